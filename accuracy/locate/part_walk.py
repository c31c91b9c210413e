"""A decoder or a tower of both sides, walked half a layer at a time on the reference's input.

Enters: the reference, which PyTorch computes, and the candidate as it runs. Leaves: readings of all units, and for one
that is out of line what is to blame. Errors do not add up over layers, since the candidate is given what the reference
computes. Memory holds one layer of each side besides the hidden states.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from ...spec.types import Progress
from .location import Blame, ModelPart, Reading
from .readings import Errors, Pairs, Readings, paired
from .units import Halves, Hidden, Units

Half = Literal["attend", "feed"]

LAST = {"attend": "attended", "feed": "out"}
"""Unit that leaves each half of a layer."""


class PartWalk(ABC):
    """One part of both models.

    Attributes:
        part: Decoder or tower.
        word: A layer of the part, in words.
        layers: Number of layers.
        reference: The reference's layers.
        candidate: The candidate's layers.
        progress: Called with each layer.
    """

    part: ModelPart
    word: str
    layers: int
    reference: Halves
    candidate: Halves
    progress: Progress

    @abstractmethod
    def read_start(self, readings: Readings) -> list[Hidden]:
        """Reads the units before the layers. Returns the reference's hidden states behind them."""

    @abstractmethod
    def read_end(self, readings: Readings, x_W: Sequence[Hidden]) -> None:
        """Reads the units behind the layers."""

    @abstractmethod
    def enter(self) -> list[Hidden]:
        """The reference's hidden states before the first layer, of each window or of all tiles."""

    @abstractmethod
    def expected(self, index: int) -> dict[str, float]:
        """The errors to be expected of the half that the reference ran last, by unit."""

    @abstractmethod
    def blame(self, reading: Reading) -> Blame:
        """Says what is wrong with a unit that is out of line."""

    def pairs(self, index: int, theirs: Units, ours: Units, last: str, before: Tensor) -> Pairs:
        """Both sides' outputs of a half, as they are compared."""
        return paired(theirs, ours, last, before)

    def hidden(self, rows: Tensor) -> Hidden:
        """Rows as hidden states."""
        hidden: Hidden = rows.numpy()
        return hidden

    def read(self, readings: Readings) -> None:
        """Takes a reading of each unit, in the order of computation."""
        x_W = self.read_start(readings)
        for index in range(self.layers):
            self.progress(f"both, {self.word} {index}", index, self.layers)
            x_W = self._read_half(readings, index, "feed", self._read_half(readings, index, "attend", x_W))
            self.reference.release()
            self.candidate.release()
        self.read_end(readings, x_W)
        self.candidate.release()

    def input_of(self, reading: Reading) -> list[Hidden]:
        """Walks the reference alone up to the half that a reading's unit lies in. Returns the half's input."""
        x_W = self.enter()
        for index in range(reading.layer):
            self.progress(f"reference, {self.word} {index}", index, reading.layer)
            x_W = self._outputs(index, "feed", self._outputs(index, "attend", x_W))
            self.reference.release()
        return self._outputs(reading.layer, "attend", x_W) if in_second_half(reading.unit) else x_W

    def _read_half(self, readings: Readings, index: int, half: Half, x_W: Sequence[Hidden]) -> list[Hidden]:
        """Reads the units of a half. Returns the reference's output."""
        errors, expected, last = Errors(), dict[str, float](), LAST[half]
        outputs = []
        for x in x_W:
            theirs, ours = run_half(self.reference, half, index, x), run_half(self.candidate, half, index, x)
            expected = expected or self.expected(index)
            outputs.append(self.hidden(theirs[last]))
            errors.add(self.pairs(index, theirs, ours, last, torch.from_numpy(x).flatten(0, -2)))
        readings.take(self.part, index, errors, expected)
        return outputs

    def _outputs(self, index: int, half: Half, x_W: Sequence[Hidden]) -> list[Hidden]:
        return [self.hidden(run_half(self.reference, half, index, x)[LAST[half]]) for x in x_W]


def run_half(layers: Halves, half: Half, index: int, x: Hidden) -> Units:
    """The units of one half of a layer."""
    return layers.attend(index, x) if half == "attend" else layers.feed(index, x)


def in_second_half(unit: str) -> bool:
    """Whether a unit of a layer lies behind the attention's residual."""
    return unit == "out" or unit.startswith(("feed_forward.", "mlp."))
