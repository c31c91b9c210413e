"""The cost of a draft's guesses in a session, by the clock, and whether those of late were worth it.

Enters: the times of steps with guesses and without. Leaves: costs in steps of the model, of one row among those that
step together: what one row's guesses cost, all wait for. Invariant: these costs change nothing but how often guesses
are asked for.
"""

import time
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")

VERIFYING = 0.22
"""A token more in a piece that is verified, before one was timed: the tiny Llama 4's take 0.25, a mixture of 1.4
billion parameters takes 0.23."""

PAUSE, LONGEST_PAUSE = 8, 256
"""Steps in which a draft that did not pay is not asked, the first time and at most."""


@dataclass(slots=True)
class Rest:
    """How long a draft that did not pay of late is left alone, in all sequences of a kind.

    Attributes:
        left: Steps of sequences that begin now in which it is not asked.
        next: The pause of one in which it does not pay either.
    """

    left: int = 0
    next: int = PAUSE

    @property
    def is_given_up(self) -> bool:
        """Whether it did not pay after ever longer pauses, and the longest is not over soon."""
        return self.next == LONGEST_PAUSE and self.left > LONGEST_PAUSE // 4


SEEN, MOST = 9, 4.0
"""Times of a kind that are kept, of which the one in the middle counts, and steps that guesses cost at most at a time:
others compute on the machine as well."""


class DraftCosts:
    """The cost of guesses, in steps of the model.

    Args:
        going_on: A step of the draft, before one was timed.

    Attributes:
        going_on: A step of the draft.
        verifying: A token more in a piece that is verified.
        rests: The rests of texts that are drawn (True) and of those that are not.
    """

    def __init__(self, going_on: float = 0.0) -> None:
        self.going_on, self.verifying = going_on, VERIFYING
        self.rests = {False: Rest(), True: Rest()}
        self._seen: dict[tuple[str, int, int], deque[float]] = defaultdict(lambda: deque(maxlen=SEEN))

    def saw_step(self, rows: int, seconds: float) -> None:
        """Takes down a whole step of some rows in which nothing was guessed."""
        self._seen["step", rows, 0].append(seconds)

    def knows(self, rows: int) -> bool:
        """Whether a step of as many rows was timed, without which nobody can tell what guesses cost."""
        return bool(self._seen["step", rows, 0])

    def beyond_step(self, rows: int, seconds: float) -> float | None:
        """How many steps of some rows a step with guesses took beyond one without; None where none was timed."""
        plain = self._usual("step", rows)
        return min(seconds / plain - 1, MOST) if plain else None

    def of_tokens(self, rows: int, guesses: int, run: Callable[[], T]) -> T:
        """Has the model read a token of each of some rows, and guesses besides; takes down the time."""
        started = time.perf_counter()
        found = run()
        self._seen["run", rows, guesses].append(time.perf_counter() - started)
        if guesses and (plain := self._usual("run", rows)):
            beyond = self._usual("run", rows, guesses) - plain
            self.verifying = max(0.0, beyond) * rows / (plain * guesses)
        return found

    def saw_draft(self, rows: int, asked: int, seconds: float) -> None:
        """Takes down a step of the draft that guessed for some of all rows that wait for it."""
        if plain := self._usual("step", rows):
            self._seen["draft", 0, 0].append(rows * seconds / (plain * asked))
            self.going_on = self._usual("draft")

    def _usual(self, kind: str, rows: int = 0, guesses: int = 0) -> float:
        """The middle one of the times of a kind that were seen last; 0 where none was."""
        seen = sorted(self._seen[kind, rows, guesses])
        return seen[len(seen) // 2] if seen else 0.0
