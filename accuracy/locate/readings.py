"""How far each unit of a candidate is off on the reference's input, and which of them is the first out of line.

Enters: both sides' outputs, unit by unit. Leaves: `Reading`s, in the order of computation, and the first that neither
the recipe's rounding nor the same unit in other layers explains.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

from torch import Tensor

from ...errors import AccuracyError
from .expected_errors import ARITHMETIC
from .location import ModelPart, Reading
from .units import Units

BEYOND = 3.0
"""Multiple of the explained error, above which an error is out of line."""

LENIENCE = 4.0
"""Factor by which all layers' errors alike may exceed the expectation: attention amplifies rounding of its inputs."""

HIDDEN_BY_SMOOTHING = {"self_attn.v_proj", "self_attn"}
"""Beside `up_proj`, units whose channels a quantiser may divide; their errors are seen in what reads them."""

Pairs = dict[str, tuple[Tensor, Tensor]]
"""The reference's and the candidate's outputs by unit."""


@dataclass(slots=True)
class Errors:
    """Summed squares of units' outputs and of what differs in them."""

    signal: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    noise: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    def add(self, pairs: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Takes in the reference's and the candidate's outputs by unit."""
        for unit, (theirs, ours) in pairs.items():
            self.signal[unit] += float(theirs.double().square().sum())
            self.noise[unit] += float((ours - theirs).double().square().sum())

    def relative(self, unit: str) -> float:
        """Root mean square of what differs, of the output's; 0 where both are nothing."""
        signal, noise = self.signal[unit], self.noise[unit]
        return math.sqrt(noise / signal) if signal else (math.inf if noise else 0.0)


class Readings:
    """Readings taken so far, in the order of computation.

    Args:
        is_smoothed: Whether one of the two may have channels divided.
    """

    def __init__(self, is_smoothed: bool) -> None:
        self.is_smoothed = is_smoothed
        self.taken: list[Reading] = []

    def take(self, part: ModelPart, layer: int, errors: Errors, expected: Mapping[str, float] | None = None) -> None:
        """Reads all units that errors were summed of; where nothing is expected, float sums are all that may differ.

        Raises:
            AccuracyError: One of the two computes no numbers.
        """
        for unit in errors.noise:
            hidden = unit in HIDDEN_BY_SMOOTHING or unit.endswith(".up_proj")
            if hidden and self.is_smoothed:
                continue
            explained = ARITHMETIC if expected is None else expected[unit]
            found = Reading(part=part, layer=layer, unit=unit, error=errors.relative(unit), expected=explained)
            if not math.isfinite(found.error):
                raise AccuracyError(
                    f"{found.place}: {unit} is NaN or infinite in one of the two: its weights are damaged"
                )
            self.taken.append(found)

    def first_out_of_line(self) -> tuple[Reading, float] | None:
        """The first reading beyond what is explained, and the error that would have been in line."""
        ratios: dict[tuple[str, str], list[float]] = defaultdict(list)
        for reading in self.taken:
            ratios[reading.part, reading.unit].append(reading.error / reading.expected)
        for reading in self.taken:
            common = min(max(median(ratios[reading.part, reading.unit]), 1.0), LENIENCE)
            if reading.error > BEYOND * common * reading.expected:
                return reading, BEYOND * common * reading.expected
        return None


def paired(theirs: Units, ours: Units, last: str, before: Tensor) -> Pairs:
    """Both sides' outputs by unit; of the half's own output what it adds to its input."""
    pairs = shared(theirs, ours, [unit for unit in theirs if unit != last])
    return pairs | {last: (theirs[last] - before, ours[last] - before)}


def shared(theirs: Units, ours: Units, units: Sequence[str]) -> Pairs:
    """Both sides' outputs of the units that both have."""
    return {unit: (theirs[unit], ours[unit]) for unit in units if unit in ours}
