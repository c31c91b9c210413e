"""What mixture-of-experts dispatch launches on a GPU, in which order, over which scratch memory.

Enters: the op's geometry and the GPU's compute capability; for a call, the number of tokens and where its arrays lie.
Leaves: the kernels to compile, and the launches. Invariant: these depend on the number of tokens and on no data.

There are three ways, by the number of pairs of a token and one of its experts:

- *few* (all pairs fit into one tile): each chosen expert's weights are read once, cut along columns and depth so that
  one expert keeps the whole GPU busy; the parts are added in order.
- *some*: pairs are sorted by expert into tiles of few rows, for a batch of sequences that decode.
- *many*: the same with tall tiles, which are worth the tensor cores' full rate.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..launch import Buffer, Kernel, Launch
from .op import Attributes

FEW = 16
"""Pairs of the first way: the rows of the smallest tile that the tensor cores multiply."""

SOME = 16
"""Pairs an expert of the second way, on average. An expert with more reads its weights more than once there."""

MULTIPROCESSORS = 132
"""Of an H100. Where the first way has fewer tiles of columns than about two a multiprocessor, it cuts the depth too."""

BLOCK = 1024
"""Elements that a program of the element-wise kernels handles at a time."""

MODULE = "arriero.plugins.moe.kernel"
"""Where the kernels' Triton functions are."""

STORED = {"int8": "i8", "fp8": "fp8e4nv", "int4": "u8"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Geometry:
    """What fixes the kernels.

    Attributes:
        hidden: H.
        expert_size: I.
        experts: Experts that the router knows (E).
        local_experts: Those whose weights and scales are here; tokens sent to others add nothing. None: all.
        first_expert: The first of them.
        attributes: The op's.
        dtype: `bf16` or `fp16`, of the tokens; of the weights too, where these are not quantised.
        group: Rows of a weight that share a scale in `int4`, a power of two; 0 is the whole column.
        static: Whether the activation scales are given.
    """

    hidden: int
    expert_size: int
    experts: int
    local_experts: int | None = None
    first_expert: int = 0
    attributes: Attributes
    dtype: str = "bf16"
    group: int = 0
    static: bool = False

    def __post_init__(self) -> None:
        assert self.dtype in ("bf16", "fp16")
        assert self.first_expert + self.local <= self.experts
        if self.group:
            assert self.kind == "int4"
            assert self.group >= 16
            assert self.group == power_of_two(self.group)
            assert self.hidden % self.group == self.expert_size % self.group == 0
        if self.kind == "int4":
            assert self.hidden % 2 == self.expert_size % 2 == 0, "two weights share a byte"
        assert not self.static or self.rounded

    @property
    def local(self) -> int:
        """Experts whose weights are here."""
        return self.experts if self.local_experts is None else self.local_experts

    @property
    def kind(self) -> str:
        """How the weights are stored, in the attributes' words."""
        return self.attributes.quantisation

    @property
    def rounded(self) -> bool:
        """Whether activations are quantised too."""
        return self.kind in ("int8", "fp8")

    @property
    def direct(self) -> bool:
        """Whether a sorted pair's output is its token's: each has one expert, and it is here."""
        return self.attributes.top_k == 1 and self.local == self.experts

    @property
    def weight_sizes(self) -> dict[str, tuple[int, int]]:
        """Depth and width of each weight, as the products see them."""
        return {"gate_up": (self.hidden, 2 * self.expert_size), "down": (self.expert_size, self.hidden)}

    @property
    def name(self) -> str:
        """What tells this geometry's kernels from those of others in a bundle."""
        scales = f"g{self.group}" if self.kind == "int4" else "static" if self.static else ""
        experts = f"{self.local}of{self.experts}k{self.attributes.top_k}"
        return f"moe_{self.dtype}_{self.kind}{scales}_{self.hidden}x{self.expert_size}x{experts}"

    @property
    def dynamic(self) -> bool:
        """Whether each token's activations have their own scale."""
        return self.rounded and not self.static


@dataclass(frozen=True, kw_only=True, slots=True)
class Tile:
    """What one program of a product computes, and how: rows, columns, a step of depth; warps, and steps in flight."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """A kernel and the names of what its run-time parameters are given, in order: arrays, or counts."""

    kernel: Kernel
    names: tuple[str, ...]


class Plan:
    """The launches of one geometry on one kind of GPU.

    Args:
        geometry: The op's.
        capability: The GPU's compute capability, as in 89.
        few: Most pairs that go the first way, up to `FEW`; tests lower it.
        some: Most pairs an expert that go the second way.
    """

    def __init__(self, geometry: Geometry, capability: int, *, few: int = FEW, some: int = SOME) -> None:
        assert few <= FEW
        self.geometry, self.few, self.some = geometry, few, some
        self.types = types(geometry)
        self.tiles = tiles(geometry, capability)
        self.parts = {weight: parts(*size, self.tiles["few"]) for weight, size in geometry.weight_sizes.items()}
        self.steps = {step.kernel.name: step for step in (*self._around(), *self._few(), *self._grouped())}
        self.kernels = tuple(step.kernel for step in self.steps.values())

    def workspace(self, tokens: int) -> dict[str, Buffer]:
        """Scratch memory for calls of up to that many tokens, by the names under which `launches` takes it."""
        g = self.geometry
        pairs = tokens * g.attributes.top_k
        few = min(pairs, self.few)
        heights = (self.tiles["some"].rows, self.tiles["many"].rows)
        counts = [most_tiles(pairs, g.local, height) for height in heights]
        shapes: dict[str, tuple[int, ...]] = {
            "chosen": (pairs,),
            "expert_input": (pairs, g.hidden),
            "input_scale": (pairs,),
            "order": (max(count * height for count, height in zip(counts, heights, strict=True)),),
            "tile_expert": (max(counts),),
            "gate_up_parts": (self.parts["gate_up"], few, 2 * g.expert_size),
            "wide": (pairs, g.expert_size),
            "activated": (pairs, g.expert_size),
            "activated_row_scale": (pairs,),
            "down_parts": (self.parts["down"], few, g.hidden),
            "pair_outputs": (pairs, g.hidden),
        }
        return {
            name: Buffer(dtype=self.types[name].removeprefix("*"), shape=shape)
            for name, shape in shapes.items()
            if name in self.types
        }

    def launches(self, pointers: Mapping[str, Any], tokens: int) -> list[Launch]:
        """The launches of a call, in order.

        Args:
            pointers: The op's inputs and output, and the workspace's buffers, by name.
            tokens: T.
        """
        g = self.geometry
        pairs = tokens * g.attributes.top_k
        if not pairs:
            return []
        if pairs <= self.few:
            return self._launches_of_few(pointers, tokens, pairs)
        way = "some" if pairs <= self.some * g.local else "many"
        tile = self.tiles[way]
        count = most_tiles(pairs, g.local, tile.rows)
        values = {**pointers, "first_expert": g.first_expert, "pairs": pairs, "tiles": count}
        launches = [
            self._launch("route", (tokens,), values),
            self._launch(f"arrange_{way}", (g.local,), values),
            self._launch(f"gate_and_up_{way}", (count * ceil_divide(g.expert_size, tile.columns // 2),), values),
        ]
        if g.dynamic:
            launches.append(self._launch("quantise_rows", (pairs,), values))
        launches.append(self._launch(f"down_{way}", (count * ceil_divide(g.hidden, tile.columns),), values))
        if not g.direct:
            launches.append(self._launch("combine", (tokens, ceil_divide(g.hidden, BLOCK)), values))
        return launches

    def _launches_of_few(self, pointers: Mapping[str, Any], tokens: int, pairs: int) -> list[Launch]:
        g = self.geometry
        values = {**pointers, "first_expert": g.first_expert, "pairs": pairs}
        columns = {
            weight: ceil_divide(width, self.tiles["few"].columns) for weight, (_, width) in g.weight_sizes.items()
        }
        return [
            self._launch("route", (tokens,), values),
            self._launch("gate_up_few", (columns["gate_up"], self.parts["gate_up"], pairs), values),
            self._launch("activate_few", (pairs, 1 if g.dynamic else ceil_divide(g.expert_size, BLOCK)), values),
            self._launch("down_few", (columns["down"], self.parts["down"], pairs), values),
            self._launch("combine_few", (tokens, ceil_divide(g.hidden, BLOCK)), values),
        ]

    def _launch(self, part: str, grid: tuple[int, ...], values: Mapping[str, Any]) -> Launch:
        step = self.steps[f"{self.geometry.name}_{part}"]
        across, down, deep = (*grid, 1, 1)[:3]
        arguments = tuple(values[name] for name in step.names)
        return Launch(kernel=step.kernel.name, grid=(across, down, deep), arguments=arguments)

    def _step(
        self,
        part: str,
        function: str,
        names: Mapping[str, str],
        constants: Mapping[str, Any],
        warps: int,
        stages: int = 1,
    ) -> Step:
        """A kernel, from what each of its parameters is given; those that this geometry has not are None."""
        given = {parameter: name for parameter, name in names.items() if name in self.types}
        absent = dict.fromkeys(names.keys() - given.keys())
        kernel = Kernel(
            name=f"{self.geometry.name}_{part}",
            function=function,
            signature={parameter: self.types[name] for parameter, name in given.items()},
            constants={**absent, **constants},
            warps=warps,
            stages=stages,
        )
        return Step(kernel=kernel, names=tuple(given.values()))

    def _around(self) -> list[Step]:
        """The kernels before and behind the products."""
        g = self.geometry
        kind, local, top_k = {"KIND": g.kind}, {"LOCAL": g.local}, {"TOP_K": g.attributes.top_k}
        steps = [
            self._step(
                "route",
                "route",
                same("hidden router_logits hidden_scale chosen expert_input input_scale first_expert"),
                {
                    **(kind | local | top_k),
                    **{"HIDDEN": g.hidden, "EXPERTS": g.experts},
                    **{"BLOCK_H": power_of_two(g.hidden), "BLOCK_E": power_of_two(g.experts)},
                },
                warps=8,
            ),
            self._step(
                "activate_few",
                "activate",
                {"parts": "gate_up_parts", **same("chosen activated_scale activated activated_row_scale pairs")},
                {
                    **(kind | local),
                    **{"WIDTH": g.expert_size, "PARTS": self.parts["gate_up"]},
                    "BLOCK_I": power_of_two(g.expert_size) if g.dynamic else BLOCK,
                },
                warps=8 if g.dynamic else 4,
            ),
            self._combine("combine_few", "down_parts", self.parts["down"]),
        ]
        if g.dynamic:
            constants = {**(kind | local), "WIDTH": g.expert_size, "BLOCK_I": power_of_two(g.expert_size)}
            names = same("wide chosen activated activated_row_scale")
            steps.append(self._step("quantise_rows", "quantise_rows", names, constants, warps=8))
        if not g.direct:
            steps.append(self._combine("combine", "pair_outputs", 1))
        for way in ("some", "many"):
            blocks = {"BLOCK_M": self.tiles[way].rows, "BLOCK_E": power_of_two(g.local + 1), "BLOCK_P": BLOCK}
            names = same("chosen order tile_expert pairs tiles")
            steps.append(self._step(f"arrange_{way}", "arrange", names, {**local, **blocks}, warps=4))
        return steps

    def _combine(self, part: str, source: str, count: int) -> Step:
        g = self.geometry
        sizes = {"WIDTH": g.hidden, "PARTS": count, "BLOCK_H": BLOCK}
        constants = {"LOCAL": g.local, "TOP_K": g.attributes.top_k, **sizes}
        return self._step(part, "combine", {"parts": source, **same("chosen output pairs")}, constants, warps=4)

    def _few(self) -> list[Step]:
        """The products of the first way."""
        tile = self.tiles["few"]
        steps = []
        for weight, (depth, width) in self.geometry.weight_sizes.items():
            part = ceil_divide(depth, self.parts[weight] * tile.depth) * tile.depth
            even = depth == part * self.parts[weight] and width % tile.columns == 0
            names = {**self._operands(weight), "chosen": "chosen", "parts": f"{weight}_parts", "pairs": "pairs"}
            constants = {**self._constants(tile), **sizes(depth, width), "PART": part, "EVEN": even}
            steps.append(self._step(f"{weight}_few", "few_products", names, constants, tile.warps, tile.stages))
        return steps

    def _grouped(self) -> list[Step]:
        """The products over tiles of pairs that are sorted by expert."""
        g = self.geometry
        steps = []
        for way in ("some", "many"):
            whole = self.tiles[way]
            tile = replace(whole, columns=whole.columns // 2)  # of the gate, and as many of the up projection
            depth, width = g.hidden, g.expert_size
            names = {
                **self._operands("gate_up"),
                **same("activated_scale order tile_expert"),
                **{"output": "wide" if g.dynamic else "activated", "pairs": "pairs", "tiles": "tiles"},
            }
            constants = {**self._constants(tile), **sizes(depth, width), "EVEN": even(depth, width, tile)}
            steps.append(self._step(f"gate_and_up_{way}", "gate_and_up", names, constants, tile.warps, tile.stages))
            depth, width = width, depth
            names = {
                **self._operands("down"),
                **same("order tile_expert"),
                **{"output": "output" if g.direct else "pair_outputs", "pairs": "pairs", "tiles": "tiles"},
            }
            constants = {**self._constants(whole), **sizes(depth, width), "EVEN": even(depth, width, whole)}
            steps.append(self._step(f"down_{way}", "product", names, constants, whole.warps, whole.stages))
        return steps

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


OPERAND_SCALES = {"gate_up": ("hidden_scale", "input_scale"), "down": ("activated_scale", "activated_row_scale")}
"""What scales the left operand of a weight: static by expert, or dynamic by pair."""


def types(geometry: Geometry) -> dict[str, str]:
    """Types of the arrays and counts that this geometry has, in Triton's words."""
    dtype = geometry.dtype
    weight = dtype if geometry.kind == "none" else STORED[geometry.kind]
    activation = STORED[geometry.kind] if geometry.rounded else dtype
    arrays = dict.fromkeys(("hidden", "router_logits", "output"), dtype)
    arrays |= dict.fromkeys(("gate_up", "down"), weight) | dict.fromkeys(("expert_input", "activated"), activation)
    arrays |= dict.fromkeys(("chosen", "order", "tile_expert"), "i32")
    floats = ["gate_up_parts", "down_parts"]
    if geometry.kind != "none":
        floats += ["gate_up_scale", "down_scale"]
    if geometry.static:
        floats += ["hidden_scale", "activated_scale"]
    if geometry.dynamic:
        floats += ["input_scale", "activated_row_scale"]
        arrays["wide"] = dtype
    if not geometry.direct:
        arrays["pair_outputs"] = dtype
    arrays |= dict.fromkeys(floats, "fp32")
    return {name: f"*{each}" for name, each in arrays.items()} | dict.fromkeys(
        ("pairs", "tiles", "first_expert"), "i32"
    )


def tiles(geometry: Geometry, capability: int) -> dict[str, Tile]:
    """The tiles of the three ways; shared memory holds a tile's operands `stages` times, and bounds it."""
    narrow = geometry.rounded
    depth = 128 if narrow else 64
    if geometry.group:
        depth = min(depth, geometry.group)
    few = Tile(rows=16, columns=128, depth=depth, warps=4, stages=4)
    some = Tile(rows=16, columns=128, depth=depth, warps=4, stages=4)
    many = Tile(rows=128, columns=256 if capability in (90, 100) else 128, depth=depth, warps=8, stages=3)
    return {"few": few, "some": some, "many": many}


def parts(depth: int, width: int, tile: Tile) -> int:
    """Into how many parts the first way cuts a weight's depth: no part is of fewer than eight steps."""
    count = 1
    while count * ceil_divide(width, tile.columns) < 2 * MULTIPROCESSORS and depth >= 16 * count * tile.depth:
        count *= 2
    return count


def most_tiles(pairs: int, experts: int, rows: int) -> int:
    """The tiles that the pairs take where as many as can be are cut short: one an expert."""
    return min(pairs, (pairs + experts * (rows - 1)) // rows)


def even(depth: int, width: int, tile: Tile) -> bool:
    """Whether tiles cover a weight with nothing left over."""
    return depth % tile.depth == 0 and width % tile.columns == 0


def sizes(depth: int, width: int) -> dict[str, int]:
    return {"DEPTH": depth, "WIDTH": width}


def same(names: str) -> dict[str, str]:
    """Parameters that are called like what they are given."""
    return {name: name for name in names.split()}


def ceil_divide(count: int, size: int) -> int:
    return -(-count // size)


def power_of_two(count: int) -> int:
    """The least power of two that is not below."""
    return 1 << (count - 1).bit_length()
