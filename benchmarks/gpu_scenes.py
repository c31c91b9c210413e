"""Every precision in every way over a GPU that is not there: the scenes of which the tests play a sample.

    python benchmarks/gpu_scenes.py [--only bf16 …] [--once]
    python benchmarks/gpu_scenes.py --cost 48    # what a step of so many layers costs the host

The cost is the processor's time of the session and the plugins: kernels, driver and TensorRT are left out.
"""

import argparse
import itertools
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "support"))

from gpu_process import Gpu

WAYS = ("alone", "flight", "guesses", "prefixes")
PLACEMENTS = {"experts": "experts", "inside": "nothing", "outside": "all weights"}


def main() -> int:
    from gpu_models import PRECISIONS  # here, since the GPU's process imports this file before its Triton interprets

    parser = argparse.ArgumentParser(description="Tokens over the executing driver beside the CPU's.")
    parser.add_argument("--only", nargs="*", default=PRECISIONS, choices=PRECISIONS, metavar="PRECISION")
    parser.add_argument(
        "--cost", type=int, metavar="LAYERS", help="the host's share of a step over 8 rows, and no scenes"
    )
    parser.add_argument("--once", action="store_true", help="each way once, in turn with graphs and without")
    arguments = parser.parse_args()
    return tell_cost(arguments.cost) if arguments.cost else play(arguments.only, once=arguments.once)


def play(precisions: Sequence[str], *, once: bool) -> int:
    """Plays the scenes of some precisions, all or each way once. Returns 1 where anything is wrong."""
    from conftest import llama4
    from gpu_models import make_model
    from sure_llama4 import sequences

    gpu, started, wrong = Gpu(), time.perf_counter(), 0
    ids = sequences(4, 3, 20)
    prompts = [ids[0], ids[1][:13], ids[2][:6], ids[0]]
    scenes = Table("precision", "way", "graphs", "tokens", "clear", "equal of these")
    logits = Table("precision", "outside the engine", "bound", "largest difference", "bound", "deviation")

    def tell(table: Table, *row: str) -> None:
        table.add_row(*row)
        print(*row, f"{time.perf_counter() - started:.0f} s", sep=", ", flush=True)

    with TemporaryDirectory() as folder:
        for name in precisions:
            model, bound, deviation = make_model(name, Path(folder) / name, llama4)
            for placement in list(PLACEMENTS)[: 1 if once else None]:
                given = {"ids": ids, "lengths": [20, 13, 6], "decoded": 3, "placement": placement}
                found, expected = gpu.run("logits", model=model, **given)
                apart = np.abs(found - expected)
                apart_by = np.sqrt(np.mean(apart**2))
                wrong += int(apart.max() >= bound or apart_by >= deviation)
                sizes = (f"{size:.4f}" for size in (bound, apart.max(), deviation, apart_by))
                tell(logits, name, PLACEMENTS[placement], *sizes)
            every = zip(WAYS, itertools.cycle((True, False)), strict=False)
            for way, graphs in every if once else itertools.product(WAYS, (True, False)):
                given = {"model": model, "graphs": graphs}
                found, _, _ = gpu.run("texts", prompts=prompts, new=5, way=way, **given)
                judged = gpu.run("judged", prompts=prompts, found=found, **given)
                clear = [behind == 0 for apart, behind in judged if apart > 2 * bound]
                wrong += len(clear) - sum(clear)
                counts = (str(len(judged)), f"{len(clear) / len(judged):.1%}", f"{np.mean(clear):.1%}")
                tell(scenes, name, way, "on" if graphs else "off", *counts)
            shortened, whole = gpu.run("drawn", model=model, ids=ids[0][:5], seeds=20)
            wrong += shortened != whole
            same = np.mean([a == b for a, b in zip(shortened, whole, strict=True)])
            tell(scenes, name, "drawn from shortlists", "on", str(len(whole)), "", f"{same:.1%}")
    gpu.close()
    for table in (logits, scenes):
        Console().print(table)
    return int(wrong > 0)


def tell_cost(layers: int, batch: int = 8) -> int:
    from conftest import llama4
    from gpu_models import make_layers

    gpu = Gpu()
    with TemporaryDirectory() as folder:
        model = make_layers(layers, Path(folder), llama4)
        cost = gpu.run("host_cost.shape_cost", model=str(model), batch=batch)
    gpu.close()
    for name, (seconds, calls) in cost.items():
        print(f"{name}: {calls} driver calls, {seconds * 1e3:.2f} ms")
    return 0


if __name__ == "__main__":
    sys.exit(main())
