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


UNPRIVILEGED = """
import ctypes, os, sys
from pathlib import Path

if os.geteuid() == 0 and "AGAIN" not in os.environ:
    for capability in (1, 2):  # those by which root writes where nobody may, which what it runs next has no more
        ctypes.CDLL(None).prctl(24, capability)
    os.environ["AGAIN"] = "1"
    os.execv(sys.executable, sys.orig_argv)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Linux's capabilities")
def test_an_output_in_a_folder_that_is_only_read_is_refused_before_any_work(tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir()
    (locked / "runs.jsonl").write_text("")
    (locked / "runs.jsonl").chmod(0o444)
    locked.chmod(0o555)
    checks = """
from arriero.accuracy.golden import check_replaceable
from arriero.errors import ArrieroError
from arriero.files.output import check_free
from arriero.files.single import check_writable
from arriero.pages.history import check_appendable

locked = Path(sys.argv[1])
for check in (
    lambda: check_free(locked / "a" / "bundle", force=False),
    lambda: check_writable(locked / "page.html", force=False, start=b""),
    lambda: check_replaceable(locked / "golden.safetensors", force=False),
    lambda: check_appendable(locked / "runs.jsonl"),
    lambda: check_appendable(locked / "more.jsonl"),
    lambda: check_free(locked / "runs.jsonl" / "bundle", force=False),
):
    try:
        check()
    except ArrieroError as error:
        print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", UNPRIVILEGED + checks, str(locked)], capture_output=True, text=True, check=True
    )
    locked.chmod(0o755)
    assert done.stdout.replace(str(locked), "…").splitlines() == [
        "…/a/bundle: cannot be created (Permission denied): choose another output",
        "…/page.html: writing failed (Permission denied): choose another output",
        "…/golden.safetensors: cannot be written (Permission denied): choose another output",
        "…/runs.jsonl: Permission denied: give another file with --history",
        "…/more.jsonl: Permission denied: give another file with --history",
        "…/runs.jsonl/bundle: cannot be created (Not a directory): choose another output",
    ]


@pytest.mark.skipif(sys.platform != "linux", reason="Linux's capabilities")
def test_a_folder_that_is_only_read_leaves_nothing_when_it_is_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "inner").mkdir(parents=True)
    for name in (SPEC, "inner/weights"):
        (out / name).write_text("{}")
    for folder in (out / "inner", out):
        folder.chmod(0o555)
    replace = """
from arriero.files.output import new_folder
with new_folder(Path(sys.argv[1]), force=True) as folder:
    (folder / "spec.json").write_text("new")
"""
    subprocess.run([sys.executable, "-c", UNPRIVILEGED + replace, str(out)], check=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (out / SPEC).read_text() == "new"
