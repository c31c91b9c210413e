"""The launches of one call of grouped-query attention: kernels, scratch memory, launches in order.

Enters: a layer's geometry, the GPU's compute capability, and a call's shapes. Leaves: `Kernel`s to compile, `Buffer`s
to provide, `Launch`es to put into a stream. Invariant: all of it hangs on shapes alone, never on what tensors hold.

A call over one token a row is a single launch (see `decode_kernel`). Others are three steps (see `kernel`): `prepare`
writes the cache and the prepared queries, `attend` attends, and `combine` joins the splits of `attend` where there are
few queries over many slots. There splits are what fills the GPU (flash-decoding: Dao, Haziza, Massa, Sizov 2023).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from ...errors import BuildError
from ...spec.built_engine import FP8_FROM
from ..launch import Buffer, Kernel, Launch, ceil_divide, power_of_two
from .op import Attributes

PROGRAMS = 256
"""Programs that fill a GPU: two on each of some 130 multiprocessors."""

MOST_SPLITS = 256
"""Most splits of one query of one kv head: they fill a GPU."""

LEAST_SLOTS = 256
"""Slots of a full cache that are worth a split."""

BLOCK_SPLITS = 32
"""Splits that `combine` reads at a time."""

MOST_DIMS = 128
"""Most dims of a head: the tiles of `attend` are sized for them."""

STEPS = 4
"""Steps that a program of `prepare` serves."""

STAGES = 3
"""Stages of the pipeline that loads keys and values: with fewer, nothing is loaded while the tensor cores work."""

MODULE = "arriero.plugins.gqa.kernel"
"""Module of the kernels' Triton functions."""

STORED = {"int8": "i8", "fp8": "fp8e4nv"}
"""Triton's types of quantised caches."""
LARGEST = {"none": 0, "int8": 127, "fp8": 448}
FOLD = {"none": 1, "int8": 128, "fp8": 512}
"""With a key's scale times this the query is about as large as query times key; see `prepare`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Geometry:
    """The sizes and types that are fixed for one node of the op.

    Attributes:
        attributes: The node's attributes.
        head_dim: D.
        rope: Whether the node has `inv_freq`.
        dtype: Type of query, key, value and output, and of caches that are not quantised.
        cache: How the caches are quantised.
        fused: Whether query, key and value are each given the projection [B, S, (Q+2K)·D] of all three.
    """

    attributes: Attributes
    head_dim: int
    rope: bool
    dtype: Literal["bf16", "fp16"]
    cache: Literal["none", "int8", "fp8"] = "none"
    fused: bool = False

    def __post_init__(self) -> None:
        assert self.head_dim % 2 == 0
        assert self.dtype in ("bf16", "fp16")
        assert self.cache in LARGEST

    @property
    def group(self) -> int:
        """Query heads of one kv head."""
        return self.attributes.heads // self.attributes.kv_heads


@dataclass(frozen=True, kw_only=True, slots=True)
class Tile:
    """The work of one specialisation of `attend`: stacked queries a program, slots a step, warps."""

    rows: int
    slots: int
    warps: int


Form = Literal["one", "few", "some", "many"]
"""Ways of a call by how many queries a kv head has. `one` is a token's own, in one launch; the others are
specialisations of `attend`, of which `few` and `some` are split, `many` is not."""


def tiles(capability: int, quantised: bool) -> dict[Form, Tile]:
    """The tiles of `attend` on one compute capability: what fits its shared memory and registers with nothing spilled.

    Quantised keys and values pass through registers on their way to the tensor cores, so their steps are smaller. Each
    warp converts them for itself, so a token's own program has no more warps where four have registers enough.
    """
    few = Tile(rows=16, slots=64, warps=4)
    forms: dict[Form, Tile] = {"one": replace(few, warps=8), "few": few}  # it prepares and joins besides
    if capability // 10 in (9, 10):  # 227 KB of shared memory, from which wgmma and tcgen05 read keys and values
        many = Tile(rows=128, slots=64 if quantised else 128, warps=8)
        forms["one"] = replace(few, warps=4 if quantised else 8)
        return {**forms, "some": Tile(rows=64, slots=64, warps=4), "many": many}
    many = Tile(rows=128, slots=32 if quantised else 64, warps=8)
    return {**forms, "some": Tile(rows=64, slots=32, warps=4), "many": many}


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """The spread of a call over the GPU: the form of `attend`, and its splits (1 where it is not split)."""

    form: Form
    splits: int = 1


class Plan:
    """The kernels of one geometry on one compute capability, and what a call launches of them.

    Layers whose geometries differ in numbers only (chunk, scale, epsilon) share kernels, which then have equal names.

    Args:
        geometry: The node's.
        capability: As in 89.

    Raises:
        BuildError: There are no kernels for this geometry on this GPU.
    """

    def __init__(self, geometry: Geometry, capability: int) -> None:
        if geometry.cache == "fp8" and capability < FP8_FROM:
            raise BuildError(
                f"an fp8 KV cache needs compute capability {FP8_FROM}, found {capability}: calibrate an int8 cache"
            )
        if geometry.head_dim > MOST_DIMS:
            raise BuildError(
                f"heads of {geometry.head_dim} dimensions: our kernels take {MOST_DIMS}, build with --gqa native"
            )
        self.geometry = geometry
        self.tiles = tiles(capability, geometry.cache != "none")
        self._parts = {
            "prepare": self._prepare(),
            **{f"attend_{form}": self._attend(form) for form in self.tiles if form != "one"},
            "decode": self._decode(),
            "combine": self._combine(),
        }

    @property
    def kernels(self) -> tuple[Kernel, ...]:
        """All kernels that calls may launch."""
        return tuple(self._parts.values())

    def schedule(self, batch: int, length: int, capacity: int) -> Schedule:
        """Chooses form and splits for B rows of S tokens over C slots.

        Splits share a row's real length equally, so a short row in a large cache keeps the GPU as busy.
        """
        heads = batch * self.geometry.attributes.kv_heads
        rows = length * self.geometry.group
        if rows > self.tiles["few"].rows and heads * ceil_divide(rows, self.tiles["many"].rows) >= PROGRAMS // 2:
            return Schedule(form="many")
        form: Form = "some" if rows > self.tiles["few"].rows else "one" if length == 1 else "few"
        programs = heads * ceil_divide(rows, self.tiles[form].rows)
        splits = min(max(PROGRAMS // programs, 1), MOST_SPLITS, max(capacity // LEAST_SLOTS, 1))
        return Schedule(form="many") if form == "some" and splits == 1 else Schedule(form=form, splits=splits)

    def workspace(self, batch: int, length: int, capacity: int, schedule: Schedule | None = None) -> dict[str, Buffer]:
        """Scratch memory of a call, by the names that `launches` looks up.

        Args:
            batch: Rows (B).
            length: Tokens of the padded piece (S).
            capacity: Slots of the cache (C).
            schedule: In place of the plan's own choice.
        """
        geometry, schedule = self.geometry, schedule or self.schedule(batch, length, capacity)
        heads, rows = geometry.attributes.kv_heads, length * geometry.group
        buffers = {}
        if schedule.form != "one":
            buffers["queries"] = Buffer(dtype=geometry.dtype, shape=(batch, heads, rows, geometry.head_dim))
        if schedule.form != "many":
            logs = (batch, heads, schedule.splits, rows)
            buffers["partial"] = Buffer(dtype="fp32", shape=(*logs, geometry.head_dim))
            buffers["partial_log"] = Buffer(dtype="fp32", shape=logs)
        return buffers

    def largest_workspace(self, batch: int, length: int, capacity: int) -> dict[str, Buffer]:
        """Scratch memory that is enough for every call of up to these sizes.

        A smaller call may need more than the largest: it is split more. But its programs are at most `PROGRAMS`, or
        one for each row and kv head, and none has more queries than its tile.
        """
        few, some = self.tiles["few"].rows, self.tiles["some"].rows
        rows = length * self.geometry.group
        queries = max(PROGRAMS, batch * self.geometry.attributes.kv_heads) * min(rows, few)
        if rows > few:
            queries = max(queries, PROGRAMS * some)
        buffers = self.workspace(batch, length, capacity, Schedule(form="many"))
        buffers["partial"] = Buffer(dtype="fp32", shape=(queries, self.geometry.head_dim))
        buffers["partial_log"] = Buffer(dtype="fp32", shape=(queries,))
        return buffers

    def launches(
        self,
        pointers: Mapping[str, Any],
        batch: int,
        length: int,
        capacity: int,
        schedule: Schedule | None = None,
    ) -> list[Launch]:
        """The launches of a call, in order.

        Args:
            pointers: The op's inputs, `output`, `counters` and the workspace's, by name. Caches are written in place.
            batch: Rows (B).
            length: Tokens of the padded piece (S).
            capacity: Slots of the cache (C).
            schedule: In place of the plan's own choice.
        """
        a, group = self.geometry.attributes, self.geometry.group
        schedule = schedule or self.schedule(batch, length, capacity)
        rows = length * group
        values: dict[str, Any] = {
            **pointers,
            "length": length,
            "capacity": capacity,
            "chunk": a.chunk,
            "eps": a.qk_norm_eps,
            "temperature_scale": a.temperature_scale,
            "temperature_floor": a.temperature_floor,
            "scale": a.scale * math.log2(math.e) / FOLD[self.geometry.cache],
            "splits": schedule.splits,
        }
        grids = (
            {"decode": schedule.splits}
            if schedule.form == "one"
            else {
                "prepare": ceil_divide(length, STEPS),
                f"attend_{schedule.form}": ceil_divide(rows, self.tiles[schedule.form].rows) * schedule.splits,
            }
        )
        if schedule.form in ("few", "some"):
            grids["combine"] = rows
        return [
            Launch(
                kernel=self._parts[part].name,
                grid=(programs, a.kv_heads, batch),
                arguments=tuple(values[name] for name in self._parts[part].signature),
            )
            for part, programs in grids.items()
        ]

    def _name(self, part: str) -> str:
        """A kernel's name, which says all that its code hangs on."""
        g, a = self.geometry, self.geometry.attributes
        words = ["gqa", part, g.dtype, f"{a.heads}x{a.kv_heads}x{g.head_dim}"]
        if part != "combine" and g.cache != "none":
            words.append(g.cache)
        if part in ("prepare", "decode"):
            flags = {"fused": g.fused, "rope": g.rope, "norm": a.qk_norm_eps, "temperature": a.temperature_scale}
            words += [word for word, flag in flags.items() if flag]
        return "_".join(words)

    def _prepare(self) -> Kernel:
        signature, constants = typed(
            **self._tensors,
            queries=self._activations,
            **dict.fromkeys(("length", "capacity", "chunk"), "i32"),
            **dict.fromkeys(("eps", "temperature_scale", "temperature_floor"), "fp32"),
        )
        constants |= {**self._flags, "STEPS": STEPS, "PAIRS": self._block_dim // 2}
        return Kernel(
            name=self._name("prepare"), function="prepare", signature=signature, constants=constants | self._heads
        )

    def _attend(self, form: Form) -> Kernel:
        tile, split = self.tiles[form], form != "many"
        signature, constants = typed(
            queries=self._activations,
            **dict.fromkeys(("key_cache", "value_cache"), self._cache),
            past_lengths="*i32",
            value_scale=self._scales,
            output=None if split else self._activations,
            **dict.fromkeys(("partial", "partial_log"), "*fp32" if split else None),
            **dict.fromkeys(("length", "capacity", "chunk"), "i32"),
            scale="fp32",
            splits="i32" if split else None,
        )
        constants |= {"BLOCK_M": tile.rows, "BLOCK_N": tile.slots, "BLOCK_D": self._block_dim}
        return Kernel(
            name=self._name(f"attend_{form}"),
            function="attend",
            signature=signature,
            constants=constants | self._heads,
            warps=tile.warps,
            stages=STAGES,
        )

    def _decode(self) -> Kernel:
        tile, group = self.tiles["one"], power_of_two(self.geometry.group)
        signature, constants = typed(
            **self._tensors,
            output=self._activations,
            **dict.fromkeys(("partial", "partial_log"), "*fp32"),
            counters="*i32",
            **dict.fromkeys(("capacity", "chunk"), "i32"),
            **dict.fromkeys(("eps", "temperature_scale", "temperature_floor", "scale"), "fp32"),
            splits="i32",
        )
        constants |= {
            **self._flags,
            **{"BLOCK_M": tile.rows, "BLOCK_N": tile.slots, "BLOCK_D": self._block_dim, "BLOCK_GROUP": group},
            **{"BLOCK_SPLITS": max(128 // group, 4), "MOST_SPLITS": MOST_SPLITS},
        }
        return Kernel(
            name=self._name("decode"),
            function="decode",
            signature=signature,
            constants=constants | self._heads,
            warps=tile.warps,
            stages=STAGES,
        )

    def _combine(self) -> Kernel:
        signature, constants = typed(
            **dict.fromkeys(("partial", "partial_log"), "*fp32"),
            output=self._activations,
            **dict.fromkeys(("length", "splits"), "i32"),
        )
        constants |= {"BLOCK_D": self._block_dim, "MOST_SPLITS": MOST_SPLITS, "BLOCK_SPLITS": BLOCK_SPLITS}
        return Kernel(
            name=self._name("combine"), function="combine", signature=signature, constants=constants | self._heads
        )

    @property
    def _tensors(self) -> dict[str, str | None]:
        """Types of the op's inputs."""
        return {
            **dict.fromkeys(("query", "key", "value"), self._activations),
            **dict.fromkeys(("key_cache", "value_cache"), self._cache),
            "past_lengths": "*i32",
            "inv_freq": "*fp32" if self.geometry.rope else None,
            **dict.fromkeys(("key_scale", "value_scale"), self._scales),
        }

    @property
    def _flags(self) -> dict[str, Any]:
        g, a = self.geometry, self.geometry.attributes
        return {
            **{"NORM": bool(a.qk_norm_eps), "TEMPERATURE": bool(a.temperature_scale)},
            **{"LARGEST": LARGEST[g.cache], "FOLD": FOLD[g.cache], "FUSED": g.fused},
        }

    @property
    def _activations(self) -> str:
        return f"*{self.geometry.dtype}"

    @property
    def _cache(self) -> str:
        return f"*{STORED.get(self.geometry.cache, self.geometry.dtype)}"

    @property
    def _scales(self) -> str | None:
        return None if self.geometry.cache == "none" else "*fp32"

    @property
    def _heads(self) -> dict[str, int]:
        geometry = self.geometry
        return {
            "KV_HEADS": geometry.attributes.kv_heads,
            "GROUP": geometry.group,
            "HEAD_DIM": geometry.head_dim,
        }

    @property
    def _block_dim(self) -> int:
        """The head dim as the kernels pad it: a power of two, and 16 at least for the tensor cores."""
        return max(16, power_of_two(self.geometry.head_dim))


def typed(**types: str | None) -> tuple[dict[str, str], dict[str, Any]]:
    """A kernel's signature, and None for the parameters that this specialisation has not."""
    signature = {name: kind for name, kind in types.items() if kind}
    return signature, {name: None for name in types if name not in signature}
