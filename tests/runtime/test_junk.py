"""Junk where a session expects prompts, numbers and ids: a `SessionError` of one short line, and nothing raw."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import arriero
from arriero.errors import SessionError
from arriero.runtime import Flight, Session


@pytest.fixture(scope="module")
def session(tiny_model: Path) -> Session:
    return arriero.load(tiny_model, max_seq=64)


@pytest.mark.parametrize(
    "prompts", ["The list", b"The", {"role": "user", "content": "x"}, [5, 6, 7], None, 3, Path(".")]
)
def test_one_prompt_in_place_of_several_is_refused(session: Session, prompts: Any) -> None:
    for call in (session.generate_many, lambda each, count: list(session.stream_many(each, count))):
        with pytest.raises(SessionError, match=r"the prompts are .*: \[prompt\] is a list of one") as caught:
            call(prompts, 2)
        assert len(str(caught.value)) < 200


@pytest.mark.parametrize("make", [iter, tuple, list, np.array])
def test_prompts_of_any_collection_are_each_continued(session: Session, make: Callable[[Any], Any]) -> None:
    prompts = [[5, 6, 7], [8, 9, 10]]
    expected = [session.generate(each, max_new_tokens=3).ids for each in prompts]
    assert [each.ids for each in session.generate_many(make(prompts), 3)] == expected
    assert session.generate_many(iter([]), 3) == []


@pytest.mark.parametrize("value", ["4", 2.5, True, 0, -1, [2], b"2", float("nan"), -(10**30)])
@pytest.mark.parametrize("name", ["slots", "prefill_budget", "positions"])
def test_sizes_of_a_flight_are_whole_numbers(session: Session, name: str, value: Any) -> None:
    with pytest.raises(SessionError, match=rf"^{'batch' if name == 'slots' else name} is"):
        Flight(session, **{name: value})


def test_sizes_that_are_whole_numbers_of_other_types_are_taken(session: Session) -> None:
    flight = Flight(session, np.int32(2), positions=np.float64(16), prefill_budget=8.0)  # type: ignore[arg-type]
    number = flight.join(session.request([5, 6, 7], 2))
    assert [each for _ in range(2) for each, _ in flight.step()] == [number, number]


def named(value: object) -> str:
    """A value as a test's name, the same in every process."""
    return repr(value).partition(" at 0x")[0]


JUNK = ["ab", [1.5], [None], [[[1]]], None, {"a": 1}, [2**70], [-1], [True], object(), ["5"]]


@pytest.mark.parametrize("row", JUNK, ids=named)
def test_rows_of_junk_are_refused(session: Session, row: Any) -> None:
    state = session.start(1, 32)
    for rows in ([row], row, 5, [5]):
        with pytest.raises(SessionError):
            session.prefill(state, rows)
    with pytest.raises(SessionError):
        list(session.extend(state, [row]))
    session.prefill(state, [[5, 6]])
    for tokens in (row, [row]):
        with pytest.raises(SessionError):
            session.decode(state, tokens)
    assert state.past_B.tolist() == [2]


@pytest.mark.parametrize("ids", [*JUNK, 5, [[1, 2], [3]], [[1.0]], [["a"]], [[]]], ids=named)
def test_logits_of_junk_are_refused(session: Session, ids: Any) -> None:
    with pytest.raises(SessionError):
        session.logits(ids)


@pytest.mark.parametrize("lengths", ["a", [1.0], [[1], [2, 3]], [0], [3], None.__class__, [1, 1]], ids=named)
def test_lengths_of_junk_are_refused(session: Session, lengths: Any) -> None:
    with pytest.raises(SessionError, match="lengths are"):
        session.logits([[5, 6]], lengths)


@pytest.mark.parametrize("name", ["max_seq", "max_batch", "threads", "prefix_bytes"])
@pytest.mark.parametrize("value", ["4", 2.5, True, [2], b"2", float("nan"), -(10**30)])
def test_sizes_of_a_session_are_whole_numbers(tiny_model: Path, name: str, value: Any) -> None:
    with pytest.raises(SessionError, match=name):
        arriero.load(tiny_model, **{name: value})
