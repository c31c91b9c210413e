"""Our Triton kernels beside those of an earlier commit and PyTorch's, on this GPU: `kernel_speed.py` of both trees.

Each tree's own benchmark runs in a process of its own, with its own kernels, one behind the other. PyTorch's kernels
run in both, so that a card which has changed its pace between the two is seen: their times are in the last columns.

    python benchmarks/old_kernels.py [--commit dcb44b8] [--quick] [--seconds 90] [--json FILE]
"""

import argparse
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parent.parent
BEFORE = "dcb44b8"
"""The last commit whose quantised experts lay [E, K, N], and whose decode steps took three and five launches."""


def take_out(commit: str, folder: Path) -> Path | None:
    """Writes a commit's tree as the package `arriero` into a folder. Returns its root, or None where git has none."""
    command = ["git", "archive", "--format=tar", commit]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, check=False)
    if found.returncode:
        return None
    with tarfile.open(fileobj=io.BytesIO(found.stdout)) as archive:
        archive.extractall(folder / "arriero", filter="data")
    return folder / "arriero"


def race(root: Path, arguments: Sequence[str], report: Path) -> dict[str, Any]:
    """Runs a tree's benchmark over its own package. Returns what it found: nothing where it came to no end."""
    script = [sys.executable, str(root / "benchmarks" / "kernel_speed.py"), *arguments, "--json", str(report)]
    path = {} if root == ROOT else {"PYTHONPATH": str(root.parent)}
    subprocess.run(script, cwd=root, env={**os.environ, **path}, check=False)
    found: dict[str, Any] = json.loads(report.read_text("utf-8")) if report.exists() else {"rows": []}
    return found


def joined(now: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
    """The rows of now, with `before_us` and `before_peer_us` of the same call where it ran before, and was right."""
    earlier = {(row["op"], row["shape"], row["kind"]): row for row in before["rows"]}
    rows = []
    for row in now["rows"]:
        other = earlier.get((row["op"], row["shape"], row["kind"]), {})
        rows.append({**row, "before_us": other.get("ours"), "before_peer_us": other.get("peer_us")})
    return {**now, "rows": rows}


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """A line a call: microseconds."""
    made = Table("op", "call", "stored", "ours", "before", "before / ours", "PyTorch", "PyTorch beside before")
    for row in rows:
        ours, before = row["ours"], row["before_us"]
        ratio = f"{before / ours:.2f}" if ours and before else ""
        numbers = (ours, before, row.get("peer_us"), row["before_peer_us"])
        mine, old, peer, old_peer = ("" if each is None else f"{each:.1f}" for each in numbers)
        made.add_row(row["op"], row["shape"], row["kind"], mine or "WRONG", old, ratio, peer, old_peer)
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Races both trees. Returns 0 where every result of this one is right, 1 where one is wrong or none is there."""
    parser = argparse.ArgumentParser(description="Our kernels beside an earlier commit's and PyTorch's.")
    parser.add_argument("--commit", default=BEFORE)
    parser.add_argument("--quick", action="store_true", help="fewer shapes, and Scout's experts only")
    parser.add_argument("--seconds", type=float, default=90, help="of each tree: begin no further race after that many")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args(arguments)
    passed = ["--seconds", str(given.seconds), *(["--quick"] if given.quick else [])]
    console = Console(width=150)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        now = race(ROOT, passed, folder / "now.json")
        root = take_out(given.commit, folder)
        if root is None:
            console.print(f"no commit {given.commit} here: the kernels of now alone (git fetch --unshallow brings it)")
        found = joined(now, race(root, passed, folder / "before.json") if root else {"rows": []})
    console.print(table(found["rows"]))
    if given.json:
        given.json.write_text(json.dumps(found, indent=1), "utf-8")
    return 0 if found["rows"] and all(row["is_right"] for row in found["rows"]) else 1


if __name__ == "__main__":
    sys.exit(main())
