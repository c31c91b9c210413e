"""Hostile graphs of the CPU's own ops: the whole table, and random ones. Prints how many were right and refused.

    python tests/fuzz/ops.py --count 2000 --seed 0

A process a batch; one that dies or hangs is halved until its graph is named. Exits with 1 where a graph crashes, hangs
(5 s of processor time), takes 2 GB, writes beside its tensors, is answered wrongly or without having a meaning, or is
refused though it has one. `python tests/support/op_batches.py random 17 18` runs the graph of seed 17 alone.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "support"))

from hostile_calls import table
from op_batches import batch, summary

EACH = 250


def main() -> int:
    """Runs as many as asked and reports."""
    parser = argparse.ArgumentParser(description="Hostile graphs of the CPU's own ops")
    parser.add_argument("--count", type=int, default=2000, help="random graphs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--thinned", type=int, default=1, help="one in as many of the table's graphs")
    arguments = parser.parse_args()
    rows = sum(1 for _ in table(arguments.thinned))
    is_bad = False
    for kind, first, last in (
        (f"table/{arguments.thinned}", 0, rows),
        ("random", arguments.seed, arguments.seed + arguments.count),
    ):
        found: dict[int, str] = {}
        for start in range(first, last, EACH):
            found |= batch(kind, start, min(last, start + EACH))
            bad = summary(found)["bad"]
            print(f"{kind}: {len(found)} of {last - first}, {len(bad)} bad", file=sys.stderr)
        report = summary(found)
        is_bad |= bool(report["bad"])
        print(json.dumps({"graphs": kind} | report, indent=1))
    return int(is_bad)


if __name__ == "__main__":
    sys.exit(main())
