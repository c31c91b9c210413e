"""Clips against the formulas of their papers, written out plainly in float64."""

import numpy as np
import pytest
import torch

from arriero.calibration.clip import choose_clip, clip_by_entropy, entropy_divergence, linear_histogram
from arriero.calibration.statistics import Statistics
from arriero.plugins.quantisation import LARGEST, fake_quantise


def measured(x: np.ndarray) -> tuple[np.ndarray, float]:
    statistics = Statistics("x", x.shape[1])
    statistics.update(torch.from_numpy(x.astype(np.float32)))
    nothing = torch.zeros(x.shape[1], dtype=torch.int32)
    return statistics.histogram(nothing), statistics.absmax(nothing)


@pytest.fixture(scope="module")
def heavy() -> np.ndarray:
    """Activations with a long tail."""
    return np.random.default_rng(0).standard_t(3, (4000, 8)).astype(np.float32)


def test_absmax_is_the_largest_magnitude(heavy: np.ndarray) -> None:
    assert choose_clip(*measured(heavy), "absmax", "int8") == np.abs(heavy).max()


@pytest.mark.parametrize("share", [90, 99, 99.9, 99.99])
def test_a_percentile_is_that_of_all_values(heavy: np.ndarray, share: float) -> None:
    # to a bin of a sixteenth of an octave
    found = choose_clip(*measured(heavy), "percentile", "int8", share)
    assert found == pytest.approx(np.percentile(np.abs(heavy), share), rel=1 / 16)


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_mse_is_about_the_best_of_all_clips(heavy: np.ndarray, kind: str) -> None:
    def error(clip: float) -> float:
        return float(np.mean((fake_quantise(heavy, clip / LARGEST[kind], kind) - heavy) ** 2))

    largest = float(np.abs(heavy).max())
    best = min(error(float(clip)) for clip in np.linspace(0.02, 1, 200) * largest)
    found = choose_clip(*measured(heavy), "mse", kind)
    assert error(found) <= 1.05 * best
    assert error(found) <= 1.01 * error(largest)


def test_entropy_equals_the_papers_pseudocode(heavy: np.ndarray) -> None:
    counts = linear_histogram(*measured(heavy), bins=512)
    divergences = {count: divergence(counts, count) for count in range(128, 513)}
    for count in (128, 200, 384, 512):
        assert entropy_divergence(counts, count) == pytest.approx(divergences[count], rel=1e-9)
    best = min(divergences, key=lambda count: divergences[count])
    assert clip_by_entropy(counts, 512.0) == best
    assert best < 512


def divergence(counts: np.ndarray, kept: int) -> float:
    """Migacz 2017, step by step."""
    reference = [float(count) for count in counts[:kept]]
    reference[-1] += float(sum(counts[kept:]))
    candidate = [0.0] * kept
    for level in range(128):
        members = [index for index in range(kept) if index * 128 // kept == level]
        filled = [index for index in members if counts[index] > 0]
        for index in filled:
            candidate[index] = sum(counts[i] for i in members) / len(filled)
    total, other = sum(reference), sum(candidate)
    pairs = [(p / total, q / other) for p, q in zip(reference, candidate, strict=True) if p > 0]
    return sum(p * np.log(p / max(q, 1e-12)) for p, q in pairs)


def test_a_tensor_of_zeros_has_clip_zero() -> None:
    for method in ("absmax", "percentile", "entropy", "mse"):
        assert choose_clip(*measured(np.zeros((9, 4), dtype=np.float32)), method, "int8") == 0
