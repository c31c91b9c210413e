"""The launches of mixture-of-experts dispatch on a GPU: kernels, scratch memory, launches in order.

Enters: a geometry and a compute capability; for a call, the number of tokens and where its arrays lie. Leaves: the
kernels to compile, and the launches. Invariant: these depend on the number of tokens and on no data.

There are three ways, by the number of pairs of a token and one of its experts:

- *few*: all pairs fit into one tile of rows. Two launches (see `few_kernel`): routing, gate and up projection and
  activation; down projection and the sum over a token's experts. Where activations are quantised, routing is a launch
  of its own, which quantises each token once. Each chosen expert's weights are read once.
- *some*: pairs are sorted by expert into tiles of few rows. For a batch of sequences that decode.
- *many*: the same with tall tiles, that the tensor cores multiply at their full rate. For prefill.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..launch import COUNTERS, DEPENDENT_FROM, Buffer, Kernel, Launch, ceil_divide, power_of_two
from .kernel_geometry import Geometry

MODULE = "arriero.plugins.moe.kernel"
"""Module of the kernels' Triton functions."""

FEW = 16
"""Most pairs of the first way: the rows of the smallest tile that tensor cores multiply."""

SOME = 16
"""Most pairs an expert, on average, of the second way; with more, tiles of one expert read its weights again."""

BLOCK = 1024
"""Elements that a program of the element-wise kernels handles at a time."""

PROGRAMS = 264
"""Programs that keep a GPU busy: two for each of an H100's multiprocessors."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tile:
    """The part of a product that a program computes: rows, columns and a step of depth; warps, and steps in flight."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """The counts of one call; `tiles` is an upper bound."""

    tokens: int
    pairs: int
    tiles: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """A kernel, the arrays and counts that its run-time parameters are given, by name, and its grid in a call."""

    kernel: Kernel
    names: tuple[str, ...]
    grid: Callable[[Call], tuple[int, int, int]]


class Plan:
    """The launches of one geometry on one kind of GPU.

    Args:
        geometry: The layer's geometry.
        capability: The GPU's compute capability, as in 89.
        few: Most pairs that go the first way, up to `FEW`.
        some: Most pairs an expert that go the second way.
    """

    def __init__(self, geometry: Geometry, capability: int, *, few: int = FEW, some: int = SOME) -> None:
        assert few <= FEW
        self.geometry, self.some, self.dependent = geometry, some, capability >= DEPENDENT_FROM
        self.types = {name: f"*{each}" for name, each in geometry.types.items()}
        self.types |= dict.fromkeys(("first_expert", "pairs", "tiles"), "i32")
        self.tiles = tiles(geometry, capability)
        self.few = min(few, COUNTERS // ceil_divide(2 * geometry.expert_size, self.tiles["few"].columns))
        self.parts = {weight: parts(*size, self.tiles["few"]) for weight, size in geometry.weight_sizes.items()}
        self.ways = {"few": self._few(), "some": self._sorted("some"), "many": self._sorted("many")}
        kernels = {step.kernel.name: step.kernel for way in self.ways.values() for step in way}
        self.kernels = tuple(kernels.values())

    def workspace(self, tokens: int) -> dict[str, Buffer]:
        """Scratch memory for calls of up to that many tokens, by the names under which `launches` takes it."""
        g, types = self.geometry, self.geometry.types
        pairs = tokens * g.attributes.top_k
        few = min(pairs, self.few)
        counts = {way: most_tiles(pairs, g.local, self.tiles[way].rows) for way in ("some", "many")}
        shapes: dict[str, tuple[int, ...]] = {
            "chosen": (pairs,),
            "expert_input": (pairs, g.hidden),
            "input_row_scale": (pairs,),
            "order": (max(count * self.tiles[way].rows for way, count in counts.items()),),
            "tile_expert": (max(counts.values()),),
            "gate_up_parts": (self.parts["gate_up"], few, 2 * g.expert_size),
            "few_wide": (few, g.expert_size),
            "few_peaks": (few, ceil_divide(g.expert_size, self.tiles["few"].columns // 2)),
            "wide": (pairs, g.expert_size),
            "activated": (pairs, g.expert_size),
            "activated_row_scale": (pairs,),
            "down_parts": (self.parts["down"], few, g.hidden),
            "pair_outputs": (pairs, g.hidden),
        }
        return {name: Buffer(dtype=types[name], shape=shape) for name, shape in shapes.items() if name in types}

    def launches(self, pointers: Mapping[str, Any], tokens: int) -> list[Launch]:
        """The launches of a call, in order.

        Args:
            pointers: The op's inputs and output, the workspace's buffers, and `counters`, by name.
            tokens: T.
        """
        if not tokens:
            return []
        g = self.geometry
        pairs = tokens * g.attributes.top_k
        way = "few" if pairs <= self.few else "some" if pairs <= self.some * g.local else "many"
        call = Call(tokens=tokens, pairs=pairs, tiles=most_tiles(pairs, g.local, self.tiles[way].rows))
        values = {**pointers, "first_expert": g.first_expert, "pairs": pairs, "tiles": call.tiles}
        return [
            Launch(
                kernel=step.kernel.name,
                grid=step.grid(call),
                arguments=tuple(values[name] for name in step.names),
            )
            for step in self.ways[way]
        ]

    def _few(self) -> list[Step]:
        g, tile = self.geometry, self.tiles["few"]
        half = replace(tile, columns=tile.columns // 2)  # of the gate's columns, and as many of the up projection's
        columns = {"gate_up": ceil_divide(g.expert_size, half.columns), "down": ceil_divide(g.hidden, tile.columns)}
        activated = "few_wide" if g.dynamic else "activated"
        shared = {"TOP_K": g.attributes.top_k, "DEPENDENT": self.dependent}

        def cut(weight: str) -> dict[str, int]:
            depth, count = g.weight_sizes[weight][0], self.parts[weight]
            return {"DEPTH": depth, "PARTS": count, "PART": ceil_divide(depth, count * tile.depth) * tile.depth}

        gate_and_up = self._step(
            "gate_up_few",
            "gate_and_up_few",
            {
                **{**self._operands("gate_up"), "x": "expert_input" if g.rounded else "hidden"},
                **{name: "" if g.rounded else name for name in ("router_logits", "first_expert")},
                **{**same("activated_scale chosen counters pairs"), "parts": "gate_up_parts"},
                **{"activated": activated, "peaks": "few_peaks"},
            },
            {
                **{**self._constants(half), **shared, **cut("gate_up"), "WIDTH": g.expert_size},
                **{"EXPERTS": g.experts, "BLOCK_E": power_of_two(g.experts)},
            },
            grid=lambda call: (columns["gate_up"], self.parts["gate_up"], call.pairs),
            tile=half,
            dependent=self.dependent and g.rounded,
        )
        down = self._step(
            "down_few",
            "down_few",
            {
                **{"activated": activated, "peaks": "few_peaks", "weight": "down", "weight_scale": "down_scale"},
                **{"parts": "down_parts", **same("activated_scale chosen output counters pairs")},
            },
            {
                **{**self._constants(tile), **shared, **cut("down"), "WIDTH": g.hidden, "BOUND": g.bound},
                **{"PEAKS": columns["gate_up"], "BLOCK_PEAKS": power_of_two(columns["gate_up"])},
            },
            grid=lambda call: (columns["down"], self.parts["down"], call.pairs),
            tile=tile,
            dependent=self.dependent,
        )
        return [*([self._route()] if g.rounded else []), gate_and_up, down]

    def _sorted(self, way: str) -> list[Step]:
        g = self.geometry
        tile = self.tiles[way]
        arrange = self._step(
            f"arrange_{way}",
            "arrange",
            same("chosen order tile_expert pairs tiles"),
            {"LOCAL": g.local, "BLOCK_M": tile.rows, "BLOCK_E": power_of_two(g.local + 1), "BLOCK_P": BLOCK},
            grid=lambda call: (g.local, 1, 1),
        )
        down_tile = self.tiles.get(f"{way}_down", tile)
        half = replace(tile, columns=tile.columns // 2)  # of the gate's columns, and as many of the up projection's
        gate_and_up = self._step(
            f"gate_and_up_{way}",
            "gate_and_up",
            {
                **self._operands("gate_up"),
                **same("activated_scale order tile_expert"),
                **{"output": "wide" if g.dynamic else "activated", **same("pairs tiles")},
            },
            {**self._constants(half), "DEPTH": g.hidden, "WIDTH": g.expert_size},
            grid=lambda call: (call.tiles * ceil_divide(g.expert_size, half.columns), 1, 1),
            tile=half,
        )
        quantise = self._step(
            "quantise_rows",
            "quantise_rows",
            same("wide chosen activated activated_row_scale"),
            {
                **{"KIND": g.kind, "BOUND": g.bound, "LOCAL": g.local, "WIDTH": g.expert_size},
                "BLOCK_I": power_of_two(g.expert_size),
            },
            grid=lambda call: (call.pairs, 1, 1),
        )
        down = self._step(
            f"down_{way}",
            "product",
            {
                **self._operands("down"),
                **same("order tile_expert"),
                **{"output": "output" if g.direct else "pair_outputs", **same("pairs tiles")},
            },
            {**self._constants(down_tile), "DEPTH": g.expert_size, "WIDTH": g.hidden},
            grid=lambda call: (call.tiles * ceil_divide(g.hidden, down_tile.columns), 1, 1),
            tile=down_tile,
        )
        combine = self._combine()
        steps = [self._route(), arrange, gate_and_up, *([quantise] if g.dynamic else []), down]
        return steps if g.direct else [*steps, combine]

    def _route(self) -> Step:
        g = self.geometry
        return self._step(
            "route",
            "route",
            same("hidden router_logits hidden_scale chosen expert_input input_row_scale first_expert"),
            {
                **{"KIND": g.kind, "BOUND": g.bound, "HIDDEN": g.hidden, "EXPERTS": g.experts, "LOCAL": g.local},
                **{"TOP_K": g.attributes.top_k, "BLOCK_H": power_of_two(g.hidden), "BLOCK_E": power_of_two(g.experts)},
                "DEPENDENT": self.dependent,
            },
            grid=lambda call: (call.tokens, 1, 1),
        )

    def _combine(self) -> Step:
        g = self.geometry
        return self._step(
            "combine",
            "combine",
            same("pair_outputs chosen output"),
            {"LOCAL": g.local, "WIDTH": g.hidden, "TOP_K": g.attributes.top_k, "BLOCK_H": BLOCK},
            grid=lambda call: (call.tokens, ceil_divide(g.hidden, BLOCK), 1),
        )

    def _step(
        self,
        name: str,
        function: str,
        names: Mapping[str, str],
        constants: Mapping[str, Any],
        *,
        grid: Callable[[Call], tuple[int, int, int]],
        tile: Tile | None = None,
        dependent: bool = False,
    ) -> Step:
        """A kernel from the argument of each of its parameters, in order; those that this geometry has not are None."""
        given = {parameter: name for parameter, name in names.items() if name in self.types}
        kernel = Kernel(
            name=f"{self.geometry.name}_{name}",
            function=function,
            signature={parameter: self.types[name] for parameter, name in given.items()},
            constants={**dict.fromkeys(names.keys() - given.keys()), **constants},
            warps=tile.warps if tile else 8,
            stages=tile.stages if tile else 1,
            dependent=dependent,
        )
        return Step(kernel=kernel, names=tuple(given.values()), grid=grid)

    def _operands(self, weight: str) -> dict[str, str]:
        static, row = OPERAND_SCALES[weight]
        return {
            "x": "expert_input" if weight == "gate_up" else "activated",
            "x_scale": static if self.geometry.static else row,
            "weight": weight,
            "weight_scale": f"{weight}_scale",
        }

    def _constants(self, tile: Tile) -> dict[str, Any]:
        g = self.geometry
        return {
            **{"KIND": g.kind, "STATIC": g.static, "GROUP": g.group, "LOCAL": g.local},
            **{"BLOCK_M": tile.rows, "BLOCK_N": tile.columns, "BLOCK_K": tile.depth},
        }


OPERAND_SCALES = {"gate_up": ("hidden_scale", "input_row_scale"), "down": ("activated_scale", "activated_row_scale")}
"""Scales of the left operand of a weight: static by expert, or dynamic by pair."""


def tiles(geometry: Geometry, capability: int) -> dict[str, Tile]:
    """The tiles of the three ways, and of the last one's second product: at Llama 4's sizes nothing spills, all fit.

    Wide tiles are for the tensor cores that take their operands from shared memory as they lie there, and for sizes
    that need no masks. Hopper's sums of E4M3 are added to others of float32 behind each step: of one wide product both
    would not fit into its registers, of two half as wide they do. On the other GPUs low tiles have shorter steps, so
    that several programs share a multiprocessor.
    """
    data_centre = capability // 10 in (9, 10)
    depth = 128 if geometry.rounded else min(64, geometry.group or 64)
    short = depth if data_centre else min(64, depth)
    low = Tile(rows=16, columns=128, depth=short, warps=8 if short > 32 else 4, stages=4)
    tall = Tile(rows=128, columns=128, depth=depth, warps=8, stages=3)
    wide = tall
    takes_wide = data_centre and not (geometry.kind == "int8" and capability // 10 == 10)  # no such instruction there
    if takes_wide and geometry.kind != "int4" and geometry.hidden % 256 == geometry.expert_size % 128 == 0:
        wide = replace(tall, columns=256, stages=4)
    if geometry.kind == "int4" and not geometry.group:
        wide = replace(tall, depth=32)
    elif geometry.kind == "int4" and capability // 10 != 9:  # weights, products and sums are all in registers
        wide = replace(tall, columns=64)
    down = tall if geometry.kind == "fp8" and capability // 10 == 9 else wide
    return {"few": low, "some": low, "many": wide, "many_down": down}


def parts(depth: int, width: int, tile: Tile) -> int:
    """Parts into which the first way cuts a weight's depth: none has fewer than eight steps."""
    count = 1
    while count * ceil_divide(width, tile.columns) < PROGRAMS and depth >= 16 * count * tile.depth:
        count *= 2
    return count


def most_tiles(pairs: int, experts: int, rows: int) -> int:
    """Most tiles that pairs can take when they are sorted: each expert may leave one unfilled."""
    return min(pairs, (pairs + experts * (rows - 1)) // rows)


def same(names: str) -> dict[str, str]:
    """Parameters that are called like what they are given."""
    return {name: name for name in names.split()}
