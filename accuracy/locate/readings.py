"""How far each unit of a candidate is off on the reference's input, and which of them is the first out of line.

Enters: both sides' outputs, unit by unit. Leaves: `Reading`s, in the order of computation, and the first that neither
the recipe's rounding nor the same unit in other layers explains.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Literal

from torch import Tensor

from ...errors import AccuracyError
from ...spec.choice import ADAPTER, PROJECTOR
from .decoder import Units
from .expected_errors import ARITHMETIC

BEYOND = 3.0
"""Errors of so many times what is explained are out of line."""

LENIENCE = 4.0
"""What all layers' errors alike may exceed the expectation by: attention amplifies the rounding of queries and keys."""

HIDDEN_BY_SMOOTHING = {"self_attn.v_proj", "self_attn"}
"""Beside `up_proj`, units whose channels a quantiser may divide; their errors are seen in what reads them."""

Part = Literal["decoder", "vision"]
"""The text decoder, or the vision tower with its projector."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """One unit's error on the reference's input.

    Attributes:
        part: Of the model.
        layer: Its number; -1 is the embedding or the tower's stem, the number of layers the head.
        unit: As in `self_attn.q_proj`; `attended` and `out` are what leaves the layer's halves.
        error: Root mean square of what differs, of the output's.
        expected: What plain rounding by the recipe explains of it.
    """

    part: Part = "decoder"
    layer: int
    unit: str
    error: float
    expected: float

    @property
    def place(self) -> str:
        """Where it is, in words."""
        if self.part == "decoder":
            return f"layer {self.layer}"
        if self.layer < 0:
            return "vision stem"
        return "vision head" if self.unit in (*ADAPTER, PROJECTOR) else f"vision {self.layer}"


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
    """What has been read so far.

    Args:
        is_smoothed: Whether one of the two may have channels divided.
    """

    def __init__(self, is_smoothed: bool) -> None:
        self.is_smoothed = is_smoothed
        self.taken: list[Reading] = []

    def take(
        self, layer: int, errors: Errors, expected: Mapping[str, float] | None = None, part: Part = "decoder"
    ) -> None:
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


def paired(theirs: Units, ours: Units, last: str, before: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Both sides' outputs by unit; of the half's own output what it adds to its input."""
    pairs = shared(theirs, ours, [unit for unit in theirs if unit != last])
    return pairs | {last: (theirs[last] - before, ours[last] - before)}


def shared(theirs: Units, ours: Units, units: Sequence[str]) -> dict[str, tuple[Tensor, Tensor]]:
    """Both sides' outputs of the units that both have."""
    return {unit: (theirs[unit], ours[unit]) for unit in units if unit in ours}
