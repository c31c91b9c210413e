"""By how much a model's logits may differ where each of its ops is off by as much as the ops' tables allow.

Enter: a small Llama 4 and a precision. Leave: the largest change of a logit that was seen when errors of that size were
drawn for the output of every op, over many draws, and the largest deviation of a sequence's logits. So a bound knows
nothing of the engine that it judges. The second sees faults that are small and everywhere, since the first is that of
one unlucky logit.

In eight bits the tables' errors are those of a value that rounding to 16 bits moved over the border of two steps: in
float32 the same kernels are the meaning's to 1e-6. A bound that let every value err by that much would be several times
what can be, so there the roundings to 16 bits are drawn, and what they move is quantised as the ops quantise it. Where
weights have four bits the model has such weights, which its linears round to 16 bits; the CPU, beside which an engine
is judged, rounds what enters there to int8 in blocks of 32.
"""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from transformers.models.llama4 import modeling_llama4

from arriero.accuracy.sides.folder_side import torch_at_rest

UNITS = {"bf16": 2.0**-8, "fp16": 2.0**-11}
"""The largest relative error of rounding once."""
ATTENTION = 1
"""The deviation of attention's error beside its output's size, in units: `test_gqa_kernel`'s, over every cache."""
EXPERTS = {"bf16": 1e-2, "fp16": 1e-3}
"""The deviation of the experts' error beside their output's size: `test_moe_kernel`'s."""
LARGEST = {"int8": 127.0, "fp8": 448.0}

DRAWS = 4

Tensor = torch.Tensor
Change = Callable[[Tensor], Tensor]


class Bounds(NamedTuple):
    """The largest change of a logit, and the largest root of the mean square of a sequence's."""

    largest: float
    deviation: float


def bound_logits(model: Any, precision: str, ids: list[list[int]]) -> Bounds:
    """Bounds for the changes of logits over sequences, of the model as `precision` computes it.

    Args:
        model: A model of `transformers`.
        precision: `bf16`, `fp16`, `int8` (static), `fp8` (dynamic) or `int4`, the last three with caches of the recipes
            in `gpu_models`; all but `fp16` compute in bfloat16.
        ids: Sequences of one length.
    """
    shaken, tokens = copy.deepcopy(model).float(), torch.tensor(ids)
    shaken.set_attn_implementation("eager")
    errors = Errors("fp16" if precision == "fp16" else "bf16")
    shake(shaken, errors, precision)
    with torch_at_rest(), torch.no_grad(), quantised(shaken, precision, errors):
        expected = shaken(tokens).logits  # and scales are those of what this run sees
        errors.drawn = True
        changes = torch.stack([shaken(tokens).logits - expected for _ in range(DRAWS)])
    return Bounds(float(changes.abs().max()), float(changes.square().mean((-2, -1)).sqrt().max()))


class Errors:
    """Errors of one 16-bit type, none until they are to be `drawn`, then each time others."""

    def __init__(self, dtype: str) -> None:
        self.unit, self.dtype, self.drawn = UNITS[dtype], dtype, False
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, x: Tensor, most: float = 0.0) -> Tensor:
        """Errors of up to so much of the row's size, and of up to half a step of the type, as rounding has."""
        if not self.drawn:
            return x
        rows = x.square().mean(-1, keepdim=True).sqrt()
        halves = torch.ldexp(torch.full_like(x, self.unit / 2), torch.frexp(x).exponent)
        return x + most * rows * self._draw(x) + halves * self._draw(x)

    def _draw(self, x: Tensor) -> Tensor:
        return 2 * torch.rand(x.shape, generator=self.generator) - 1


def shake(model: Any, errors: Errors, precision: str) -> None:
    """Has every op of a model err from now on."""

    def after(most: float) -> Any:
        def hook(_: Any, __: Any, found: Any) -> Any:
            return errors(found, most) if isinstance(found, Tensor) else (errors(found[0], most), *found[1:])

        return hook

    experts = 0.0 if precision in LARGEST else EXPERTS[errors.dtype] * 3**0.5  # uniform errors of that deviation
    for name, module in model.named_modules():
        if name.endswith("o_proj"):
            module.register_forward_pre_hook(lambda _, given: (errors(given[0], ATTENTION * 3**0.5 * errors.unit),))
        if name.endswith(".experts"):
            module.register_forward_hook(after(experts))
        elif isinstance(module, torch.nn.Linear) or "norm" in name or name.removeprefix("model.layers.").isdigit():
            module.register_forward_hook(after(0.0))


def is_quantised(name: str, module: Any) -> bool:
    """Whether a module is a linear that recipes quantise."""
    return isinstance(module, torch.nn.Linear) and not name.endswith("router") and name != "lm_head"


@torch.no_grad()
def have_four_bits(model: Any, errors: Errors) -> None:
    """Gives a model weights of four bits, those of its linears rounded to 16 bits when they are used.

    Without errors it computes as the CPU does.
    """
    int8 = Steps("int8", (-1,), fixed=False)

    def entering(x: Tensor) -> Tensor:
        return x if errors.drawn else int8(x.unflatten(-1, (-1, 32))).flatten(-2)

    for name, module in model.named_modules():
        if is_quantised(name, module):
            module.weight.copy_(four_bits(module.weight.T).T)
            module.forward = lambda x, module=module: torch.nn.functional.linear(entering(x), errors(module.weight))
        elif name.endswith(".experts"):
            for weight in (module.gate_up_proj, module.down_proj):
                weight.copy_(four_bits(weight))
            module.forward = _experts(module, entering, entering, errors)


def four_bits(weight: Tensor, group: int = 32) -> Tensor:
    """A weight [..., K, N] in four bits, whose groups of inputs share a scale."""
    groups = weight.unflatten(-2, (-1, group))
    scale = groups.abs().amax(-2, keepdim=True).clamp(1e-12) / 7
    return ((groups / scale).round() * scale).flatten(-3, -2)


class Steps:
    """Values in eight bits: whole steps of scales that are each row's own, or fixed by what comes first.

    Args:
        kind: `int8` or `fp8`.
        axes: Axes of the values that share a scale; none of them is all.
        fixed: Whether scales are those of the first values.
    """

    def __init__(self, kind: str, axes: tuple[int, ...], *, fixed: bool) -> None:
        self.kind, self.axes, self.fixed = kind, axes, fixed
        self.scale: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        scale = self.scale
        if scale is None or not self.fixed:
            scale = x.abs().amax(self.axes, keepdim=True).clamp(1e-12) / LARGEST[self.kind]
            self.scale = scale
        steps = (x / scale).clamp(-LARGEST[self.kind], LARGEST[self.kind])
        stored = steps.round() if self.kind == "int8" else steps.to(torch.float8_e4m3fn).float()
        return stored * scale


def quantised(model: Any, precision: str, errors: Errors) -> Any:
    """Has a model quantise what enters its products, and its keys and values, as the recipe of `precision` does.

    Returns a context in which it may be run. Each value is rounded to 16 bits, with its error, before it is quantised.
    """
    caches: dict[tuple[Any, str], Steps] = {}
    if precision == "int4":
        have_four_bits(model, errors)
    if precision not in LARGEST:
        return patch.object(modeling_llama4, "eager_attention_forward", modeling_llama4.eager_attention_forward)
    for name, module in model.named_modules():
        if is_quantised(name, module):
            steps = _inputs(precision)
            module.register_forward_pre_hook(lambda _, given, steps=steps: (steps(errors(given[0])),))
        elif name.endswith(".experts"):
            module.forward = _experts(module, _inputs(precision), _inputs(precision), errors)
    attend = modeling_llama4.eager_attention_forward

    def over_cache(module: Any, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **how: Any) -> Any:
        found = []
        for place, x in (("key", key), ("value", value)):
            steps = caches.setdefault((module, place), Steps(precision, (0, 2), fixed=True))
            found.append(steps(errors(x)))
        return attend(module, errors(query), *found, *rest, **how)

    return patch.object(modeling_llama4, "eager_attention_forward", over_cache)


def _inputs(precision: str) -> Steps:
    """Steps of a product's inputs: a token's own in FP8, one scale for all in int8."""
    return Steps(precision, (-1,), fixed=False) if precision == "fp8" else Steps(precision, (), fixed=True)


def _experts(module: Any, entering: Change, between: Change, errors: Errors) -> Change:
    """The experts' products over what is quantised before each."""

    def forward(hidden: Tensor) -> Tensor:
        x_ETH = entering(errors(hidden.view(len(module.gate_up_proj), -1, hidden.shape[-1])))
        gate, up = torch.bmm(x_ETH, module.gate_up_proj).chunk(2, dim=-1)
        made = between(errors(up * module.act_fn(gate)))
        return torch.bmm(made, module.down_proj).view(-1, module.down_proj.shape[-1])

    return forward
