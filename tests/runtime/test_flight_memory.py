"""Rows that share one budget of memory, and prompts that are read once for several requests."""

from pathlib import Path
from typing import Any

import pytest

import arriero
from arriero.errors import SessionError
from arriero.runtime import Flight, Generated, Session
from arriero.runtime.continuation import joined

GREEDY: dict[str, Any] = {"do_sample": False, "eos_token_id": []}


@pytest.fixture(scope="module")
def session(tiny_model: Path) -> Session:
    return arriero.load(tiny_model, max_seq=1024, threads=1)


def land(flight: Flight, most: int | None = None) -> dict[int, Generated]:
    """Steps until all have landed. Returns each one's text; no more than `most` bytes are ever taken."""
    pieces: dict[int, list[Generated]] = {}
    while flight.waiting or flight.riding:
        for number, piece in flight.step():
            pieces.setdefault(number, []).append(piece)
        assert most is None or sum(flight.taken.values()) <= most
    return {number: joined(each) for number, each in pieces.items()}


def test_many_short_rows_or_few_long_ones_fit_the_same_memory(session: Session) -> None:
    short, long = session.request("The list type", 25, **GREEDY), session.request([5] * 500, 12, **GREEDY)
    caches = session.start(1, None, sparse=True).caches
    budget = 2 * caches.row_bytes(long.positions)
    fitting = budget // caches.row_bytes(short.positions)
    assert fitting >= 4
    for request, most in ((short, fitting), (long, 2)):
        flight, pieces, riding = Flight(session, 16, cache_bytes=budget), {}, 0
        numbers = [flight.join(request) for _ in range(most + 1)]
        while flight.waiting or flight.riding:
            for number, piece in flight.step():
                pieces.setdefault(number, []).append(piece)
            riding = max(riding, flight.riding)
            assert 0 <= flight.used <= 1
        assert riding == most
        assert len({tuple(joined(pieces[number]).ids) for number in numbers}) == 1
        assert not flight.taken
        assert flight.used == 0


def test_memory_of_rows_that_were_left_is_given_back(session: Session) -> None:
    statm = Path("/proc/self/statm")
    if not statm.exists():
        pytest.skip("not Linux")
    flight = Flight(session, 12, cache_bytes=1 << 40)
    settings = {**GREEDY, "max_new_tokens": 2}
    row = flight.state.caches.row_bytes(402)

    def fly(count: int) -> int:
        for _ in range(count):
            flight.join(session.request([5] * 400, **settings))
        land(flight)
        return int(statm.read_text().split()[1]) * 4096

    before = fly(1)
    assert fly(12) - before < 6 * row


def test_a_request_of_more_memory_than_there_is_cannot_join(session: Session) -> None:
    request = session.request("The list type", 600, **GREEDY)
    budget = session.start(1, None, sparse=True).caches.row_bytes(300)
    flight = Flight(session, 4, cache_bytes=budget)
    with pytest.raises(SessionError, match="bytes of cache"):
        flight.join(request)
    with pytest.raises(SessionError, match="cache_bytes"):
        Flight(session, 4, cache_bytes=10)
    assert not flight.waiting


@pytest.mark.parametrize("positions", [16, 64, 1024])
def test_the_memory_of_a_whole_row_holds_any_sequence_of_it(session: Session, positions: int) -> None:
    caches = session.start(1, positions, sparse=True).caches
    sizes = [caches.row_bytes(tokens) for tokens in range(1, positions + 1)]
    assert sizes == sorted(sizes)
    flight = Flight(session, 1, positions, cache_bytes=sizes[-1])
    for count in (1, positions // 2, positions - 2):
        number = flight.join(session.request([5], count, **GREEDY))
        assert len(land(flight)[number].ids) == count


@pytest.mark.parametrize("slots", [2, 5, 8])
def test_requests_that_join_as_one_get_what_each_gets_alone(session: Session, slots: int) -> None:
    prompt = "A for statement is used to iterate over the elements of a sequence. " * 3
    settings = [{"do_sample": True, "temperature": 0.8, "seed": seed, "max_new_tokens": 9} for seed in range(5)]
    flight = Flight(session, slots, prefill_budget=16)
    other = flight.join(session.request("The list type", 30, **GREEDY))
    numbers = flight.join_as_one([session.request(prompt, **each) for each in settings])
    found = land(flight)
    assert [found[number] for number in numbers] == [session.generate(prompt, **each) for each in settings]
    assert found[other] == session.generate("The list type", 30, **GREEDY)


def test_any_of_those_that_join_as_one_may_leave(session: Session) -> None:
    prompt, settings = [7] * 90, {**GREEDY, "max_new_tokens": 9}
    alone = session.generate(prompt, **settings)
    flight = Flight(session, 8, prefill_budget=16, cache_bytes=1 << 30)
    flight.join(session.request("The list type", 40, **GREEDY))
    flight.step()
    numbers = flight.join_as_one([session.request(prompt, **settings) for _ in range(4)])
    flight.leave(numbers[3])
    flight.step()
    flight.leave(numbers[0])
    found = land(flight)
    assert [found[number] for number in numbers[1:3]] == [alone] * 2
    assert not flight.taken
    gone = flight.join_as_one([session.request(prompt, **settings) for _ in range(2)])
    flight.step()
    for number in gone:
        flight.leave(number)
    assert not flight.riding
    assert not flight.taken
    assert not land(flight)


def test_scopes_do_not_share_beginnings(session: Session) -> None:
    import dataclasses

    keeping = Session(session.decoder, session.text, session.defaults, session.limits, prefix_bytes=1 << 24)
    request = keeping.request([9] * 200, 2, **GREEDY)
    flight, reused = Flight(keeping, 2), []
    for scope in (b"a", b"b", b"a", b"b"):
        number = flight.join(dataclasses.replace(request, scope=scope))
        reused.append(land(flight)[number].reused)
    assert reused[0] == reused[1] == 0
    assert reused[2] == reused[3] >= 160
