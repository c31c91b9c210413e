import subprocess
import sys
from pathlib import Path

import pytest

from arriero.errors import FolderError
from arriero.files.folders import SPEC, read_spec
from arriero.files.output import copy_sparse, new_folder, remove_leftovers


def test_a_folder_appears_only_when_it_is_complete(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with new_folder(out) as folder:
        (folder / "a").write_text("x")
        assert not out.exists()
    assert (out / "a").read_text() == "x"
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> None:
        with new_folder(tmp_path / "out") as folder:
            (folder / "a").write_text("x")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert not list(tmp_path.iterdir())


def test_force_replaces_only_what_is_arrieros(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("precious")
    with pytest.raises(FolderError, match="no folder of Arriero's"), new_folder(out, force=True):
        pass
    (out / SPEC).write_text("{}")
    with pytest.raises(FolderError, match="--force to replace"), new_folder(out):
        pass
    with new_folder(out, force=True) as folder:
        (folder / "new").write_text("x")
    assert [path.name for path in out.iterdir()] == ["new"]


def test_what_appears_while_writing_is_kept(tmp_path: Path) -> None:
    out = tmp_path / "out"

    def write() -> None:
        with new_folder(out):
            out.mkdir()
            (out / "thesis.txt").write_text("precious")

    with pytest.raises(FolderError, match="exists"):
        write()
    assert (out / "thesis.txt").read_text() == "precious"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_symlink_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with (
        pytest.raises(FolderError, match="is a symlink, which is not replaced"),
        new_folder(tmp_path / "link", force=True),
    ):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "real"]


def test_a_folder_set_aside_by_a_killed_writer_comes_back(tmp_path: Path) -> None:
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    aside = tmp_path / f".out.{dead.stdout.strip()}.replaced"
    aside.mkdir()
    (aside / SPEC).write_text("{}")
    other = tmp_path / f".out.{dead.stdout.strip()}.5.x.partial"  # of an output named out.<number>
    other.mkdir()
    remove_leftovers(tmp_path / "out")
    assert (tmp_path / "out" / SPEC).exists()
    assert other.exists()


def test_what_killed_writers_left_is_removed(tmp_path: Path) -> None:
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    leftover = tmp_path / f".out.{dead.stdout.strip()}.x.partial"
    alive = tmp_path / ".out.1.x.partial"
    leftover.mkdir()
    alive.mkdir()
    remove_leftovers(tmp_path / "out")
    assert not leftover.exists()
    assert alive.exists()


def test_a_full_disk_is_one_clear_line(tmp_path: Path) -> None:
    code = (
        "import resource, signal, sys\n"
        "from pathlib import Path\n"
        "from arriero.files.output import new_folder\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "with new_folder(Path(sys.argv[1])) as folder:\n"
        "    (folder / 'big').write_bytes(bytes(5000))\n"
    )
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path / "out")], capture_output=True, text=True)
    assert "writing failed (File too large)" in run.stderr
    assert not list(tmp_path.iterdir())


def test_a_sparse_copy_keeps_data_and_holes(tmp_path: Path) -> None:
    source, target = tmp_path / "a", tmp_path / "b"
    with source.open("wb") as file:
        file.write(b"head")
        file.seek(50_000_000)
        file.write(b"middle")
        file.truncate(100_000_000)
    copy_sparse(source, target)
    assert target.stat().st_size == 100_000_000
    assert target.stat().st_blocks * 512 < 1_000_000
    with target.open("rb") as file:
        assert file.read(4) == b"head"
        file.seek(50_000_000)
        assert file.read(6) == b"middle"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "damaged"),
        ("[]", "damaged"),
        ('{"schema": 99}', "schema 99"),
        ('{"schema": 1, "kind": "model"}', "damaged"),
        ('{"schema": 2, "kind": "model"}', "damaged"),
        (" " * 9_000_000 + "{}", "9000002 bytes, expected at most 8388608: write the folder again"),
    ],
)
def test_a_damaged_or_newer_spec_is_refused(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / SPEC).write_text(text)
    with pytest.raises(FolderError, match=said):
        read_spec(tmp_path)


def test_a_folder_of_another_kind_is_named(tmp_path: Path) -> None:
    with pytest.raises(FolderError, match=r"holds no spec\.json"):
        read_spec(tmp_path)
    with pytest.raises(FolderError, match="is no folder"):
        read_spec(tmp_path / "missing")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FolderError, match="is a checkpoint: make a model of it"):
        read_spec(tmp_path)
