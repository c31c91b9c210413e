"""The time that a calibration will take, known before it begins.

Enters: a model's geometry, its recipe, the text. Leaves: seconds, and a line for people.
"""

import time

import numpy as np
import torch
from numpy.typing import NDArray

from ..spec.geometry import ModelSpec
from ..spec.recipe import Recipe
from .extent import walk_operations
from .outer_products import FEW

ROUNDING, CORRECTING = 800, 2600
"""Operations of one core that take as long as all do to round a weight, and for GPTQ's steps over it beside products:
what experts of Scout's took on two cores of an EPYC with AVX2. Most wait for memory, and gain little by more cores."""


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
