"""A head's steps recorded, and replayed in a model whose own head guesses nothing.

Enters: sequences that run alone, by a session with a draft. Leaves: for each step in which the head was asked, its
guesses and how many of them were right; or a text whose guesses are as right as those.
"""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from arriero.runtime import Session, speculation
from arriero.runtime.speculation import Chooser


@dataclass(slots=True)
class Asked:
    """A step in which the head was asked: its guesses, and how many were right."""

    drafted: int = 0
    accepted: int = 0


@contextmanager
def choosing(chooser: type[Chooser]) -> Iterator[None]:
    """Has guesses chosen in another way meanwhile."""
    usual = speculation.Chooser
    speculation.Chooser = chooser  # type: ignore[misc]
    try:
        yield
    finally:
        speculation.Chooser = usual  # type: ignore[misc]


def recorded(session: Session, prompt: Sequence[int], count: int, **settings: Any) -> tuple[list[int], list[Asked]]:
    """A prompt's continuation, and the steps in which the head was asked."""
    steps, ids = list[Asked](), list[int]()

    class Recorder(Chooser):
        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            steps.append(Asked())

        def choose(self, row: int, step: int, logits_V: NDArray[np.float32]) -> tuple[int | None, bool]:
            token, goes_on = super().choose(row, step, logits_V)
            steps[-1].drafted += token is not None
            return token, goes_on

    with choosing(Recorder):
        for piece in session.stream(list(prompt), count, **settings):
            ids += piece.ids
            if piece.drafted:
                steps[-1].accepted = piece.accepted
    return ids, steps


def replayed(session: Session, prompt: Sequence[int], text: Sequence[int], steps: Sequence[Asked], tokens: int) -> int:
    """Continues a prompt with guesses that are as right as recorded ones.

    Args:
        session: A model with a draft, which computes all its steps.
        prompt: The prompt.
        text: The model's own greedy continuation.
        steps: The recorded steps, over and over.
        tokens: Tokens that the draft is asked for at most, as when they were recorded.

    Returns:
        The decoder's steps.
    """
    left = itertools.cycle(steps)

    class Replay(Chooser):
        def __init__(self, model: Session, riders: Any, counts: Any) -> None:
            super().__init__(model, riders, counts)
            self.place = len(riders[0].continuation.ids) - len(prompt)
            self.now = next(left)

        def choose(self, row: int, step: int, logits_V: NDArray[np.float32]) -> tuple[int | None, bool]:
            super().choose(row, step, logits_V)
            if step == self.now.drafted:
                return None, False
            right = int(text[self.place + step])
            return right if step < self.now.accepted else (right + 1) % session.spec.vocab_size, True

    with choosing(Replay):
        found = session.generate(
            list(prompt), len(text), temperature=0, eos_token_id=[], draft_tokens=tokens, prompt_lookup_num_tokens=None
        )
    assert found.ids == list(text)
    return len(text) - found.accepted
