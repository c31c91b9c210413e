"""A walk's result: each unit's error on the reference's input, the first that is out of line, and what is to blame.

Plain values; nothing here needs PyTorch.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from ...spec.choice import ADAPTER, PROJECTOR

ModelPart = Literal["decoder", "vision"]
"""The text decoder, or the vision tower with its projector."""

STEM = "stem"
"""Unit of the tower that leaves its stem: patches, class token and places, behind the norm."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """One unit's error on the reference's input.

    Attributes:
        part: Decoder or tower.
        layer: Number of the layer; -1 is the embedding or the tower's stem, the number of layers the head.
        unit: Name, as in `self_attn.q_proj`; `attended` and `out` are what leaves the layer's halves.
        error: Root mean square of what differs, relative to the output's.
        expected: The part of it that plain rounding by the recipe explains.
    """

    part: ModelPart = "decoder"
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


@dataclass(frozen=True, kw_only=True, slots=True)
class Blame:
    """A fault.

    Attributes:
        kind: A tensor, an attribute of an op where no tensor is to blame, or an op as a whole.
        op: ONNX's name of the op that computes the unit.
        name: The tensor's name in the checkpoint, or the unit's.
        attribute: Name of the attribute; empty where it is none.
        why: A sentence.
    """

    kind: Literal["tensor", "attribute", "op"]
    op: str
    name: str
    attribute: str = ""
    why: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Location:
    """The first fault of a candidate, and all readings.

    Attributes:
        blame: The first fault, and why; None where all is in line.
        part: Decoder or tower, where the fault is.
        place: Where it is, in words.
        layer: Number of the layer, in that part.
        unit: The unit where it shows.
        error: The unit's error.
        explained: The largest error that would have been in line.
        readings: Every unit's.
        router_flips: By layer, the share of choices of experts that differ on the same input.
    """

    blame: Blame | None
    part: ModelPart | None
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
