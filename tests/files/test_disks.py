"""Which disk is full, and room taken before use."""

import errno
import os
import tempfile
from pathlib import Path

import pytest

from arriero.cli.terminal import one_line
from arriero.errors import FolderError
from arriero.files.disks import full_disk, take_room
from arriero.files.output import new_folder, resumed_folder

FULL = "No space left on device"


def mount_of(path: Path) -> Path:
    return next(folder for folder in (path.resolve(), *path.resolve().parents) if os.path.ismount(folder))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_the_path_of_the_error_decides(tmp_path: Path, number: int) -> None:
    error = OSError(number, FULL, str(tmp_path / "not" / "there"))
    said = full_disk(error, Path("/proc"))
    assert said is not None
    assert f"{mount_of(tmp_path)} has " in said
    assert "MB free: make room there" in said


def test_the_fullest_disk_is_taken_where_no_path_is_named(tmp_path: Path) -> None:
    full = Path("/proc")  # a file system with nothing free
    said = full_disk(OSError(errno.ENOSPC, FULL), tmp_path, full)
    assert said is not None
    assert "/proc has 0.0 MB free" in said


def test_the_temporary_folder_has_its_own_remedy() -> None:
    said = full_disk(OSError(errno.ENOSPC, FULL, os.path.join(tempfile.gettempdir(), "x")))
    assert said is not None
    assert "set TMPDIR to a folder on another disk" in said


def test_other_errors_are_none_of_it() -> None:
    assert full_disk(OSError(errno.EACCES, "Permission denied", "/x")) is None
    assert full_disk(ValueError("No space left")) is None


def test_outputs_name_the_disk(tmp_path: Path) -> None:
    for open_folder in (new_folder(tmp_path / "a"), resumed_folder(tmp_path / "b", "job")):
        with (
            pytest.raises(FolderError, match=rf"writing failed \(the disk is full: {mount_of(tmp_path)} has "),
            open_folder,
        ):
            raise OSError(errno.ENOSPC, FULL, str(tmp_path / "file"))


def test_the_command_line_names_the_disk(tmp_path: Path) -> None:
    line = one_line(OSError(errno.ENOSPC, FULL, str(tmp_path)), "")
    assert line.startswith(f"the disk is full: {mount_of(tmp_path)} has ")


@pytest.mark.parametrize("has_fallocate", [True, False])
def test_room_is_taken_before_it_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_fallocate: bool) -> None:
    if not has_fallocate:
        monkeypatch.delattr(os, "posix_fallocate")
    for size in (0, 5, (1 << 20) + 1):
        take_room(tmp_path / "x", size)
        assert (tmp_path / "x").read_bytes() == bytes(size)


def test_room_that_there_is_not_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: int) -> None:
        raise OSError(errno.ENOSPC, FULL)

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with pytest.raises(OSError, match=FULL) as caught:
        take_room(tmp_path / "x", 9)
    assert caught.value.filename == str(tmp_path / "x")
    assert not (tmp_path / "x").exists()
