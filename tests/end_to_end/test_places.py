"""Folders where people have them: in a hub's cache of symlinks, and under a path that is not UTF-8; every verb."""

import contextlib
import hashlib
import io
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import arriero
from arriero.accuracy.golden import read_golden
from arriero.cli.app import app

Lay = Callable[[Path], Path]
FEW = ("--samples", "1", "--window", "32")


def in_a_hub_cache(source: Path, room: Path) -> Path:
    """A copy of a folder or file as a hub's cache has it: each file a link to `../../blobs/<hash>`."""
    repository = room / f"models--maker--{source.name}"
    blobs, snapshot = repository / "blobs", repository / "snapshots" / "0123abcd"
    blobs.mkdir(parents=True)
    for path in [source] if source.is_file() else sorted(each for each in source.rglob("*") if each.is_file()):
        blob = blobs / hashlib.sha256(path.read_bytes()).hexdigest()
        shutil.copyfile(path, blob)
        link = snapshot / (path.name if source.is_file() else path.relative_to(source))
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return snapshot / source.name if source.is_file() else snapshot


def under_latin_1(source: Path, room: Path) -> Path:
    """A copy under a folder whose name is `café` in Latin-1, which is not UTF-8."""
    target = room / os.fsdecode(b"caf\xe9") / source.name
    try:
        target.parent.mkdir(exist_ok=True)
    except OSError:
        pytest.skip("this file system takes no name that is not UTF-8")
    return Path(shutil.copy(source, target) if source.is_file() else shutil.copytree(source, target))


@pytest.fixture(params=[in_a_hub_cache, under_latin_1], ids=lambda lay: lay.__name__)
def lay(request: pytest.FixtureRequest, tmp_path: Path) -> Lay:
    room = tmp_path / "there"
    room.mkdir()
    return lambda source: request.param(source, room)


def verb(*arguments: Any, codes: tuple[int, ...] = (0,)) -> str:
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", errors="backslashreplace") for _ in range(2))  # as streams.py's
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as end:
        app([str(each) for each in arguments], prog_name="arriero")
    written, said = (stream.buffer.getvalue().decode() for stream in (out, err) if stream.flush() is None)
    assert (end.value.code or 0) in codes, said
    assert "arriero:" not in said
    return written


def test_every_verb_takes_every_folder_wherever_it_lies(
    lay: Lay, small: Path, texts: tuple[Path, Path], tmp_path: Path
) -> None:
    data, checkpoint = lay(texts[1]), lay(small)
    verb("export", checkpoint, "-o", tmp_path / "model")
    model = lay(tmp_path / "model")
    verb("calibrate", model, "-o", tmp_path / "int8", "--recipe", "int8", "--data", data, "--floor", 0, *FEW)
    quantised = lay(tmp_path / "int8")
    verb("build", quantised, "-o", tmp_path / "bundle")
    bundle = lay(tmp_path / "bundle")
    verb("build", model, "-o", tmp_path / "plain")
    plain = lay(tmp_path / "plain")
    verb("golden", model, "--data", data, "-o", tmp_path / "golden", *FEW)
    golden = lay(tmp_path / "golden")
    assert read_golden(golden).source.isprintable()
    words = {verb("run", folder, "--prompt", "The list", "--max-new-tokens", 2) for folder in (model, plain)}
    words.add(verb("run", tmp_path / "plain", "--prompt", "The list", "--max-new-tokens", 2))
    assert len(words) == 1
    for folder in (model, quantised, bundle, plain):
        assert verb("inspect", folder)
        assert len(arriero.load(folder, max_seq=32).generate("The list", max_new_tokens=2).ids) == 2
    verb("bench", bundle, "--prefill", 4, "--batch", 1, "--decode-tokens", 1, "--runs", 1)
    judged = (0, 1, 3)  # as the little data says
    for against in (checkpoint, model):
        verb("check", plain, "--against", against, "--data", data, "--locate", *FEW, codes=judged)
    verb("check", bundle, "--against", golden, "-o", tmp_path / "report", codes=judged)
    assert (tmp_path / "report" / "report.html").read_text("utf-8")
    verb("golden", checkpoint, "--data", data, "-o", golden, "--force", *FEW)


def test_outputs_may_have_a_path_that_is_not_utf8(small: Path, texts: tuple[Path, Path], tmp_path: Path) -> None:
    out = under_latin_1(texts[1], tmp_path).parent
    verb("export", small, "-o", out / "model", "--copy-weights")
    verb("build", out / "model", "-o", out / "bundle")
    verb("golden", out / "bundle", "--data", texts[1], "-o", out / "golden", *FEW)
    verb(
        "check",
        out / "bundle",
        "--against",
        out / "golden",
        "-o",
        out / "report",
        "--history",
        out / "runs",
        codes=(0, 1, 3),
    )
    verb("trend", out / "runs", "-o", out / "trend.html")
    verb("compare", out / "report", "-o", out / "compared.html")
    for page in ("report/report.html", "trend.html", "compared.html"):
        assert (out / page).read_text("utf-8")
