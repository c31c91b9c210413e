"""Processors within the quotas of control groups, of both versions and of nested ones."""

from collections.abc import Iterable
from pathlib import Path

import pytest

from arriero.files import control_groups
from arriero.files import processors as module


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The mount of a made-up system's control groups, on a machine of 64 processors."""
    monkeypatch.setattr(control_groups, "GROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(control_groups, "OWN_GROUPS", tmp_path / "own")
    monkeypatch.setattr(module.os, "sched_getaffinity", lambda _: set(range(64)))
    return tmp_path


def write(root: Path, own: str, files: dict[str, str]) -> None:
    (root / "own").write_text(own)
    for name, text in files.items():
        path = root / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.mark.parametrize(
    ("own", "files", "expected"),
    [
        ("0::/\n", {"cpu.max": "200000 100000\n"}, 2),
        ("0::/\n", {"cpu.max": "max 100000\n"}, 64),
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 2),
        ("0::/\n", {"cpu.max": "50000 100000\n"}, 1),
        ("0::/\n", {"cpu.max": "100500 100000\n"}, 1),
        ("0::/\n", {"cpu.max": "9900000 100000\n"}, 64),
        ("0::/\n", {"cpu.max": ""}, 64),
        ("0::/\n", {"cpu.max": "nonsense\n"}, 64),
        ("0::/\n", {"cpu.max": "100000 0\n"}, 64),
        ("0::/\n", {"cpu.max": "300000"}, 64),
        (
            "0::/a/b/c\n",
            {"a/b/c/cpu.max": "max 100000", "a/b/cpu.max": "800000 100000", "a/cpu.max": "300000 100000"},
            3,
        ),
        ("0::/a/b\n", {"a/b/cpu.max": "100000 50000", "a/cpu.max": "max 100000"}, 2),
        ("0::/docker/hidden\n", {"cpu.max": "400000 100000"}, 4),
        ("0::/../../other\n", {"cpu.max": "400000 100000"}, 4),
        (
            "4:cpu,cpuacct:/x\n0::/\n",
            {"cpu,cpuacct/x/cpu.cfs_quota_us": "250000", "cpu,cpuacct/x/cpu.cfs_period_us": "100000"},
            3,
        ),
        ("4:cpu,cpuacct:/x\n", {"cpu/x/cpu.cfs_quota_us": "-1", "cpu/x/cpu.cfs_period_us": "100000"}, 64),
        (
            "4:cpuacct,cpu:/x\n",
            {
                "cpu/x/cpu.cfs_quota_us": "-1",
                "cpu/x/cpu.cfs_period_us": "100000",
                "cpu/cpu.cfs_quota_us": "500000",
                "cpu/cpu.cfs_period_us": "100000",
            },
            5,
        ),
        ("4:cpu:/outside\n", {"cpu/cpu.cfs_quota_us": "200000", "cpu/cpu.cfs_period_us": "100000"}, 2),
        ("4:cpuset:/x\n", {"cpuset/x/cpu.cfs_quota_us": "1000", "cpuset/x/cpu.cfs_period_us": "100000"}, 64),
        ("", {}, 64),
    ],
)
def test_the_smallest_quota_on_the_way_up_holds(groups: Path, own: str, files: dict[str, str], expected: int) -> None:
    write(groups, own, files)
    assert module.processors() == expected


def test_without_groups_the_affinity_holds(groups: Path) -> None:
    assert module.processors() == 64


def test_systems_without_affinity_count_all(groups: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(module.os, "sched_getaffinity")
    monkeypatch.setattr(module.os, "cpu_count", lambda: 6)
    assert module.processors() == 6


def test_pytorch_and_onnx_runtime_take_no_more(groups: Path) -> None:
    import torch

    from arriero.walk.numbers import fit_threads

    write(groups, "0::/\n", {"cpu.max": "100000 100000"})
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        fit_threads()
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_nothing_else_counts_processors() -> None:
    root = Path(module.__file__).parent.parent
    rooms = [path.parent for path in root.glob("*/__init__.py") if path.parent.name != "tests"]
    for path in (path for room in rooms for path in room.rglob("*.py")):
        if path != Path(module.__file__):
            assert "sched_getaffinity" not in path.read_text("utf-8"), path


@pytest.mark.parametrize(
    ("allowed", "nodes", "parts", "expected"),
    [
        (range(8), {"node0": "0-3", "node1": "4-7"}, 2, [[0, 1, 2, 3], [4, 5, 6, 7]]),
        (range(8), {"node0": "0,2,4,6", "node1": "1,3,5,7"}, 4, [[0, 2], [4, 6], [1, 3], [5, 7]]),
        ((1, 2, 6), {"node0": "0-3", "node1": "4-7"}, 2, [[1, 2], [6]]),  # of what is allowed
        (range(6), {"node0": "0-5"}, 2, [[0, 1, 2], [3, 4, 5]]),
        (range(6), {"node0": "0-2", "node1": "3-5"}, 3, [[0, 1], [2, 3], [4, 5]]),  # no three of two nodes
        (range(3), {}, 2, [[0], [1, 2]]),  # a system that does not tell
        (range(1), {"node0": "0"}, 2, None),
    ],
)
def test_ranks_share_processors_by_memory_nodes(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    allowed: Iterable[int],
    nodes: dict[str, str],
    parts: int,
    expected: list[list[int]] | None,
) -> None:
    monkeypatch.setattr(module.os, "sched_getaffinity", lambda _: set(allowed))
    for name, processors in nodes.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "cpulist").write_text(f"{processors}\n")
    assert module.share_processors(parts, tmp_path) == expected
