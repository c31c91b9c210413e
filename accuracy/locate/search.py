"""Where a candidate goes wrong first: the layer, the op, and the tensor or attribute to blame.

Each layer is run on the reference's input, so that errors don't add up over layers. A unit is out of line where its
error is beyond what the recipe's rounding and its neighbours in other layers explain. The first such unit in the order
of computation is handed to `suspects`, which says why. Memory holds one layer of each side. Where there are images, the
vision tower is walked first, and the reference's image features enter both decoders.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...walk.windows import Windows
from ..sides import Progress, Side
from .decoder import Hidden, Layers, TorchLayers, open_layers, units_of, weights_of
from .decoder_suspects import Blame, blame, blame_ends
from .expected_errors import expected_errors, expected_head_error
from .readings import Errors, Part, Reading, Readings, paired
from .tower_search import TowerWalk

WINDOWS = 3
"""Windows of text that the layers are run on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Location:
    """What the walk found.

    Attributes:
        blame: What is wrong first, and why; None where all is in line.
        part: Of the model that it is in.
        place: Where it is, in words.
        layer: Its number, in that part.
        unit: The unit where it shows.
        error: The unit's.
        explained: The largest error that would have been in line.
        readings: Every unit's.
        router_flips: By layer, the share of choices of experts that differ on the same input.
    """

    blame: Blame | None
    part: Part | None
    place: str | None
    layer: int | None
    unit: str | None
    error: float | None
    explained: float | None
    readings: tuple[Reading, ...]
    router_flips: dict[int, float]

    def as_fields(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return dataclasses.asdict(self)


def locate(side: Side, other: Side, windows: Windows, progress: Progress) -> Location:
    """Walks the layers of both.

    Args:
        side: The candidate.
        other: The reference, whose layers PyTorch computes from its weights.
        windows: Token ids and images; the first `WINDOWS` are used. Image features are the reference's for both.
        progress: Told of each layer.

    Raises:
        AccuracyError: One of them is an engine.
    """
    return _Walk(side, other, windows.first(WINDOWS), progress).locate()


class _Walk:
    """Both sides, layer by layer."""

    def __init__(self, side: Side, other: Side, windows: Windows, progress: Progress) -> None:
        self.candidate, self.reference = open_layers(side), TorchLayers(other.spec, weights_of(other))
        self.recipe, self.progress, self.windows = side.recipe, progress, windows
        self.features_MH = other.encode(windows, progress)
        self.readings = Readings(side.recipe is not None or other.recipe is not None)
        self.tower = TowerWalk(side, other, windows, progress) if len(windows.pixels_N3PP) else None
        self.router_flips: dict[int, float] = {}

    def locate(self) -> Location:
        """Takes the readings, and where one is out of line walks there again to find out why."""
        if self.tower is not None:
            self.tower.read(self.readings)
        x_WSH, ours_WSH = self._embedded(self.reference), self._embedded(self.candidate)
        embedding, head = Errors(), Errors()
        for x_SH, ours_SH in zip(x_WSH, ours_WSH, strict=True):
            embedding.add({"embed_tokens": (torch.from_numpy(x_SH), torch.from_numpy(ours_SH))})
        self.readings.take(-1, embedding)
        count = len(self.reference.spec.layers)
        for index in range(count):
            self.progress(f"both, layer {index}", index, count)
            x_WSH = self._read_layer(index, x_WSH)
        for x_SH in x_WSH:
            head.add({"lm_head": (self.reference.head(tail(x_SH)), self.candidate.head(tail(x_SH)))})
        self.readings.take(count, head, {"lm_head": expected_head_error(self.reference, x_WSH[0], self.recipe)})
        self.candidate.release()
        found = self.readings.first_out_of_line()
        reading, explained = (None, None) if found is None else found
        return Location(
            blame=None if reading is None else self._blame(reading),
            part=None if reading is None else reading.part,
            place=None if reading is None else reading.place,
            layer=None if reading is None else reading.layer,
            unit=None if reading is None else reading.unit,
            error=None if reading is None else reading.error,
            explained=explained,
            readings=tuple(self.readings.taken),
            router_flips=self.router_flips,
        )

    def _embedded(self, layers: Layers) -> list[Hidden]:
        """What enters the first layer of each window."""
        windows = self.windows
        return [
            layers.embed(ids_S, windows.image_token, windows.features_of(row, self.features_MH))
            for row, ids_S in enumerate(windows.ids_WS)
        ]

    def _read_layer(self, index: int, x_WSH: list[Hidden]) -> list[Hidden]:
        """Reads one layer's units. Returns the reference's output."""
        attended_WSH, out_WSH, flipped = [], [], []
        errors, expected = Errors(), dict[str, float]()
        for x_SH in x_WSH:
            theirs, ours = self.reference.attend(index, x_SH), self.candidate.attend(index, x_SH)
            expected = expected or expected_errors(self.reference, index, self.recipe)
            attended_WSH.append(theirs["attended"].numpy())
            errors.add(paired(theirs, ours, "attended", torch.from_numpy(x_SH)))
        self.readings.take(index, errors, expected)
        errors, expected = Errors(), {}
        for attended_SH in attended_WSH:
            theirs, ours = self.reference.feed(index, attended_SH), self.candidate.feed(index, attended_SH)
            expected = expected or expected_errors(self.reference, index, self.recipe)
            out_WSH.append(theirs["out"].numpy())
            pairs = paired(theirs, ours, "out", torch.from_numpy(attended_SH))
            if (routers := pairs.get("feed_forward.router")) is not None:
                kept_S = same_experts(routers, self.reference.spec.experts_per_token)
                flipped.append(~kept_S)
                for unit in {"feed_forward.experts", "out"} & pairs.keys():
                    pairs[unit] = pairs[unit][0][kept_S], pairs[unit][1][kept_S]
            errors.add(pairs)
        self.readings.take(index, errors, expected)
        if flipped:
            self.router_flips[index] = float(torch.cat(flipped).float().mean())
        self.reference.release()
        self.candidate.release()
        return out_WSH

    def _blame(self, reading: Reading) -> Blame:
        """Walks the reference up to a reading's layer, and says what is wrong there."""
        if self.tower is not None and reading.part == "vision":
            return self.tower.blame(reading)
        count = len(self.reference.spec.layers)
        if not 0 <= reading.layer < count:
            return blame_ends(reading.unit, reading.expected, self.reference, self.candidate)
        x_WSH = self._embedded(self.reference)
        for index in range(reading.layer):
            self.progress(f"reference, layer {index}", index, reading.layer)
            for at, x_SH in enumerate(x_WSH):
                attended = self.reference.attend(index, x_SH)["attended"].numpy()
                x_WSH[at] = self.reference.feed(index, attended)["out"].numpy()
            self.reference.release()
        if reading.unit not in (*units_of(self.reference.spec.layers[reading.layer])[0], "attended"):
            x_WSH = [self.reference.attend(reading.layer, x_SH)["attended"].numpy() for x_SH in x_WSH]
        return blame(reading.layer, reading.unit, reading.expected, self.reference, self.candidate, x_WSH)


def same_experts(routers: tuple[Tensor, Tensor], count: int) -> Tensor:
    """Whether both routers choose the same experts, for each token."""
    theirs, ours = (logits_SE.topk(count, dim=-1).indices.sort(-1).values for logits_SE in routers)
    return (theirs == ours).all(-1)


def tail(x_SH: Hidden, rows: int = 64) -> Hidden:
    """The last rows: the head is the same for all."""
    return np.ascontiguousarray(x_SH[-rows:])
