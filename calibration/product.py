"""One product quantised: its weight rounded, its input's scale chosen, and how far its output is off.

Enters: a weight [N, K] and what is known of its input. Leaves: a `Product`, and a `Record` for the report.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..plugins.quantisation import LARGEST
from ..spec.choice import Choice
from ..spec.recipe import Recipe
from .clip import choose_clip
from .gptq import Corrections, find_corrections, round_gptq
from .moved_weight import MovedWeight
from .rounding import Rounded, choose_and_round, choose_scales, fake_quantise, round_nearest
from .smoothing import SEARCHED_OUTPUTS, Reader, some_outputs
from .statistics import Statistics

MEASURED_ROWS = 32
"""Sample rows, at least, that the report's noise of a product is measured over."""

MEASURED_OUTPUTS = 1024
"""Output channels, evenly spaced, that the report's noise is measured over: it then lies within some hundredths of a dB
of that over all, in a tenth of the time that rounding a wide weight takes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """The record of one quantised weight.

    Attributes:
        name: The weight's name, with the expert's number where there is one.
        format: Format that it is stored in.
        activations: `static`, `dynamic` or `none`.
        tokens: Tokens that its input was measured over.
        largest: The input's largest magnitude, smoothed.
        clip: The largest that is represented; of dynamic scales the largest too.
        strength: Strength of the smoothing of its input; None where there is none.
        weight_sqnr: Signal to quantisation noise of the weight, over some output channels, dB.
        output_sqnr: Signal to quantisation noise of the product over sample rows and the same channels, its input
            quantised too, dB; None where no row was seen.
        measured: Whether it was rounded with statistics of its own.
    """

    name: str
    format: str
    activations: str
    tokens: int
    largest: float
    clip: float
    strength: float | None
    weight_sqnr: float
    output_sqnr: float | None
    measured: bool = True


@dataclass(slots=True)
class Product:
    """A quantised product.

    Attributes:
        weight: The stored weight.
        input_scale: The static scale of its input; None where there is none.
    """

    weight: Rounded
    input_scale: float | None


@dataclass(slots=True)
class ProductInput:
    """The input of some products, before and after it is smoothed.

    Attributes:
        statistics: Statistics of the input as the model computes it.
        recipe: Recipe that names the methods.
        exponents_K: Octaves that each channel is divided by.
        strength: Strength that they were made with.
        borrowed: The static scale where it is another's; None where it is chosen from the statistics.
    """

    statistics: Statistics
    recipe: Recipe
    exponents_K: Tensor = field(init=False)
    strength: float | None = field(init=False, default=None)
    borrowed: float | None = field(init=False, default=None)
    _scales: dict[tuple[bytes, str, str], float] = field(init=False, default_factory=dict)
    _corrections: Corrections | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.exponents_K = torch.zeros(self.statistics.channels, dtype=torch.int32, device=self.statistics.device)

    def scale(self, choice: Choice, exponents_K: Tensor) -> float | None:
        """The static scale under some exponents, or None where the choice has none."""
        if not choice.quantises_activations or choice.activations == "dynamic":
            return None
        if self.borrowed is not None:
            return float(torch.tensor(self.borrowed or 1.0))
        key = exponents_K.int().cpu().numpy().tobytes(), choice.clip, choice.format
        if key not in self._scales:
            clip = self.statistics.absmax(exponents_K)
            if choice.clip != "absmax":
                counts_B = self.statistics.histogram(exponents_K)
                clip = choose_clip(counts_B, clip, choice.clip, choice.format, self.recipe.percentile)
            self._scales[key] = float(torch.tensor(clip / LARGEST[choice.format] or 1.0))  # as float32 holds it
        return self._scales[key]

    def corrections(self) -> Corrections | None:
        """GPTQ's corrections under the chosen exponents, found once for all weights that read the input."""
        products = self.statistics.products
        if self._corrections is None and products is not None:
            self._corrections = find_corrections(products.divided(self.exponents_K))
        return self._corrections

    def reader(self, weight_NK: Tensor, choice: Choice) -> Reader:
        """A linear of this input, for the search of the smoothing's strength."""

        def quantise(rows_RK: Tensor, moved_NK: Tensor, exponents_K: Tensor) -> Tensor:
            group = choice.group_size or moved_NK.shape[1]
            scales_NG = choose_scales(moved_NK, choice.format, group, "absmax")
            rounded = round_nearest(moved_NK, scales_NG, choice.format)
            return fake_quantise(rows_RK, choice.format, self.scale(choice, exponents_K)) @ rounded.wide().T

        nothing_K = torch.zeros_like(self.exponents_K)
        sample_RK, weight = self.statistics.sample(nothing_K), MovedWeight(weight_NK, nothing_K)
        some_NK = weight.rows(some_outputs(weight_NK, SEARCHED_OUTPUTS))
        return Reader(some_NK, weight.largest_K(), sample_RK, sample_RK @ some_NK.T, quantise)


def quantise_product(
    name: str, weight: MovedWeight, source: ProductInput, choice: Choice, dtype: torch.dtype
) -> tuple[Product, Record]:
    """Quantises one product.

    Args:
        name: The weight's name, for the record.
        weight: The weight, moved by the exponents chosen for its input and for the next.
        source: Its input.
        choice: The recipe's choice for it.
        dtype: The type that can hold the scales of groups.
    """
    statistics, exponents_K = source.statistics, source.exponents_K
    clip = source.recipe.weight_clip
    group, held = (choice.group_size, dtype) if choice.group_size else (weight.shape[1], torch.float32)
    corrections = source.corrections() if choice.rounding == "gptq" else None
    if corrections is None:
        rounded = choose_and_round(weight, choice.format, group, clip, held)
    else:
        pieces = (weight.rows(piece) for piece in weight.pieces())
        scales_NG = torch.cat([choose_scales(rows_NK, choice.format, group, clip, held) for rows_NK in pieces])
        rounded = round_gptq(weight, scales_NG, choice.format, corrections)
    scale = source.scale(choice, exponents_K)
    rows_RK = statistics.sample(exponents_K)
    rows_RK = rows_RK[:: max(1, len(rows_RK) // MEASURED_ROWS)]
    some_N = some_outputs(weight.stored_NK, MEASURED_OUTPUTS)
    exact_NK, wide_NK = weight.rows(some_N), Rounded(rounded.values_NK[some_N], rounded.scale_NG[some_N]).wide()
    found_RN = fake_quantise(rows_RK, choice.format, scale) @ wide_NK.T
    largest = statistics.absmax(exponents_K)
    record = Record(
        name=name,
        format=choice.format,
        activations=choice.activations if choice.quantises_activations else "none",
        tokens=statistics.tokens,
        largest=largest,
        clip=largest if scale is None else scale * LARGEST[choice.format],
        strength=source.strength,
        weight_sqnr=sqnr(exact_NK, wide_NK),
        output_sqnr=sqnr(rows_RK @ exact_NK.T, found_RN) if len(rows_RK) else None,
    )
    return Product(rounded, scale), record


def sqnr(exact: Tensor, found: Tensor) -> float:
    """Signal to quantisation noise, dB; 200 at most, so that a perfect one can be plotted. Overwrites `found`."""
    signal, noise = (float(torch.linalg.vector_norm(x)) ** 2 for x in (exact, found.sub_(exact)))
    return min(200.0, 10 * math.log10(signal / noise)) if signal > 0 and noise > 0 else 200.0
