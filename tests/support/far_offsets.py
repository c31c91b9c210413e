"""Each GPU kernel over arrays of more than 2^32 elements beside the same call over small ones, interpreted.

Enter: forms and ways. Leave: what a call left near the beginning of its arrays, and what the same call left far behind
it, which is equal unless an offset was taken in 32 bits. Memory that no kernel touches is not there, and of a grid only
the programs run that write what is compared. To be used in a process whose Triton interprets; see `gpu_process`.
"""

import contextlib
import ctypes
import itertools
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
from executed_kernels import MODULES, Memory, interpret

from arriero.plugins.gqa import plan as gqa
from arriero.plugins.gqa.op import Attributes as Attention
from arriero.plugins.launch import BYTES, COUNTERS, Kernel, Launch
from arriero.plugins.moe import plan as moe
from arriero.plugins.moe.kernel_geometry import Geometry
from arriero.plugins.moe.op import Attributes as Experts
from arriero.plugins.shortlist import plan as shortlist

Array = np.ndarray[Any, Any]
Program = tuple[int, int, int]

CAPABILITY = 90
PERIOD = 1_000_003
"""Values after which a drawn array begins again: large arrays are quickly filled, and no two rows are alike."""


class Held(NamedTuple):
    """An array of the GPU's memory: address, type in Triton's words, shape."""

    address: int
    dtype: str
    shape: tuple[int, ...]


class Arrays:
    """Arrays by name in memory that is zero; `launch` runs programs over them."""

    def __init__(self, kernels: Iterable[Kernel], module: str) -> None:
        self.memory, self.held = Memory(), dict[str, Held]()
        self.kernels = {kernel.name: kernel for kernel in kernels}
        MODULES.update(dict.fromkeys(self.kernels, module))

    def add(self, name: str, dtype: str, shape: tuple[int, ...]) -> None:
        size = int(np.prod(shape, dtype=np.int64)) * BYTES[dtype]
        self.held[name] = Held(self.memory.allocate(size), dtype, shape)
        if size <= 64 << 20:  # which the memory has filled; larger is zero
            ctypes.memset(self.held[name].address, 0, size)

    def _place(self, name: str, index: tuple[int, ...]) -> tuple[int, int]:
        """Where a part begins that leading indices choose, and its bytes."""
        address, dtype, shape = self.held[name]
        first = sum(each * int(np.prod(shape[axis + 1 :], dtype=np.int64)) for axis, each in enumerate(index))
        return address + first * BYTES[dtype], int(np.prod(shape[len(index) :], dtype=np.int64)) * BYTES[dtype]

    def write(self, name: str, index: tuple[int, ...], values: Array) -> None:
        address, size = self._place(name, index)
        bits = np.resize(np.ascontiguousarray(values).view(np.uint8).ravel(), size)
        ctypes.memmove(address, bits.ctypes.data, size)

    def read(self, name: str, index: tuple[int, ...]) -> Array:
        address, size = self._place(name, index)
        return np.frombuffer(ctypes.string_at(address, size), np.uint8)

    @property
    def addresses(self) -> dict[str, int]:
        return {name: each.address for name, each in self.held.items()}

    def launch(self, launch: Launch, programs: Iterable[Program]) -> None:
        kernel, programs = self.kernels[launch.kernel], list(programs)
        values = dict(zip(kernel.signature, launch.arguments, strict=True))
        with told(launch.grid, programs):
            interpret(kernel, (len(programs), 1, 1), values, self.memory)


@contextlib.contextmanager
def told(grid: Program, programs: list[Program]) -> Iterator[None]:
    """Has the interpreter run some programs of a grid only: it tells them other numbers than those it counts up."""
    from triton.runtime.interpreter import InterpreterBuilder

    index, size = InterpreterBuilder.set_grid_idx, InterpreterBuilder.set_grid_dim
    with (
        patch.object(InterpreterBuilder, "set_grid_dim", lambda self, *_: size(self, *grid)),
        patch.object(InterpreterBuilder, "set_grid_idx", lambda self, x, *_: index(self, *programs[x])),
    ):
        yield


def drawn(dtype: str) -> Array:
    """Values of a type to fill arrays with."""
    rng = np.random.default_rng(0)
    if dtype in ("bf16", "fp16", "fp32"):
        values = rng.standard_normal(PERIOD).astype(np.float32) / 16
        return values.astype(np.float16) if dtype == "fp16" else (values if dtype == "fp32" else bf16(values))
    return rng.integers(0, 256, PERIOD, np.uint8) & np.uint8(0xBF if dtype == "fp8e4nv" else 0xFF)  # E4M3's below 2


def bf16(values: Array) -> Array:
    """The upper halves of float32."""
    return (values.view(np.uint32) >> 16).astype(np.uint16)


def experts(kind: Any, way: str, group: int = 0, top_k: int = 1) -> tuple[Array, Array]:
    """Experts of Maverick's size, by any way. Returns the output of one token near and far, as bytes: the only token of
    two experts, at the second of them, and the last of a million pairs (of few, where few are wanted) at the last of
    128. Only the last columns of each product are there."""
    many = 1 if way == "few" else 1_000_000 // top_k
    return _expert(kind, way, group, top_k, 2, 1), _expert(kind, way, group, top_k, 128, many)


def _expert(kind: Any, way: str, group: int, top_k: int, count: int, tokens: int) -> Array:
    attributes = Experts(top_k=top_k, quantisation=kind)
    geometry = Geometry(hidden=5120, expert_size=8192, experts=count, attributes=attributes, group=group)
    plan = moe.Plan(geometry, CAPABILITY, few=16 if way == "few" else 0, some=0 if way == "many" else 1 << 20)
    arrays, types, pack = Arrays(plan.kernels, moe.MODULE), geometry.types, 2 if kind == "int4" else 1
    shapes: dict[str, tuple[int, ...]] = {"hidden": (tokens, 5120), "output": (tokens, 5120)}
    shapes |= {"router_logits": (tokens, count), "counters": (COUNTERS,)}
    for name, (depth, width) in geometry.weight_sizes.items():
        shapes[name] = (count, depth * width // pack)
        if kind != "none":
            shapes[f"{name}_scale"] = (count, width * (depth // group if group else 1))
    for name, shape in shapes.items():
        arrays.add(name, types[name], shape)
    for name, buffer in plan.workspace(tokens).items():
        arrays.add(name, buffer.dtype, buffer.shape)
    for name in ("gate_up", "down", "gate_up_scale", "down_scale"):
        if name in shapes:
            values = drawn(types[name])
            arrays.write(name, (count - 1,), np.abs(values) if name.endswith("scale") else values)
    arrays.write("hidden", (tokens - 1,), drawn("bf16"))
    arrays.write("router_logits", (tokens - 1, count - 1), bf16(np.ones(1, np.float32)))
    for launch in plan.launches(arrays.addresses, tokens):
        arrays.launch(launch, last_programs(arrays.kernels[launch.kernel], launch.grid, tokens, top_k, count))
    return arrays.read("output", (tokens - 1,))


def last_programs(kernel: Kernel, grid: Program, tokens: int, top_k: int, experts: int) -> list[Program]:
    """Of a launch those programs that serve the last token's first choice, and of its product's columns the last."""
    match kernel.function:
        case "route":
            return [(tokens - 1, 0, 0)]
        case "arrange":
            return [(experts - 1, 0, 0)]
        case "quantise_rows":
            return [((tokens - 1) * top_k, 0, 0)]
        case "combine":
            return [(tokens - 1, block, 0) for block in range(grid[1])]
        case "gate_and_up_few" | "down_few":  # the first one says who is served
            every = itertools.product(range(grid[1]), range(grid[2]))
            return [(0, 0, pair) for pair in range(grid[2])] + [(grid[0] - 1, *each) for each in every]
    rows = kernel.constants["BLOCK_M"]
    tiles = moe.most_tiles(tokens * top_k, experts, rows)
    tile = -(-(tokens * top_k - 1) // rows)  # behind those of expert 0, which has all other pairs
    across, first = grid[0] // tiles, tile // 8 * 8
    return [(first * across + (across - 1) * min(tiles - first, 8) + tile - first, 0, 0)]


def slots(form: Any) -> tuple[Array, Array]:
    """Attention over caches of 64 slots and of 10 M, by any form: outputs and the slots that were written, as bytes."""
    length = {"one": 1, "few": 3, "some": 20, "many": 40}[form]
    return _attention(form, length, 64), _attention(form, length, 10_000_000)


def _attention(form: Any, length: int, capacity: int) -> Array:
    attributes = Attention(heads=4, kv_heads=2, scale=0.1, qk_norm_eps=1e-5)
    geometry = gqa.Geometry(attributes=attributes, head_dim=128, rope=False, dtype="fp16", cache="int8")
    plan, batch = gqa.Plan(geometry, CAPABILITY), 3
    schedule = gqa.Schedule(form=form, splits=1 if form == "many" else 2)
    arrays = Arrays(plan.kernels, gqa.MODULE)
    for name, heads in (("query", 4), ("key", 2), ("value", 2), ("output", 4)):
        arrays.add(name, "fp16", (batch, length, heads * 128))
        if name != "output":
            arrays.write(name, (), drawn("fp16")[PERIOD // 2 :] * 16)
    for name in ("key", "value"):
        arrays.add(f"{name}_cache", "i8", (batch, 2, capacity, 128))
        arrays.add(f"{name}_scale", "fp32", (2, 128))
        arrays.write(f"{name}_scale", (), np.full(1, 0.02, np.float32))
        for row in range(batch):
            for head in range(2):
                for slot in range(7):
                    arrays.write(f"{name}_cache", (row, head, slot), drawn("i8")[slot * 128 :])
    past = np.array([3, 5, 7], np.int32)
    arrays.add("past_lengths", "i32", (batch,))
    arrays.write("past_lengths", (), past)
    arrays.add("counters", "i32", (COUNTERS,))
    for name, buffer in plan.workspace(batch, length, capacity, schedule).items():
        arrays.add(name, buffer.dtype, buffer.shape)
    for launch in plan.launches(arrays.addresses, batch, length, capacity, schedule):
        arrays.launch(launch, [(x, y, z) for z in range(batch) for y in range(2) for x in range(launch.grid[0])])
    written = [
        arrays.read(f"{name}_cache", (row, head, int(past[row]) + step))
        for name in ("key", "value") for row in range(batch) for head in range(2) for step in range(length)
    ]  # fmt: skip
    return np.concatenate([arrays.read("output", ()), *written])


def logits() -> tuple[Array, Array]:
    """The shortlist of the only row of Llama 4's logits, and of the last of 22,000, as bytes: of two blocks of it."""
    return _shortlist(1), _shortlist(22_000)


def _shortlist(rows: int) -> Array:
    plan = shortlist.Plan(202_048)
    arrays = Arrays(plan.kernels, shortlist.MODULE)
    for name, dtype, shape in (
        ("logits", "fp32", (rows, 202_048)), ("sharpness", "fp32", (rows,)), ("shortlist", "i32", (rows, 132))
    ):  # fmt: skip
        arrays.add(name, dtype, shape)
    for name, buffer in plan.workspace(rows).items():
        arrays.add(name, buffer.dtype, buffer.shape)
    arrays.write("logits", (rows - 1,), drawn("fp32"))
    arrays.write("sharpness", (rows - 1,), np.ones(1, np.float32))
    shorten, join = plan.launches(arrays.addresses, rows)
    arrays.launch(shorten, [(block, rows - 1, 0) for block in (0, plan.blocks - 1)])
    arrays.launch(join, [(rows - 1, 0, 0)])
    return arrays.read("shortlist", (rows - 1,))
