"""The progress of a calibration that ended early, as another program may have left it."""

import os
from pathlib import Path

import pytest

from arriero.calibration.reached import PROGRESS, kept, read_progress
from arriero.errors import FolderError
from arriero.files.output import resumable, resumed_folder

GOOD = '"tower": [], "head": null, "data": ""'


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{}", "tower is missing"),
        (f'{{{GOOD}, "layers": [4]}}', r"layers\[0\] is 4, expected an object"),
        (f'{{{GOOD}, "layers": [{{}}]}}', "records"),
        ('{"tower": [], "layers": [], "head": [{"a": 1}], "data": ""}', "unexpected keyword argument 'a'"),
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
def test_work_whose_fingerprint_is_no_file_is_refused(tmp_path: Path) -> None:
    work = resumable(tmp_path / "out")
    (work / "folder").mkdir(parents=True)
    (work / "folder" / "old").touch()
    os.mkfifo(work / "job")
    with pytest.raises(FolderError, match=r"job: cannot be read \(a pipe"), resumed_folder(tmp_path / "out", job="x"):
        pass
