"""Small files: one reader, which opens nothing that could hang, and reads nothing without a bound."""

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from arriero.errors import CheckpointError, FolderError
from arriero.files.folders import LONGEST_SPEC, SPEC, carry_files, read_json, read_spec
from arriero.files.reading import SMALL, open_regular
from arriero.files.safetensors import open_shard
from arriero.runtime.text import Text
from arriero.spec.json_text import DEEPEST, parse_json


def pipe(path: Path) -> None:
    os.mkfifo(path)


def zeros(path: Path) -> None:
    path.symlink_to("/dev/zero")


def bound(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(path))


def large(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(SMALL + 1)


def folder(path: Path) -> None:
    path.mkdir()


NO_FILES: list[tuple[Callable[[Path], None], str]] = [
    (pipe, r"cannot be read \(a pipe, expected a regular file\)"),
    (folder, r"cannot be read \(a folder, expected a regular file\)"),
    (bound, r"cannot be read \(a socket, expected a regular file\)"),
    (zeros, "is a link out of its folder, to /dev/zero: put the file itself there"),
    (large, f"{SMALL + 1} bytes, expected at most ({SMALL}|{LONGEST_SPEC})"),
    (lambda path: path.symlink_to("nowhere"), "a link to a file that is missing"),
    (lambda path: path.symlink_to(path.name), "cannot be read"),
]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes that are files")
@pytest.mark.parametrize(("make", "said"), NO_FILES)
def test_what_is_no_file_of_a_sane_size_is_refused(
    tmp_path: Path, make: Callable[[Path], None], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # a socket's path must be short
    for name in (SPEC, "generation_config.json", "tokenizer.json"):
        make(tmp_path / name)
    with pytest.raises(FolderError, match=said):
        read_spec(tmp_path)
    with pytest.raises(FolderError, match=said):
        read_json(tmp_path / "generation_config.json")
    with pytest.raises(FolderError, match=said):
        Text(tmp_path)
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match=said):
        carry_files(tmp_path, tmp_path / "out")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes that are files")
def test_a_weight_file_that_is_a_pipe_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match="a pipe, expected a regular file: restore the file"):
        open_shard(tmp_path / "w.safetensors")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"a": "\xff"}', r"cannot be read \(no UTF-8 text, byte 7 is 0xff\): export again"),
        ("{}".encode("utf-16"), r"cannot be read \(no UTF-8 text"),
        (b"[" * 100_000, "damaged, not JSON .nested too deeply"),
        (b'{"a":' * (DEEPEST + 1) + b"1" + b"}" * (DEEPEST + 1), f"nested more than {DEEPEST} deep"),
        (b'{"a": %s}' % (b"9" * 5000), "damaged, not JSON .a number of 5000 digits"),
        (b"[1]", "not a JSON object"),
        (b'{"a": "\\ud800"}', "damaged, not JSON .a text with half a character"),
    ],
)
def test_text_that_is_none_or_nested_without_end_is_refused(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "generation_config.json").write_bytes(content)
    with pytest.raises(FolderError, match=said):
        read_json(tmp_path / "generation_config.json")


def test_a_byte_order_mark_before_json_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_bytes(b'\xef\xbb\xbf{"top_k": 3}')
    assert read_json(tmp_path / "generation_config.json") == {"top_k": 3}


def test_numbers_of_tokenizers_configs_are_read() -> None:
    assert parse_json('{"model_max_length": 1000000000000000019884624838656}')["model_max_length"] > 10**30


def test_a_link_out_of_a_folder_is_not_carried(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("{}")
    source, target = tmp_path / "source", tmp_path / "target"
    for each in (source, target, source / "additional_chat_templates"):
        each.mkdir()
    for name in ("tokenizer_config.json", "additional_chat_templates/x.jinja"):
        (source / name).symlink_to(tmp_path / "secret")
        with pytest.raises(CheckpointError, match=r"is a link out of its folder, to .*secret: put"):
            carry_files(source, target)
        (source / name).unlink()
    (source / "real.json").write_text('{"a": 1}')
    (source / "tokenizer_config.json").symlink_to("real.json")
    carry_files(source, target)
    assert (target / "tokenizer_config.json").read_text() == '{"a": 1}'
    assert not (target / "tokenizer_config.json").is_symlink()


def test_a_hubs_links_to_its_blobs_are_carried(tmp_path: Path) -> None:
    repository = tmp_path / "hub" / "models--a--b"
    snapshot, blob = repository / "snapshots" / "abc", repository / "blobs" / ("a1" * 20)
    mine, target = tmp_path / "mine", tmp_path / "target"
    for each in (snapshot, blob.parent, mine, target):
        each.mkdir(parents=True)
    blob.write_text('{"a": 1}')
    (snapshot / "tokenizer_config.json").symlink_to(f"../../blobs/{blob.name}")
    (mine / "tokenizer_config.json").symlink_to(snapshot / "tokenizer_config.json")
    for source in (snapshot, mine):
        carry_files(source, target)
        assert (target / "tokenizer_config.json").read_text() == '{"a": 1}'
        (target / "tokenizer_config.json").unlink()
    (snapshot / "generation_config.json").symlink_to("/etc/hostname")
    with pytest.raises(CheckpointError, match="is a link out of its folder"):
        carry_files(snapshot, target)


def test_a_file_of_the_systems_that_waits_ends_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = os.pipe()  # stands for /proc/kmsg, a regular file that waits for more
    os.set_blocking(first, False)
    os.write(second, b"so far")
    (tmp_path / "log").touch()
    monkeypatch.setattr("arriero.files.reading._check_regular", lambda mode, path: None)
    monkeypatch.setattr("arriero.files.reading.os.open", lambda path, flags: first)
    with open_regular(tmp_path / "log") as file:
        assert (file.read(100), file.read(100), file.read()) == (b"so far", b"", b"")
    os.close(second)
