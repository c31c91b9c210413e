"""Attention's kernels by their machine code, and what that predicts of an H100. For `machine_code`; no GPU.

A call takes a fitted time a launch, and for the kernel that attends at least what reading the cache takes, and at least
its steps: the largest of what tensor cores, schedulers and special functions take of one, and the rest, each with a
fitted weight. The fit is to the times in `docs/measured.md`, whose decoding was three launches, which the kernels still
are by which several tokens of a row are decoded.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from rich.table import Table

from arriero.plugins import triton_compiler as kernels
from arriero.plugins.gqa import kernel as module
from arriero.plugins.gqa.op import Attributes
from arriero.plugins.gqa.plan import Geometry, Plan, Schedule, Tile

from .sass import KINDS, MachineCode, read

HEADS, KV_HEADS, HEAD_DIM, CHUNK = 40, 8, 128, 8192
SIZES = {"heads": HEADS, "kv_heads": KV_HEADS, "scale": HEAD_DIM**-0.5}
CHUNKED = Attributes(**SIZES, chunk=CHUNK, qk_norm_eps=1e-5)  # type: ignore[arg-type]
FULL = Attributes(**SIZES, temperature_scale=0.1, temperature_floor=8192.0)  # type: ignore[arg-type]
FULL_CAPACITY = 32768 + 128
CACHES = {"bf16": ("none", 2), "int8": ("int8", 1), "FP8": ("fp8", 1)}
MULTIPROCESSORS, CLOCK, MEMORY, PRODUCTS, SCHEDULERS, SPECIAL = 132, 1.755e9, 3.0e12, 2048, 4, 16
"""An H100's, as in `machine_code`, but for the bytes read a second, which are what 32 rows of the measured decoding
read; and special functions a cycle of a multiprocessor."""

MEASURED = {
    (1, 1024, 1): (13.2, 14.7, 15.0),
    (1, 32768, 1): (61.3, 44.3, 49.2),
    (8, 8192, 1): (105.9, 71.8, 81.2),
    (32, 32768, 1): (1419, 832, 1004),
    (1, 0, 512): (29.6, 31.5, 34.2),
    (1, 0, 8192): (1573, 2138, 2519),
}
"""µs on an H100 by rows, past and new tokens, of three kinds of cache, decoding in three launches."""

Fit = tuple[float, float, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Attending:
    """One compiled kernel that attends."""

    cache: str
    form: str
    tile: Tile
    code: MachineCode

    @property
    def cycles(self) -> tuple[float, float]:
        """Cycles of a step: the largest of tensor cores, issue and special functions, and the rest of their sum."""
        code, tile = self.code, self.tile
        tensor = 2 * max(tile.rows, 16) * tile.slots * HEAD_DIM / PRODUCTS
        issue = sum(code.loop.values()) * code.warps / SCHEDULERS
        special = code.loop.get("special", 0) * code.warps * 32 / SPECIAL
        largest = max(tensor, issue, special)
        return largest, tensor + issue + special - largest


def plan_of(layer: Attributes, cache: str, capability: int) -> Plan:
    kind = CACHES[cache][0]
    return Plan(
        Geometry(attributes=layer, head_dim=HEAD_DIM, rope=layer.chunk > 0, dtype="bf16", cache=kind),  # type: ignore[arg-type]
        capability,
    )


def attending(capability: int) -> Iterator[Attending]:
    """Every kernel that attends on one kind of GPU."""
    for cache in CACHES:
        if cache == "FP8" and capability < 89:
            continue
        plan = plan_of(CHUNKED, cache, capability)
        for each in plan.kernels:
            form = "one" if "_decode_" in each.name else each.name.partition("attend_")[2].partition("_")[0]
            if form in plan.tiles:
                code = read(kernels.compile_kernel(module, each, capability))
                yield Attending(cache=cache, form=form, tile=plan.tiles[form], code=code)  # type: ignore[index,arg-type]


def code_table(capability: int, found: list[Attending]) -> Table:
    """A table of each kernel's main loop by kinds of instructions, and of what a program uses."""
    kinds = [*KINDS, "other"]
    table = Table(f"sm{capability}", "rows, slots", "registers", "spilled", "KiB", "resident", *kinds)
    for each in found:
        code = each.code
        table.add_row(
            f"attention, {each.form}, {each.cache} cache",
            f"{each.tile.rows}, {each.tile.slots}",
            *(str(value) for value in (code.registers, code.spilled)),
            f"{code.shared / 1024:.0f}",
            str(code.resident),
            *(str(code.loop.get(kind, 0)) for kind in kinds),
        )
    return table


def predict(call: tuple[int, int, int], cache: str, found: list[Attending], fit: Fit, *, joined: bool) -> float:
    """Microseconds of a call; `joined` is decoding in one launch."""
    batch, past, length = call
    layer, capacity = (FULL, FULL_CAPACITY) if length == 1 else (CHUNKED, CHUNK)
    schedule: Schedule = plan_of(layer, cache, 90).schedule(batch, length, capacity)
    form = "few" if schedule.form == "one" and not joined else schedule.form
    kernel = next(each for each in found if (each.cache, each.form) == (cache, form))
    rows, group = length * HEADS // KV_HEADS, HEADS // KV_HEADS
    steps = 0.0
    for first in range(0, rows, kernel.tile.rows):
        end = past + min((first + kernel.tile.rows - 1) // group, length - 1) + 1
        share = math.ceil(math.ceil(end / schedule.splits) / kernel.tile.slots)
        steps += schedule.splits * share
    steps *= batch * KV_HEADS
    largest, rest = (steps / MULTIPROCESSORS * each / CLOCK for each in kernel.cycles)
    memory = 2 * batch * KV_HEADS * (past + length) * HEAD_DIM * CACHES[cache][1] / MEMORY
    launches = {"one": 1, "many": 2}.get(form, 3)
    return launches * fit[0] + 1e6 * max(memory, fit[1] * largest + fit[2] * rest)


def ratios(found: list[Attending], fit: Fit) -> list[float]:
    """Logarithms of predicted over measured times."""
    return [
        math.log(predict(call, cache, found, fit, joined=False) / measured)
        for call, times in MEASURED.items()
        for cache, measured in zip(CACHES, times, strict=True)
    ]


def fit_to(found: list[Attending]) -> Fit:
    """The fit with the least sum of squared logarithms: ever closer around the best."""
    best, spans = (4.0, 1.0, 0.5), (8.0, 3.0, 3.0)
    for _ in range(6):
        axes = [np.linspace(max(0.0, at - span / 2), at + span / 2, 9) for at, span in zip(best, spans, strict=True)]
        tried = (tuple(map(float, each)) for each in itertools.product(*axes))
        best = min(tried, key=lambda fit: math.hypot(*ratios(found, fit)))  # type: ignore[arg-type,assignment]
        spans = tuple(span / 2 for span in spans)  # type: ignore[assignment]
    return best


def time_table(found: list[Attending], fit: Fit) -> Table:
    """Times by the fit: of the kernels that were measured, beside the measured ones, and of today's."""
    table = Table("rows, past, new tokens", *(f"{name}: measured, fitted, predicted" for name in CACHES))
    for call, times in MEASURED.items():
        cells = []
        for cache, measured in zip(CACHES, times, strict=True):
            fitted, today = (predict(call, cache, found, fit, joined=joined) for joined in (False, True))
            cells.append(f"{measured:,.1f}, {fitted:,.1f}, {today:,.1f}")
        table.add_row(", ".join(map(str, call)), *cells)
    return table
