"""A draft's account: one that does not pay is left alone in all sequences, one that pays is not."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from arriero.runtime.draft_costs import LONGEST_PAUSE, DraftCosts
from arriero.runtime.guesses import Guesses, Guessing
from arriero.runtime.speculation import settle


def test_as_many_are_guessed_as_are_right() -> None:
    guesses = Guesses(Guessing(draft=6), DraftCosts())
    guesses.by_draft = True
    lengths = []
    for drafted, accepted in ((3, 3), (4, 4), (5, 1), (2, 2), (4, 0)):
        guesses.judge(drafted, accepted)
        lengths.append(guesses.length)
    assert lengths == [4, 5, 3, 3, 2]


def used(guesses: Guesses, steps: int, cost: float, right: float, rng: np.random.Generator) -> tuple[int, float]:
    """Uses a draft whose step with guesses costs so much more. Returns how often it was asked, and the steps lost."""
    asked, lost = 0, 0.0
    for step in range(steps):
        if count := guesses.ask_draft(10):
            guesses.by_draft = True
            verified = count if step % 2 else 0  # a draft that trusts none of its guesses is asked in vain
            accepted = int(np.logical_and.accumulate(rng.random(verified) < right).sum())
            guesses.judge(verified, accepted)
            guesses.book(cost)
            asked, lost = asked + 1, lost + cost - accepted
    return asked, lost


@pytest.mark.parametrize(("cost", "right"), [(0.9, 0.0), (0.9, 0.3), (0.3, 0.1)])
def test_a_draft_that_does_not_pay_costs_little_in_all_sequences(cost: float, right: float) -> None:
    costs, rng = DraftCosts(), np.random.default_rng(0)
    lost = sum(used(Guesses(Guessing(draft=4), costs), 100, cost, right, rng)[1] for _ in range(20))
    assert 0 < lost < 0.02 * 2000


def test_a_draft_that_pays_is_not_left() -> None:
    guesses, rng = Guesses(Guessing(draft=4), DraftCosts()), np.random.default_rng(0)
    asked, lost = used(guesses, 1000, 0.4, 0.7, rng)
    assert asked > 900
    assert lost < 0


def test_a_draft_that_pays_again_is_asked_again() -> None:
    costs, rng = DraftCosts(), np.random.default_rng(0)
    used(Guesses(Guessing(draft=4), costs), 1000, 0.9, 0.0, rng)
    assert costs.rests[False].left > 0
    assert used(Guesses(Guessing(draft=4), costs, is_drawn=True), 10, 0.9, 0.0, rng)[0] > 0, "drawn texts are others"
    asked, _ = used(Guesses(Guessing(draft=4), costs), LONGEST_PAUSE + 500, 0.4, 0.9, rng)
    assert asked > 450
    assert costs.rests[False].left == 0


def test_what_guesses_cost_is_the_time_beyond_a_usual_step_shared_by_those_who_asked() -> None:
    costs = DraftCosts()
    riders: list[Any] = [SimpleNamespace(guesses=Guesses(Guessing(draft=4), costs)) for _ in range(3)]
    assert not costs.knows(3)
    for seconds in (0.010, 0.900, 0.011, 0.009, 0.010):
        settle(costs, riders, seconds, with_guesses=False)
    assert costs.knows(3)
    for rider in riders[:2]:
        assert rider.guesses.ask_draft(10) == 3
        rider.guesses.by_draft = True
    riders[0].guesses.judge(3, 2)
    before = [rider.guesses.account for rider in riders]
    settle(costs, riders, 0.015, with_guesses=True)
    gained = [rider.guesses.account - was for rider, was in zip(riders, before, strict=True)]
    assert np.allclose(gained, [2 - 0.5 * 3 / 2, -0.5 * 3 / 2, 0])
