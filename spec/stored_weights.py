"""Weights as they lie in safetensors files, and as a lowered graph is given them."""

import math
import re
from dataclasses import dataclass
from typing import Literal

from ..errors import shortened
from .sizes import check_name, check_shape, check_sizes, is_absolute
from .types import BITS, Stored

Pages = Literal["auto", "huge", "file"]
"""Weights of a session that lie in huge pages: of a bundle those in the kernels' layout, if the system has some;
all that every token reads; none."""

EXPERT = re.compile(r"\.experts\.")
"""Part of the names of routed experts' weights, of one's or of all of them."""
GROUP = 32
"""Dims of a token's key or value that a scale of their own is for in a cache of groups."""
PANEL = 32
"""Outputs of a matrix that the CPU's own kernels compute together."""
BLOCK = 32
"""Inputs that these kernels round by one scale, at most; a matrix is padded to a multiple."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightFile:
    """A safetensors file that a folder's graph reads in place.

    Attributes:
        name: File name, which is also its `location` in the ONNX graph.
        path: Absolute path where it was found, or empty where it lies in the folder itself.
        size: Bytes.
        identity: Fingerprint of the file: SHA-256 of its length, its header and samples of its data.
    """

    name: str
    path: str
    size: int
    identity: str

    def __post_init__(self) -> None:
        check_name("the name of a weight file", self.name)
        check_sizes(self, ("size",), 0, 2**53)
        if self.path and not is_absolute(self.path):
            raise ValueError(f"weight file {shortened(self.name)} lies at {shortened(self.path)}, no absolute path")


@dataclass(frozen=True, kw_only=True, slots=True)
class Weight:
    """One tensor that the runtime hands to a lowered graph, as a region of a weight file.

    Attributes:
        name: The graph's name for it.
        file: Name of its `WeightFile`.
        offset: First byte in the file.
        shape: Dimensions, row-major.
        dtype: Type in the file; two of `int4` lie in a byte, the first in its low half.
        convert: Type the graph wants; equal to `dtype` where the file's bytes are used as they lie. `uint4` is `int4`
            plus 8, `uint8` is `int8` plus 128.
        layout: How the graph wants it: in `rows`, as it is stored; in `panels` of 32 outputs, those of the CPU's own
            kernels, a matrix; as the `scales` of such panels; or in `groups`, scales [E, N, groups] turned to
            [E, groups, N].
        stacked: Whether it is all experts' [E, N, K], a matrix for each; others in panels are [N, K].
        interleaved: Whether a panel is 16 of a matrix's first half of outputs, and the same 16 of the second.
        is_made: Whether the file holds it as the graph is given it; `dtype` and `shape` say what it was made from.
        part_of: The graph's input that it is the next rows of, behind those of the weights listed before it; empty
            where it is an input by itself.
    """

    name: str
    file: str
    offset: int
    shape: tuple[int, ...]
    dtype: Stored
    convert: Stored
    layout: Literal["rows", "panels", "scales", "groups"] = "rows"
    stacked: bool = False
    interleaved: bool = False
    is_made: bool = False
    part_of: str = ""

    def __post_init__(self) -> None:
        check_name(f"the file of weight {shortened(self.name)}", self.file)
        check_shape(f"weight {shortened(self.name)}", self.shape)
        check_sizes(self, ("offset",), 0, 2**53)
        least = {"rows": 0, "panels": 2, "scales": 1, "groups": 3}[self.layout]
        is_stacked = self.stacked or self.layout == "groups"
        if len(self.shape) < least or (is_stacked and not (self.stacked and len(self.shape) == 3)):
            raise ValueError(f"weight {shortened(self.name)} has the shape {list(self.shape)}, no {self.layout}")
        if self.part_of and (self.layout != "rows" or len(self.shape) != 2):
            raise ValueError(f"weight {shortened(self.name)} is a part of an input, and no matrix in rows")

    @property
    def size(self) -> int:
        """Bytes in the file."""
        return self.given_size if self.is_made else math.prod(self.shape) * BITS[self.dtype] // 8

    @property
    def matrix(self) -> tuple[int, int]:
        """Outputs, and inputs or groups of them, of one matrix or its scales."""
        if self.stacked:
            return self.shape[1], self.shape[2]
        return self.shape[0], math.prod(self.shape[1:])

    @property
    def panels(self) -> int:
        """Panels of one matrix."""
        outputs = self.matrix[0] // 2 if self.interleaved else self.matrix[0]
        return -(-outputs // (PANEL // 2 if self.interleaved else PANEL))

    @property
    def given_shape(self) -> tuple[int, ...]:
        """Dimensions as the graph is given them, of panels those of bytes."""
        if self.layout == "rows":
            return self.shape
        if self.layout == "groups":
            return self.shape[0], self.shape[2], self.shape[1]
        experts = self.shape[:1] if self.stacked else ()
        if self.layout == "scales":
            return (*experts, self.panels, self.matrix[1], PANEL)
        padded = -(-self.matrix[1] // BLOCK) * BLOCK
        return (*experts, self.panels, padded * PANEL * BITS[self.convert] // 8)

    @property
    def given_size(self) -> int:
        """Bytes as the graph is given it."""
        return math.prod(self.given_shape) * (8 if self.layout == "panels" else BITS[self.convert]) // 8

    @property
    def is_converted(self) -> bool:
        """Whether the graph is given a copy in other memory, not the file's own bytes."""
        if self.is_made:
            return False
        is_misaligned = self.offset % max(1, BITS[self.dtype] // 8) != 0
        return self.dtype != self.convert or self.layout != "rows" or is_misaligned


def slot_bytes(head_dim: int, bits: int) -> int:
    """Bytes of a head's key or value in a cache of groups, scales among them, as `plugins/cpu/matrix.h` says."""
    groups = -(-head_dim // GROUP)
    return groups * (GROUP * bits // 8 + (4 if bits == 4 else 2))
