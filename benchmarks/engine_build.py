"""TensorRT-RTX engines built with no GPU: time, peak memory and size, against the model's size.

Three questions, each build a process of its own: what grows with weights inside (0.3, 0.6, 1.2 B parameters, random
weights on disk); what each placement of the weights costs in layers; and whether full-size Scout and Maverick build
with weights outside, in bf16 and, experts stacked [E, N, K], in FP8 (sparse files: their weights are never read).

    python benchmarks/engine_build.py [--runs 3] [--only Scout …] [--json FILE]
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from support.dense import scout_like, write_random_checkpoint
from support.sparse import MAVERICK, SCOUT, write_sparse_checkpoint
from support.sparse_models import write_sparse_fp8

from arriero.export import export_checkpoint
from arriero.files.folders import read_spec

BUILD = """
import json, resource, sys, time
from arriero.engine import Options, build_bundle
started = time.perf_counter()
build_bundle(sys.argv[1], sys.argv[2], target=sys.argv[3], options=Options(**json.loads(sys.argv[4])))
seconds = time.perf_counter() - started
print(json.dumps([seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024]))
"""
TARGET = "tensorrt-rtx:sm89"
COMPUTES = ("gemm", "kgen", "runtime_fusion", "PluginV3", "custom_layer")


def build(model: Path, folder: Path, runs: int, **options: Any) -> dict[str, float]:
    """Builds a model several times. Returns median seconds and peak, the engine's size, and its fused layers."""
    seconds, peaks = [], []
    for run in range(runs):
        bundle = folder / f"bundle{run}"
        command = [sys.executable, "-c", BUILD, str(model), str(bundle), TARGET, json.dumps(options)]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
        took, peak = json.loads(output)
        seconds.append(took)
        peaks.append(peak)
    layers = json.loads((bundle / "layers.json").read_text())
    return {
        "seconds": statistics.median(seconds),
        "peak_GB": statistics.median(peaks) / 1e9,
        "engine_MB": (bundle / "decoder.engine").stat().st_size / 1e6,
        "layers": sum(layer["kind"] in COMPUTES for layer in layers),
    }


def dense(layers: int, placement: str, runs: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        parameters = write_random_checkpoint(scout_like(layers), folder / "checkpoint")
        model = export_checkpoint(folder / "checkpoint", folder / "model")
        return {"weights_GB": parameters * 2 / 1e9, **build(model, folder, runs, weights=placement, max_seq=16384)}


def sparse(config: dict[str, Any], runs: int, *, fp8: bool = False, **options: Any) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size = write_sparse_checkpoint(config, folder / "checkpoint")
        model = export_checkpoint(folder / "checkpoint", folder / "model")
        if fp8:
            model = write_sparse_fp8(model, folder / "fp8")
            size = sum(file.size for file in read_spec(model).weight_files)
        return {"weights_GB": size / 1e9, **build(model, folder, runs, **{"weights": "outside", **options})}


CASES: dict[str, Callable[[int], dict[str, float]]] = {
    **{f"inside, {layers} layers": partial(dense, layers, "inside") for layers in (4, 9, 19)},
    **{f"{placement}, 9 layers": partial(dense, 9, placement) for placement in ("experts", "outside")},
    "Scout, outside": partial(sparse, SCOUT),
    "Scout, outside, native attention": partial(sparse, SCOUT, gqa="native"),
    "Scout, FP8, outside": partial(sparse, SCOUT, fp8=True),
    "Maverick, outside": partial(sparse, MAVERICK),
    "Maverick, FP8, outside": partial(sparse, MAVERICK, fp8=True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Engines built with no GPU.")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--only", nargs="*", default=[""], metavar="WORD", help="models whose names have such a word")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    chosen = {name: case for name, case in CASES.items() if any(word in name for word in arguments.only)}
    results = {name: case(arguments.runs) for name, case in chosen.items()}
    table = Table("model", "weights, GB", "wall, s", "peak RSS, GB", "peak / weights", "engine, MB", "fused layers")
    for name, each in results.items():
        ratio = f"{each['peak_GB'] / each['weights_GB']:.2f}"
        numbers = (f"{each['weights_GB']:.2f}", f"{each['seconds']:.1f}", f"{each['peak_GB']:.2f}", ratio)
        table.add_row(name, *numbers, f"{each['engine_MB']:.0f}", f"{each['layers']:.0f}")
    Console(width=120).print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
