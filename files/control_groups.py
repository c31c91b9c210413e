"""Control groups that this process lies in, of version 2 and of version 1, from its own up to the root.

A container sees its own group as the mount's root; each group on the way up may hold a limit, and the smallest holds.
"""

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from .reading import open_regular

GROUPS = Path("/sys/fs/cgroup")
"""The place where control groups are mounted."""

OWN_GROUPS = Path("/proc/self/cgroup")
"""The file that names this process's groups."""


def unified_groups() -> Iterator[Path]:
    """Folders of version 2's groups."""
    for number, controllers, path in _own():
        if number == "0" and not controllers:
            for mount in (GROUPS, GROUPS / "unified"):
                yield from _up(mount, path)


def legacy_groups(controller: str) -> Iterator[Path]:
    """Folders of version 1's groups of a controller, as of `cpu` or `memory`."""
    for _, controllers, path in _own():
        if controller in controllers.split(","):
            for mount in sorted({GROUPS / controllers, GROUPS / controller, GROUPS / "cpu,cpuacct"}):
                yield from _up(mount, path)


def words(file: Path) -> list[str]:
    """The words of a group's file; none where it cannot be read."""
    try:
        with open_regular(file) as opened:
            return opened.read(1 << 20).decode("utf-8").split()
    except (OSError, ValueError):
        return []


def number(file: Path) -> int | None:
    """The one number of a group's file; None where there is none, as of `max`."""
    found = words(file)
    return int(found[0]) if len(found) == 1 and found[0].isdecimal() else None


def _own() -> Iterator[tuple[str, str, str]]:
    """Number, controllers and path of each group."""
    try:
        lines = OWN_GROUPS.read_text("utf-8").splitlines()
    except (OSError, ValueError):
        return
    for line in lines:
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        yield number, controllers, path


def _up(mount: Path, path: str) -> Iterator[Path]:
    """A group and all around it."""
    parts = [part for part in PurePosixPath(path).parts if part not in ("/", "..")]
    for length in range(len(parts), -1, -1):
        yield mount.joinpath(*parts[:length])
