"""The meaning of a call of the CPU's own ops, in numpy float64: whether it has one, and what it computes.

Independent of the library: the rules by which a call fits are written here a second time, and matrices and caches are
read byte by byte.
"""

import os
import struct
from typing import Any

import ml_dtypes
import numpy as np
from op_calls import BFLOAT16, E4M3, LINE_OF, Array, OpCall

from arriero.plugins.gqa.meaning import normalise, rotate, softmax
from arriero.plugins.moe.meaning import chosen_experts, moe_dispatch, sigmoid, silu
from arriero.plugins.moe.op import Attributes
from arriero.plugins.quantisation import fake_quantise, quantise
from arriero.runtime.ranks.segment import HEAD, HEADER, LINE, MAGIC, MOST_RANKS

CACHE_TYPES = {np.dtype(np.float32): "float32", np.dtype(np.float16): "float16", np.dtype(np.int8): "int8", E4M3: "fp8"}
INTEGERS = {
    "AllReduce": ("ranks", "rank"),
    "Linear": ("bits", "group", "outputs"),
    "PlainLinear": (),
    "MoeDispatch": ("bits", "group", "down_group", "top_k", "first_expert", "experts", "width"),
    "PlainMoeDispatch": ("top_k", "first_expert"),
    "Fp8Linear": (),
    "Fp8MoeDispatch": ("top_k", "first_expert"),
    "GroupedQueryAttention": ("heads", "kv_heads", "chunk", "cache_bits"),
}
ALIGNED = (
    "part",
    "group",
    "x",
    "x_scale",
    "hidden",
    "router_logits",
    "hidden_scale",
    "activated_scale",
    "query",
    "key",
    "value",
)
ALIGNED += ("past_lengths", "inv_freq", "key_scale", "value_scale")  # the others are read byte by byte
OF_FP8 = ("scale", "gate_up_scale", "down_scale")
"""Scales that the ops of E4M3 read as numbers."""
FLOATS = {
    "GroupedQueryAttention": ("scale", "qk_norm_eps", "temperature_scale", "temperature_floor"),
    "Fp8Linear": ("bound",),
    "Fp8MoeDispatch": ("bound",),
}


def fits(call: OpCall) -> bool:
    """Whether the call has a meaning."""
    a = call.attributes
    integers, floats = INTEGERS[call.op], FLOATS.get(call.op, ())
    if any(type(a.get(name)) is not int for name in integers) or any(type(a.get(name)) is not float for name in floats):
        return False
    moved = call.given(call.misaligned)
    aligned = ALIGNED + (OF_FP8 if call.op.startswith("Fp8") else ())
    if call.misaligned in aligned and moved is not None and moved.size:
        return False
    if "" in call.outputs or any(a[name] < 0 for name in integers):
        return False
    rules = {
        "AllReduce": _sum_fits,
        "Linear": _linear_fits,
        "PlainLinear": _plain_linear_fits,
        "MoeDispatch": _experts_fit,
        "PlainMoeDispatch": _plain_experts_fit,
        "Fp8Linear": _fp8_linear_fits,
        "Fp8MoeDispatch": _fp8_experts_fit,
    }
    return rules.get(call.op, _attention_fits)(call)


def is_tensor(array: Array | None, dtype: Any, shape: tuple[int | None, ...]) -> bool:
    if array is None or array.dtype != np.dtype(dtype) or array.ndim != len(shape):
        return False
    return all(wanted in (None, size) for wanted, size in zip(shape, array.shape, strict=True))


def _matrix_fits(
    weight: Array | None, scale: Array | None, bits: int, group: int, size: tuple[int, int], front: tuple[int, ...] = ()
) -> bool:
    inputs, outputs = size
    if group % 8 or (group and inputs % group) or inputs < 1 or outputs < 1 or 0 in front:
        return False
    panels, padded = -(-outputs // 32), -(-inputs // 32) * 32
    if not is_tensor(weight, np.uint8, (*front, panels, padded * 32 * bits // 8)):
        return False
    if bits >= 16:
        return scale is None and group == 0
    shape = (*front, panels, inputs // group if group else 1, 32)
    return is_tensor(scale, np.float32, shape) or is_tensor(scale, BFLOAT16, shape)


def _are_scales(array: Array | None, count: int) -> bool:
    """Whether static scales are none, or one for each of so many experts."""
    return array is None or (is_tensor(array, np.float32, (count,)) and _are_positive(array))


def _are_positive(array: Array) -> bool:
    return bool(np.all(np.isfinite(array) & (array >= np.float32(1e-30))))


def _sum_fits(call: OpCall) -> bool:
    """Whether the group is memory of this process, whose other ranks bring as much in each turn as this one."""
    a, part, group = call.attributes, call.given("part"), call.given("group")
    if part is None or part.dtype != np.float32 or part.ndim > 8 or "group" in call.constants:
        return False
    if not 1 <= a["ranks"] <= MOST_RANKS or a["rank"] >= a["ranks"]:
        return False
    if not is_tensor(group, np.uint8, (None,)) or group is None or group.size < HEAD:
        return False
    magic, ranks, _, capacity, _, _ = HEADER.unpack_from(group.tobytes())
    whole = HEAD + MOST_RANKS * LINE + 2 * ranks * capacity * 4
    if (magic, ranks, whole) != (MAGIC, a["ranks"], group.size) or not capacity:
        return False
    lines = [struct.unpack_from(LINE_OF, group, HEAD + rank * LINE) for rank in range(ranks)]
    others = [line for rank, line in enumerate(lines) if rank != a["rank"]]
    turns = range(-(-part.size // capacity))
    brings = [min(capacity, part.size - turn * capacity) for turn in turns]
    has_come = all(line[4 + (turn + 1) % 2] == brings[turn] for line in others for turn in turns)
    return lines[a["rank"]][2] == os.getpid() and has_come


def all_reduce(call: OpCall) -> Array:
    """The sum of what this rank brings and what lies in the others' slots, turn by turn."""
    part, group, (ranks, rank) = call.given("part"), call.given("group"), call.attributes.values()
    assert part is not None
    assert group is not None
    slots = group[HEAD + MOST_RANKS * LINE :].view(np.float32).reshape(2, ranks, -1).astype(np.float64)
    total, capacity = part.reshape(-1).astype(np.float64), slots.shape[2]
    for turn, first in enumerate(range(0, part.size, capacity), 1):
        count = min(capacity, part.size - first)
        total[first : first + count] += np.delete(slots[turn % 2], rank, 0)[:, :count].sum(0)
    return total.reshape(part.shape)


def _linear_fits(call: OpCall) -> bool:
    a, x, static = call.attributes, call.given("x"), call.given("x_scale")
    if a["bits"] not in (4, 8, 16, 32) or x is None or x.dtype != np.float32 or not 1 <= x.ndim <= 8:
        return False
    if static is not None:
        shaped = is_tensor(static, np.float32, ()) or is_tensor(static, np.float32, (1,))
        if a["bits"] >= 16 or not shaped or not _are_positive(static):
            return False
    size = (x.shape[-1], a["outputs"])
    return _matrix_fits(call.given("weight"), call.given("scale"), a["bits"], a["group"], size)


def _plain_linear_fits(call: OpCall) -> bool:
    x, weight = call.given("x"), call.given("weight")
    if x is None or x.dtype != np.float32 or not 1 <= x.ndim <= 8 or x.shape[-1] == 0:
        return False
    return any(is_tensor(weight, dtype, (None, x.shape[-1])) for dtype in (np.float32, np.float16, BFLOAT16))


def _experts_fit(call: OpCall) -> bool:
    a, hidden, logits, held = (
        call.attributes,
        call.given("hidden"),
        call.given("router_logits"),
        call.attributes["experts"],
    )
    if a["bits"] not in (4, 8) or held < 1 or a["width"] < 1:
        return False
    if hidden is None or not is_tensor(hidden, np.float32, (None, None)):
        return False
    if logits is None or not is_tensor(logits, np.float32, (hidden.shape[0], None)):
        return False
    if not 1 <= a["top_k"] <= logits.shape[1] or a["first_expert"] + held > logits.shape[1]:
        return False
    size, width = hidden.shape[1], a["width"]
    return (
        _matrix_fits(
            call.given("gate_up"), call.given("gate_up_scale"), a["bits"], a["group"], (size, 2 * width), (held,)
        )
        and _matrix_fits(
            call.given("down"), call.given("down_scale"), a["bits"], a["down_group"], (width, size), (held,)
        )
        and all(_are_scales(call.given(name), held) for name in ("hidden_scale", "activated_scale"))
    )


def _held_experts(call: OpCall) -> tuple[tuple[int, ...], int] | None:
    """The shape of the last matrices of experts that lie as stored, and H; None where their tokens' ways do not fit."""
    a, hidden, logits, down = call.attributes, *(call.given(name) for name in ("hidden", "router_logits", "down"))
    if hidden is None or not is_tensor(hidden, np.float32, (None, None)) or hidden.shape[1] == 0:
        return None
    if down is None or down.ndim != 3 or 0 in down.shape:
        return None
    if logits is None or not is_tensor(logits, np.float32, (hidden.shape[0], None)):
        return None
    if not 1 <= a["top_k"] <= logits.shape[1] or a["first_expert"] + len(down) > logits.shape[1]:
        return None
    return down.shape, hidden.shape[1]


def _plain_experts_fit(call: OpCall) -> bool:
    if (found := _held_experts(call)) is None:
        return False
    (held, width, _), size = found
    shapes = {"gate_up": (held, size, 2 * width), "down": (held, width, size)}
    types = (np.float32, np.float16, BFLOAT16)
    return all(any(is_tensor(call.given(name), dtype, shape) for dtype in types) for name, shape in shapes.items())


def _fp8_linear_fits(call: OpCall) -> bool:
    x, weight, static, bound = *(call.given(name) for name in ("x", "weight", "x_scale")), call.attributes["bound"]
    if x is None or x.dtype != np.float32 or not 1 <= x.ndim <= 8 or x.shape[-1] == 0:
        return False
    if not np.isfinite(bound) or bound < 0 or weight is None or not is_tensor(weight, E4M3, (None, x.shape[-1])):
        return False
    shaped = static is None or is_tensor(static, np.float32, ()) or is_tensor(static, np.float32, (1,))
    is_sound = shaped and (static is None or _are_positive(static))
    return is_sound and is_tensor(call.given("scale"), np.float32, weight.shape[:1])


def _fp8_experts_fit(call: OpCall) -> bool:
    found, bound = _held_experts(call), call.attributes["bound"]
    if found is None or not np.isfinite(bound) or bound < 0:
        return False
    (held, _, width), size = found
    shapes = {"gate_up": (held, 2 * width, size), "down": (held, size, width)}
    return (
        all(is_tensor(call.given(name), E4M3, shape) for name, shape in shapes.items())
        and all(is_tensor(call.given(f"{name}_scale"), np.float32, (*shape[:2], 1)) for name, shape in shapes.items())
        and all(_are_scales(call.given(name), held) for name in ("hidden_scale", "activated_scale"))
    )


def cache_of(call: OpCall) -> str | None:
    """The form of a call's caches; None where they have none that is known."""
    key, value, bits = call.given("key_cache"), call.given("value_cache"), call.attributes["cache_bits"]
    if key is None or value is None or key.dtype != value.dtype:
        return None
    if key.dtype == np.uint8:
        return f"groups{bits}" if bits in (4, 8) else None
    return CACHE_TYPES.get(key.dtype) if bits == 0 else None


def slot_size(cache: str, dim: int) -> int:
    groups = -(-dim // 32)
    return {"groups8": 34 * groups, "groups4": 20 * groups}.get(cache, dim)


def _attention_fits(call: OpCall) -> bool:
    a, query, cache = call.attributes, call.given("query"), cache_of(call)
    heads, kv_heads = a["heads"], a["kv_heads"]
    if min(heads, kv_heads) < 1 or heads % kv_heads or not all(np.isfinite(a[name]) for name in FLOATS[call.op]):
        return False
    if a["qk_norm_eps"] < 0 or a["temperature_floor"] <= 0 or cache is None:
        return False
    if query is None or not is_tensor(query, np.float32, (None, None, None)) or query.shape[2] % heads:
        return False
    batch, length, dim = query.shape[0], query.shape[1], query.shape[2] // heads
    if not 1 <= dim <= 512:
        return False
    key_cache, past, inv_freq = call.given("key_cache"), call.given("past_lengths"), call.given("inv_freq")
    assert key_cache is not None
    capacity = key_cache.shape[2] if key_cache.ndim == 4 else -1
    stored = (batch, kv_heads, capacity, slot_size(cache, dim))
    shapes = [("key", (batch, length, kv_heads * dim)), ("value", (batch, length, kv_heads * dim))]
    if not all(is_tensor(call.given(name), np.float32, shape) for name, shape in shapes):
        return False
    if not all(is_tensor(call.given(name), key_cache.dtype, stored) for name in ("key_cache", "value_cache")):
        return False
    if past is None or not is_tensor(past, np.int32, (batch,)):
        return False
    slots = past.astype(np.int64) % a["chunk"] if a["chunk"] else past.astype(np.int64)
    if length and (np.any(past < 0) or np.any(slots + length > capacity)):
        return False
    if inv_freq is not None and (dim % 2 or not is_tensor(inv_freq, np.float32, (dim // 2,))):
        return False
    scales = [call.given(name) for name in ("key_scale", "value_scale")]
    if cache in ("int8", "fp8"):
        return all(is_tensor(scale, np.float32, (kv_heads, dim)) for scale in scales)
    return all(scale is None for scale in scales)


def unpanelled(weight: Array, scale: Array | None, bits: int, size: tuple[int, int], gated: bool = False) -> Array:
    """A matrix [K, N] from its panels and their scales."""
    inputs, outputs = size
    words = weight.reshape(weight.shape[0], -1, 32, 4).swapaxes(1, 2).reshape(weight.shape[0] * 32, -1)
    words = np.ascontiguousarray(words)
    if bits == 4:
        values = np.stack([words & 15, words >> 4], -1).reshape(len(words), -1).astype(np.float64) - 8
    elif bits == 8:
        values = words.astype(np.float64) - 128
    else:
        values = words.view(BFLOAT16 if bits == 16 else np.float32).astype(np.float64)
    values = values[:, :inputs]
    if scale is not None:
        by_output = scale.astype(np.float64).swapaxes(1, 2).reshape(len(words), -1)
        values = values * np.repeat(by_output, inputs // by_output.shape[1], axis=1)
    if gated:  # sixteen gates and as many ups
        halves = values.reshape(-1, 2, 16, inputs)
        gates, ups = (halves[:, side].reshape(-1, inputs)[: outputs // 2] for side in (0, 1))
        values = np.concatenate([gates, ups])
    return values[:outputs].T


def rounded(x_TK: Array, group: int, static: float | None) -> Array:
    """Activations as a product with integers takes them."""
    if static is not None:
        return fake_quantise(x_TK, static, "int8")
    block = 32
    while group % block:
        block //= 2
    padded = np.pad(x_TK, ((0, 0), (0, -x_TK.shape[1] % block)))
    return fake_quantise(padded.reshape(-1, block), None, "int8").reshape(padded.shape)[:, : x_TK.shape[1]]


def linear(call: OpCall) -> Array:
    a, x, weight, static = call.attributes, call.given("x"), call.given("weight"), call.given("x_scale")
    assert x is not None
    assert weight is not None
    rows = x.reshape(-1, x.shape[-1])
    matrix = unpanelled(weight, call.given("scale"), a["bits"], (x.shape[-1], a["outputs"]))
    taken = (
        rows if a["bits"] >= 16 else rounded(rows, a["group"], None if static is None else float(static.reshape(-1)[0]))
    )
    return (taken.astype(np.float64) @ matrix).reshape(*x.shape[:-1], a["outputs"])


def plain_linear(call: OpCall) -> Array:
    x, weight = call.given("x"), call.given("weight")
    assert x is not None
    assert weight is not None
    return x.astype(np.float64) @ weight.astype(np.float64).T


def experts(call: OpCall) -> Array:
    a, t = call.attributes, call.tensors
    hidden, logits = t["hidden"].astype(np.float64), t["router_logits"].astype(np.float64)  # type: ignore[union-attr]
    size, width, output = hidden.shape[1], a["width"], np.zeros_like(hidden)

    def times(x_K: Array, expert: int, name: str, static: str, group: int, shape: tuple[int, int]) -> Array:
        weight, scale, own = t[name], t[f"{name}_scale"], t.get(static)
        assert weight is not None
        assert scale is not None
        matrix = unpanelled(weight[expert], scale[expert], a["bits"], shape, gated=name == "gate_up")
        return (rounded(x_K[None], group, None if own is None else float(own[expert])) @ matrix)[0]

    for token, chosen in zip(*chosen_experts(logits, a["top_k"]), strict=True):
        expert = int(chosen) - a["first_expert"]
        if not 0 <= expert < a["experts"]:
            continue
        x = hidden[token] * sigmoid(logits[token, chosen])
        gate, up = np.split(times(x, expert, "gate_up", "hidden_scale", a["group"], (size, 2 * width)), 2)
        output[token] += times(up * silu(gate), expert, "down", "activated_scale", a["down_group"], (width, size))
    return output


def plain_experts(call: OpCall) -> Array:
    arrays = {name: array.astype(np.float64) for name, array in call.tensors.items() if array is not None}
    return moe_dispatch(**arrays, attributes=Attributes(**call.attributes))


def rounded_fp8(x_TK: Array, static: Array | None, bound: float) -> Array:
    """Rows in E4M3, by a static scale or each by its own, divided in float32 as the op's contract has them."""
    most = np.abs(x_TK).max(-1, keepdims=True)
    own = np.float32(np.minimum(most, np.float32(bound)) if bound else most) / np.float32(448)
    scale = np.where(own == 0, np.float32(1), own) if static is None else static.reshape(-1)[:1]
    divided = x_TK.astype(np.float32) / scale.astype(np.float32)
    made: Array = quantise(divided, 1.0, "fp8").astype(np.float64) * scale
    return made


def fp8_linear(call: OpCall) -> Array:
    x, weight, scale = (call.given(name) for name in ("x", "weight", "scale"))
    assert x is not None
    assert weight is not None
    assert scale is not None
    rows = rounded_fp8(x.reshape(-1, x.shape[-1]), call.given("x_scale"), call.attributes["bound"])
    made: Array = rows @ (weight.astype(np.float64) * scale[:, None]).T
    return made.reshape(*x.shape[:-1], len(weight))


def fp8_experts(call: OpCall) -> Array:
    a, t = call.attributes, call.tensors
    hidden, logits = t["hidden"].astype(np.float64), t["router_logits"].astype(np.float64)  # type: ignore[union-attr]
    output = np.zeros_like(hidden)

    def times(x_K: Array, expert: int, name: str, static: str) -> Array:
        weight, scale, own = t[name], t[f"{name}_scale"], t.get(static)
        assert weight is not None
        assert scale is not None
        matrix = weight[expert].astype(np.float64) * scale[expert]
        return (rounded_fp8(x_K[None], None if own is None else own[expert : expert + 1], a["bound"]) @ matrix.T)[0]

    for token, chosen in zip(*chosen_experts(logits, a["top_k"]), strict=True):
        expert = int(chosen) - a["first_expert"]
        if not 0 <= expert < len(t["down"]):  # type: ignore[arg-type]
            continue
        gate, up = np.split(times(hidden[token] * sigmoid(logits[token, chosen]), expert, "gate_up", "hidden_scale"), 2)
        output[token] += times(up * silu(gate), expert, "down", "activated_scale")
    return output


def widened(stored: Array, cache: str, dim: int, scale_KD: Array | None) -> Array:
    """Keys or values [B, K, C, D] as a cache holds them."""
    if not cache.startswith("groups"):
        wide = stored.astype(np.float32).astype(np.float64)
        return wide if scale_KD is None else wide * scale_KD[None, :, None]
    bits, groups = int(cache.removeprefix("groups")), -(-dim // 32)
    values, halves = np.split(stored, [groups * 4 * bits], axis=-1)
    scales = np.ascontiguousarray(halves).view(ml_dtypes.bfloat16).astype(np.float64)
    scales = scales.reshape(*stored.shape[:3], groups, -1)
    values = values.reshape(*stored.shape[:3], groups, -1)
    if bits == 4:
        wide = np.concatenate([values & 15, values >> 4], -1) * scales[..., :1] + scales[..., 1:]
    else:
        wide = values.view(np.int8) * scales
    return wide.reshape(*stored.shape[:3], -1)[..., :dim]


def attention_faults(call: OpCall, output: Array, presents: list[Array], pasts: list[Array]) -> str:
    """How a call's outputs depart from its meaning; empty where they do not.

    Presents hold the piece's keys and values, rounded, and otherwise their past; the output is what follows from them.
    """
    a, cache, query = call.attributes, cache_of(call), call.given("query")
    assert cache is not None
    assert query is not None
    batch, length = query.shape[:2]
    if batch * length == 0:
        is_equal = all(map(np.array_equal, presents, pasts))
        return "" if is_equal else "a cache changed, and nothing was written"
    heads, kv_heads, dim = a["heads"], a["kv_heads"], query.shape[2] // a["heads"]
    seen = []
    for name, present, past in zip(("key", "value"), presents, pasts, strict=True):
        scale = call.given(f"{name}_scale")
        exact = np.asarray(call.given(name), dtype=np.float64).reshape(batch, length, kv_heads, dim)
        wide = widened(present, cache, dim, scale)
        untouched = np.ones(present.shape[:3], dtype=bool)
        for row, step, position, slot in _places(call):
            untouched[row, :, slot] = False
            new = prepared(exact[row, step], position, call) if name == "key" else exact[row, step]
            error = np.abs(wide[row, :, slot] - new)
            if np.any(error > step_of(new, cache, scale)):
                return f"present_{name} is off by {error.max():.3g} at row {row}, slot {slot}"
        if not np.array_equal(present[untouched].view(np.uint8), past[untouched].view(np.uint8)):
            return f"present_{name} is not its past where nothing was written"
        seen.append(wide)
    query_BSQD = query.astype(np.float64).reshape(batch, length, heads, dim)
    found = output.reshape(batch, length, heads, dim)
    for row, step, position, slot in _places(call):
        ready = prepared(query_BSQD[row, step], position, call) * tuned(position, call)
        for head in range(heads):
            keys, values = (wide[row, head * kv_heads // heads, : slot + 1] for wide in seen)
            expected = softmax(keys @ ready[head] * a["scale"]) @ values
            error = np.abs(found[row, step, head] - expected).max()
            if not error <= 2e-3 * max(1, np.abs(values).max()):
                return f"output is off by {error:.3g} at row {row}, step {step}, head {head}"
    return ""


def _places(call: OpCall) -> list[tuple[int, int, int, int]]:
    """Row, step, position and slot of each token of a piece."""
    query, past, chunk = call.tensors["query"], call.tensors["past_lengths"], call.attributes["chunk"]
    assert query is not None
    assert past is not None
    firsts = [(row, int(length), int(length) % chunk if chunk else int(length)) for row, length in enumerate(past)]
    return [(row, step, length + step, slot + step) for row, length, slot in firsts for step in range(query.shape[1])]


def prepared(x_ND: Array, position: int, call: OpCall) -> Array:
    """Heads rotated, by angles in float32 as the op's contract has them, and normalised."""
    inv_freq, eps = call.given("inv_freq"), np.float32(call.attributes["qk_norm_eps"])
    if inv_freq is not None:
        x_ND = rotate(x_ND, 1, np.float32(position) * inv_freq)
    return normalise(x_ND, float(eps)) if eps else x_ND


def tuned(position: int, call: OpCall) -> float:
    a = call.attributes
    steps = np.floor(np.float32(position + 1) / np.float32(a["temperature_floor"]))
    return float(np.log1p(np.float64(steps)) * a["temperature_scale"] + 1)


def step_of(new_KD: Array, cache: str, scale_KD: Array | None) -> Array | float:
    """The largest error of what a cache holds for these values."""
    size = np.abs(new_KD)
    if scale_KD is not None:
        held = quantise(new_KD, scale_KD, cache).astype(np.float64) * scale_KD
        return np.abs(held - new_KD) + (scale_KD * 1.01 if cache == "int8" else size / 7 + scale_KD / 500)
    if cache.startswith("groups"):
        spread = np.abs(np.pad(new_KD, ((0, 0), (0, 1)))).max(-1, keepdims=True)
        return spread * (0.006 if cache == "groups8" else 0.08) + 1e-9
    return 2e-5 * (1 + size) if cache == "float32" else 1e-3 * size + 1e-6
