"""The time that steps take, by which a prompt's pieces are cut so that those who decode wait not much longer for them.

Enters: steps and pieces, which are timed. Leaves: the tokens of the next piece. Invariant: it is never longer than the
usual one, nor shorter than the least.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from .rider import Boarding

T = TypeVar("T")

LEAST, GRAIN = 8, 4
"""Tokens of a piece at least, and what it is a multiple of: memory is kept for each length that comes twice."""

SHARE = 1.5
"""Seconds that a piece takes for each of the step of the rows that decode: with it a token comes after 2.5 times as
long, and 1 in 100 after less than three times."""

WEIGHT, MOST = 0.2, 3.0
"""The weight of what was seen last in a mean, and how many times the mean it counts at most: others compute as well."""


@dataclass(slots=True)
class Pace:
    """Means of what was seen last, 0 before anything was.

    Attributes:
        step: Seconds of a step of the rows that decode.
        token: Seconds of a token of a piece beside them.
    """

    step: float = 0.0
    token: float = 0.0

    def of_step(self, step: Callable[[], T]) -> T:
        """Makes a step of the rows that decode, and takes down its time."""
        started = time.perf_counter()
        found = step()
        self.step = _mean(self.step, time.perf_counter() - started)
        return found

    def of_piece(self, boarding: Boarding, budget: int) -> tuple[int, Any]:
        """Reads a piece of a prompt beside them, as `Boarding.read` does, and takes down its time.

        Nothing is learnt from images, from a prompt's beginning, which may be known, or from a piece that is short.
        """
        is_typical, started = boarding.trail is not None, time.perf_counter()
        read, logits_V = boarding.read(budget)
        if is_typical and read >= LEAST:
            self.token = _mean(self.token, (time.perf_counter() - started) / read)
        return read, logits_V

    def piece(self, usual: int) -> int:
        """Tokens of the next piece: the usual number, or less where that would keep the others waiting too long."""
        if not (self.step and self.token):
            return usual
        fitting = int(SHARE * self.step / self.token)
        return min(usual, max(LEAST, fitting - fitting % GRAIN))


def _mean(before: float, seen: float) -> float:
    return before + WEIGHT * (min(seen, MOST * before) - before) if before else seen
