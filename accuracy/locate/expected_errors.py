"""How far a recipe's rounding alone takes each unit's output away from the exact one.

Enters: the inputs of the reference's units, its weights, and the recipe. Leaves: relative errors to be expected of
plain rounding (largest magnitudes as clips, nothing smoothed or corrected) at the same inputs.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import linear

from ...export.llama4 import rms_norm
from ...plugins.quantisation import LARGEST, fake_quantise, quantise
from ...spec.choice import ADAPTER, PATCHES, PROJECTOR, Choice, choose
from ...spec.geometry import VISION_LAYERS
from ...spec.recipe import Recipe
from .decoder_units import TorchDecoder
from .location import STEM
from .tower_units import HEAD, PRODUCTS, TorchTower
from .units import Hidden

ARITHMETIC = 2e-5
"""Difference of float32 sums in another order, relative to the output."""

ROWS, OUTPUTS = 128, 512
"""Tokens and output channels that are looked at."""

CACHE_ERRORS = {"none": 0.0, "int8": 0.01, "fp8": 0.03}
"""Errors of keys and values by the type of the cache."""


def expected_errors(layers: TorchDecoder, index: int, recipe: Recipe | None) -> dict[str, float]:
    """The errors to be expected of the half that the reference ran last, by unit.

    Args:
        layers: The reference's.
        index: Number of the layer.
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


def expected_head_error(layers: TorchDecoder, x_SH: Hidden, recipe: Recipe | None) -> float:
    """The error to be expected of the head's logits."""

    def normed() -> Tensor:
        return rms_norm(torch.from_numpy(x_SH[-ROWS:].copy()), layers.weights.wide("norm.weight"), layers.spec.norm_eps)

    return product_error(recipe, "lm_head", normed, lambda: layers.weights.wide("lm_head.weight"))


class _Expected:
    """The errors of one layer's products."""

    def __init__(self, layers: TorchDecoder, index: int, recipe: Recipe | None) -> None:
        self.layers, self.index, self.recipe = layers, index, recipe

    def linear(self, unit: str, source: str) -> float:
        """A linear's error."""
        return self._product(
            unit, lambda: self.layers.inputs[source], lambda: self.layers.walk.weight(f"{unit}.weight")
        )

    def experts(self) -> float:
        """The error of the expert that most tokens chose: both products, and the rounding between them."""
        walk, unit = self.layers.walk, "feed_forward.experts"
        if rounding(self.recipe, self._full(unit)) is None:
            return ARITHMETIC
        chosen_TK = walk.chosen()
        expert = int(torch.bincount(chosen_TK.flatten()).argmax())
        tokens_N = (chosen_TK == expert).any(1).nonzero()[:, 0][:ROWS]
        _, x_NH = next(walk.expert_inputs(expert, tokens_N))
        gate_up, down = self.layers.expert(expert)
        gate_NI, up_NI = (x_NH @ gate_up).chunk(2, dim=1)
        activated_NI = up_NI * torch.nn.functional.silu(gate_NI)
        first = self._product(unit, lambda: x_NH, lambda: gate_up.T)
        second = self._product(unit, lambda: activated_NI, lambda: down.T)
        return math.hypot(first, first, second)  # gate and up both

    def _product(self, unit: str, x: Callable[[], Tensor], weight: Callable[[], Tensor]) -> float:
        return product_error(self.recipe, self._full(unit), x, weight)

    def _full(self, unit: str) -> str:
        return f"layers.{self.index}.{unit}"


def expected_stem_errors(tower: TorchTower, recipe: Recipe | None) -> dict[str, float]:
    """The errors to be expected of the tower's stem, which the reference ran last, by unit."""
    return dict.fromkeys((PATCHES, STEM), _tower_error(tower, recipe, PATCHES, "patches"))


def expected_tower_errors(tower: TorchTower, index: int, recipe: Recipe | None) -> dict[str, float]:
    """The errors to be expected of the half of a tower's layer that the reference ran last, by unit."""
    own = {
        unit: _tower_error(tower, recipe, f"{VISION_LAYERS}{index}.{unit}", source, has_bias=True)
        for unit, source in PRODUCTS.items()
        if source in tower.inputs
    }
    whole = math.hypot(*own.values())
    if "feed_input" in tower.inputs:
        return own | {"mlp.fc2": whole, "out": whole}
    attention = math.hypot(*(own[f"self_attn.{part}_proj"] for part in "qkv"))
    return own | {"self_attn": attention, "self_attn.o_proj": whole, "attended": whole}


def expected_projection_errors(tower: TorchTower, recipe: Recipe | None) -> dict[str, float]:
    """The errors to be expected of adapter and projector, which the reference ran last, by unit."""
    fc1, fc2, last = (_tower_error(tower, recipe, unit, source) for unit, source in HEAD.items())
    return dict(zip((*ADAPTER, PROJECTOR), (fc1, math.hypot(fc1, fc2), math.hypot(fc1, fc2, last)), strict=True))


def _tower_error(tower: TorchTower, recipe: Recipe | None, name: str, source: str, *, has_bias: bool = False) -> float:
    """The error of one linear; a bias may leave less of the product's."""

    def share() -> float:
        product_RN = linear(sample(tower.inputs[source], ROWS), sample(tower.weights.wide(f"{name}.weight"), OUTPUTS))
        whole_RN = product_RN + sample(tower.weights.wide(f"{name}.bias"), OUTPUTS)
        return float(product_RN.norm() / whole_RN.norm().clamp(min=1e-30))

    return product_error(
        recipe,
        name,
        lambda: tower.inputs[source],
        lambda: tower.weights.wide(f"{name}.weight"),
        share if has_bias else lambda: 1.0,
    )


def rounding(recipe: Recipe | None, name: str) -> Choice | None:
    """How the recipe rounds a weight; None where it does not."""
    choice = None if recipe is None else choose(recipe, name)
    return None if choice is None or choice.format == "none" else choice


def product_error(
    recipe: Recipe | None,
    name: str,
    x: Callable[[], Tensor],
    weight: Callable[[], Tensor],
    share: Callable[[], float] = lambda: 1.0,
) -> float:
    """The relative error to be expected of a product, at least that of arithmetic.

    Args:
        recipe: The candidate's; None leaves arithmetic alone.
        name: Name under which the recipe chooses.
        x: Reads the input, [R, K].
        weight: Reads the weight, [N, K].
        share: Computes the product's share of the output.
    """
    choice = rounding(recipe, name)
    if choice is None:
        return ARITHMETIC
    x_RK, weight_NK = sample(x(), ROWS), sample(weight(), OUTPUTS)
    return max(ARITHMETIC, share() * rounding_error(x_RK.numpy(), weight_NK.numpy(), choice))


def rounding_error(x_RK: NDArray[np.float32], weight_NK: NDArray[np.float32], choice: Choice) -> float:
    """The relative error of a product whose weight, and whose input where the choice says so, are rounded."""
    kind, size = choice.format, weight_NK.shape[1]
    group = choice.group_size or size
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
    """At most `count` rows, evenly spaced."""
    return rows[:: max(1, len(rows) // count)][:count]
