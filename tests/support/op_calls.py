"""Single-node graphs of the CPU's own ops, as data: attributes and tensors that fit one another, drawn from a seed."""

import os
import struct
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np

from arriero.runtime.ranks.segment import HEAD, HEADER, LINE, MAGIC, MOST_RANKS

Array = np.ndarray[Any, Any]
Rng = np.random.Generator

INPUTS = {
    "AllReduce": ("part", "group"),
    "Linear": ("x", "weight", "scale", "x_scale"),
    "PlainLinear": ("x", "weight"),
    "MoeDispatch": (
        "hidden",
        "router_logits",
        "gate_up",
        "gate_up_scale",
        "down",
        "down_scale",
        "hidden_scale",
        "activated_scale",
    ),
    "PlainMoeDispatch": ("hidden", "router_logits", "gate_up", "down"),
    "Fp8Linear": ("x", "weight", "scale", "x_scale"),
    "GroupedQueryAttention": (
        "query",
        "key",
        "value",
        "key_cache",
        "value_cache",
        "past_lengths",
        "inv_freq",
        "key_scale",
        "value_scale",
    ),
}
INPUTS["Fp8MoeDispatch"] = INPUTS["MoeDispatch"]
PRODUCTS = ("Linear", "PlainLinear", "Fp8Linear", "MoeDispatch", "PlainMoeDispatch", "Fp8MoeDispatch")
OUTPUTS = (
    {"AllReduce": ("total",)}
    | dict.fromkeys(PRODUCTS, ("output",))
    | {"GroupedQueryAttention": ("output", "present_key", "present_value")}
)
LINE_OF = "<IIiIQQ"
"""The beginning of a line: a rank's turn, who sleeps, its process, a word, what it brings of even and odd turns."""

CACHES = ("float32", "float16", "int8", "fp8", "groups8", "groups4")
BFLOAT16, E4M3 = np.dtype(ml_dtypes.bfloat16), np.dtype(ml_dtypes.float8_e4m3fn)


@dataclass(kw_only=True)
class OpCall:
    """One call of an op.

    Attributes:
        tensors: The inputs by name; one that is absent or None is not given.
        constants: Names of inputs that are initializers.
        outputs: Names of the outputs, empty ones left out.
        misaligned: Name of an input that lies at an odd address.
        in_place: Whether caches are written where they are read.
        is_wild: Whether values are such that only their memory is looked after.
        changes: How the call departs from one that fits.
    """

    op: str
    attributes: dict[str, Any]
    tensors: dict[str, Array | None]
    constants: set[str] = field(default_factory=set)
    outputs: tuple[str, ...] = ()
    misaligned: str = ""
    in_place: bool = False
    is_wild: bool = False
    changes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.outputs = self.outputs or OUTPUTS[self.op]

    def given(self, name: str) -> Array | None:
        return self.tensors.get(name)


def normal(rng: Rng, *shape: int) -> Array:
    return rng.standard_normal(shape).astype(np.float32)


def random_bytes(rng: Rng, *shape: int) -> Array:
    return rng.integers(0, 256, shape, dtype=np.uint8)


def matrix(rng: Rng, bits: int, group: int, size: tuple[int, int], experts: int = 0) -> tuple[Array, Array | None]:
    """A weight in panels, random in its padding too, and its scales."""
    inputs, outputs = size
    front, panels, padded = (experts,) if experts else (), -(-outputs // 32), -(-inputs // 32) * 32
    if bits >= 16:
        values = normal(rng, *front, panels, padded * 32)
        return (values if bits == 32 else values.astype(BFLOAT16)).view(np.uint8), None
    weight = random_bytes(rng, *front, panels, padded * 32 * bits // 8)
    scale = rng.uniform(0.01, 0.03, (*front, panels, inputs // group if group else 1, 32)).astype(np.float32)
    return weight, scale.astype(BFLOAT16) if rng.random() < 0.5 else scale


def linear(rng: Rng, bits: int | None = None) -> OpCall:
    bits = bits or int(rng.choice([4, 8, 16, 32]))
    group = 8 * int(rng.integers(1, 9)) if bits < 16 and rng.random() < 0.6 else 0
    inputs = group * int(rng.integers(1, 5)) if group else int(rng.integers(1, 130))
    outputs = int(rng.integers(1, 100))
    weight, scale = matrix(rng, bits, group, (inputs, outputs))
    front = tuple(int(size) for size in rng.integers(0 if rng.random() < 0.1 else 1, 9, int(rng.integers(0, 3))))
    static = np.float32(rng.uniform(0.005, 0.03)) if bits < 16 and rng.random() < 0.4 else None
    return OpCall(
        op="Linear",
        attributes={"bits": bits, "group": group, "outputs": outputs},
        tensors={
            "x": normal(rng, *front, inputs),
            "weight": weight,
            "scale": scale,
            "x_scale": None if static is None else np.array(static).reshape(() if rng.random() < 0.5 else (1,)),
        },
    )


def plain_linear(rng: Rng, dtype: Any = None) -> OpCall:
    dtype = dtype or (np.float32, np.float16, BFLOAT16)[int(rng.integers(3))]
    inputs, outputs = (
        int(rng.integers(1, 130) if rng.random() < 0.8 else rng.integers(500, 1100)),
        int(rng.integers(1, 100)),
    )
    front = tuple(int(size) for size in rng.integers(0 if rng.random() < 0.1 else 1, 9, int(rng.integers(0, 3))))
    tensors: dict[str, Array | None] = {
        "x": normal(rng, *front, inputs),
        "weight": normal(rng, outputs, inputs).astype(dtype),
    }
    return OpCall(op="PlainLinear", attributes={}, tensors=tensors)


def experts(rng: Rng, bits: int | None = None) -> OpCall:
    bits = bits or int(rng.choice([4, 8]))
    group, down_group = (8 * int(rng.integers(1, 6)) if rng.random() < 0.5 else 0 for _ in range(2))
    hidden = group * int(rng.integers(1, 4)) if group else int(rng.integers(1, 80))
    width = down_group * int(rng.integers(1, 4)) if down_group else int(rng.integers(1, 60))
    routed, tokens = int(rng.integers(1, 10)), int(rng.integers(0 if rng.random() < 0.1 else 1, 20))
    held = int(rng.integers(1, routed + 1)) if rng.random() < 0.5 else routed
    gate_up, gate_up_scale = matrix(rng, bits, group, (hidden, 2 * width), held)
    down, down_scale = matrix(rng, bits, down_group, (width, hidden), held)
    statics = [rng.uniform(0.005, 0.03, held).astype(np.float32) if rng.random() < 0.4 else None for _ in range(2)]
    tensors = [normal(rng, tokens, hidden), normal(rng, tokens, routed), gate_up, gate_up_scale, down, down_scale]
    return OpCall(
        op="MoeDispatch",
        attributes={
            "bits": bits,
            "group": group,
            "down_group": down_group,
            "top_k": int(rng.integers(1, routed + 1)) if rng.random() < 0.5 else 1,
            "first_expert": int(rng.integers(0, routed - held + 1)),
            "experts": held,
            "width": width,
        },
        tensors=dict(zip(INPUTS["MoeDispatch"], [*tensors, *statics], strict=True)),
    )


def plain_experts(rng: Rng, dtype: Any = None) -> OpCall:
    types = (np.float32, np.float16, BFLOAT16)
    into, back = (dtype or types[int(rng.integers(3))] for _ in range(2))
    hidden, width = (int(rng.integers(1, 80) if rng.random() < 0.8 else rng.integers(250, 600)) for _ in range(2))
    routed, tokens = int(rng.integers(1, 10)), int(rng.integers(0 if rng.random() < 0.1 else 1, 40))
    held = int(rng.integers(1, routed + 1)) if rng.random() < 0.5 else routed
    return OpCall(
        op="PlainMoeDispatch",
        attributes={
            "top_k": int(rng.integers(1, routed + 1)) if rng.random() < 0.5 else 1,
            "first_expert": int(rng.integers(0, routed - held + 1)),
        },
        tensors={
            "hidden": normal(rng, tokens, hidden),
            "router_logits": normal(rng, tokens, routed),
            "gate_up": (normal(rng, held, hidden, 2 * width) / hidden**0.5).astype(into),
            "down": (normal(rng, held, width, hidden) / width**0.5).astype(back),
        },
    )


def e4m3(rng: Rng, *shape: int) -> Array:
    """Numbers in E4M3, of each size and sign."""
    bits = rng.integers(0, 127, shape, dtype=np.uint8) | rng.integers(0, 2, shape, dtype=np.uint8) << 7
    return bits.view(E4M3)


def fp8_linear(rng: Rng) -> OpCall:
    inputs = int(rng.integers(1, 130) if rng.random() < 0.8 else rng.integers(500, 2200))
    outputs = int(rng.integers(1, 100))
    front = tuple(int(size) for size in rng.integers(0 if rng.random() < 0.1 else 1, 9, int(rng.integers(0, 3))))
    static = np.array(np.float32(rng.uniform(0.001, 0.01))) if rng.random() < 0.4 else None
    return OpCall(
        op="Fp8Linear",
        attributes={"bound": float(rng.choice([0, 1.5]))},
        tensors={
            "x": normal(rng, *front, inputs),
            "weight": e4m3(rng, outputs, inputs),
            "scale": rng.uniform(0.001, 0.003, outputs).astype(np.float32),
            "x_scale": static if static is None or rng.random() < 0.5 else static.reshape(1),
        },
    )


def fp8_experts(rng: Rng) -> OpCall:
    hidden, width = (int(rng.integers(1, 80) if rng.random() < 0.8 else rng.integers(250, 600)) for _ in range(2))
    routed, tokens = int(rng.integers(1, 10)), int(rng.integers(0 if rng.random() < 0.1 else 1, 40))
    held = int(rng.integers(1, routed + 1)) if rng.random() < 0.5 else routed
    statics = [rng.uniform(0.001, 0.01, held).astype(np.float32) if rng.random() < 0.4 else None for _ in range(2)]
    tensors = [
        normal(rng, tokens, hidden),
        normal(rng, tokens, routed),
        e4m3(rng, held, 2 * width, hidden),
        (rng.uniform(0.005, 0.015, (held, 2 * width, 1)) / hidden**0.5).astype(np.float32),
        e4m3(rng, held, hidden, width),
        (rng.uniform(0.005, 0.015, (held, hidden, 1)) / width**0.5).astype(np.float32),
    ]
    return OpCall(
        op="Fp8MoeDispatch",
        attributes={
            "top_k": int(rng.integers(1, routed + 1)) if rng.random() < 0.5 else 1,
            "first_expert": int(rng.integers(0, routed - held + 1)),
            "bound": float(rng.choice([0, 1.5])),
        },
        tensors=dict(zip(INPUTS["Fp8MoeDispatch"], [*tensors, *statics], strict=True)),
    )


def attention(rng: Rng, cache: str | None = None) -> OpCall:
    cache = cache or str(rng.choice(CACHES))
    kv_heads, batch = int(rng.integers(1, 4)), int(rng.integers(0 if rng.random() < 0.1 else 1, 4))
    heads, length = kv_heads * int(rng.integers(1, 5)), int(rng.integers(0 if rng.random() < 0.1 else 1, 10))
    has_rope = rng.random() < 0.5
    dim = 2 * int(rng.integers(1, 40)) if has_rope else int(rng.integers(1, 80))
    capacity = length + int(rng.integers(1, 150))
    chunk = int(rng.integers(1, 40)) if rng.random() < 0.5 else 0
    slots = rng.integers(0, min(chunk - 1 if chunk else capacity, capacity - length) + 1, batch)
    past = slots + (chunk * rng.integers(0, 50, batch) if chunk else 0)
    tensors: dict[str, Array | None] = {
        "query": normal(rng, batch, length, heads * dim),
        "key": normal(rng, batch, length, kv_heads * dim),
        "value": normal(rng, batch, length, kv_heads * dim),
        "key_cache": filled_cache(rng, cache, (batch, kv_heads, capacity, dim)),
        "value_cache": filled_cache(rng, cache, (batch, kv_heads, capacity, dim)),
        "past_lengths": past.astype(np.int32),
        "inv_freq": (1 / 1000 ** (np.arange(0, dim, 2) / dim)).astype(np.float32) if has_rope else None,
    }
    if cache in ("int8", "fp8"):
        low, high = (0.01, 0.04) if cache == "int8" else (0.004, 0.01)
        for name in ("key_scale", "value_scale"):
            tensors[name] = rng.uniform(low, high, (kv_heads, dim)).astype(np.float32)
    attributes = {
        "heads": heads,
        "kv_heads": kv_heads,
        "chunk": chunk,
        "scale": dim**-0.5,
        "qk_norm_eps": 1e-5 if rng.random() < 0.5 else 0.0,
        "temperature_scale": 0.1 if rng.random() < 0.5 else 0.0,
        "temperature_floor": 4.0,
        "cache_bits": int(cache.removeprefix("groups")) if cache.startswith("groups") else 0,
    }
    return OpCall(op="GroupedQueryAttention", attributes=attributes, tensors=tensors, in_place=bool(rng.random() < 0.5))


def filled_cache(rng: Rng, cache: str, shape: tuple[int, int, int, int]) -> Array:
    """Keys or values that are there before the call, plausible ones in every slot."""
    if cache == "float32":
        return normal(rng, *shape)
    if cache == "float16":
        return normal(rng, *shape).astype(np.float16)
    if cache == "int8":
        return random_bytes(rng, *shape).view(np.int8)
    if cache == "fp8":
        return (random_bytes(rng, *shape) & np.uint8(0xBF)).view(E4M3)
    groups, bits = -(-shape[3] // 32), int(cache.removeprefix("groups"))
    values = random_bytes(rng, *shape[:3], groups * 4 * bits)
    scales = rng.uniform(0.005, 0.02, (*shape[:3], groups, 1)) * (1 if bits == 8 else 10)
    parts = [scales, normal(rng, *shape[:3], groups, 1) - 1] if bits == 4 else [scales]
    halves = np.concatenate(parts, -1).astype(BFLOAT16).reshape(*shape[:3], groups * len(parts))
    return np.concatenate([values, np.ascontiguousarray(halves).view(np.uint8)], -1)


def all_reduce(rng: Rng) -> OpCall:
    """A sum whose other ranks have brought their parts for all turns that there are."""
    ranks = int(rng.integers(1, 5))
    rank, capacity, turns = int(rng.integers(ranks)), int(rng.integers(1, 40)), int(rng.integers(1, 4))
    count = capacity * turns if turns > 1 else int(rng.integers(1, capacity + 1))
    group = np.zeros(HEAD + MOST_RANKS * LINE + 2 * ranks * capacity * 4, np.uint8)
    group[: HEADER.size] = np.frombuffer(HEADER.pack(MAGIC, ranks, 0, capacity, 1, 0), np.uint8)
    brought = count if turns == 1 else capacity
    for other in range(ranks):
        line = struct.pack(LINE_OF, 0, 0, os.getpid(), 0, 0, 0)
        if other != rank:
            line = struct.pack(LINE_OF, 1 << 20, 0, 0, 0, brought, brought)
        group[HEAD + other * LINE :][: len(line)] = np.frombuffer(line, np.uint8)
    group[HEAD + MOST_RANKS * LINE :] = normal(rng, 2 * ranks * capacity).view(np.uint8)
    shape = (count,) if rng.random() < 0.5 else (1, count, 1)
    return OpCall(
        op="AllReduce",
        attributes={"ranks": ranks, "rank": rank},
        tensors={"part": normal(rng, *shape), "group": group},
    )


DRAWN = {
    "AllReduce": all_reduce,
    "Linear": linear,
    "PlainLinear": plain_linear,
    "MoeDispatch": experts,
    "PlainMoeDispatch": plain_experts,
    "GroupedQueryAttention": attention,
    "Fp8Linear": fp8_linear,
    "Fp8MoeDispatch": fp8_experts,
}


def drawn(rng: Rng) -> OpCall:
    """A call that fits."""
    return DRAWN[str(rng.choice(list(DRAWN), p=[0.1, 0.1, 0.1, 0.1, 0.1, 0.3, 0.1, 0.1]))](rng)
