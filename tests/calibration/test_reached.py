"""The progress of a calibration that ended early, as another program may have left it."""

import os
from pathlib import Path

import pytest

from arriero.calibration.reached import PROGRESS, kept, read_progress
from arriero.errors import FolderError
from arriero.files.output import resumable, resumed_folder

GOOD = '"tower": [], "head": null, "data": "", "shards": {}'


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{}", "tower is missing"),
        (f'{{{GOOD}, "layers": [4]}}', r"layers\[0\] is 4, expected an object"),
        (f'{{{GOOD}, "layers": [{{}}]}}', "records"),
        ('{"tower": [], "layers": [], "head": [{"a": 1}], "data": "", "shards": {}}', r"head\[0\].name is missing"),
    ],
)
def test_progress_of_another_form_is_refused_in_a_line(text: str, said: str, tmp_path: Path) -> None:
    scratch = resumable(tmp_path / "out") / "scratch"
    scratch.mkdir(parents=True)
    (scratch / PROGRESS).write_text(text)
    with pytest.raises(FolderError, match=f"progress.json is damaged .*{said}.*: remove the folder, and run it again"):
        read_progress(scratch)
    assert kept(tmp_path / "out") == ""


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes that are files")
@pytest.mark.parametrize("name", ["job", "lock", "folder/shard", "scratch/0.f32", "scratch", ""])
@pytest.mark.parametrize("kind", ["a link", "a pipe, socket or device"])
def test_links_and_pipes_in_what_a_run_left_are_refused(name: str, kind: str, tmp_path: Path) -> None:
    """A link in the place of each file that is written would have a file elsewhere written over; a pipe waits."""
    work, elsewhere = resumable(tmp_path / "out"), tmp_path / "elsewhere"
    elsewhere.write_text("mine")
    path = work / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(elsewhere) if kind == "a link" else os.mkfifo(path)
    said = f"{path} is {kind}, which no run leaves there: remove {work}, and run it again"
    with pytest.raises(FolderError) as caught, resumed_folder(tmp_path / "out", job="x"):
        pass
    assert str(caught.value) == said
    assert elsewhere.read_text() == "mine"


def test_a_fingerprint_that_is_a_folder_is_refused(tmp_path: Path) -> None:
    (resumable(tmp_path / "out") / "job").mkdir(parents=True)
    with pytest.raises(FolderError, match=r"job: cannot be read \(a folder"), resumed_folder(tmp_path / "out", job="x"):
        pass
