"""Calibration's memory and time against depth and width, and the speed of its quantising against a plain copy.

Writes random Scout-like checkpoints (16 experts in every layer), exports them, and calibrates each in a process of its
own over the same few tokens, so that the weights and not the text take the time. `anonymous` is the process's own
memory at its peak; the mapped checkpoint and the mapped hidden states can be dropped by the system. `CPU` is processor
time, which with one thread is the time on a machine that does nothing else, but for waiting for the disk.

    python benchmarks/calibration_scale.py [--recipe int8] [--deepest 36] [--threads 2]

36 layers and the widest of 4,096 have more than 4 GB of weights each, and take 14 GB of disk while they are made.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from support.dense import GEOMETRY, fill
from support.peak import WATCH
from support.sparse import write_sparse_checkpoint

from arriero.export import export_checkpoint

RUN = f"""
import json, sys, time
import numpy as np, torch
torch.set_num_threads(int(sys.argv[4]))
from arriero.calibration import calibrate_model
{WATCH}ids = np.random.default_rng(0).integers(3, 30000, (4, 256))
started, used = time.perf_counter(), time.process_time()
calibrate_model(sys.argv[1], sys.argv[2], recipe=sys.argv[3], data=ids, floor=0)
print(json.dumps([time.perf_counter() - started, time.process_time() - used, peak[0] - before]))
"""


def measure(hidden: int, layers: int, recipe: str, threads: int, folder: Path) -> tuple[float, ...]:
    """Gigabytes of weights, seconds, processor seconds, peak anonymous megabytes, and seconds of a plain copy."""
    config: dict[str, Any] = {
        **GEOMETRY,
        "hidden_size": hidden,
        "intermediate_size": hidden,
        "num_attention_heads": hidden // 64,
        "num_hidden_layers": layers,
        "dtype": "float32",
    }
    write_sparse_checkpoint(config, folder / "float32", dtype="F32")
    fill(folder / "float32")
    model = export_checkpoint(folder / "float32", folder / "model", dtype="bfloat16")
    shutil.rmtree(folder / "float32")
    size = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    started = time.perf_counter()
    for path in model.glob("*.safetensors"):
        shutil.copyfile(path, folder / "copy")
    copying = time.perf_counter() - started
    (folder / "copy").unlink()
    command = [sys.executable, "-c", RUN, str(model), str(folder / "quantised"), recipe, str(threads)]
    seconds, used, peak = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return size / 1e9, seconds, used, peak, copying


def main() -> None:
    parser = argparse.ArgumentParser(description="Calibration against depth and width.")
    parser.add_argument("--recipe", default="int8")
    parser.add_argument("--deepest", type=int, default=8, help="layers at most: of 2, 4, 8, 16 and 36")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    columns = ("hidden", "layers", "weights, GB", "seconds", "CPU, s", "GB/s", "copy, GB/s", "peak anonymous, MB")
    table = Table(*columns, title=f"Calibration to {arguments.recipe}, 1,024 tokens")
    sizes = [(1024, layers) for layers in (2, 4, 8, 16, 36) if layers <= arguments.deepest]
    for hidden, layers in [*sizes, (512, 4), (2048, 4), (4096, 2)]:
        with tempfile.TemporaryDirectory() as name:
            figures = measure(hidden, layers, arguments.recipe, arguments.threads, Path(name))
        size, seconds, used, peak, copying = figures
        numbers = (
            f"{size:.2f}",
            f"{seconds:.1f}",
            f"{used:.1f}",
            f"{size / seconds:.2f}",
            f"{size / copying:.2f}",
            f"{peak:.0f}",
        )
        table.add_row(str(hidden), str(layers), *numbers)
        print(hidden, layers, *numbers, file=sys.stderr, flush=True)
    Console().print(table)


if __name__ == "__main__":
    main()
