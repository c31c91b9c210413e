"""Folders as a stage writes them: complete, or not there.

A folder is written as a hidden sibling and renamed when whole, so that a full disk, an error or a kill leaves nothing
under the final name, and an output that is replaced stays until the new one is ready.
"""

import contextlib
import errno
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ..errors import ArrieroError, FolderError
from .disks import full_disk
from .folders import SPEC
from .locks import is_alive, lock_file
from .reading import read_text


@contextlib.contextmanager
def new_folder(out: Path, *, force: bool = False, mark: str = SPEC) -> Iterator[Path]:
    """Yields an empty temporary folder that becomes `out` when the block ends without an error.

    Args:
        out: Final path. Its parent is created where missing.
        force: Whether an existing folder of Arriero's at `out` is replaced.
        mark: The file that tells such a folder from others.

    Raises:
        FolderError: `out` exists and may not be replaced, or it cannot be written.
    """
    out = out.absolute()
    check_free(out, force=force, mark=mark)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(out)
        temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.{os.getpid()}.", suffix=".partial", dir=out.parent))
    except OSError as error:
        raise FolderError(f"{out}: cannot be created ({reason(error, out.parent)}): choose another output") from error
    try:
        yield temporary
        temporary.chmod(0o777 & ~_umask())
        check_free(out, force=force, mark=mark)  # again: someone may have written there meanwhile
        replace_folder(temporary, out)
    except OSError as error:
        where = f" at {error.filename}" if error.filename else ""
        why = reason(error, out.parent)
        raise FolderError(f"{out}: writing failed ({why}){where}; nothing was changed") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def resumed_folder(
    out: Path, job: str, *, force: bool = False, kept: type[ArrieroError] | tuple[()] = ()
) -> Iterator[tuple[Path, Path]]:
    """Yields a folder that becomes `out`, and a scratch folder beside it; both outlive a kill.

    The next writer of the same output and the same job finds them as they were left. One with another job, or one
    after an error of Arriero's own, begins anew.

    Args:
        out: Final path.
        job: Fingerprint that tells this work from other work.
        force: Whether an existing folder of Arriero's at `out` is replaced.
        kept: An error of Arriero's own that they outlive too.

    Raises:
        FolderError: `out` exists and may not be replaced, cannot be written, or is being written by another process.
    """
    out = out.absolute()
    check_free(out, force=force)
    work = resumable(out)
    model, scratch = work / "folder", work / "scratch"
    _check_left(work)
    try:
        work.mkdir(parents=True, exist_ok=True)
        lock = (work / "lock").open("w")
        lock_file(lock)
    except BlockingIOError as error:
        raise FolderError(
            f"{out} is being written by another process: wait for it, or choose another output"
        ) from error
    except OSError as error:
        raise FolderError(f"{out}: cannot be created ({reason(error, out.parent)}): choose another output") from error
    with lock:
        try:
            if _job_in(work) != job:
                for each in (model, scratch):
                    shutil.rmtree(each, ignore_errors=True)
                (work / "job").write_text(job)
            model.mkdir(exist_ok=True)
            scratch.mkdir(exist_ok=True)
            yield model, scratch
            check_free(out, force=force)
            replace_folder(model, out)
        except OSError as error:
            where = f" at {error.filename}" if error.filename else ""
            why = reason(error, out.parent)
            raise FolderError(f"{out}: writing failed ({why}){where}; run it again to go on from there") from error
        except ArrieroError as error:
            if not isinstance(error, kept):
                shutil.rmtree(work, ignore_errors=True)
            raise
        shutil.rmtree(work, ignore_errors=True)


def _check_left(work: Path) -> None:
    """Refuses what no run leaves in the folder that outlives it: links lead its writes elsewhere, pipes hold it up.

    Raises:
        FolderError: It is or holds something else than folders and files.
    """
    if not os.path.lexists(work):
        return
    for path in (work, *(Path(place) / name for place, *names in os.walk(work) for name in (*names[0], *names[1]))):
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            kind = "a link" if path.is_symlink() else "a pipe, socket or device"
            raise FolderError(f"{path} is {kind}, which no run leaves there: remove {work}, and run it again")


def _job_in(work: Path) -> str:
    """The fingerprint of the work that a folder was left by; empty where there is none."""
    try:
        return read_text(work / "job", remedy=f"remove {work}", folder=work)
    except FileNotFoundError:
        return ""


def resumable(out: Path) -> Path:
    """The folder beside an output that outlives a kill."""
    return out.absolute().with_name(f".{out.name}.resumable")


def reason(error: OSError, *places: Path) -> str:
    """The system's words for an error; of a full disk, which one and what is free there."""
    return full_disk(error, *places) or error.strerror or str(error)


def check_free(out: Path, *, force: bool, mark: str = SPEC) -> None:
    """Refuses an output that exists, unless `force` allows to replace it and it is one of Arriero's or empty.

    Raises:
        FolderError: It may not be replaced, or nothing can be written where it is to be.
    """
    if (why := unwritable(out.absolute().parent)) is not None:
        raise FolderError(f"{out}: cannot be created ({why}): choose another output")
    if not os.path.lexists(out):
        return
    if out.is_symlink():
        raise FolderError(f"{out} is a symlink, which is not replaced: remove it, or give the folder it points to")
    if os.path.ismount(out):
        raise FolderError(f"{out} is a mount point, which is not replaced: choose an output in it")
    if not out.is_dir() or (any(out.iterdir()) and not (out / mark).exists()):
        raise FolderError(f"{out} exists and is no folder of Arriero's: it is not replaced, choose another output")
    if not force:
        raise FolderError(f"{out} exists: choose another output, or --force to replace it")


def unwritable(folder: Path) -> str | None:
    """The system's words for why nothing can be made in a folder, or in the nearest one that exists; None where it can.

    What takes long is not begun for an output that cannot be written. Nothing is made to find out.
    """
    while not os.path.lexists(folder) and folder != folder.parent:
        folder = folder.parent
    if not folder.is_dir():
        return os.strerror(errno.ENOTDIR)
    if os.access(folder, os.W_OK | os.X_OK):
        return None
    is_mounted_so = hasattr(os, "statvfs") and os.statvfs(folder).f_flag & os.ST_RDONLY
    return os.strerror(errno.EROFS if is_mounted_so else errno.EACCES)


def replace_folder(new: Path, out: Path) -> None:
    """Renames `new` to `out`; what was there is set aside first and goes when the new one stands."""
    if not os.path.lexists(out):
        new.rename(out)
        return
    old = out.with_name(f".{out.name}.{os.getpid()}.replaced")
    out.rename(old)
    try:
        new.rename(out)
    except BaseException:
        old.rename(out)
        raise
    remove_folder(old)


def remove_folder(folder: Path) -> None:
    """Removes a folder, one that its owner may not write to as well."""
    shutil.rmtree(folder, ignore_errors=True)
    if folder.is_dir() and not folder.is_symlink():
        with contextlib.suppress(OSError):
            for path, _, _ in os.walk(folder):
                Path(path).chmod(0o700)
        shutil.rmtree(folder, ignore_errors=True)


def remove_leftovers(out: Path) -> None:
    """Removes the temporary siblings that killed writers left, and puts back what one of them had set aside."""
    for leftover in out.parent.iterdir():
        match = re.fullmatch(rf"\.{re.escape(out.name)}\.(\d+)\.(\w+\.partial|replaced)", leftover.name)
        if match is None or is_alive(int(match[1])):
            continue
        if match[2] == "replaced" and not os.path.lexists(out):
            leftover.rename(out)
        else:
            remove_folder(leftover)


def check_apart(source: Path, out: Path) -> None:
    """Refuses an output that is its own source, lies in it, or holds it.

    Raises:
        FolderError: Writing `out` would change or remove `source`.
    """
    source, out = source.resolve(), out.resolve()
    if source == out or source in out.parents or out in source.parents:
        raise FolderError(f"{out} and {source} lie in one another: choose an output beside the input")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def copy_sparse(source: Path, target: Path) -> None:
    """Copies a file's data and keeps its holes, so that a sparse file stays as small as it is; whole but on Linux."""
    if sys.platform != "linux":  # others have no such calls, or ones for sockets alone
        shutil.copyfile(source, target)
        return
    with source.open("rb") as reader, target.open("xb") as writer:
        size = os.fstat(reader.fileno()).st_size
        os.truncate(writer.fileno(), size)
        position = 0
        while position < size:
            try:
                position = os.lseek(reader.fileno(), position, os.SEEK_DATA)
            except OSError as error:
                if error.errno == errno.ENXIO:
                    break  # nothing but a hole up to the end
                raise
            end = os.lseek(reader.fileno(), position, os.SEEK_HOLE)
            os.lseek(writer.fileno(), position, os.SEEK_SET)
            while position < end:
                moved = os.sendfile(writer.fileno(), reader.fileno(), position, min(end - position, 1 << 30))
                if not moved:
                    raise ArrieroError(f"{source}: shrank while it was copied: copy again")
                position += moved
