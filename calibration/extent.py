"""The text that a calibration takes where nobody says how much, and the time that it will take.

Enters: a model's geometry and its recipe. Leaves: a number of windows, and seconds. A small model affords much text; of
a large one's time most would go into walking it, though it needs no more. So it is walked for about an hour, but never
over fewer tokens than its statistics want.
"""

import math
import time

import numpy as np
import torch
from numpy.typing import NDArray

from ..spec.geometry import ModelSpec
from ..spec.parameters import count_parameters
from ..spec.recipe import Recipe
from .outer_products import FEW

MOST_WINDOWS = 128
"""Windows at most."""

FEWEST_TOKENS = 16_384
"""Tokens at least, where there are as many."""

TOKENS_AN_EXPERT = 256
"""Tokens at least that an expert sees if all see as many: eight times `coverage.FLOOR`, since they do not."""

OPERATIONS = 3e14
"""Operations of the walk that are spent without being asked for: an hour of two cores of 40 GFLOP/s each."""

ROUNDING, CORRECTING = 800, 2600
"""Operations of one core that take as long as all do to round a weight, and for GPTQ's steps over it beside products:
what experts of Scout's took on two cores of an EPYC with AVX2. Most wait for memory, and gain little by more cores."""


def default_windows(spec: ModelSpec, window: int) -> int:
    """Windows of this length that a calibration takes where nobody says how many."""
    share = max((spec.experts / spec.experts_per_token for layer in spec.layers if layer.experts), default=1)
    tokens = max(OPERATIONS / walk_operations(spec), FEWEST_TOKENS, TOKENS_AN_EXPERT * share)
    return min(MOST_WINDOWS, math.ceil(tokens / window))


def walk_operations(spec: ModelSpec, *, all_experts: bool = False) -> float:
    """Operations of the walk for a token, without attention's products of activations and the head's."""
    total, active = count_parameters(spec)
    ends = spec.vocab_size * spec.hidden_size * (1 if spec.tied_embeddings else 2)
    return 2.0 * ((total if all_experts else active) - ends)


def expected_seconds(spec: ModelSpec, recipe: Recipe, tokens: int, *, all_experts: bool = False) -> float:
    """The time that a calibration will take on this machine's processors, by the speed of one product."""
    weights = walk_operations(spec, all_experts=True) / 2
    rows = tokens if all_experts else tokens * spec.experts_per_token / max(1, spec.experts)
    each: float = ROUNDING
    if recipe.rounding == "gptq":
        each += CORRECTING + min(FEW * rows, spec.hidden_size)
    walk = walk_operations(spec, all_experts=all_experts) * tokens / product_speed()
    return walk + weights * each / product_speed(threads=1)


def product_speed(threads: int | None = None) -> float:
    """Operations a second of a product in float32, on some threads, or as many as PyTorch has."""
    usual = torch.get_num_threads()
    torch.set_num_threads(threads or usual)
    try:
        return _product_speed()
    finally:
        torch.set_num_threads(usual)


def _product_speed() -> float:
    x_NK, weight_KM = torch.randn(512, 1024), torch.randn(1024, 2048)
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        x_NK @ weight_KM
        seconds.append(time.perf_counter() - started)
    return 2 * 512 * 1024 * 2048 / min(seconds)


def expected(spec: ModelSpec, recipe: Recipe, ids_WS: NDArray[np.int64], *, all_experts: bool = False) -> str | None:
    """The text and the time that it will take, in a sentence; None where that is under a minute."""
    windows, tokens = len(ids_WS), ids_WS.size
    seconds = expected_seconds(spec, recipe, tokens, all_experts=all_experts)
    if seconds < 60:
        return None
    took = f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"
    held = "1 window" if windows == 1 else f"{windows} windows"
    return f"{tokens:,} tokens in {held}: about {took} on this machine (--samples N takes N windows)."
