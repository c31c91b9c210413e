"""Processors that this process may use: its affinity, and the quotas of the control groups that it lies in.

A container with `--cpus=2` on a machine of 64 sees all of them, and 64 threads wait for each other while its
quota is used up.
"""

import math
import os
from pathlib import Path

from .control_groups import legacy_groups, unified_groups, words

NODES = Path("/sys/devices/system/node")
"""The place where Linux describes the memory nodes."""


def processors() -> int:
    """The number of processors that this process may use, a quota rounded up; 1 at least."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = processor_quota()
    return count if quota is None else max(1, min(count, math.ceil(quota - 0.01)))


def share_processors(parts: int, nodes: Path = NODES) -> list[list[int]] | None:
    """Divides the processors that this process may use into parts, none of which reaches over two memory nodes.

    Args:
        parts: Number of parts, all of one size where the numbers divide.
        nodes: The place where the system describes its memory nodes.

    Returns:
        The processors of each part; None where there are fewer than parts, or the system does not tell.
    """
    if not hasattr(os, "sched_getaffinity"):
        return None
    allowed = os.sched_getaffinity(0)
    if len(allowed) < parts:
        return None
    found = [sorted(allowed & of_node) for of_node in _memory_nodes(nodes)]
    rest = sorted(allowed.difference(*found))
    groups = [group for group in (*found, rest) if group]
    if parts % len(groups) or any(len(group) < parts // len(groups) for group in groups):
        groups = [[each for group in groups for each in group]]  # node by node, in one line
    each = parts // len(groups)
    return [group[len(group) * i // each : len(group) * (i + 1) // each] for group in groups for i in range(each)]


def _memory_nodes(folder: Path) -> list[set[int]]:
    """The processors of each memory node, as in `0-3,8-11`."""
    found = []
    for path in sorted(folder.glob("node[0-9]*"), key=lambda path: int(path.name.removeprefix("node"))):
        of_node: set[int] = set()
        for word in (listed := words(path / "cpulist")) and listed[0].split(","):
            first, _, last = word.partition("-")
            if first.isdecimal():
                of_node |= set(range(int(first), int(last or first) + 1))
        found.append(of_node)
    return found


def processor_quota() -> float | None:
    """The processors' time that the control groups allow, in processors; None where nothing limits it."""
    quotas = [*map(_unified_quota, unified_groups()), *map(_legacy_quota, legacy_groups("cpu"))]
    return min((quota for quota in quotas if quota is not None), default=None)


def _unified_quota(folder: Path) -> float | None:
    """A group's quota in version 2, `max 100000` or `150000 100000`."""
    found = words(folder / "cpu.max")
    return _ratio(*found[:2]) if len(found) >= 2 else None


def _legacy_quota(folder: Path) -> float | None:
    """A group's quota in version 1, -1 where there is none."""
    quota, period = words(folder / "cpu.cfs_quota_us"), words(folder / "cpu.cfs_period_us")
    return _ratio(quota[0], period[0]) if quota and period else None


def _ratio(quota: str, period: str) -> float | None:
    """A quota over its period; None where one of them is no positive number."""
    try:
        found = int(quota), int(period)
    except ValueError:  # "max"
        return None
    return found[0] / found[1] if min(found) > 0 else None
