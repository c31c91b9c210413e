"""The guesses of one sequence: where they come from, and how many are worth while.

Enters: how many of the last ones were right. Leaves: how many are asked for next. Invariant: guesses change nothing but
the time.

A draft costs whether it is right or wrong, and more than it gives where it is right too seldom, as of text that is
drawn. So an account is kept in steps of the model: a right guess saves one, each step of the draft and each token more
in a piece that is verified costs a part of one. Where the account is empty, the draft pauses, and is tried again after
ever longer pauses; so that a text takes but little more time with a useless draft than with none.
"""

from dataclasses import dataclass

from .lookup import Lookup

VERIFYING = 0.22
"""A token more in the piece that is verified, in steps of the model: the tiny Llama 4's take 0.25, a mixture of 1.4
billion parameters takes 0.23."""

START, TRIAL, MOST = 2.0, 1.0, 8.0
"""The account of a sequence that begins, that after a pause, and the most that it keeps."""

PAUSE, LONGEST_PAUSE = 8, 256
"""Steps in which a draft is not asked whose account is empty, the first time and at most."""


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
        cost: A step of the draft, in steps of the model.
        asking: The work beside it whenever the draft is asked, likewise.
    """

    def __init__(self, guessing: Guessing, cost: float = 0.0, asking: float = 0.0) -> None:
        self.lookup = Lookup(guessing.lookup)
        self.limit, self.cost, self.asking = guessing.draft, cost, asking
        self.length = min(self.limit, 3)
        self.account, self.pause, self.next_pause = START, 0, PAUSE
        self.by_draft = False

    @property
    def least_trust(self) -> float:
        """Probability that a guess, with all before it, must have for the draft to go on behind it."""
        return self.cost + VERIFYING

    @property
    def are_on(self) -> bool:
        """Whether there may be any."""
        return self.lookup.limit > 0 or self.limit > 0

    def rests(self) -> bool:
        """Whether nothing guesses at present."""
        return self.pause > 0 and not self.lookup.limit

    def ask_draft(self, room: int) -> int:
        """Tokens that the draft is asked for, `room` of them at most; none while it pauses."""
        if self.pause:
            self.pause -= 1
            return 0
        count = max(0, min(self.length, room))
        if count:
            self._book(-self.cost - self.asking)
        return count

    def judge(self, drafted: int, accepted: int) -> None:
        """Adjusts the length of the next guesses to how many of these were right."""
        if not drafted:
            return
        if not self.by_draft:
            self.lookup.judge(drafted, accepted)
            return
        self.length = min(self.limit, max(self.length, drafted + 1) if accepted == drafted else accepted + 2)
        self._book(accepted - VERIFYING * drafted - self.cost * (drafted - 1))

    def _book(self, gain: float) -> None:
        """Takes down steps of the model that were saved, or lost."""
        self.account = min(MOST, self.account + gain)
        if self.account < 0:
            self.account, self.pause = TRIAL, min(self.next_pause, LONGEST_PAUSE)
            self.next_pause = min(2 * self.next_pause, LONGEST_PAUSE)
        elif self.account >= START:
            self.next_pause = PAUSE
