"""Two of Scout's layers at real size, from the checkpoint to a check: time and peak memory of each command.

Random weights of hidden 5120, 16 experts of 8192 in each layer, embedding and head of 202,048 tokens: 13 GB, which are
removed afterwards with all that is made from them (26 GB at most at once). The text is that of the tiny Llama 4, by its
tokenizer. `own` is the process's own memory at its peak; mapped weights can be dropped by the system.

    python benchmarks/scout_rehearsal.py [--folder DIR] [--tokens 2048] [--threads 2] [--recipes int8 fp8]
"""

import argparse
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table
from support.dense import write_random_checkpoint
from support.sparse import SCOUT

TINY = Path(__file__).parent.parent / "examples" / "tiny-llama4"
TEXT = TINY / "unseen.txt"


def own_memory(process: int) -> float:
    """A process's anonymous memory, GB; 0 where it has ended."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return sum(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1e6


def measure(command: list[str], threads: int) -> tuple[float, float, float, int]:
    """Seconds, processor seconds, peak of its own memory in GB and exit code of a command of Arriero."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "arriero", *command], env=environment)
    peak = 0.0
    while process.poll() is None:
        peak = max(peak, own_memory(process.pid))
        time.sleep(0.02)
    seconds, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return seconds, used, peak, process.returncode


def steps(folder: Path, recipes: list[str], tokens: int, threads: int) -> list[tuple[str, list[str]]]:
    """Each step's name, and the words behind `arriero`."""
    at = {name: str(folder / name) for name in ("checkpoint", "model", *recipes, *(f"{each}-cpu" for each in recipes))}
    text = ["--data", str(TEXT), "--samples", "1"]
    found = [("export", ["export", at["checkpoint"], "-o", at["model"], "--tokenizer", str(TINY)])]
    for recipe in recipes:
        measured = [*text, "--window", str(tokens), "--floor", "0"]
        bundle, limit = at[f"{recipe}-cpu"], ["--threads", str(threads)]
        found += [
            (f"calibrate {recipe}", ["calibrate", at["model"], "-o", at[recipe], "--recipe", recipe, *measured]),
            (f"build {recipe}", ["build", at[recipe], "-o", bundle, "--target", "cpu"]),
            (f"run {recipe}", ["run", bundle, "--prompt", "A list is", "--max-new-tokens", "8", *limit]),
            (f"check {recipe}", ["check", bundle, "--against", at["model"], *text, "--window", "512", *limit]),
        ]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Two of Scout's layers at real size.")
    parser.add_argument("--folder", type=Path, help="where 40 GB are free; a temporary one by default")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--recipes", nargs="+", default=["int8", "fp8"])
    arguments = parser.parse_args()
    table = Table("step", "seconds", "CPU, s", "own, GB", "exit", title=f"{arguments.layers} layers of Scout")
    folder = Path(tempfile.mkdtemp(dir=arguments.folder))
    try:
        write_random_checkpoint({**SCOUT, "num_hidden_layers": arguments.layers}, folder / "checkpoint", pool=1 << 25)
        for name, command in steps(folder, arguments.recipes, arguments.tokens, arguments.threads):
            seconds, used, peak, code = measure(command, arguments.threads)
            row = name, f"{seconds:.1f}", f"{used:.1f}", f"{peak:.2f}", str(code)
            table.add_row(*row)
            print(*row, file=sys.stderr, flush=True)
    finally:
        shutil.rmtree(folder)
    Console().print(table)


if __name__ == "__main__":
    main()
