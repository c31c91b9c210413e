"""Sequences that share a session, in a flight or over threads: none gets another's error, tokens or waiting time."""

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import arriero
from arriero.errors import SessionError, StepError
from arriero.runtime import Flight, Generated, Session, State
from arriero.runtime.backends.onnxruntime_decoder import OnnxRuntimeBinding
from arriero.runtime.continuation import joined
from arriero.runtime.prefix import total
from arriero.runtime.rider import BEGUN

GREEDY: dict[str, Any] = {"temperature": 0, "eos_token_id": []}
POISON = 13
"""A token that the faults of these tests wait for."""

PROMPTS = ["The list type", "Return the", [9, 10, 11, 12], "A dictionary is", [9] * 200]


@pytest.fixture(scope="module")
def session(tiny_model: Path) -> Session:
    return arriero.load(tiny_model, max_seq=2000)


def land(flight: Flight) -> dict[int, Generated]:
    """Steps until nobody is there. Returns what each request got."""
    pieces: dict[int, list[Generated]] = {}
    while flight.riding or flight.waiting:
        for number, piece in flight.step():
            pieces.setdefault(number, []).append(piece)
    return {number: joined(each) for number, each in pieces.items()}


def poisoned(session: Session, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets a method of a session run out of memory where a row gets the poison."""
    whole = getattr(session, name)

    def failing(state: State, rows: Any, *more: Any) -> Any:
        if POISON in np.concatenate([np.atleast_1d(row) for row in rows]):
            raise MemoryError("no room for this row")
        return whole(state, rows, *more)

    monkeypatch.setattr(session, name, failing)


@pytest.mark.parametrize("place", range(3))
@pytest.mark.parametrize("bad", [[9, POISON, 9], [9] * 150 + [POISON]], ids=["short", "long"])
def test_a_prompt_that_cannot_be_read_ends_alone(
    session: Session, monkeypatch: pytest.MonkeyPatch, place: int, bad: list[int]
) -> None:
    alone = [session.generate(prompt, 8, **GREEDY) for prompt in PROMPTS]
    poisoned(session, "prefill", monkeypatch)
    found = session.generate_many([*PROMPTS[:place], bad, *PROMPTS[place:]], 8, slots=4, **GREEDY)
    failed = found.pop(place)
    assert (failed.ids, failed.finish) == ([], "error")
    assert isinstance(failed.error, StepError)
    assert str(failed.error).startswith("there is not enough memory for a step (MemoryError: no room for this row): ")
    assert found == alone


def test_a_row_that_cannot_be_decoded_ends_with_what_it_had(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = [session.generate(prompt, 30, **GREEDY) for prompt in PROMPTS]
    victim = max(range(len(alone)), key=lambda index: len(set(alone[index].ids)))
    ids = alone[victim].ids
    fault = next(token for token in ids[4:] if sum(token in each.ids for each in alone) == 1)
    whole = session.decode_rows

    def failing(state: State, tokens_B: Any) -> Any:
        if fault in tokens_B:
            raise RuntimeError("the step failed")
        return whole(state, tokens_B)

    monkeypatch.setattr(session, "decode_rows", failing)
    found = session.generate_many(PROMPTS, 30, slots=5, **GREEDY)
    assert isinstance(found[victim].error, StepError)
    assert str(found[victim].error).startswith("a step of the model failed (RuntimeError: the step failed): ")
    assert found[victim].ids == ids[: ids.index(fault) + 1]
    assert [each for index, each in enumerate(found) if index != victim] == [
        each for index, each in enumerate(alone) if index != victim
    ]


def test_a_flight_goes_on_after_every_kind_of_error(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    class Silent:
        def open_stream(self) -> Any:
            raise SessionError("this tokenizer says nothing")

    request = session.request("The list type", 8, **GREEDY)
    with monkeypatch.context() as patched:
        poisoned(session, "prefill", patched)
        poisoned(session, "decode_rows", patched)
        flight = Flight(session, slots=3)
        for _ in range(2):
            flight.join(session.request([POISON, 9], 4, **GREEDY))
            flight.join(dataclasses.replace(request, text=Silent()))  # type: ignore[arg-type]
            flight.join(request)
        found = land(flight)
    assert [each.finish for _, each in sorted(found.items())] == ["error", "error", "length"] * 2
    flight.join(request)
    assert list(land(flight).values()) == [session.generate("The list type", 8, **GREEDY)]


@pytest.mark.parametrize(
    ("raised", "said"),
    [
        (MemoryError(), "there is not enough memory for a step (MemoryError): free some, "),
        (RuntimeError("arriero.cpu Linear: x\nis none"), "(RuntimeError: arriero.cpu Linear: x is none): try again, "),
    ],
)
def test_a_step_that_fails_is_one_error_and_the_next_one_goes_on(
    session: Session, monkeypatch: pytest.MonkeyPatch, raised: Exception, said: str
) -> None:
    def fail(*arguments: Any) -> None:
        raise raised

    alone, state = session.generate("The list type", 4, **GREEDY), session.start(1, 8)
    session.prefill(state, [[9, 9]])
    with monkeypatch.context() as patched:
        for name in ("step", "decode"):
            patched.setattr(OnnxRuntimeBinding, name, fail)
        for ask in (
            lambda: session.generate("The list type", 4, **GREEDY),
            lambda: session.logits([[9, 9]]),
            lambda: session.decode(state, [9]),
            lambda: session.decode_rows(state, [9]),
            lambda: session.prefill(state, [[9]]),
            lambda: list(session.score([9, 9], 1)),
        ):
            with pytest.raises(StepError) as error:
                ask()
            assert said in str(error.value)
            assert "\n" not in str(error.value)
            assert error.value.__cause__ is raised
    assert session.generate("The list type", 4, **GREEDY) == alone
    assert state.past_B.tolist() == [2]


@pytest.mark.parametrize("budget", [1, 7, 64])
def test_a_long_prompt_keeps_no_one_waiting(session: Session, monkeypatch: pytest.MonkeyPatch, budget: int) -> None:
    prompt, read = np.random.default_rng(0).integers(20, 2000, 500).tolist(), []
    alone, waiting = session.generate(prompt, 5, **GREEDY), session.generate("The", 1000, **GREEDY)
    whole = session.prefill

    def counted(state: State, rows: Any, *more: Any) -> Any:
        read[-1] += sum(len(row) for row in rows)
        return whole(state, rows, *more)

    monkeypatch.setattr(session, "prefill", counted)
    flight = Flight(session, slots=2, prefill_budget=budget)
    first = flight.join(session.request("The", 1000, **GREEDY))
    read.append(0)
    pieces = dict([flight.step()[-1]])
    second = flight.join(session.request(prompt, 5, **GREEDY))
    got: dict[int, list[Generated]] = {first: [], second: []}
    while not got[second] or got[second][-1].finish is None:
        read.append(0)
        for number, piece in flight.step():
            got[number].append(piece)
    assert max(read[1:]) <= budget
    assert joined(got[second]) == alone
    assert pieces[first].ids == waiting.ids[:1]
    assert [piece.ids[0] for piece in got[first]] == waiting.ids[1 : 1 + len(got[first])]


@pytest.mark.parametrize(("decoding", "coming", "most"), [(1, 1, 32), (1, 3, 96), (2, 4, 64), (3, 2, 32), (1, 20, 256)])
def test_more_of_the_prompts_is_read_where_more_wait_than_decode(
    session: Session, monkeypatch: pytest.MonkeyPatch, decoding: int, coming: int, most: int
) -> None:
    flight, read, whole = Flight(session, slots=decoding + coming), [0], session.prefill

    def counted(state: State, rows: Any, *more: Any) -> Any:
        read[-1] += sum(len(row) for row in rows)
        return whole(state, rows, *more)

    monkeypatch.setattr(session, "prefill", counted)
    for _ in range(decoding):
        flight.join(session.request("The", 60, **GREEDY))
    for _ in range(BEGUN):
        flight.step()
    assert len(flight.rows) == decoding
    prompt, read[-1] = [7] * 70, 0
    for _ in range(coming):
        flight.join(session.request(prompt, 1, **GREEDY))
    flight.step()
    assert read[-1] == min(most, coming * len(prompt))


def test_a_request_leaves_while_its_prompt_is_read(session: Session) -> None:
    flight = Flight(session, slots=3, prefill_budget=10)
    staying = flight.join(session.request("The list type", 30, **GREEDY))
    flight.step()
    leaving, last = (flight.join(session.request(each, 5, **GREEDY)) for each in ([9] * 100, "Return the"))
    flight.step()
    assert flight.riding == 2
    flight.leave(leaving)
    found = land(flight)
    assert found.keys() == {staying, last}
    assert found[last] == session.generate("Return the", 5, **GREEDY)


def test_rows_that_end_while_a_prompt_is_read_leave_no_gap(session: Session) -> None:
    flight = Flight(session, slots=4, prefill_budget=16)
    counts = {
        flight.join(session.request(prompt, count, **GREEDY)): (prompt, count)
        for prompt, count in (("The", 3), ("A", 9), ("It", 40))
    }
    long = [11] * 180
    counts[flight.join(session.request(long, 12, **GREEDY))] = long, 12
    counts[flight.join(session.request("Return the", 12, **GREEDY))] = "Return the", 12
    found = land(flight)
    assert found == {number: session.generate(prompt, count, **GREEDY) for number, (prompt, count) in counts.items()}


def test_a_budget_is_at_least_a_token(session: Session) -> None:
    with pytest.raises(SessionError, match="prefill_budget is 0, expected a whole number from 1 up"):
        session.generate_many(["The", "A"], 3, prefill_budget=0)


@pytest.mark.parametrize("prefix_bytes", [0, 200_000, 1 << 26])
def test_threads_share_a_session(tiny_model: Path, prefix_bytes: int) -> None:
    alone = arriero.load(tiny_model, max_seq=400)
    text = "The list type is a mutable sequence. " * 6
    prompts = [text, text + "Note that", "Return the " + text, "import", text[:100], [9] * 150]
    expected = [alone.generate(prompt, 10, **GREEDY).ids for prompt in prompts]
    ids_BS = np.arange(20, 120)[None]
    logits = alone.logits(ids_BS)
    shared = arriero.load(tiny_model, max_seq=400, prefix_bytes=prefix_bytes)

    def work(index: int) -> bool:
        match index % 4:
            case 0:
                return [each.ids for each in shared.generate_many(prompts, 10, slots=3, **GREEDY)] == expected
            case 1:
                abandoned = shared.stream(prompts[index % 6], 10, **GREEDY)
                next(abandoned)
                return bool(np.allclose(shared.logits(ids_BS), logits, atol=1e-4))
            case _:
                return shared.generate(prompts[index % 6], 10, **GREEDY).ids == expected[index % 6]

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(work, range(24)))
    blocks = shared.prefixes.blocks
    assert shared.prefixes.size == sum(map(total, blocks.values())) <= prefix_bytes
