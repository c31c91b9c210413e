"""The hub's local cache: names and folders of it are found, and nothing is downloaded."""

import os
from pathlib import Path

import pytest

from arriero.errors import CheckpointError
from arriero.files.hub_cache import cache_folder, find_checkpoint


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with two snapshots of me/x."""
    folder = tmp_path / "home" / "hub" / "models--me--x"
    for revision in ("aaa", "bbb"):
        (folder / "snapshots" / revision).mkdir(parents=True)
        (folder / "snapshots" / revision / "config.json").write_text("{}")
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("bbb\n")
    for name in ("HF_HUB_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return folder


def test_a_name_and_the_caches_folder_are_the_snapshot_of_main(cache: Path) -> None:
    assert find_checkpoint("me/x") == find_checkpoint(cache) == cache / "snapshots" / "bbb"
    assert find_checkpoint(cache / "snapshots" / "aaa") == cache / "snapshots" / "aaa"


def test_a_folder_here_goes_before_a_name_in_the_cache(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "me" / "x").mkdir(parents=True)
    assert find_checkpoint("me/x") == Path("me/x")


def test_what_is_not_there_says_how_to_get_it(cache: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nothing is downloaded: get it with `hf download you/y`"):
        find_checkpoint("you/y")
    (cache / "refs" / "main").write_text("ccc")
    with pytest.raises(CheckpointError, match=r"refs/main names ccc, .* `hf download me/x`"):
        find_checkpoint("me/x")
    (cache / "refs" / "main").unlink()
    with pytest.raises(CheckpointError, match="2 snapshots and no refs/main: give one"):
        find_checkpoint(cache)


def test_the_cache_lies_where_the_hub_s_library_puts_it(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache_folder() == cache.parent
    monkeypatch.delenv("HF_HOME")
    assert cache_folder() == Path("~/.cache/huggingface/hub").expanduser()
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert cache_folder() == Path("/cache/huggingface/hub")
    monkeypatch.setenv("HF_HUB_CACHE", "/somewhere")
    assert cache_folder() == Path("/somewhere")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes that are files")
def test_a_ref_that_is_no_file_is_refused(cache: Path) -> None:
    main = cache / "refs" / "main"
    main.unlink()
    os.mkfifo(main)
    with pytest.raises(CheckpointError, match=r"main: cannot be read \(a pipe, expected a regular file\): get it with"):
        find_checkpoint("me/x")
    main.unlink()
    main.symlink_to("/dev/zero")
    with pytest.raises(CheckpointError, match="main is a link out of its folder, to /dev/zero"):
        find_checkpoint("me/x")
