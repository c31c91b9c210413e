"""Guesses that cost nothing: a draft never rests, and no clock has a say in what it guesses."""

from collections.abc import Callable
from typing import TypeVar

from arriero.runtime.draft_costs import DraftCosts

T = TypeVar("T")


class FreeDrafts(DraftCosts):
    """Costs that stay as they are given.

    Args:
        going_on: A step of the draft, by which guesses are held to be worth one.
        verifying: A token more in a piece that is verified, likewise.
    """

    def __init__(self, going_on: float = 0.0, verifying: float = 0.0) -> None:
        super().__init__(going_on)
        self.verifying = verifying

    def knows(self, rows: int) -> bool:
        return True

    def beyond_step(self, rows: int, seconds: float) -> float | None:
        return 0.0

    def of_tokens(self, rows: int, guesses: int, run: Callable[[], T]) -> T:
        return run()

    def saw_draft(self, rows: int, asked: int, seconds: float) -> None:
        pass
