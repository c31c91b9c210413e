"""Prompts' pieces by the time that steps take: their lengths, and texts that do not depend on them."""

import random
from pathlib import Path
from typing import Any

import pytest

import arriero
from arriero.runtime import Flight
from arriero.runtime.pace import LEAST, SHARE, Pace
from arriero.runtime.party import MOST_BUDGETS, PREFILL_BUDGET, usual_budget
from arriero.runtime.rider import BEGUN

FREE: dict[str, Any] = {"eos_token_id": [], "temperature": 0}


def test_a_piece_takes_its_share_of_a_step_and_is_never_longer_than_the_usual_one() -> None:
    assert Pace().piece(32) == Pace(step=0.01).piece(32) == Pace(token=0.01).piece(32) == 32
    lengths = [Pace(step=0.01, token=0.01 * SHARE / fitting).piece(32) for fitting in (1, 9.5, 14, 20.1, 33, 1000)]
    assert lengths == [LEAST, 8, 12, 20, 32, 32]


def test_a_burst_is_read_in_long_pieces_whatever_they_take() -> None:
    slow = Pace(step=0.001, token=0.001)
    assert [usual_budget(coming, 4, slow) for coming in (0, 1, 3)] == [LEAST] * 3
    assert [usual_budget(coming, 4, slow) // PREFILL_BUDGET for coming in (4, 7, 8, 40)] == [1, 1, 2, MOST_BUDGETS]
    assert [usual_budget(coming, 0, slow) // PREFILL_BUDGET for coming in (0, 1, 3, 40)] == [1, 1, 3, MOST_BUDGETS]


def test_those_of_a_burst_that_have_just_begun_do_not_slow_down_the_others(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Pace, "piece", lambda pace, usual: LEAST)
    session = arriero.load(tiny_model, max_seq=200)
    flight, steps = Flight(session, 9), 0
    flight.join(session.request("The list type", 60, **FREE))
    for _ in range(BEGUN):
        flight.step()
    for _ in range(8):
        flight.join(session.request([7] * 64, 60, **FREE))
    while flight.waiting or flight.boarding:
        steps += 1
        flight.step()
    assert steps <= BEGUN
    assert [rider.has_begun for _, rider in flight.rows] == [True] + [False] * 8


def test_one_slow_step_among_many_changes_little(monkeypatch: pytest.MonkeyPatch) -> None:
    moments = iter([0.0])
    monkeypatch.setattr("arriero.runtime.pace.time.perf_counter", lambda: next(moments))

    def mean(*seconds: float) -> float:
        nonlocal moments
        moments, pace = iter([moment for each in seconds for moment in (0.0, each)]), Pace()
        for _ in seconds:
            pace.of_step(lambda: None)
        return pace.step

    assert mean(0.01, 0.01) == pytest.approx(0.01)
    assert mean(0.01, 5.0) == pytest.approx(0.014)
    assert mean(0.01, *[0.03] * 30) == pytest.approx(0.03, rel=0.01)


def test_pieces_of_any_lengths_give_the_same_text(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = arriero.load(tiny_model, max_seq=200)
    prompts = ["The list type", "Return the", "x", "A for statement is " * 12, "def f(x): " * 9]
    alone = [session.generate(prompt, 24, **FREE).ids for prompt in prompts]
    rng, asked = random.Random(0), list[int]()

    def piece(pace: Pace, usual: int) -> int:
        assert pace.step
        asked.append(rng.randint(1, usual))
        return asked[-1]

    monkeypatch.setattr(Pace, "piece", piece)
    flight, found = Flight(session, 5), dict[int, list[int]]()
    for number, prompt in enumerate(prompts):
        flight.join(session.request(prompt, 24, **FREE))
        for _ in range(3 * (number < 3)):
            for rider, each in flight.step():
                found.setdefault(rider, []).extend(each.ids)
    while flight.riding or flight.waiting:
        for rider, each in flight.step():
            found.setdefault(rider, []).extend(each.ids)
    assert [found[number] for number in range(5)] == alone
    assert len(asked) > 5
    assert flight.pace.token > 0
