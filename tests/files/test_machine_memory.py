"""Memory that a process can have, by the machine and by control groups of both versions."""

from pathlib import Path

import pytest

from arriero.files import control_groups, machine_memory
from arriero.files.machine_memory import UNKNOWN, find_room

GB = 1 << 30


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A made-up machine of 64 GiB, 48 of them free."""
    monkeypatch.setattr(control_groups, "GROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(control_groups, "OWN_GROUPS", tmp_path / "own")
    monkeypatch.setattr(machine_memory, "MEMORY", tmp_path / "meminfo")
    monkeypatch.setattr(machine_memory, "OWN_STATUS", tmp_path / "status")
    (tmp_path / "meminfo").write_text(f"MemTotal: {64 << 20} kB\nMemFree: 5 kB\nMemAvailable:   {48 << 20} kB\n")
    return tmp_path


def write(root: Path, own: str, files: dict[str, str]) -> None:
    (root / "own").write_text(own)
    for name, text in files.items():
        path = root / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.mark.parametrize(
    ("own", "files", "free", "limit"),
    [
        ("", {}, 48, 64),
        ("0::/\n", {"memory.max": "max\n"}, 48, 64),
        ("0::/\n", {"memory.max": f"{8 * GB}\n", "memory.stat": f"anon {3 * GB}\nfile {4 * GB}\n"}, 5, 8),
        ("0::/a/b\n", {"a/memory.max": f"{4 * GB}\n", "a/b/memory.max": f"{8 * GB}\n"}, 4, 4),
        ("0::/\n", {"memory.max": f"{2 * GB}\n", "memory.stat": f"anon {3 * GB}\n"}, 0, 2),
        ("0::/\n", {"memory.max": "nonsense"}, 48, 64),
        (
            "4:memory:/docker/x\n",
            {"memory/memory.limit_in_bytes": f"{6 * GB}\n", "memory/memory.stat": f"total_rss {GB}\n"},
            5,
            6,
        ),
        ("4:memory:/x\n", {"memory/x/memory.limit_in_bytes": "9223372036854771712\n"}, 48, 64),
    ],
)
def test_the_tightest_limit_counts(system: Path, own: str, files: dict[str, str], free: int, limit: int) -> None:
    write(system, own, files)
    room = find_room()
    assert (room.free, room.limit) == (free * GB, limit * GB)
    assert ("container" in room.holder) == (limit < 64)


def test_where_nothing_is_known_nothing_is_limited(system: Path) -> None:
    (system / "meminfo").unlink()
    assert find_room().free == UNKNOWN
