"""Two vision towers walked part by part: how far each unit of the candidate's is off on the reference's input.

Enters: both sides, and the tiles of some windows. Leaves: readings, and of one that is out of line what is to blame.
Memory holds one layer of each side and some tiles' hidden states.
"""

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import linear

from ...spec.choice import ADAPTER, PATCHES, PROJECTOR, choose
from ...spec.geometry import VISION_LAYERS
from ...walk.decoder import Hidden
from ...walk.windows import Windows
from ..sides import Progress, Side
from .decoder_suspects import Blame
from .expected_errors import ARITHMETIC, OUTPUTS, ROWS, rounding_error, sample
from .readings import Errors, Reading, Readings, paired, shared
from .tower import HEAD, PRODUCTS, STEM, in_torch, open_tower
from .tower_suspects import blame_tower

TILES = 8
"""Tiles that the towers are run on."""

HALVES = {"attend": (*(f"self_attn.{part}_proj" for part in "qkv"), "self_attn", "self_attn.o_proj", "attended")}
HALVES["feed"] = ("mlp.fc1", "mlp.fc2", "out")
"""What each half of a layer computes, in order."""


class TowerWalk:
    """Both sides' towers.

    Args:
        side: The candidate.
        other: The reference, whose tower PyTorch computes from its weights.
        windows: Of which the first tiles are used.
        progress: Told of each layer.

    Raises:
        AccuracyError: One of them is an engine.
    """

    def __init__(self, side: Side, other: Side, windows: Windows, progress: Progress) -> None:
        self.reference, self.candidate = in_torch(other), open_tower(side)
        self.recipe, self.progress = side.recipe, progress
        self.vision, self.pixels_N3PP = self.reference.vision, windows.pixels_N3PP[:TILES].astype(np.float32)

    def read(self, readings: Readings) -> None:
        """Takes a reading of each unit, from the stem to the head."""
        theirs, ours = self.reference.stem(self.pixels_N3PP), self.candidate.stem(self.pixels_N3PP)
        patches = self._rounding(PATCHES, "patches", has_bias=False)
        self._take(readings, -1, shared(theirs, ours, [PATCHES, STEM]), {PATCHES: patches, STEM: patches})
        x_NSC, layers = self._hidden(theirs[STEM]), self.vision.layers
        for index in range(layers):
            self.progress(f"both, vision layer {index}", index, layers)
            before = torch.from_numpy(x_NSC).flatten(0, 1)
            theirs, ours = self.reference.attend(index, x_NSC), self.candidate.attend(index, x_NSC)
            pairs, attended_NSC = paired(theirs, ours, "attended", before), self._hidden(theirs["attended"])
            self._take(readings, index, pairs, self._expected(index, "attend"))
            theirs, ours = self.reference.feed(index, attended_NSC), self.candidate.feed(index, attended_NSC)
            pairs = paired(theirs, ours, "out", torch.from_numpy(attended_NSC).flatten(0, 1))
            self._take(readings, index, pairs, self._expected(index, "feed"))
            x_NSC = self._hidden(theirs["out"])
            self.reference.weights.release()
        theirs, ours = self.reference.head(x_NSC), self.candidate.head(x_NSC)
        fc1, fc2, last = (self._rounding(unit, source, has_bias=False) for unit, source in HEAD.items())
        expected = dict(
            zip((*ADAPTER, PROJECTOR), (fc1, math.hypot(fc1, fc2), math.hypot(fc1, fc2, last)), strict=True)
        )
        self._take(readings, layers, shared(theirs, ours, list(HEAD)), expected)

    def blame(self, reading: Reading) -> Blame:
        """Walks the reference up to a reading's part, and says what is wrong there."""
        if reading.layer < 0:
            return blame_tower(reading, self.reference, self.candidate, self.pixels_N3PP)
        x_NSC = self._hidden(self.reference.stem(self.pixels_N3PP)[STEM])
        for index in range(reading.layer):
            self.progress(f"reference, vision layer {index}", index, reading.layer)
            attended_NSC = self._hidden(self.reference.attend(index, x_NSC)["attended"])
            x_NSC = self._hidden(self.reference.feed(index, attended_NSC)["out"])
            self.reference.weights.release()
        if reading.unit in HALVES["feed"]:
            x_NSC = self._hidden(self.reference.attend(reading.layer, x_NSC)["attended"])
        return blame_tower(reading, self.reference, self.candidate, x_NSC)

    def _take(
        self,
        readings: Readings,
        layer: int,
        pairs: Mapping[str, tuple[Tensor, Tensor]],
        expected: Mapping[str, float],
    ) -> None:
        errors = Errors()
        errors.add(pairs)
        readings.take(layer, errors, expected, "vision")

    def _hidden(self, rows: Tensor) -> Hidden:
        """Rows as hidden states [N, S, C]."""
        hidden_NSC: Hidden = rows.view(-1, self.vision.positions, self.vision.hidden_size).numpy()
        return hidden_NSC

    def _expected(self, index: int, half: str) -> dict[str, float]:
        """The errors to be expected of the half that the reference ran last, by unit."""
        own = {
            unit: self._rounding(f"{VISION_LAYERS}{index}.{unit}", PRODUCTS[unit])
            for unit in HALVES[half]
            if unit in PRODUCTS
        }
        if half == "feed":
            fed = math.hypot(*own.values())
            return own | {"mlp.fc2": fed, "out": fed}
        attended = math.hypot(*own.values())
        attention = math.hypot(*(own[unit] for unit in HALVES["attend"][:3]))
        return own | {"self_attn": attention, "self_attn.o_proj": attended, "attended": attended}

    def _rounding(self, name: str, source: str, *, has_bias: bool = True) -> float:
        """What plain rounding by the recipe makes of a linear's output; a bias may leave less of the product."""
        choice = None if self.recipe is None else choose(self.recipe, name)
        if choice is None or choice.format == "none":
            return ARITHMETIC
        weights = self.reference.weights
        x_RK = sample(self.reference.inputs[source], ROWS)
        weight_NK = sample(weights.wide(f"{name}.weight"), OUTPUTS)
        error = rounding_error(x_RK.numpy(), weight_NK.numpy(), choice)
        if has_bias:
            product_RN = linear(x_RK, weight_NK)
            whole_RN = product_RN + sample(weights.wide(f"{name}.bias"), OUTPUTS)
            error *= float(product_RN.norm() / whole_RN.norm().clamp(min=1e-30))
        return max(ARITHMETIC, error)
