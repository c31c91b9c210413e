"""The kernels by their machine code: the main loop's instructions, what a program uses, and a predicted time.

Every product of the experts is compiled for each GPU at Llama 4's sizes. Per step of its main loop: instructions a warp
by kind, and bytes that a program reads. The prediction is for an H100 and no measurement. A kernel takes at least what
reading its weights once takes, and at least the sum of three terms over its steps: the largest of what its tensor
cores, its schedulers and its share of the L2 cache take; its warps' accesses to shared memory; and, where weights come
through registers, a wait for them that the programs of a multiprocessor share. The three terms' weights are fitted once
to the times in `docs/measured.md`, of kernels that read weights [K, N]; how far that fit is off is printed with it.

    python benchmarks/machine_code.py [--capabilities 80 90] [--json FILE]
    python benchmarks/machine_code.py --capabilities 90 --fit 1 2 500    # predict with another tree's fit

Attention has a model and a fit of its own, in `support/attention_code.py`. Triton alone is needed, and no GPU. Other
work on the machine does no harm.
"""

import argparse
import itertools
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from operator import mul
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from support import attention_code
from support.sass import KINDS, MachineCode, read

from arriero.plugins import triton_compiler as kernels
from arriero.plugins.moe import kernel as module
from arriero.plugins.moe.kernel_geometry import Geometry
from arriero.plugins.moe.op import Attributes
from arriero.plugins.moe.plan import FEW, SOME, Plan, Tile

HIDDEN, EXPERT_SIZE = 5120, 8192
FORMATS = {"bf16": "none", "int8": "int8", "FP8": "fp8", "int4": "int4"}
WEIGHT_BYTES = {"bf16": 2.0, "int8": 1.0, "FP8": 1.0, "int4": 0.5}
"""Bytes of a weight; in int4 those of its share of a scale come on top."""
SCALE_BYTES = {"bf16": 2, "fp32": 4}
TOKEN_BYTES = {"bf16": 2, "int8": 1, "FP8": 1, "int4": 2}

MEASURED = {
    (16, 1): (96, 76, 77, 54),
    (16, 8): (533, 348, 322, 241),
    (16, 32): (1230, 859, 852, 795),
    (16, 512): (1510, 2534, 2729, 3145),
    (16, 4096): (2570, 5618, 6053, 6856),
    (128, 32): (2545, 1761, 1718, 1459),
    (128, 4096): (11367, 17388, 18729, 22239),
}
"""µs on an H100 by experts and tokens, of bf16, int8, FP8 and int4, with weights [K, N] (`docs/measured.md`)."""

MULTIPROCESSORS, CLOCK = 132, 1.755e9
"""Multiprocessors of an H100 SXM, and their clock under load in Hz, which is assumed."""
MEMORY, CACHE = 2.4e12, 5.5e12
"""Bytes a second from its memory, the copy in `docs/measured.md`, and from its L2 cache, assumed."""
PRODUCTS = {"bf16": 2048, "int8": 4096, "FP8": 4096, "int4": 2048}
"""Products a cycle of a multiprocessor's tensor cores: 989 TFLOP/s in 16 bits, twice that in 8 (H100 data sheet)."""
SCHEDULERS = 4
"""Instructions that a multiprocessor issues a cycle."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Product:
    """One compiled product.

    Attributes:
        format: How weights are stored.
        way: `few`, `some` or `many`.
        depth: K.
        columns: Columns of all that a program multiplies at a step, those of gate and up together.
        width: All such columns.
        tile: Its tile.
        code: Its machine code.
        parts: Parts into which the depth is cut.
        scale_bytes: Bytes of a weight's share of a scale.
    """

    format: str
    name: str
    way: str
    depth: int
    columns: int
    width: int
    tile: Tile
    code: MachineCode
    parts: int = 1
    scale_bytes: float = 0.0

    @property
    def weight_bytes(self) -> float:
        """Bytes that are read of each weight."""
        return WEIGHT_BYTES[self.format] + self.scale_bytes

    @property
    def step_bytes(self) -> float:
        """Bytes that a program reads at a step."""
        return self.tile.depth * (self.tile.rows * TOKEN_BYTES[self.format] + self.columns * self.weight_bytes)

    @property
    def cycles(self) -> tuple[float, float, float]:
        """Cycles of a step: the largest of tensor cores, issue and cache; accesses to shared memory; waits for weights.

        There is a wait where weights go to shared memory by way of registers; its length is fitted.
        """
        code = self.code
        tensor = self.tile.rows * self.columns * self.tile.depth / PRODUCTS[self.format]
        issue = sum(code.loop.values()) * code.warps / SCHEDULERS
        cache = self.step_bytes / (CACHE / CLOCK / MULTIPROCESSORS)
        accesses = code.warps * (code.loop.get("to shared", 0) + code.loop.get("from shared", 0))
        return max(tensor, issue, cache), float(accesses), 1 / code.resident if code.loop.get("to shared") else 0.0


def products(
    capability: int, formats: Sequence[str] = tuple(FORMATS), group: int = 128, scale: str = "bf16"
) -> Iterator[Product]:
    """Every product of the experts on one kind of GPU; of the formats that it has, int4 in groups with such scales."""
    for name in formats:
        if name == "FP8" and capability < 89:
            continue
        kind = FORMATS[name]
        geometry = Geometry(
            hidden=HIDDEN,
            expert_size=EXPERT_SIZE,
            experts=16,
            attributes=Attributes(top_k=1, quantisation=kind),  # type: ignore[arg-type]
            group=group if kind == "int4" else 0,
            scale=scale if kind == "int4" else "fp32",
        )
        plan = Plan(geometry, capability)
        for each in plan.kernels:
            part, _, way = each.name.removeprefix(f"{geometry.name}_").rpartition("_")
            if way not in plan.tiles or part not in ("gate_up", "gate_and_up", "down"):
                continue
            weight = "down" if part == "down" else "gate_up"
            tile = plan.tiles.get(f"{way}_{part}", plan.tiles[way])
            depth, width = geometry.weight_sizes[weight]
            yield Product(
                format=name,
                name=part,
                way=way,
                depth=depth,
                columns=tile.columns,
                width=width,
                tile=tile,
                code=read(kernels.compile_kernel(module, each, capability)),
                parts=plan.parts[weight] if way == "few" else 1,
                scale_bytes=SCALE_BYTES[scale] / group if kind == "int4" else 0.0,
            )


# Prediction


def tiles_of(experts: int, tokens: int, product: Product) -> tuple[float, float]:
    """Tiles of rows and experts that have any, on average over draws of an expert a token."""
    rng = np.random.default_rng(0)
    counts_DE = rng.multinomial(tokens, [1 / experts] * experts, 50)
    busy = float((counts_DE > 0).sum(1).mean())
    tiles = float(np.ceil(counts_DE / product.tile.rows).sum(1).mean())
    return tiles, busy


Limits = tuple[float, tuple[float, float, float]]
"""Seconds of a kernel that reading its weights takes, and of the three terms of its steps, before they are weighted."""

Fit = tuple[float, float, float]
Calls = dict[tuple[int, int, str], list[Limits]]
"""The two products of each call: experts, tokens, format."""


def limits(product: Product, experts: int, tokens: int) -> Limits:
    """The limits of one kernel in a call."""
    tiles, busy = tiles_of(experts, tokens, product)
    steps = tiles * math.ceil(product.width / product.columns) * math.ceil(product.depth / product.tile.depth)
    memory = busy * product.depth * product.width * product.weight_bytes / MEMORY
    largest, accesses, waits = (steps / MULTIPROCESSORS * each / CLOCK for each in product.cycles)
    return memory, (largest, accesses, waits)


def way_of(experts: int, tokens: int) -> str:
    """The way that a call goes, by the plan's own rule."""
    return "few" if tokens <= FEW else "some" if tokens <= SOME * experts else "many"


def calls_of(found: Sequence[Product]) -> Calls:
    """The limits of the calls in the table of measured times."""
    by_way: dict[tuple[str, str], list[Product]] = {}
    for each in found:
        by_way.setdefault((each.format, each.way), []).append(each)
    return {
        (*call, name): [limits(each, *call) for each in by_way[name, way_of(*call)]]
        for call in MEASURED
        for name in FORMATS
    }


def predict(kernels_of_call: Sequence[Limits], fit: Fit) -> float:
    """Seconds of a call's kernels."""
    return sum(max(memory, sum(map(mul, fit, terms))) for memory, terms in kernels_of_call)


def fit_to(calls: Calls) -> Fit:
    """The weights with the least sum of squared logarithms of predicted over measured: ever closer around the best."""
    best, spans = (1.0, 1.0, 500.0), (4.0, 4.0, 3000.0)
    for _ in range(8):
        axes = [np.linspace(max(0.0, at - span / 2), at + span / 2, 13) for at, span in zip(best, spans, strict=True)]
        tried = (tuple(map(float, each)) for each in itertools.product(*axes))
        best = min(tried, key=lambda fit: math.hypot(*ratios(calls, fit)))
        spans = tuple(span / 2 for span in spans)
    return best


def ratios(calls: Calls, fit: Fit) -> list[float]:
    """Logarithms of predicted over measured times."""
    return [math.log(max(1e-12, predict(each, fit)) * 1e6 / measured_of(*key)) for key, each in calls.items()]


def measured_of(experts: int, tokens: int, name: str) -> float:
    """Measured µs."""
    return MEASURED[experts, tokens][list(FORMATS).index(name)]


# Tables


def code_table(capability: int, found: Sequence[Product]) -> Table:
    """A table of each product's main loop by kinds of instructions, and of what a program uses."""
    kinds = [*KINDS, "other"]
    table = Table(f"sm{capability}", "tile", "registers", "spilled", "KiB", "resident", "bytes", *kinds)
    for each in found:
        code, tile = each.code, each.tile
        table.add_row(
            f"{each.name}, {each.format}, {each.way}",
            f"{tile.rows}x{each.columns}x{tile.depth}, {tile.stages}",
            *(str(value) for value in (code.registers, code.spilled)),
            f"{code.shared / 1024:.0f}",
            str(code.resident),
            f"{each.step_bytes:.0f}",
            *(str(code.loop.get(kind, 0)) for kind in kinds),
        )
    return table


def time_table(found: dict[tuple[int, int, str], list[tuple[float, float, float]]], fit: tuple[float, float]) -> Table:
    """Predicted times beside the measured ones."""
    table = Table("experts", "tokens", *(f"{name}, predicted (measured)" for name in FORMATS))
    for experts, tokens in MEASURED:
        cells = [
            f"{predict(found[experts, tokens, name], fit) * 1e6:,.0f} ({measured_of(experts, tokens, name):,.0f})"
            for name in FORMATS
        ]
        table.add_row(str(experts), str(tokens), *cells)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--capabilities", type=int, nargs="*", default=[80, 89, 90, 100, 120])
    parser.add_argument("--group", type=int, default=128, help="inputs that share a scale in int4")
    parser.add_argument("--scales", choices=SCALE_BYTES, default="bf16", help="type of such scales")
    parser.add_argument("--fit", type=float, nargs=3, help="the three weights, of the tree that was measured")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    console, said = Console(width=200), {}
    for capability in arguments.capabilities:
        found = list(products(capability, group=arguments.group, scale=arguments.scales))
        console.print(code_table(capability, found))
        said[str(capability)] = [asdict(each) for each in found]
        heads = list(attention_code.attending(capability))
        console.print(attention_code.code_table(capability, heads))
        said[f"{capability}, attention"] = [asdict(each) for each in heads]
        if capability == 90:
            weights = attention_code.fit_to(heads)
            console.print(attention_code.time_table(heads, weights))
            off = np.exp(np.abs(attention_code.ratios(heads, weights)))
            console.print(
                f"Predictions, no measurements: {weights[0]:.2g} µs a launch, weights {weights[1]:.3g} and "
                f"{weights[2]:.3g}; off by a factor of {np.median(off):.2f} in the median, {off.max():.2f} at most."
            )
            calls = calls_of(found)
            fit = tuple(arguments.fit) if arguments.fit else fit_to(calls)
            off = np.exp(np.abs(ratios(calls, fit)))
            console.print(time_table(calls, fit))
            whose = "given" if arguments.fit else "fitted here"
            console.print(
                f"Predictions, no measurements: weights {fit[0]:.3g}, {fit[1]:.3g} and {fit[2]:.3g}, {whose}; against "
                f"the measured column off by a factor of {np.median(off):.2f} in the median, {off.max():.2f} at most."
            )
    if arguments.json:
        arguments.json.write_text(json.dumps(said, indent=1))


if __name__ == "__main__":
    main()
