"""Where a candidate goes wrong first: the layer, the op, and the tensor or attribute to blame.

Each layer is run on the reference's input, so that errors don't add up over layers. A unit is out of line where its
error is beyond what the recipe's rounding and its neighbours in other layers explain. The first such unit in the order
of computation is handed to `suspects`, which says why. Memory holds one layer of each side.
"""

import dataclasses
import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import AccuracyError
from ..export.windows import Windows
from .layers import Hidden, Layers, TorchLayers, Units, open_layers, units_of, weights_of
from .rounding import ARITHMETIC, expected_errors, expected_head_error
from .sides import Progress, Side
from .suspects import Blame, blame, blame_ends

WINDOWS = 3
"""Windows of text that the layers are run on."""

BEYOND = 3.0
"""Errors of so many times what is explained are out of line."""

LENIENCE = 4.0
"""What all layers' errors alike may exceed the expectation by: attention amplifies the rounding of queries and keys."""

HIDDEN_BY_SMOOTHING = {"self_attn.v_proj", "self_attn"}
"""Beside `up_proj`, units whose channels a quantiser may divide; their errors are seen in what reads them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """One unit's error on the reference's input.

    Attributes:
        layer: Its number; -1 is the embedding, the number of layers the head.
        unit: As in `self_attn.q_proj`; `attended` and `out` are what leaves the layer's halves.
        error: Root mean square of what differs, of the output's.
        expected: What plain rounding by the recipe explains of it.
    """

    layer: int
    unit: str
    error: float
    expected: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Location:
    """What the walk found.

    Attributes:
        blame: What is wrong first, and why; None where all is in line.
        layer: Of it.
        unit: The unit where it shows.
        error: The unit's.
        explained: The largest error that would have been in line.
        readings: Every unit's.
        router_flips: By layer, the share of choices of experts that differ on the same input.
    """

    blame: Blame | None
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


class _Walk:
    """Both sides, layer by layer."""

    def __init__(self, side: Side, other: Side, windows: Windows, progress: Progress) -> None:
        self.candidate, self.reference = open_layers(side), TorchLayers(other.spec, weights_of(other))
        self.recipe, self.progress, self.windows = side.recipe, progress, windows
        self.features_MH = other.encode(windows, progress)
        self.is_smoothed = side.recipe is not None or other.recipe is not None
        self.readings: list[Reading] = []
        self.router_flips: dict[int, float] = {}

    def locate(self) -> Location:
        """Takes the readings, and where one is out of line walks there again to find out why."""
        x_WSH, ours_WSH = self._embedded(self.reference), self._embedded(self.candidate)
        ends = Errors()
        for x_SH, ours_SH in zip(x_WSH, ours_WSH, strict=True):
            ends.add({"embed_tokens": (torch.from_numpy(x_SH), torch.from_numpy(ours_SH))})
        self._read(-1, "embed_tokens", ends)
        count = len(self.reference.spec.layers)
        for index in range(count):
            self.progress(f"both, layer {index}", index, count)
            x_WSH = self._read_layer(index, x_WSH)
        for x_SH in x_WSH:
            ends.add({"lm_head": (self.reference.head(tail(x_SH)), self.candidate.head(tail(x_SH)))})
        self._read(count, "lm_head", ends, expected_head_error(self.reference, x_WSH[0], self.recipe))
        self.candidate.release()
        found = self._first_out_of_line()
        blamed = None if found is None else self._blame(found[0])
        return Location(
            blame=blamed,
            layer=None if found is None else found[0].layer,
            unit=None if found is None else found[0].unit,
            error=None if found is None else found[0].error,
            explained=None if found is None else found[1],
            readings=tuple(self.readings),
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
        self._read_half(index, errors, expected)
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
        self._read_half(index, errors, expected)
        if flipped:
            self.router_flips[index] = float(torch.cat(flipped).float().mean())
        self.reference.release()
        self.candidate.release()
        return out_WSH

    def _read_half(self, index: int, errors: "Errors", expected: dict[str, float]) -> None:
        for unit in errors.noise:
            hidden = unit in HIDDEN_BY_SMOOTHING or unit.endswith(".up_proj")
            if not (hidden and self.is_smoothed):
                self._read(index, unit, errors, expected[unit])

    def _read(self, layer: int, unit: str, errors: "Errors", expected: float = ARITHMETIC) -> None:
        error = errors.relative(unit)
        if not math.isfinite(error):
            raise AccuracyError(f"layer {layer}: {unit} is NaN or infinite in one of the two: its weights are damaged")
        self.readings.append(Reading(layer=layer, unit=unit, error=error, expected=expected))

    def _first_out_of_line(self) -> tuple[Reading, float] | None:
        """The first reading beyond what is explained, and the error that would have been in line."""
        ratios: dict[str, list[float]] = defaultdict(list)
        for reading in self.readings:
            ratios[reading.unit].append(reading.error / reading.expected)
        for reading in self.readings:
            common = min(max(median(ratios[reading.unit]), 1.0), LENIENCE)
            if reading.error > BEYOND * common * reading.expected:
                return reading, BEYOND * common * reading.expected
        return None

    def _blame(self, reading: Reading) -> Blame:
        """Walks the reference up to a reading's layer, and says what is wrong there."""
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


def paired(theirs: Units, ours: Units, last: str, before: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Both sides' outputs by unit; of the half's own output what it adds to its input."""
    pairs = {unit: (theirs[unit], ours[unit]) for unit in theirs if unit in ours and unit != last}
    return pairs | {last: (theirs[last] - before, ours[last] - before)}


def same_experts(routers: tuple[Tensor, Tensor], count: int) -> Tensor:
    """Whether both routers choose the same experts, for each token."""
    theirs, ours = (logits_SE.topk(count, dim=-1).indices.sort(-1).values for logits_SE in routers)
    return (theirs == ours).all(-1)


def tail(x_SH: Hidden, rows: int = 64) -> Hidden:
    """The last rows: the head is the same for all."""
    return np.ascontiguousarray(x_SH[-rows:])
