"""Statistics of a product's input, collected while calibration text runs through the model.

Enters: rows of activations, some at a time. Leaves: for each channel its largest magnitude, its mean magnitude and a
histogram; of the whole some sample rows and, where GPTQ asks for it, the outer products. Memory depends on the
number of channels only.

A histogram's bins are float32 bit patterns without their last bits, sixteen to an octave. Multiplying a channel by a
power of two therefore shifts its bins and loses nothing, so that smoothing needs no second pass over the text.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import CalibrationError
from ..walk.accelerator import HOST
from .outer_products import OuterProducts

STEPS = 16
"""Bins an octave."""

DROPPED_BITS = 19
"""Bits of float32's mantissa, of 23, that an octave's sixteen bins do not need."""

SMALLEST_EXPONENT, LARGEST_EXPONENT = -30, 17
BINS = STEPS * (LARGEST_EXPONENT - SMALLEST_EXPONENT)
FIRST_PATTERN = (127 + SMALLEST_EXPONENT) * STEPS
SAMPLES = 128
"""Rows kept at least, where there are as many."""


def edges() -> NDArray[np.float64]:
    """The bins' edges, BINS + 1 magnitudes; what is smaller than the first lies in the first bin."""
    patterns = np.arange(FIRST_PATTERN, FIRST_PATTERN + BINS + 1, dtype=np.uint32) << DROPPED_BITS
    return patterns.view(np.float32).astype(np.float64)


@dataclass(slots=True)
class Statistics:
    """The statistics of one product's input.

    Args:
        name: For messages.
        channels: Columns of a row (K).
        wants_products: Whether the outer products are kept.
        wants_histogram: Whether the histogram is kept.
        device: Where its rows are, and all that is kept of them.

    Attributes:
        tokens: Rows seen.
        absmax_K: Largest magnitude of each channel.
        absolute_sum_K: Sum of magnitudes of each channel.
        histogram_KB: How many magnitudes of each channel lie in each bin.
        products: The rows' outer products.
    """

    name: str
    channels: int
    wants_products: bool = False
    wants_histogram: bool = True
    device: torch.device = HOST
    tokens: int = 0
    absmax_K: Tensor = field(init=False)
    absolute_sum_K: Tensor = field(init=False)
    histogram_KB: Tensor = field(init=False)
    products: OuterProducts | None = field(init=False, default=None)
    kept: list[Tensor] = field(init=False, default_factory=list)
    stride: int = field(init=False, default=1)

    def __post_init__(self) -> None:
        counted, device = self.channels if self.wants_histogram else 0, self.device
        self.absmax_K = torch.zeros(self.channels, device=device)
        self.absolute_sum_K = torch.zeros(self.channels, dtype=torch.float64, device=device)
        self.histogram_KB = torch.zeros(counted, BINS, dtype=torch.int32, device=device)
        if self.wants_products:
            self.products = OuterProducts(self.channels, device)

    def update(self, x_NK: Tensor) -> None:
        """Takes in more rows.

        Raises:
            CalibrationError: A value is NaN or infinite.
        """
        magnitude_NK = x_NK.abs().contiguous()
        largest_K = magnitude_NK.amax(0) if len(x_NK) else self.absmax_K
        if not torch.isfinite(largest_K).all():
            raise CalibrationError(f"{self.name} is NaN or infinite: the checkpoint's weights or the text are damaged")
        self.absmax_K = torch.maximum(self.absmax_K, largest_K)
        self.absolute_sum_K += magnitude_NK.sum(0)
        if self.wants_histogram:
            self._count(magnitude_NK)
        if self.products is not None:
            self.products.update(x_NK)
        self._keep(x_NK)

    def _count(self, magnitude_NK: Tensor) -> None:
        bins_NK = (magnitude_NK.view(torch.int32) >> DROPPED_BITS).sub_(FIRST_PATTERN).clamp_(0, BINS - 1)
        places_NK = bins_NK.add_(torch.arange(self.channels, dtype=torch.int32, device=self.device) * BINS)
        counts = torch.bincount(places_NK.view(-1), minlength=self.channels * BINS)
        self.histogram_KB += counts.view(self.channels, BINS).int()

    def _keep(self, x_NK: Tensor) -> None:
        """Keeps every row whose number is a multiple of the stride, which doubles when there are too many."""
        first = -self.tokens % self.stride
        self.kept.append(x_NK[first :: self.stride].clone())
        self.tokens += len(x_NK)
        while sum(map(len, self.kept)) > 2 * SAMPLES:
            self.kept = [torch.cat(self.kept)[::2].clone()]
            self.stride *= 2

    @property
    def mean_K(self) -> Tensor:
        """Mean magnitude of each channel."""
        return (self.absolute_sum_K / max(1, self.tokens)).float()

    def histogram(self, exponents_K: Tensor) -> NDArray[np.float64]:
        """How many magnitudes of x / 2^exponents lie in each bin, over all channels."""
        total_B = torch.zeros(BINS, dtype=torch.float64, device=self.device)
        for exponent in exponents_K.unique().cpu().tolist():
            counts_B = self.histogram_KB[exponents_K == exponent].sum(0, dtype=torch.float64)
            shift = STEPS * exponent
            start, end = max(0, shift), min(BINS, BINS + shift)
            total_B[start - shift : end - shift] += counts_B[start:end]
            total_B[0] += counts_B[:start].sum()
        return total_B.cpu().numpy()

    def sample(self, exponents_K: Tensor) -> Tensor:
        """The rows kept, evenly spaced over all, divided by 2^exponents: [R, K]."""
        rows_RK = torch.cat(self.kept) if self.kept else torch.zeros(0, self.channels, device=self.device)
        return rows_RK / torch.exp2(exponents_K.float())

    def absmax(self, exponents_K: Tensor) -> float:
        """The largest magnitude of x / 2^exponents."""
        return float((self.absmax_K / torch.exp2(exponents_K.float())).max())
