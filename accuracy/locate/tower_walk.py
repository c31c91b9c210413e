"""Two vision towers walked layer by layer over the tiles of some windows.

Enters: both sides, and windows. Leaves: readings, and of one that is out of line what is to blame. Memory holds one
layer of each side and some tiles' hidden states.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor

from ...spec.choice import PATCHES
from ...spec.types import Progress
from ...walk.windows import Windows
from ..sides.side import Side
from .expected_errors import expected_projection_errors, expected_stem_errors, expected_tower_errors
from .location import STEM, Blame, ModelPart, Reading
from .part_walk import PartWalk
from .readings import Errors, Readings, shared
from .tower_suspects import blame_tower
from .tower_units import HEAD, TorchTower, TowerUnits, in_torch, open_tower
from .units import Hidden, Units

TILES = 8
"""Tiles that the towers are run on."""


class TowerWalk(PartWalk):
    """Both sides' towers.

    Args:
        side: The candidate.
        other: The reference, whose tower PyTorch computes from its weights.
        windows: Windows of which the first tiles are used.
        progress: Called with each layer.

    Raises:
        AccuracyError: One of them is an engine.
    """

    part: ModelPart = "vision"
    word = "vision layer"
    reference: TorchTower
    candidate: TowerUnits

    def __init__(self, side: Side, other: Side, windows: Windows, progress: Progress) -> None:
        self.reference, self.candidate = in_torch(other), open_tower(side)
        self.recipe, self.progress = side.recipe, progress
        self.vision, self.pixels_N3PP = self.reference.vision, windows.pixels_N3PP[:TILES].astype(np.float32)
        self.layers = self.vision.layers

    def read_start(self, readings: Readings) -> list[Hidden]:
        """Reads the stem."""
        theirs, ours = self.reference.stem(self.pixels_N3PP), self.candidate.stem(self.pixels_N3PP)
        self._take(readings, -1, (theirs, ours), [PATCHES, STEM], expected_stem_errors(self.reference, self.recipe))
        return [self.hidden(theirs[STEM])]

    def read_end(self, readings: Readings, x_W: Sequence[Hidden]) -> None:
        """Reads adapter and projector."""
        both = self.reference.head(x_W[0]), self.candidate.head(x_W[0])
        self._take(readings, self.layers, both, [*HEAD], expected_projection_errors(self.reference, self.recipe))

    def enter(self) -> list[Hidden]:
        """The reference's hidden states of the tiles, behind the stem."""
        return [self.hidden(self.reference.stem(self.pixels_N3PP)[STEM])]

    def expected(self, index: int) -> dict[str, float]:
        """The errors to be expected of the half that the reference ran last, by unit."""
        return expected_tower_errors(self.reference, index, self.recipe)

    def hidden(self, rows: Tensor) -> Hidden:
        """Rows as hidden states [N, S, C]."""
        hidden_NSC: Hidden = rows.view(-1, self.vision.positions, self.vision.hidden_size).numpy()
        return hidden_NSC

    def blame(self, reading: Reading) -> Blame:
        """Says what is wrong with a unit that is out of line."""
        given = self.pixels_N3PP if reading.layer < 0 else self.input_of(reading)[0]
        return blame_tower(reading, self.reference, self.candidate, given)

    def _take(
        self,
        readings: Readings,
        layer: int,
        both: tuple[Units, Units],
        units: Sequence[str],
        expected: Mapping[str, float],
    ) -> None:
        errors = Errors()
        errors.add(shared(*both, units))
        readings.take(self.part, layer, errors, expected)
