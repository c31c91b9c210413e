"""How far a recipe's rounding alone takes each unit's output away from the exact one.

Enters: what the reference's units take in, its weights, and what the recipe says. Leaves: relative errors to be
expected of plain rounding (largest magnitudes as clips, nothing smoothed or corrected) at the same inputs.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...export.llama4 import rms_norm
from ...plugins.quantisation import LARGEST, fake_quantise, quantise
from ...spec.choice import Choice, choose
from ...spec.recipe import Recipe
from .decoder import Hidden, TorchLayers

ARITHMETIC = 2e-5
"""What float32 sums in another order may differ by, of the output."""

ROWS, OUTPUTS = 128, 512
"""Tokens and output channels that are looked at."""

CACHE_ERRORS = {"none": 0.0, "int8": 0.01, "fp8": 0.03}
"""Of keys and values by the type of the cache."""


def expected_errors(layers: TorchLayers, index: int, recipe: Recipe | None) -> dict[str, float]:
    """The errors to be expected of the half that the reference ran last, by unit.

    Args:
        layers: The reference's.
        index: Which layer.
        recipe: The candidate's; None leaves arithmetic alone.
    """
    expected = _Expected(layers, index, recipe)
    if "attention_input" in layers.inputs:
        q, k, v = (expected.linear(f"self_attn.{part}_proj", "attention_input") for part in "qkv")
        cache = CACHE_ERRORS["none" if recipe is None else recipe.kv_cache]
        attention = math.hypot(q, k, v, cache)
        output = math.hypot(attention, expected.linear("self_attn.o_proj", "attention_output"))
        names = (
            "self_attn.q_proj",
            "self_attn.k_proj",
            "self_attn.v_proj",
            "self_attn",
            "self_attn.o_proj",
            "attended",
        )
        return dict(zip(names, (q, k, v, attention, output, output), strict=True))
    has_experts = layers.spec.layers[index].experts
    name = "feed_forward.shared_expert" if has_experts else "feed_forward"
    gate, up = (expected.linear(f"{name}.{part}_proj", "feed_input") for part in ("gate", "up"))
    down = math.hypot(gate, up, expected.linear(f"{name}.down_proj", "down_input"))
    found = {f"{name}.gate_proj": gate, f"{name}.up_proj": up, f"{name}.down_proj": down, "out": down}
    if has_experts:
        experts = expected.experts()
        found["feed_forward.router"] = expected.linear("feed_forward.router", "feed_input")
        found |= {"feed_forward.experts": experts, "out": math.hypot(down, experts)}
    return found


def expected_head_error(layers: TorchLayers, x_SH: Hidden, recipe: Recipe | None) -> float:
    """The same of the head's logits."""
    choice = None if recipe is None else choose(recipe, "lm_head")
    if choice is None or choice.format == "none":
        return ARITHMETIC
    rows = torch.from_numpy(x_SH[-ROWS:].copy())
    normed_RH = rms_norm(rows, layers.weights.wide("norm.weight"), layers.spec.norm_eps)
    weight_VH = sample(layers.weights.wide("lm_head.weight"), OUTPUTS)
    return max(ARITHMETIC, rounding_error(normed_RH.numpy(), weight_VH.numpy(), choice))


class _Expected:
    """The errors of one layer's products."""

    def __init__(self, layers: TorchLayers, index: int, recipe: Recipe | None) -> None:
        self.layers, self.index, self.recipe = layers, index, recipe

    def linear(self, unit: str, source: str) -> float:
        """A linear's."""
        x_RK = sample(self.layers.inputs[source], ROWS)
        return self._product(unit, x_RK, lambda: self.layers.walk.weight(f"{unit}.weight"))

    def experts(self) -> float:
        """Those of the expert that most tokens chose, as an example: both products and the rounding between them."""
        walk, unit = self.layers.walk, "feed_forward.experts"
        if self._choice(unit) is None:
            return ARITHMETIC
        chosen_TK = walk.chosen()
        expert = int(torch.bincount(chosen_TK.flatten()).argmax())
        tokens_N = (chosen_TK == expert).any(1).nonzero()[:, 0][:ROWS]
        _, x_NH = next(walk.expert_inputs(expert, tokens_N))
        gate_up, down = self.layers.expert(expert)
        gate_NI, up_NI = (x_NH @ gate_up).chunk(2, dim=1)
        activated_NI = up_NI * torch.nn.functional.silu(gate_NI)
        first, second = self._product(unit, x_NH, lambda: gate_up.T), self._product(unit, activated_NI, lambda: down.T)
        return math.hypot(first, first, second)  # gate and up both

    def _choice(self, unit: str) -> Choice | None:
        choice = None if self.recipe is None else choose(self.recipe, f"layers.{self.index}.{unit}")
        return None if choice is None or choice.format == "none" else choice

    def _product(self, unit: str, x_RK: Tensor, weight: Callable[[], Tensor]) -> float:
        choice = self._choice(unit)
        if choice is None:
            return ARITHMETIC
        return max(ARITHMETIC, rounding_error(x_RK.numpy(), sample(weight(), OUTPUTS).numpy(), choice))


def rounding_error(x_RK: NDArray[np.float32], weight_NK: NDArray[np.float32], choice: Choice) -> float:
    """The relative error of a product whose weight, and whose input where the choice says so, are rounded."""
    kind, size = choice.format, weight_NK.shape[1]
    group = choice.group_size if kind == "int4" else size
    blocks_NGB = weight_NK.reshape(len(weight_NK), size // group, group)
    scale_NG1 = np.abs(blocks_NGB).max(-1, keepdims=True) / LARGEST[kind]
    scale_NG1[scale_NG1 == 0] = 1.0
    rounded_NK = (quantise(blocks_NGB, scale_NG1, kind).astype(np.float64) * scale_NG1).reshape(weight_NK.shape)
    static = choice.quantises_activations and choice.activations == "static"
    scale = float(np.abs(x_RK).max()) / LARGEST[kind] or 1.0 if static else None
    exact_RN = x_RK.astype(np.float64) @ weight_NK.T.astype(np.float64)
    found_RN = fake_quantise(x_RK, scale, kind) @ rounded_NK.T
    return float(np.linalg.norm(found_RN - exact_RN) / (np.linalg.norm(exact_RN) or 1.0))


def sample(rows: Tensor, count: int) -> Tensor:
    """So many rows at most, evenly spaced."""
    return rows[:: max(1, len(rows) // count)][:count]
