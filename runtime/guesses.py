"""The guesses of one sequence: where they come from, and how many are worth while.

Enters: how many of the last ones were right. Leaves: how many are asked for next. Invariant: guesses change nothing but
the time.
"""

from dataclasses import dataclass

from .lookup import Lookup

LONGEST_PAUSE = 64
"""Steps at most in which a draft is not asked that was wrong every time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Guessing:
    """How many tokens are guessed at most at a time; 0 guesses none.

    Attributes:
        lookup: By prompt lookup.
        draft: By the model's draft, where prompt lookup knows none.
    """

    lookup: int = 0
    draft: int = 0


class Guesses:
    """The guesses of one sequence: where they come from, and how many are worth while.

    Args:
        guessing: The limits.
    """

    def __init__(self, guessing: Guessing) -> None:
        self.lookup = Lookup(guessing.lookup)
        self.limit = guessing.draft
        self.length = min(self.limit, 3)
        self.failed = self.pause = 0
        self.by_draft = False

    @property
    def are_on(self) -> bool:
        """Whether there may be any."""
        return self.lookup.limit > 0 or self.limit > 0

    def ask_draft(self, room: int) -> int:
        """Tokens that the draft is asked for, `room` of them at most; none while it pauses."""
        if self.pause:
            self.pause -= 1
            return 0
        return min(self.length, room)

    def judge(self, drafted: int, accepted: int) -> None:
        """Adjusts the length of the next guesses to how many of these were right."""
        if not drafted:
            return
        if not self.by_draft:
            self.lookup.judge(drafted, accepted)
            return
        self.length = min(self.limit, max(self.length, drafted + 1) if accepted == drafted else accepted + 2)
        self.failed = 0 if accepted else self.failed + 1
        self.pause = min(LONGEST_PAUSE, 2 ** (self.failed - 3)) if self.failed > 3 else 0
