"""The largest magnitude that a quantised activation represents, chosen from its histogram.

Enters: how many magnitudes lie in each bin, and the largest. Leaves: the clip, never above the largest; the scale is
the clip over the format's largest value. A lower clip rounds the many small values more finely and cuts the few large.
"""

import numpy as np
from numpy.typing import NDArray

from ..plugins.quantisation import LARGEST, fake_quantise
from .statistics import edges

Array = NDArray[np.float64]

LINEAR_BINS = 2048
"""Bins of equal width between 0 and the largest magnitude, as TensorRT's calibrator has them."""

LEVELS = 128
"""Magnitudes of int8."""

SHRINKS = np.linspace(1.0, 0.3, 36)
"""Clips that `mse` tries, as shares of the largest magnitude; further octaves follow while they improve."""


def choose_clip(counts_B: Array, largest: float, method: str, kind: str, percentile: float = 99.99) -> float:
    """The clip of an activation.

    Args:
        counts_B: How many magnitudes lie in each bin of `statistics.edges`.
        largest: The largest magnitude.
        method: `absmax`, `percentile`, `entropy` (int8 only) or `mse`.
        kind: `int8` or `fp8`.
        percentile: For `percentile`, in percent.
    """
    if method == "absmax" or largest == 0 or not counts_B.sum():
        return largest
    if method == "percentile":
        return clip_at_percentile(counts_B, largest, percentile)
    if method == "entropy":
        return clip_by_entropy(linear_histogram(counts_B, largest), largest)
    return clip_by_mse(counts_B, largest, kind)


def linear_histogram(counts_B: Array, largest: float, end: float | None = None, bins: int = LINEAR_BINS) -> Array:
    """The counts in bins of equal width over [0, end], or [0, largest].

    Within its bin a magnitude is taken as equally likely; the topmost bin ends at the largest.
    """
    borders = edges()
    borders[0] = 0.0  # the first bin holds the zeros too
    below = np.concatenate([[0.0], np.cumsum(counts_B)])
    top = int(np.searchsorted(borders, largest))
    borders, below = np.append(borders[:top], largest), np.append(below[:top], below[-1])
    return np.diff(np.interp(np.linspace(0, largest if end is None else end, bins + 1), borders, below))


def clip_at_percentile(counts_B: Array, largest: float, percentile: float) -> float:
    """The magnitude under which that share of all values lies."""
    linear = linear_histogram(counts_B, largest, bins=16 * LINEAR_BINS)
    share = np.cumsum(linear) / linear.sum()
    place = int(np.searchsorted(share, percentile / 100))
    return min(largest, largest * (place + 1) / len(linear))


def clip_by_entropy(linear_B: Array, largest: float) -> float:
    """The clip whose quantised distribution has the least Kullback-Leibler divergence from the clipped one.

    Migacz, "8-bit Inference with TensorRT" (GTC 2017): for each number of bins from 128 up, the reference is the first
    `i` bins with all that lies beyond added to the last of them; the candidate spreads those bins' counts over 128
    levels and each level's count evenly over its bins that are not empty.
    """
    best, clip = np.inf, largest
    for count in range(LEVELS, len(linear_B) + 1):
        divergence = entropy_divergence(linear_B, count)
        if divergence < best:
            best, clip = divergence, largest * count / len(linear_B)
    return clip


def entropy_divergence(linear_B: Array, count: int) -> float:
    """The divergence of keeping the first `count` bins."""
    kept = linear_B[:count]
    reference = kept.copy()
    reference[-1] += linear_B[count:].sum()
    level = np.arange(count) * LEVELS // count
    filled = kept > 0
    held = np.bincount(level, kept, LEVELS) / np.maximum(np.bincount(level, filled, LEVELS), 1)
    candidate = np.where(filled, held[level], 0.0)
    p, q = reference / reference.sum(), candidate / max(candidate.sum(), 1e-300)
    present = p > 0
    return float(np.sum(p[present] * np.log(p[present] / np.maximum(q[present], 1e-12))))


def clip_by_mse(counts_B: Array, largest: float, kind: str) -> float:
    """The clip with the least mean squared error (Sung et al. 2015, arXiv:1511.06488, for uniform steps)."""
    best, clip = np.inf, largest
    octave = largest
    while octave > largest / 2**12:
        candidates = octave * SHRINKS
        errors = [squared_error(counts_B, float(candidate), largest, kind) for candidate in candidates]
        if min(errors) >= best:
            break
        best, clip = min(errors), float(candidates[int(np.argmin(errors))])
        octave *= float(SHRINKS[-1])
    return clip


def squared_error(counts_B: Array, clip: float, largest: float, kind: str) -> float:
    """The sum of squared errors under a clip: of rounding within it, of cutting beyond it."""
    inside = linear_histogram(counts_B, largest, clip)
    centres = (np.arange(len(inside)) + 0.5) * clip / len(inside)
    rounded = fake_quantise(centres[:, None], clip / LARGEST[kind], kind)[:, 0]
    borders = edges()
    beyond = np.clip((borders[1:] + borders[:-1]) / 2, clip, largest)
    return float(inside @ (centres - rounded) ** 2 + counts_B @ (beyond - clip) ** 2)
