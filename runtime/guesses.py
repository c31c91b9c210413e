"""The guesses of one sequence: where they come from, and how many are worth while.

Enters: how many of the last ones were right. Leaves: how many are asked for next. Invariant: guesses change nothing but
the time.

A draft costs whether it is right or wrong, and more than it gives where it is right too seldom, as of text that is
drawn. So an account is kept in steps of the model: a right guess saves one, and what a step with guesses takes longer
than one without, by the clock, is its cost. Where the account is empty, the draft pauses, and is tried again after
ever longer pauses, in which later sequences begin too; so that texts take but little more time with a useless draft
than with none.
"""

from dataclasses import dataclass

from .draft_costs import LONGEST_PAUSE, PAUSE, DraftCosts
from .lookup import Lookup

START, TRIAL, MOST = 2.0, 1.0, 8.0
"""The account of a sequence that begins, that after a pause, and the most that it keeps."""


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
        costs: What guesses cost in the session, and whether those of earlier sequences were worth it.
        is_drawn: Whether its tokens are drawn.
    """

    def __init__(self, guessing: Guessing, costs: DraftCosts, is_drawn: bool = False) -> None:
        self.lookup = Lookup(guessing.lookup)
        self.limit, self.costs, self.rest = guessing.draft, costs, costs.rests[is_drawn]
        self.length = min(self.limit, 3)
        self.account, self.pause, self.next_pause = START, 0, self.rest.next
        self.begins_late = self.rest.left > 0
        self.by_draft = self.is_asked = False
        self.accepted = 0

    @property
    def least_trust(self) -> float:
        """Probability that a guess, with all before it, must have for the draft to go on behind it."""
        return self.costs.going_on + self.costs.verifying

    @property
    def are_on(self) -> bool:
        """Whether there may be any."""
        return self.lookup.limit > 0 or self.limit > 0

    @property
    def resting(self) -> int:
        """Steps for which the draft will not be asked yet."""
        return self.rest.left if self.begins_late else self.pause

    def ask_draft(self, room: int) -> int:
        """Tokens that the draft is asked for, `room` of them at most; none while it pauses."""
        if self.begins_late and self.rest.left:
            self.rest.left -= 1
            return 0
        if self.begins_late:
            self.account, self.begins_late = TRIAL, False
        if self.pause:
            self.pause -= 1
            return 0
        count = max(0, min(self.length, room))
        self.is_asked, self.accepted = count > 0, 0
        return count

    def judge(self, drafted: int, accepted: int) -> None:
        """Adjusts the length of the next guesses to how many of these were right."""
        if not drafted:
            return
        if not self.by_draft:
            self.lookup.judge(drafted, accepted)
            return
        self.length = min(self.limit, max(self.length, drafted + 1) if accepted == drafted else accepted + 2)
        self.accepted = accepted

    def book(self, cost: float) -> None:
        """Takes down what the draft saved in the step that is over, and cost, in steps of the model."""
        self.is_asked = False
        self.account = min(MOST, self.account + self.accepted - cost)
        if self.account < 0:
            self.account, self.pause = TRIAL, self.next_pause
            self.next_pause = min(2 * self.next_pause, LONGEST_PAUSE)
            self.rest.left, self.rest.next = self.pause, self.next_pause
        elif self.account >= START:
            self.next_pause = PAUSE
            self.rest.left, self.rest.next = 0, PAUSE
