"""Requests that join a flight as one, and what a flight gives of them.

Enters: requests of one prompt, with their numbers. Leaves: parts of them, as rows are free; and pieces by number.
"""

from dataclasses import dataclass

from .continuation import Generated, Request

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


def failed(error: Exception) -> Generated:
    """The last piece of a sequence that an error ended."""
    return Generated([], "", "error", error=error)
