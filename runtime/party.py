"""Requests that join a flight as one, and what a flight gives of them.

Enters: requests of one prompt, with their numbers. Leaves: parts of them, as rows are free; tokens of prompts that a
step reads; and pieces by number.
"""

from dataclasses import dataclass

from .continuation import Generated, Request
from .pace import Pace

PREFILL_BUDGET = 32
"""Tokens of prompts that a step reads beside decoding rows at most. More are read faster, and keep the others waiting
longer: `benchmarks/flight_gaps.py`."""

MOST_BUDGETS = 8
"""Times that many, where many more wait for a first token than decode."""

Pieces = list[tuple[int, Generated]]
"""Requests' numbers, each with a piece of its continuation."""


@dataclass(slots=True)
class Party:
    """Requests of one prompt that have joined as one, and their numbers."""

    members: list[tuple[int, Request]]

    @property
    def first(self) -> Request:
        """The request whose prompt is read for all."""
        return self.members[0][1]

    def split(self, count: int) -> "Party":
        """Takes the first members away. Returns them as a party."""
        taken, self.members = self.members[:count], self.members[count:]
        return Party(taken)


def usual_budget(coming: int, decoding: int, pace: Pace) -> int:
    """Tokens of prompts that a step reads beside decoding rows: more where more sequences wait for a first token.

    Args:
        coming: Sequences that have rows, or get one, and have no token yet.
        decoding: Those that decode, but for those that have just begun, with the burst that still comes.
        pace: The time of steps, by which a step reads less where most decode.
    """
    if coming < decoding:
        return pace.piece(PREFILL_BUDGET)
    return PREFILL_BUDGET * max(1, min(MOST_BUDGETS, coming // max(1, decoding)))


def failed(error: Exception) -> Generated:
    """The last piece of a sequence that an error ended."""
    return Generated([], "", "error", error=error)
