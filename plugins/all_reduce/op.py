"""The sum over ranks as one op of domain `arriero`: its name, attributes, inputs and outputs.

A model that is split over ranks has one graph a rank. They run in step, and where a rank has a part of a result only,
every rank's node adds up what all of them brought: each gets the same sum. The nodes of the ranks' graphs meet in
their order, so all ranks have the same number of them with the same shapes.

The op has no function body: no standard operator reaches another device, and a rank's part taken for the sum would be
a wrong answer without an error. A graph for one rank holds no such node.
"""

from dataclasses import dataclass

DOMAIN = "arriero"
NAME = "AllReduce"
VERSION = 1

INPUTS = ("part",)
"""part [...], this rank's summand."""

OUTPUTS = ("total",)
"""total [...], of the same shape and type."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Attributes:
    """The attributes of one `AllReduce` node.

    Attributes:
        ranks: Number of graphs that take part.
    """

    ranks: int

    def __post_init__(self) -> None:
        assert self.ranks >= 1
