"""Hostile calls of the CPU's own ops: a table of calls that fit but for one change each, and random ones by seed."""

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes
import numpy as np
from op_calls import (
    BFLOAT16,
    CACHES,
    E4M3,
    INPUTS,
    OUTPUTS,
    Array,
    OpCall,
    Rng,
    all_reduce,
    attention,
    drawn,
    experts,
    fp8_experts,
    fp8_linear,
    linear,
    plain_experts,
    plain_linear,
)
from op_meanings import FLOATS, INTEGERS

from arriero.runtime.ranks.segment import HEAD, PROCESS_AT

Change = Callable[[OpCall], None]

WORDS = (
    -(1 << 63), -(1 << 32) + 8, -8, -1, 0, 1, 2, 3, 5, 6, 7, 8, 9, 12, 16, 17, 24, 31, 32, 33, 64, 513,
    (1 << 31) - 1, 1 << 31, (1 << 32) + 4, (1 << 32) + 8, 1 << 40, 1 << 61, 1 << 62, (1 << 63) - 1,
)  # fmt: skip
NUMBERS = (float("nan"), float("inf"), float("-inf"), -1.0, 0.0, 1.0, 2.0)
WILD_NUMBERS = (1e-45, 1e-30, 1e30, -3e38, 3e38)
TYPES: tuple[Any, ...] = (
    np.float32, np.float16, np.float64, np.int8, np.uint8, np.int16, np.int32, np.int64, np.bool_, BFLOAT16, E4M3,
    ml_dtypes.float8_e5m2, ml_dtypes.int4, ml_dtypes.uint4, np.object_,
)  # fmt: skip


def set_attribute(name: str, value: Any) -> Change:
    def change(call: OpCall) -> None:
        call.attributes[name] = value
        call.is_wild |= value in WILD_NUMBERS
        call.changes.append(f"{name} = {value}")

    return change


def drop_attribute(name: str) -> Change:
    def change(call: OpCall) -> None:
        call.attributes.pop(name, None)
        call.changes.append(f"no {name}")

    return change


def set_tensor(name: str, make: Callable[[Array], Array | None], how: str) -> Change:
    """Another tensor in place of one that is given; how it differs is for the message."""

    def change(call: OpCall) -> None:
        array = call.given(name)
        if array is None:
            array = np.full((2,), 0.5, np.float32)
        made = make(array)
        call.tensors[name] = made
        call.changes.append(f"{name} {how}: {None if made is None else f'{made.dtype}{list(made.shape)}'}")

    return change


def as_type(array: Array, dtype: Any) -> Array:
    """The same shape in another type."""
    if dtype is np.object_:
        return np.full(array.shape, "text", dtype=np.object_)
    with np.errstate(all="ignore"):
        if array.dtype == np.object_:
            return np.zeros(array.shape, dtype)
        return array.astype(np.float32).astype(dtype)


def resized(array: Array, axis: int, size: int) -> Array:
    """Its beginning or itself over and over, of that many elements along the axis."""
    if array.shape[axis] == 0:
        return np.zeros((*array.shape[:axis], size, *array.shape[axis + 1 :]), array.dtype)
    return np.take(array, np.arange(size) % array.shape[axis], axis=axis)


def shape_changes(name: str, rank: int) -> Iterator[Change]:
    yield set_tensor(name, lambda array: array.reshape(-1), "flat")
    yield set_tensor(name, lambda array: array[None], "with a dimension more")
    yield set_tensor(name, lambda array: array.reshape(*array.shape, *[1] * 9), "with nine dimensions more")
    yield set_tensor(name, lambda array: array.reshape(-1)[:1].reshape(()), "scalar")
    for axis in range(rank):
        for how, size in (("more", 1), ("less", -1)):
            yield set_tensor(
                name,
                lambda array, axis=axis, size=size: (  # type: ignore[misc]
                    resized(array, axis, max(0, array.shape[axis] + size)) if axis < array.ndim else array
                ),
                f"one {how} along {axis}",
            )
        yield set_tensor(
            name,
            lambda array, axis=axis: resized(array, axis, 0) if axis < array.ndim else array,  # type: ignore[misc]
            f"empty along {axis}",
        )
        yield set_tensor(
            name,
            lambda array, axis=axis: resized(array, axis, 2 * array.shape[axis]) if axis < array.ndim else array,  # type: ignore[misc]
            f"doubled along {axis}",
        )
    if rank > 1:
        yield set_tensor(name, lambda array: array.swapaxes(0, -1).copy(), "turned")


def value_changes(name: str) -> Iterator[Change]:
    """Values that are none for this input."""
    if name == "past_lengths":
        for value in (-1, -(1 << 31), 1 << 20, (1 << 31) - 1):
            yield set_tensor(name, lambda array, value=value: np.full_like(array, value), f"all {value}")  # type: ignore[misc]
    for place, size in ((0, 8), (8, 4), (16, 8), (HEAD + PROCESS_AT, 4)) if name == "group" else ():
        for word in WORDS:
            yield set_tensor(name, with_word(place, word % (1 << 8 * size), size), f"with {word} at {place}")
    if name == "group":
        yield as_constant(name)
    if name in ("x_scale", "hidden_scale", "activated_scale"):
        for number in (0, -1, np.nan, np.inf, 1e-38):
            yield set_tensor(name, lambda array, number=number: np.full_like(array, number), f"all {number}")  # type: ignore[misc]


def as_constant(name: str) -> Change:
    def change(call: OpCall) -> None:
        call.constants.add(name)
        call.changes.append(f"{name} a constant")

    return change


def with_word(place: int, word: int, size: int) -> Callable[[Array], Array]:
    """Puts a word into a tensor's bytes."""

    def make(array: Array) -> Array:
        made = array.copy()
        made[place : place + size] = np.frombuffer(word.to_bytes(size, "little"), np.uint8)
        return made

    return make


def wild_values(name: str, rng: Rng) -> Change:
    """Extreme values, of which only memory is asked."""

    def change(call: OpCall) -> None:
        array = call.given(name)
        if array is None or array.dtype != np.float32:
            return
        wild = rng.choice(np.array([np.nan, np.inf, -np.inf, 3e38, -3e38, 1e-45, 1e-38, 0, 1], np.float32), array.shape)
        call.tensors[name] = wild.astype(np.float32)
        call.is_wild = True
        call.changes.append(f"{name} wild")

    return change


def drop_output(index: int) -> Change:
    def change(call: OpCall) -> None:
        call.outputs = (*call.outputs[:index], "", *call.outputs[index + 1 :])
        call.changes.append(f"no output {index}")

    return change


def together(*changes: Change) -> Change:
    def change(call: OpCall) -> None:
        for each in changes:
            each(call)

    return change


def changes_of(call: OpCall) -> Iterator[Change]:
    """Every change of one thing, and of caches and weights those of two that agree with one another."""
    for name in INTEGERS[call.op]:
        yield from (set_attribute(name, word) for word in WORDS)
        yield from (set_attribute(name, value) for value in (1.0, "8", [8]))
        yield drop_attribute(name)
    for name in FLOATS.get(call.op, ()):
        yield from (set_attribute(name, number) for number in (*NUMBERS, *WILD_NUMBERS))
        yield from (set_attribute(name, 1), drop_attribute(name))
    for name in INPUTS[call.op]:
        array = call.given(name)
        yield set_tensor(name, lambda array: None, "left out")
        yield from shape_changes(name, 1 if array is None else array.ndim)
        yield from value_changes(name)
        own = np.dtype(np.float32) if array is None else array.dtype
        yield from (
            set_tensor(name, lambda array, dtype=dtype: as_type(array, dtype), "of another type")  # type: ignore[misc]
            for dtype in TYPES
            if np.dtype(dtype) != own
        )
    yield from (drop_output(index) for index in range(len(OUTPUTS[call.op])))
    if call.op == "GroupedQueryAttention":
        for change in zip(shape_changes("key_cache", 4), shape_changes("value_cache", 4), strict=True):
            yield together(*change)


def bases() -> list[OpCall]:
    """Calls that fit, of which the table's are made."""
    rng = np.random.default_rng(17)
    made = [linear(rng, bits) for bits in (4, 8, 16, 32)] + [experts(rng, bits) for bits in (4, 8)]
    made += [attention(rng, cache) for cache in CACHES] + [all_reduce(rng) for _ in range(2)]
    made += [plain_linear(rng, dtype) for dtype in (np.float32, np.float16, BFLOAT16)]
    made += [plain_experts(rng, dtype) for dtype in (np.float32, np.float16, BFLOAT16)]
    return [*made, fp8_linear(rng), fp8_experts(rng)]


def table(thinned: int = 1) -> Iterator[OpCall]:
    """Hostile calls, one change each; of all that there are one in as many."""
    made = ((base, change) for base in bases() for change in changes_of(base))
    for index, (base, change) in enumerate(made):
        if index % thinned == 0:
            call = changed(base, change)
            call.in_place = index % 2 == 0
            yield call


def changed(base: OpCall, change: Change) -> OpCall:
    call = dataclasses.replace(base, attributes=copy.deepcopy(base.attributes), tensors=dict(base.tensors))
    call.constants, call.changes = set(base.constants), []
    change(call)
    return call


def random_call(seed: int) -> OpCall:
    """A call of up to three changes; one in four has none."""
    rng = np.random.default_rng(seed)
    call = drawn(rng)
    for _ in range(int(rng.integers(0, 4))):
        possible = list(changes_of(call))
        if rng.random() < 0.15:
            name = str(rng.choice(INPUTS[call.op]))
            wild_values(name, rng)(call)
        else:
            with contextlib.suppress(
                ValueError, IndexError
            ):  # of two changes one may leave the other nothing to change
                possible[int(rng.integers(len(possible)))](call)
    for name, array in call.tensors.items():
        if array is not None and rng.random() < 0.2:
            call.constants.add(name)
    if not call.changes and rng.random() < 0.3:
        call.misaligned = str(rng.choice(INPUTS[call.op]))
        call.constants.discard(call.misaligned)
        call.changes.append(f"{call.misaligned} at an odd address")
    return call
