"""By how much a model's logits may differ where each of its ops is off by as much as the ops' tables allow.

Enter: a small Llama 4 and a precision. Leaves: the largest change of a logit that was seen when errors of that size
were drawn for the output of every op, over many draws. So a bound knows nothing of the engine that it judges.
"""

import copy
from typing import Any

import torch

from arriero.accuracy.sides.folder_side import torch_at_rest

UNITS = {"bf16": 2.0**-8, "fp16": 2.0**-11}
"""The largest relative error of rounding once."""
ATTENTION = {"bf16": 6 * UNITS["bf16"], "fp16": 6 * UNITS["fp16"], "8 bits": 5e-2}
"""The largest error of attention beside its output's size: `test_gqa_kernel`'s, over plain and quantised caches."""
EXPERTS = {"bf16": 1e-2, "fp16": 1e-3, "8 bits": 3e-2}
"""The deviation of the experts' error beside their output's size: `test_moe_kernel`'s, with plain and with quantised
activations. An activation in eight bits that was rounded to 16 before may lie a whole step aside."""

DRAWS = 4


def bound_logits(model: Any, precision: str, ids: list[list[int]]) -> float:
    """The largest change of a logit over sequences, of the model as `precision` computes it.

    Args:
        model: A model of `transformers`; one that is quantised moves its logits as it does.
        precision: `bf16`, `fp16`, `int8`, `fp8` or `int4`; all but the second compute in bfloat16.
        ids: Sequences of one length.
    """
    shaken = copy.deepcopy(model).float()
    tokens = torch.tensor(ids)
    with torch_at_rest(), torch.no_grad():
        expected = shaken(tokens).logits
        shake(shaken, precision, torch.Generator().manual_seed(0))
        return max(float((shaken(tokens).logits - expected).abs().max()) for _ in range(DRAWS))


def shake(model: Any, precision: str, generator: torch.Generator) -> None:
    """Has every op of a model err from now on, each time otherwise."""
    unit = UNITS["fp16" if precision == "fp16" else "bf16"]
    size = "8 bits" if precision in ("int8", "fp8") else "fp16" if precision == "fp16" else "bf16"
    linear = EXPERTS[size] if size == "8 bits" else 0.0  # what enters is quantised too, but at the router and the head

    def drawn(x: torch.Tensor) -> torch.Tensor:
        return 2 * torch.rand(x.shape, generator=generator) - 1

    def err(x: torch.Tensor, most: float) -> torch.Tensor:
        """Errors of up to so much of the row's size, and the rounding of each value."""
        rows = x.square().mean(-1, keepdim=True).sqrt()
        return x + most * rows * drawn(x) + unit * x * drawn(x)

    def after(most: float) -> Any:
        def hook(_: Any, __: Any, found: Any) -> Any:
            return err(found, most) if isinstance(found, torch.Tensor) else (err(found[0], most), *found[1:])

        return hook

    for name, module in model.named_modules():
        if name.endswith("o_proj"):
            module.register_forward_pre_hook(lambda _, given: (err(given[0], ATTENTION[size]),))
        if name.endswith(".experts"):
            module.register_forward_hook(after(EXPERTS[size] * 3**0.5))  # uniform errors of that deviation
        elif isinstance(module, torch.nn.Linear):
            plain = name.endswith("router") or name == "lm_head"
            module.register_forward_hook(after(0.0 if plain else linear * 3**0.5))
        elif "norm" in name or name.removeprefix("model.layers.").isdigit():
            module.register_forward_hook(after(0.0))
