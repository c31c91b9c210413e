"""A checkpoint larger than the memory that a process may use: tokens a second, and what is read for each.

Writes a random checkpoint of Maverick's shape (2.8 GB of bfloat16, 128 experts in every second layer), exports it, and
runs it in place in a memory cgroup (version 1; root), whose limit is a share of the weights' bytes: its pages, the
file's among them, are then dropped and read again. `read` is what the process had from the disk. The file's pages are
dropped in front of each run.

    python benchmarks/beyond_memory.py [--shares 0.5,2] [--steps 64] [--threads 2] [--folder DIR]
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from support.dense import peer, write_random_checkpoint

from arriero.export import export_checkpoint
from arriero.files.circumstances import machine, machine_text

GROUPS = Path("/sys/fs/cgroup/memory")
RUN = """
import json, os, sys, time
open(sys.argv[1], "w").write(str(os.getpid()))
def read():
    return next(int(line.split()[1]) for line in open("/proc/self/io") if line.startswith("read_bytes"))
import numpy as np
import arriero, arriero.runtime
before, started = read(), time.perf_counter()
session = arriero.load(sys.argv[2], threads=int(sys.argv[3]), max_seq=1024)
rng, steps = np.random.default_rng(0), int(sys.argv[4])
tokens = rng.integers(0, session.spec.vocab_size, 16 + steps).tolist()
state = session.start(1, 16 + steps)
session.prefill(state, [tokens[:16]])
first = time.perf_counter() - started, read() - before
before, started = read(), time.perf_counter()
for token in tokens[16:]:
    session.decode(state, [token])
print(json.dumps([*first, (time.perf_counter() - started) / steps, (read() - before) / steps]))
"""


def run(model: Path, size: int, share: float, threads: int, steps: int) -> dict[str, Any]:
    """One run of a process in a group of its own."""
    group = GROUPS / f"arriero-{os.getpid()}"
    group.mkdir()
    try:
        (group / "memory.limit_in_bytes").write_text(str(int(size * share)))
        command = [sys.executable, "-c", RUN, str(group / "cgroup.procs"), str(model), str(threads), str(steps)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        first, first_read, step, step_read = json.loads(done.stdout)
        peak = int((group / "memory.max_usage_in_bytes").read_text())
    finally:
        group.rmdir()
    return {"first": first, "first_read": first_read, "step": step, "step_read": step_read, "peak": peak}


def forget(files: list[Path]) -> None:
    """Drops files from the page cache."""
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def main() -> None:
    parser = argparse.ArgumentParser(description="A checkpoint larger than memory.")
    parser.add_argument("--shares", type=lambda text: [float(part) for part in text.split(",")], default=[0.5, 2.0])
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="Where to keep what is made.")
    arguments = parser.parse_args()
    if not os.access(GROUPS / "memory.limit_in_bytes", os.W_OK):
        sys.exit(f"{GROUPS} cannot be written to: run as root where memory cgroups are of version 1")
    columns = "limit, × weights", "to the first token, s", "read, GB", "tok/s", "read a token, MB", "peak, GB"
    table = Table(*columns, title=machine_text(machine()))
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        checkpoint, model = folder / "checkpoint", folder / "model"
        if not model.exists():
            write_random_checkpoint(peer("maverick"), checkpoint)
            export_checkpoint(checkpoint, model)
        files = sorted(checkpoint.glob("*.safetensors"))
        size = sum(path.stat().st_size for path in files)
        for share in arguments.shares:
            forget(files)
            found = run(model, size, share, arguments.threads, arguments.steps)
            table.add_row(
                f"{share:g}",
                f"{found['first']:.1f}",
                f"{found['first_read'] / 1e9:.2f}",
                f"{1 / found['step']:.1f}",
                f"{found['step_read'] / 1e6:.0f}",
                f"{found['peak'] / 1e9:.2f}",
            )
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
