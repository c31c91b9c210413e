"""Load and first token of a checkpoint of several gigabytes: where its bytes are in memory.

Writes a random Scout-like checkpoint, exports it, builds the CPU bundle, and runs one prompt in a process of its own.
`file` is memory that belongs to the mapped checkpoint and can be dropped and shared; `anonymous` is the process's own.
Weights are used as they lie, in float32 and in bfloat16.

    python benchmarks/load_in_place.py [--gigabytes 3.2] [--threads 2]
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from support.dense import GEOMETRY, fill
from support.sparse import write_sparse_checkpoint

from arriero.engine import build_bundle
from arriero.export import export_checkpoint

RUN = """
import json, sys, time
def memory():
    lines = dict(line.split(":") for line in open("/proc/self/status") if line.startswith(("RssAnon", "RssFile")))
    return {name: int(value.split()[0]) / 1e6 for name, value in lines.items()}
import arriero, arriero.runtime
before, started = memory(), time.perf_counter()
session = arriero.load(sys.argv[1], threads=int(sys.argv[2]), max_seq=512)
loaded, loading = memory(), time.perf_counter() - started
session.generate(list(range(64)), max_new_tokens=1, eos_token_id=[])
first, answering = memory(), time.perf_counter() - started - loading
session.generate(list(range(64)), max_new_tokens=16, eos_token_id=[])
print(json.dumps([before, loaded, first, memory(), loading, answering]))
"""

BYTES_PER_LAYER = 4 * 1024 * (17 * 3 * 1024 + 2 * 1024 + 2 * 256)


def measure(model: Path, folder: Path, threads: int) -> list[Any]:
    bundle = build_bundle(model, folder)
    command = [sys.executable, "-c", RUN, str(bundle), str(threads)]
    result: list[Any] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description="Load and first token in place.")
    parser.add_argument("--gigabytes", type=float, default=3.2)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    layers = max(1, round(arguments.gigabytes * 1e9 / BYTES_PER_LAYER))
    table = Table("weights", "GB", "load, s", "first token, s", "when", "file, GB", "anonymous, GB")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_sparse_checkpoint(
            {**GEOMETRY, "num_hidden_layers": layers, "dtype": "float32"}, folder / "checkpoint", dtype="F32"
        )
        size = fill(folder / "checkpoint") / 1e9
        models = {
            "float32": export_checkpoint(folder / "checkpoint", folder / "float32"),
            "bfloat16": export_checkpoint(folder / "checkpoint", folder / "bfloat16", dtype="bfloat16"),
        }
        for dtype, model in models.items():
            before, *memory, loading, answering = measure(model, folder / f"{dtype}-bundle", arguments.threads)
            times = f"{loading:.1f}", f"{answering:.1f}"
            for when, at in zip(("loaded", "first token", "16 tokens"), memory, strict=True):
                gained = (f"{at[kind] - before[kind]:.2f}" for kind in ("RssFile", "RssAnon"))
                weights = size if dtype == "float32" else size / 2
                table.add_row(dtype, f"{weights:.2f}", *times, when, *gained)
    Console().print(table)


if __name__ == "__main__":
    main()
