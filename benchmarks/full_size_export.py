"""Export at full size: wall time, peak memory and bytes written for Scout and Maverick, and their slopes.

Sparse checkpoints stand for the real ones: what export reads of a checkpoint (headers, samples for the identity) and
what it writes is the same. Every export is a process of its own; the table shows the median of `--runs`.

    python benchmarks/full_size_export.py [--runs 3] [--json FILE]
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from support.sparse import MAVERICK, SCOUT, multimodal, write_sparse_checkpoint

EXPORT = """
import resource, sys, time
started = time.perf_counter()
from arriero.export import export_checkpoint
export_checkpoint(sys.argv[1], sys.argv[2])
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(time.perf_counter() - started, peak)
"""


def measure(config: dict[str, Any], folder: Path, runs: int) -> dict[str, float]:
    checkpoint = folder / "checkpoint"
    weights = write_sparse_checkpoint(config, checkpoint)
    seconds, peaks, written = [], [], 0
    for run in range(runs):
        model = folder / f"model{run}"
        command = [sys.executable, "-c", EXPORT, str(checkpoint), str(model)]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
        seconds.append(float(output[0]))
        peaks.append(float(output[1]))
        written = sum(file.stat().st_size for file in model.iterdir())
    return {
        "weights_GB": weights / 1e9,
        "seconds": statistics.median(seconds),
        "peak_MB": statistics.median(peaks) / 1e6,
        "written_MB": written / 1e6,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Export at full size.")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    cases = {
        "Scout's text decoder": SCOUT,
        "Scout": multimodal(SCOUT),
        "Maverick's text decoder": MAVERICK,
        "Maverick": multimodal(MAVERICK),
        **{f"Scout's, {layers} layers": {**SCOUT, "num_hidden_layers": layers} for layers in (12, 24, 96)},
        **{f"Scout's, {experts} experts": {**SCOUT, "num_local_experts": experts} for experts in (4, 64)},
    }
    table = Table("checkpoint", "weights, GB", "wall, s", "peak RSS, MB", "written, MB")
    results = {}
    for name, config in cases.items():
        with tempfile.TemporaryDirectory() as folder:
            result = results[name] = measure(config, Path(folder), arguments.runs)
        table.add_row(name, *(f"{value:.1f}" for value in result.values()))
    Console().print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": platform.processor(), "results": results}, indent=1))


if __name__ == "__main__":
    main()
