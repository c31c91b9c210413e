"""Difficult input channels made easier: divided in the activations and multiplied in the weights that read them.

Enters: the statistics of an input and the linears that read it. Leaves: a power of two for each channel. With powers of
two the division folds into a norm's weight or into the rows of the linear before without any rounding, and a histogram
shifts by whole bins; what is lost against SmoothQuant's and AWQ's real-valued factors is at most half an octave.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

LARGEST_SHIFT = 10
"""Octaves that a channel is moved at most, so that no norm's weight leaves the range of float16."""

STRENGTHS = (0.25, 0.4, 0.5, 0.6, 0.75, 0.9)
"""Strengths that a search tries beside no smoothing."""

SEARCHED_OUTPUTS = 256
"""Output channels of a linear that a search measures, evenly spaced: enough to choose one number by, and the search's
time then grows with the width and not with its square."""


@dataclass(slots=True)
class Reader:
    """A linear that reads a smoothed input.

    Attributes:
        weight_NK: Some of its output channels.
        largest_K: Largest magnitude of each column, over all output channels.
        sample_RK: Some of its input's rows.
        exact_RN: The product of rows and weight.
        quantise: The product that its quantised form computes of rows [R, K] and a weight [N, K].
    """

    weight_NK: Tensor
    largest_K: Tensor
    sample_RK: Tensor
    exact_RN: Tensor
    quantise: Callable[[Tensor, Tensor, Tensor], Tensor]


def some_outputs(weight_NK: Tensor, most: int) -> Tensor:
    """Indices of `most` of a weight's output channels or all, evenly spaced from the first to the last."""
    rows_N = torch.linspace(0, len(weight_NK) - 1, min(len(weight_NK), most)).round().long()
    return rows_N.to(weight_NK.device)


def smoothquant_exponents(activation_K: Tensor, weight_K: Tensor, strength: float) -> Tensor:
    """SmoothQuant's factors, max|X|^a / max|W|^(1-a) (Xiao et al. 2022, arXiv:2211.10438, eq. 4), to powers of two.

    Args:
        activation_K: Largest magnitude of each channel.
        weight_K: Largest magnitude of each column, over all linears that read the input.
        strength: The paper's α: how much of the difficulty moves to the weights.
    """
    used_K = (activation_K > 0) & (weight_K > 0)
    log_K = strength * activation_K.log2() - (1 - strength) * weight_K.log2()
    return _octaves(log_K, used_K)


def awq_exponents(activation_K: Tensor, strength: float) -> Tensor:
    """AWQ's factors, mean|X|^a over the geometric middle of the extremes (Lin et al. 2023, arXiv:2306.00978, eq. 5).

    Args:
        activation_K: Mean magnitude of each channel.
        strength: The paper's α.
    """
    return _octaves(strength * activation_K.log2(), activation_K > 0)


def _octaves(log_K: Tensor, used_K: Tensor) -> Tensor:
    """Whole octaves about the middle of the extremes; 0 for channels that are not used."""
    if not used_K.any():
        return torch.zeros_like(log_K, dtype=torch.int32)
    middle = (log_K[used_K].max() + log_K[used_K].min()) / 2
    octaves_K = (log_K - middle).round().clamp(-LARGEST_SHIFT, LARGEST_SHIFT)
    return torch.where(used_K, octaves_K, 0.0).int()


def output_error(readers: Sequence[Reader], exponents_K: Tensor) -> float:
    """The readers' squared output errors, each relative to its output."""
    factor_K = torch.exp2(exponents_K.float())
    total = 0.0
    for reader in readers:
        found_RN = reader.quantise(reader.sample_RK / factor_K, reader.weight_NK * factor_K, exponents_K)
        signal = reader.exact_RN.square().sum().clamp(min=1e-30)
        total += float((found_RN - reader.exact_RN).square().sum() / signal)
    return total


def search(
    readers: Sequence[Reader], exponents_of: Callable[[float], Tensor], strength: float | None
) -> tuple[Tensor, float | None]:
    """The exponents of the strength given, or of the one with the least output error.

    Returns:
        Exponents [K] and their strength; None where no smoothing is best.
    """
    if strength is not None:
        return exponents_of(strength), strength
    nothing_K = torch.zeros_like(exponents_of(0.5))
    best, chosen, exponents_K = output_error(readers, nothing_K), None, nothing_K
    for candidate in STRENGTHS:
        candidate_K = exponents_of(candidate)
        error = output_error(readers, candidate_K)
        if error < best:
            best, chosen, exponents_K = error, candidate, candidate_K
    return exponents_K, chosen
