"""Llama 4's experts raced: our kernels over four kinds of weights, and PyTorch's products. For `kernel_speed`.

Ours route, scale, sort, quantise and multiply. The peers get tokens scaled and sorted beforehand, and bfloat16
weights; the plain products also get to know beforehand which experts are chosen. The oracle is a peer where weights are
bfloat16, and elsewhere a product in float32 of what is stored, for a few tokens.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import silu

from arriero.plugins.launch import Kernels
from arriero.plugins.moe.kernel_geometry import Geometry
from arriero.plugins.moe.op import Attributes
from arriero.plugins.moe.plan import Plan

from .gpu_race import Contestant, Ours, Row, able, distance, race, scratch

HIDDEN, EXPERT_SIZE, GROUP = 5120, 8192, 128
KINDS = ("none", "int8", "fp8", "int4")
STORED_BYTES = {"none": 2.0, "int8": 1.0, "fp8": 1.0, "int4": 0.5}
MOST = {"none": 1e-2, "int8": 3e-2, "fp8": 3e-2, "int4": 1e-2}
"""Errors that rounding explains: activations on the border of two steps may fall to either side."""

DECODED = 64
"""Tokens up to which reading the weights is the work."""

CHECKED = 3
"""Tokens that are computed in float32."""

Tensors = dict[str, Tensor]

grouped_mm = getattr(torch.nn.functional, "grouped_mm", None) or torch._grouped_mm


@dataclass(frozen=True, kw_only=True, slots=True)
class Sorted:
    """A set of inputs as a peer takes it.

    Attributes:
        x_TH: Tokens times their scores, by expert.
        order_T: Which token each of them is.
        ends_E: Where each expert's end.
        parts: Experts that have any tokens: expert, start, end.
    """

    x_TH: Tensor
    order_T: Tensor
    ends_E: Tensor
    parts: list[tuple[int, int, int]]


def tokens(quick: bool) -> tuple[int, ...]:
    return (1, 32, 4096) if quick else (1, 8, 32, 512, 4096)


def plan(kind: str, experts: int, capability: int) -> Plan:
    attributes = Attributes(top_k=1, quantisation=kind)  # type: ignore[arg-type]
    group = GROUP if kind == "int4" else 0
    sizes = {"hidden": HIDDEN, "expert_size": EXPERT_SIZE, "experts": experts}
    return Plan(Geometry(**sizes, attributes=attributes, group=group), capability)


def plans(experts: tuple[int, ...], capability: int) -> Iterator[Plan]:
    for count in experts:
        for kind in KINDS:
            yield plan(kind, count, capability)


def rows(experts: int, counts: tuple[int, ...], kernels: Kernels, say: Callable[[str], None]) -> Iterator[Row]:
    """One row a kind of weights and number of tokens; the peers run beside each."""
    wide = weights("none", experts)
    for kind in KINDS:
        stored = wide if kind == "none" else weights(kind, experts)
        expert_plan = plan(kind, experts, kernels.capability)
        for count in counts:
            yield race_of(expert_plan, count, stored, wide, kernels, say)


def race_of(
    expert_plan: Plan, count: int, stored: Tensors, wide: Tensors, kernels: Kernels, say: Callable[[str], None]
) -> Row:
    """One row."""
    kind, experts = expert_plan.geometry.kind, expert_plan.geometry.experts
    sets = [inputs(count, experts) for _ in range(8 if count <= DECODED else 2)]
    space = scratch(expert_plan.workspace(count))
    calls = [Ours(kernels, {**each, **stored, **space}, lambda at: expert_plan.launches(at, count)) for each in sets]
    arranged = [by_expert(each, experts) for each in sets]
    peers, refusals = able(peers_of(arranged, wide))
    for name, reason in refusals.items():
        say(f"{name} does not run {experts} experts, {count} tokens: {reason}")
    found_TH = calls[0]()
    if kind == "none":
        error = distance(found_TH[arranged[0].order_T], multiply_plain(arranged[0], wide))
    else:
        error = max(error_of_token(found_TH, arranged[0], stored, kind, at) for at in checked(count))
    right = [Contestant(name="ours", calls=calls)] if error < MOST[kind] else []
    micros = race([*right, *peers])
    chosen = sum(len(each.parts) for each in arranged) / len(arranged)
    bytes_of_expert = 3 * HIDDEN * EXPERT_SIZE * STORED_BYTES[kind]
    return Row(
        op="experts",
        shape=f"{experts} experts, {count} tokens" if count > 1 else f"{experts} experts, 1 token",
        kind="bf16" if kind == "none" else kind,
        error=error,
        most=MOST[kind],
        bytes=chosen * bytes_of_expert + 4 * count * HIDDEN,
        operations=6.0 * count * HIDDEN * EXPERT_SIZE,
        is_bound_by_bytes=count <= DECODED,
        ours=micros.pop("ours", None),
        peers=micros,
    )


def weights(kind: str, experts: int) -> Tensors:
    """Random weights as the op takes them, an expert at a time so that nothing else of their size is needed."""
    tensors: Tensors = {}
    for name, depth, width in (("gate_up", HIDDEN, 2 * EXPERT_SIZE), ("down", EXPERT_SIZE, HIDDEN)):
        if kind == "none":
            tensors[name] = torch.empty(experts, depth, width, dtype=torch.bfloat16).normal_(std=depth**-0.5)
            continue
        scales, columns = (depth // GROUP, depth // 2) if kind == "int4" else (1, depth)
        spread = {"int8": 127 / 3**0.5, "fp8": 64.0, "int4": 21.5**0.5}[kind]
        tensors[f"{name}_scale"] = torch.empty(experts, width, scales).uniform_(0.8, 1.2) / (spread * depth**0.5)
        if kind == "fp8":
            stored = torch.empty(experts, width, columns, dtype=torch.float8_e4m3fn)
            for expert in range(experts):
                stored[expert] = torch.empty(width, columns).normal_(std=spread).clamp_(-448, 448).to(stored.dtype)
        else:
            low, high, dtype = (-127, 128, torch.int8) if kind == "int8" else (0, 256, torch.uint8)
            stored = torch.randint(low, high, (experts, width, columns), dtype=dtype)
        tensors[name] = stored
    return tensors


def inputs(count: int, experts: int) -> Tensors:
    """Tokens and router logits, of which no two of a token are equal; and the output, NaN until it is written."""
    ranks_TE = torch.rand(count, experts).argsort(1)
    return {
        "hidden": torch.empty(count, HIDDEN, dtype=torch.bfloat16).normal_(),
        "router_logits": (ranks_TE * (4 / experts) - 2).bfloat16(),
        "output": torch.full((count, HIDDEN), torch.nan, dtype=torch.bfloat16),
    }


def by_expert(tensors: Tensors, experts: int) -> Sorted:
    """Tokens times the sigmoid of their largest logit, sorted by its expert."""
    logit_T, expert_T = tensors["router_logits"].max(1)
    order_T = expert_T.argsort(stable=True)
    score_T = torch.sigmoid(logit_T.float()).bfloat16()
    x_TH = (tensors["hidden"] * score_T[:, None])[order_T]
    counts_E = expert_T.bincount(minlength=experts)
    ends = counts_E.cumsum(0)
    starts = (ends - counts_E).tolist()
    parts = [each for each in zip(range(experts), starts, ends.tolist(), strict=True) if each[2] > each[1]]
    return Sorted(x_TH=x_TH, order_T=order_T, ends_E=ends.int(), parts=parts)


def multiply_grouped(given: Sorted, wide: Tensors) -> Tensor:
    gate_TI, up_TI = grouped_mm(given.x_TH, wide["gate_up"], offs=given.ends_E).chunk(2, -1)
    return grouped_mm(silu(gate_TI) * up_TI, wide["down"], offs=given.ends_E)


def multiply_plain(given: Sorted, wide: Tensors) -> Tensor:
    output_TH = torch.empty_like(given.x_TH)
    for expert, start, end in given.parts:
        gate, up = torch.mm(given.x_TH[start:end], wide["gate_up"][expert]).chunk(2, -1)
        torch.mm(silu(gate) * up, wide["down"][expert], out=output_TH[start:end])
    return output_TH


def peers_of(arranged: list[Sorted], wide: Tensors) -> Iterator[Contestant]:
    for name, multiply in (("grouped", multiply_grouped), ("plain", multiply_plain)):
        yield Contestant(name=name, calls=[partial(multiply, each, wide) for each in arranged])


def checked(count: int) -> list[int]:
    """Places of the sorted tokens that are checked: first, last, between."""
    return sorted({0, count // 2, count - 1})[:CHECKED]


def error_of_token(found_TH: Tensor, given: Sorted, stored: Tensors, kind: str, place: int) -> float:
    """Distance of a token's output from a product in float32 of what is stored."""
    expert = next(expert for expert, start, end in given.parts if start <= place < end)

    def times(x_H: Tensor, name: str) -> Tensor:
        return restored(stored[name][expert], stored[f"{name}_scale"][expert], kind) @ rounded(x_H, kind)

    gate_I, up_I = times(given.x_TH[place].float(), "gate_up").chunk(2)
    return distance(found_TH[given.order_T[place]], times(silu(gate_I) * up_I, "down"))


def restored(stored_NK: Tensor, scale_NG: Tensor, kind: str) -> Tensor:
    """Values that stored weights stand for, in float32; four-bit ones lie two a byte, the even input's low."""
    if kind == "int4":
        halves = torch.stack((stored_NK & 15, stored_NK >> 4), -1).flatten(-2).to(torch.int8)
        stored_NK = halves - 16 * (halves > 7).to(torch.int8)
    return stored_NK.float() * scale_NG.repeat_interleave(stored_NK.shape[1] // scale_NG.shape[1], 1)


def rounded(x_H: Tensor, kind: str) -> Tensor:
    """A token as it is multiplied: quantised by its own largest magnitude where activations are."""
    if kind == "int4":
        return x_H.bfloat16().float()
    scale = x_H.abs().max() / (127 if kind == "int8" else 448)
    steps = x_H / scale
    return scale * (steps.round() if kind == "int8" else steps.to(torch.float8_e4m3fn).float())
