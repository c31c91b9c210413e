"""The cases over which every implementation of grouped-query attention is held against its meaning."""

import dataclasses
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..quantisation import LARGEST, Kind, quantise
from .op import Attributes


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One call of the op: its attributes and the numbers that fix its inputs' shapes.

    Attributes:
        past: Tokens already in each row's cache.
        length: Tokens of the padded piece (S).
        capacity: Slots of the cache (C).
        rope: Whether queries and keys are rotated.
        cache: `none`, or how the caches are quantised: `int8` or `fp8`.
    """

    name: str
    attributes: Attributes
    past: tuple[int, ...]
    length: int
    capacity: int
    head_dim: int = 8
    rope: bool = True
    cache: Kind = "none"

    def inputs(self) -> dict[str, np.ndarray[Any, Any] | None]:
        """The op's inputs by name, floats in float32, caches as they are stored; equal at every call."""
        rng = np.random.default_rng(zlib.crc32(self.name.encode()))
        a, batch = self.attributes, len(self.past)

        def normal(*shape: int) -> np.ndarray[Any, Any]:
            return rng.standard_normal(shape).astype(np.float32)

        exponent = np.arange(0, self.head_dim, 2) / self.head_dim
        inputs: dict[str, np.ndarray[Any, Any] | None] = {
            "query": normal(batch, self.length, a.heads * self.head_dim),
            "key": normal(batch, self.length, a.kv_heads * self.head_dim),
            "value": normal(batch, self.length, a.kv_heads * self.head_dim),
            "key_cache": normal(batch, a.kv_heads, self.capacity, self.head_dim),
            "value_cache": normal(batch, a.kv_heads, self.capacity, self.head_dim),
            "past_lengths": np.array(self.past, dtype=np.int32),
            "inv_freq": (1 / 10000**exponent).astype(np.float32) if self.rope else None,
        }
        if self.cache != "none":
            for name in ("key", "value"):  # largest values of 2.5: some of the normal draws saturate
                spread_KD = rng.uniform(0.5, 1.5, (a.kv_heads, self.head_dim))
                scale_KD = (spread_KD * 2.5 / LARGEST[self.cache]).astype(np.float32)
                inputs[f"{name}_scale"] = scale_KD
                cache = normal(batch, a.kv_heads, self.capacity, self.head_dim)
                inputs[f"{name}_cache"] = quantise(cache, scale_KD[:, None], self.cache)
        return inputs


def _attributes(heads: int = 4, kv_heads: int = 2, head_dim: int = 8, **other: Any) -> Attributes:
    return Attributes(heads=heads, kv_heads=kv_heads, scale=head_dim**-0.5, **other)


CHUNKED = _attributes(chunk=16, qk_norm_eps=1e-5)
FULL = _attributes(temperature_scale=0.1, temperature_floor=4.0)

CASES = (
    Case(name="first piece, chunked", attributes=CHUNKED, past=(0,), length=7, capacity=16),
    Case(name="first piece of a whole chunk", attributes=CHUNKED, past=(0, 0), length=16, capacity=16),
    Case(name="later piece, chunked", attributes=CHUNKED, past=(5,), length=6, capacity=16),
    Case(name="piece that fills its chunk", attributes=CHUNKED, past=(42,), length=6, capacity=16),
    Case(name="piece that starts a chunk", attributes=CHUNKED, past=(32,), length=9, capacity=16),
    Case(name="decode, chunked, ragged", attributes=CHUNKED, past=(0, 3, 15, 16, 31, 100), length=1, capacity=16),
    Case(name="ragged pieces with slack for pads", attributes=CHUNKED, past=(3, 16, 26), length=5, capacity=20),
    Case(name="no norm, as in Maverick", attributes=_attributes(chunk=16), past=(17, 2), length=4, capacity=16),
    Case(name="rope in a full layer", attributes=_attributes(), past=(9,), length=4, capacity=32),
    Case(name="first piece, full", attributes=FULL, past=(0, 0), length=12, capacity=24, rope=False),
    Case(name="later piece, full", attributes=FULL, past=(30,), length=9, capacity=64, rope=False),
    Case(name="decode, full, ragged", attributes=FULL, past=(0, 1, 3, 4, 47), length=1, capacity=48, rope=False),
    Case(name="ragged pieces, full", attributes=FULL, past=(0, 11, 40), length=6, capacity=48, rope=False),
    Case(name="no temperature", attributes=_attributes(), past=(20,), length=3, capacity=32, rope=False),
    Case(name="as many kv heads as heads", attributes=_attributes(3, 3, chunk=8), past=(8, 4), length=4, capacity=8),
    Case(name="one kv head", attributes=_attributes(5, 1), past=(6, 0), length=3, capacity=16, rope=False),
    Case(
        name="head dim that is no multiple of 8",
        attributes=_attributes(6, 2, 20, chunk=16, qk_norm_eps=1e-5),
        past=(19,),
        length=5,
        capacity=16,
        head_dim=20,
    ),
    Case(
        name="wide heads, far position",
        attributes=_attributes(4, 1, 128, chunk=64, qk_norm_eps=1e-5),
        past=(1_000_000,),
        length=3,
        capacity=64,
        head_dim=128,
    ),
)

QUANTISED_CASES = tuple(
    dataclasses.replace(case, name=f"{cache} cache, {case.name}", cache=cache)
    for cache in ("int8", "fp8")
    for case in CASES
    if case.name
    in (
        "first piece of a whole chunk",
        "later piece, chunked",
        "decode, chunked, ragged",
        "ragged pieces with slack for pads",
        "decode, full, ragged",
        "ragged pieces, full",
        "head dim that is no multiple of 8",
    )
)
"""Cases of the op over quantised caches."""
