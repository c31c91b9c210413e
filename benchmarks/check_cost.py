"""Cost of a check beside the two runs it compares, and its memory against depth.

Cost: on the trained tiny Llama 4 and on a random Scout-like model with a real vocabulary, the time of `check` over the
time of its two sides run plainly: the same windows scored, the same tokens generated, nothing compared. Each is run
alternately, in one process, and the ratio is that of the medians. Memory: checks with `--locate` of random models of
growing depth, each in a process of its own; `anonymous` is that process's own memory at its peak, above what it had
with its libraries loaded; mapped files can be dropped by the system and are not counted.

    python benchmarks/check_cost.py [--runs 3] [--deepest 16]
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from support.dense import GEOMETRY, fill
from support.peak import WATCH
from support.sparse import write_sparse_checkpoint

from arriero.accuracy import check
from arriero.accuracy.golden import window_of
from arriero.accuracy.recorded import CONTINUED, PROMPTS, decoded_tokens, prompt_length
from arriero.accuracy.sides import open_side
from arriero.calibration import calibrate_model
from arriero.export import export_checkpoint
from arriero.walk.windows import Windows

TINY = Path(__file__).parent.parent / "examples" / "tiny-llama4"

RUN = f"""
import json, sys
import numpy as np
from arriero.accuracy import check
from arriero.accuracy.report import write_report
{WATCH}ids = np.random.default_rng(0).integers(3, 30000, (2, 512))
verdict = check(sys.argv[1], sys.argv[2], data=ids, locate_fault=True)
assert verdict.location.blame is None
print(json.dumps(peak[0] - before))
"""


def run_plainly(path: Path, ids_WS: np.ndarray, *, generates: bool) -> None:
    """One side's part of a check, with nothing looked at."""
    side = open_side(path)
    length = ids_WS.shape[1]
    windows, prompt = Windows(ids_WS=ids_WS), prompt_length(length)
    beginnings = ids_WS[:PROMPTS, :prompt]
    for _ in side.score(windows, decoded_tokens(length), lambda *_: None):
        pass
    if generates:
        for window in range(len(beginnings)):
            side.generate(windows, window, prompt, CONTINUED)
    else:
        continued = np.concatenate([beginnings, beginnings[:, :CONTINUED]], axis=1)
        for _ in side.score(Windows(ids_WS=continued), 0, lambda *_: None):
            pass
    side.close()


def seconds(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def cost(candidate: Path, reference: Path, ids_WS: np.ndarray, runs: int) -> tuple[float, float]:
    """Median seconds of the two sides run plainly, and of the check."""

    def plain() -> None:
        run_plainly(reference, ids_WS, generates=True)
        run_plainly(candidate, ids_WS, generates=False)

    plain()  # files come into the page cache
    pairs = [(seconds(plain), seconds(lambda: check(candidate, reference, data=ids_WS))) for _ in range(runs)]
    return statistics.median(pair[0] for pair in pairs), statistics.median(pair[1] for pair in pairs)


def scout_like(folder: Path, layers: int) -> tuple[Path, Path]:
    """A random Scout-like checkpoint and its export."""
    config = {**GEOMETRY, "num_hidden_layers": layers, "dtype": "float32"}
    write_sparse_checkpoint(config, folder / "checkpoint", dtype="F32")
    fill(folder / "checkpoint")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / "checkpoint" / name).write_bytes((TINY / name).read_bytes())
    return folder / "checkpoint", export_checkpoint(folder / "checkpoint", folder / "model")


def main() -> None:
    parser = argparse.ArgumentParser(description="What a check costs.")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--deepest", type=int, default=16)
    arguments = parser.parse_args()
    table = Table("model", "tokens", "two runs, s", "check, s", "ratio", "tokens/s", title="Checks against plain runs")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tiny = export_checkpoint(TINY, folder / "tiny")
        spec = open_side(tiny).spec
        ids_WS = np.random.default_rng(0).integers(3, spec.vocab_size, (24, window_of(spec)))
        int8 = calibrate_model(tiny, folder / "int8", recipe="int8", data=ids_WS[:8], floor=0)
        (folder / "large").mkdir()
        _, large = scout_like(folder / "large", 8)
        large_ids = np.random.default_rng(0).integers(3, 30000, (4, 512))
        for label, pair, ids in (("tiny, INT8", (int8, tiny), ids_WS), ("Scout-like, bf16", (large, large), large_ids)):
            plain, checked = cost(*pair, ids, arguments.runs)
            figures = (f"{plain:.1f}", f"{checked:.1f}", f"{checked / plain:.2f}", f"{ids.size / checked:,.0f}")
            table.add_row(label, f"{ids.size:,}", *figures)
    Console().print(table)
    depths = Table("layers", "weights, GB", "peak anonymous, MB", title="check --locate of a checkpoint and its export")
    for layers in (2, 4, 8, 16, 32):
        if layers <= arguments.deepest:
            with tempfile.TemporaryDirectory() as name:
                checkpoint, model = scout_like(Path(name), layers)
                size = sum(path.stat().st_size for path in checkpoint.glob("*.safetensors"))
                command = [sys.executable, "-c", RUN, str(model), str(checkpoint)]
                peak = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            depths.add_row(str(layers), f"{size / 1e9:.2f}", f"{peak:.0f}")
    Console().print(depths)


if __name__ == "__main__":
    main()
