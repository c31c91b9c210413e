"""Recipes: how a model is quantised, and what is said otherwise of some of its weights."""

from dataclasses import dataclass
from typing import Literal

Format = Literal["none", "int8", "fp8", "int4"]
"""How weights are stored: in the model's own type, or quantised."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Override:
    """An exception of a recipe for some weights; None leaves a field as the recipe has it.

    Attributes:
        pattern: Shell pattern of names without `.weight`, as in `layers.*.self_attn.o_proj` or `lm_head`; one
            layer's routed experts are `layers.N.feed_forward.experts`.
        format: How these weights are stored.
        activations: One scale a tensor, or one a token.
        clip: How the largest activation that is represented is chosen.
        group_size: Inputs of an output that share a scale in `int4`.
        rounding: To the nearest value, or with GPTQ's correction.
    """

    pattern: str
    format: Format | None = None
    activations: Literal["static", "dynamic"] | None = None
    clip: Literal["absmax", "percentile", "entropy", "mse"] | None = None
    group_size: int | None = None
    rounding: Literal["nearest", "gptq"] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """How a model is quantised.

    Attributes:
        format: Format of the linears and of the experts; `int4` quantises weights only, the others activations too.
        activations: One scale a tensor from calibration, or one a token, computed as it runs.
        clip: How the largest activation that is represented is chosen.
        percentile: Share of activations, in percent, that `percentile` keeps within the clip.
        weight_clip: How the largest weight of a column or group is chosen.
        smoothing: Method that moves difficult channels from activations into weights before rounding.
        strength: Strength of the smoothing, 0 to 1; None searches it for each group of linears with a common input.
        rounding: To the nearest value, or with GPTQ's correction of what is rounded later.
        group_size: Inputs of an output that share a scale in `int4`; 32 of an `int8` recipe's too, and otherwise all.
        kv_cache: How keys and values are stored.
        activation_bound: The largest magnitude that a token's own scale is chosen for: larger ones are clipped; 0 is
            none.
        overrides: Exceptions, of which a later one goes before an earlier one.
    """

    format: Literal["int8", "fp8", "int4"]
    activations: Literal["static", "dynamic"] = "static"
    clip: Literal["absmax", "percentile", "entropy", "mse"] = "absmax"
    percentile: float = 99.99
    weight_clip: Literal["absmax", "mse"] = "absmax"
    smoothing: Literal["none", "smoothquant", "awq"] = "none"
    strength: float | None = None
    rounding: Literal["nearest", "gptq"] = "nearest"
    group_size: int = 64
    kv_cache: Literal["none", "int8", "fp8"] = "none"
    activation_bound: float = 0.0
    overrides: tuple[Override, ...] = ()

    def __post_init__(self) -> None:
        if not 50 <= self.percentile <= 100:
            raise ValueError(f"percentile is {self.percentile}, expected 50 to 100")
        if self.strength is not None and not 0 <= self.strength <= 1:
            raise ValueError(f"strength is {self.strength}, expected 0 to 1")
