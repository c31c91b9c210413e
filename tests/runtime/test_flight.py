"""Sequences that join and leave a batch get what they get alone."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import arriero
from arriero.errors import SessionError
from arriero.export import export_checkpoint
from arriero.runtime import Flight, Generated, Session, State
from arriero.runtime.continuation import joined

FREE: dict[str, Any] = {"eos_token_id": []}


@pytest.fixture(scope="module")
def session(tiny_model: Path) -> Session:
    return arriero.load(tiny_model, max_seq=400)


@pytest.fixture(scope="module")
def requests(session: Session) -> list[tuple[Any, dict[str, Any]]]:
    """Prompts of 1 to 300 tokens, greedy and drawn, with ends of all kinds; some pass the boundaries of chunks."""
    rng = np.random.default_rng(0)
    text = session.text.encode("A list is a mutable sequence. The method returns the number of items in it. " * 20)
    asked: list[tuple[Any, dict[str, Any]]] = [
        ("The list type", {"max_new_tokens": 40, "temperature": 0, **FREE}),
        (text[:120], {"max_new_tokens": 30, "temperature": 0, **FREE}),
        (text[:300], {"max_new_tokens": 12, "temperature": 0.7, "top_p": 0.9, "seed": 5, **FREE}),
        ("Note that", {"max_new_tokens": 0}),
        ("import", {"max_new_tokens": 1, "temperature": 0}),
        ("Return the", {"max_new_tokens": 40, "temperature": 0, "stop_strings": "the"}),
        ([9], {"max_new_tokens": 25, "temperature": 1.0, "top_k": 20, "repetition_penalty": 1.2, "seed": 1}),
    ]
    for length in rng.integers(2, 250, 8).tolist():
        asked.append((text[-length:], {"max_new_tokens": int(rng.integers(2, 40)), "temperature": 0}))
    return asked


@pytest.fixture(scope="module")
def alone(session: Session, requests: list[tuple[Any, dict[str, Any]]]) -> list[Generated]:
    return [session.generate(prompt, **settings) for prompt, settings in requests]


def land(flight: Flight, pieces: dict[int, list[Generated]]) -> None:
    """Steps until nobody is there."""
    while flight.riding or flight.waiting:
        for number, piece in flight.step():
            pieces.setdefault(number, []).append(piece)


@pytest.mark.parametrize("slots", [1, 3, 20])
def test_who_joins_at_any_time_gets_what_it_gets_alone(
    session: Session, requests: list[tuple[Any, dict[str, Any]]], alone: list[Generated], slots: int
) -> None:
    rng, flight = np.random.default_rng(slots), Flight(session, slots)
    pieces: dict[int, list[Generated]] = {}
    order = rng.permutation(len(requests))
    for index in order:
        flight.join(session.request(requests[index][0], **requests[index][1]))
        for _ in range(rng.integers(0, 6)):
            for number, piece in flight.step():
                pieces.setdefault(number, []).append(piece)
    land(flight, pieces)
    for number, index in enumerate(order):
        assert joined(pieces[number]) == alone[index]


def test_many_prompts_come_back_in_their_order(session: Session) -> None:
    prompts = ["The list type", "Return the", [9, 10, 11], "import", "A dictionary is", "The list type"]
    settings: dict[str, Any] = {"max_new_tokens": 15, "temperature": 0.8, "seed": 3}
    expected = [session.generate(prompt, **settings) for prompt in prompts]
    assert session.generate_many(prompts, slots=2, **settings) == expected
    assert session.generate_many([], **settings) == []
    assert session.generate_many(["The"], max_new_tokens=0) == [Generated([], "", "length")]


def test_many_prompts_stream_side_by_side(session: Session) -> None:
    settings: dict[str, Any] = {"max_new_tokens": 10, "temperature": 0, **FREE}
    order = [number for number, _ in session.stream_many(["The", "A", "It"], slots=2, **settings)]
    assert order[:6] == [0, 1, 0, 1, 0, 1]
    assert order[-10:] == [2] * 10


def test_a_flight_is_the_greedy_search_of_transformers(make_llama4: Callable[..., Any], tmp_path: Path) -> None:
    reference = make_llama4(seed=4, num_key_value_heads=1)
    reference.save_pretrained(tmp_path / "checkpoint")
    session = arriero.load(export_checkpoint(tmp_path / "checkpoint", tmp_path / "model"))
    rng = np.random.default_rng(4)
    prompts = [rng.integers(3, 97, length).tolist() for length in (5, 16, 40, 1, 23, 9)]
    found = session.generate_many(prompts, 20, slots=4, temperature=0, eos_token_id=[])
    for prompt, generated in zip(prompts, found, strict=True):
        settings: dict[str, Any] = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "pad_token_id": 2}
        whole = reference.generate(torch.tensor([prompt]), **settings)
        assert generated.ids == whole[0, len(prompt) :].tolist()


def test_short_prompts_are_read_together(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[list[int]] = []
    prefill = session.prefill

    def watched(state: State, rows: list[list[int]], *more: Any) -> Any:
        read.append([len(row) for row in rows])
        return prefill(state, rows, *more)

    prompts = [[9 + length] * length for length in (20, 30, 25, 100, 3, 2)]
    settings: dict[str, Any] = {"max_new_tokens": 10, "temperature": 0, **FREE}
    expected = [session.generate(prompt, **settings) for prompt in prompts]
    monkeypatch.setattr(session, "prefill", watched)
    assert session.generate_many(prompts, slots=5, **settings) == expected
    assert read == [[20, 30, 25], [100], [3], [2]]  # 128 is a chunk


def test_a_first_token_waits_for_no_step_of_others(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    steps, decode = [0], session.decode_rows

    def counted(*given: Any) -> Any:
        steps[0] += 1
        return decode(*given)

    monkeypatch.setattr(session, "decode_rows", counted)
    flight = Flight(session, slots=3)
    for riding, prompts in enumerate((["The list type"], ["Return the", "import"])):
        numbers = [flight.join(session.request(prompt, 9, temperature=0, **FREE)) for prompt in prompts]
        assert [number for number, _ in flight.step()][riding:] == numbers
        assert steps[0] == riding  # what rode before had its step first


def test_images_ride_along(multimodal_model: Path) -> None:
    session = arriero.load(multimodal_model, max_seq=200)
    rng = np.random.default_rng(0)
    parts = [
        [{"type": "image", "image": rng.integers(0, 256, (30, 40, 3), np.uint8)}, {"type": "text", "text": "What?"}]
        for _ in range(2)
    ]
    prompts: list[Any] = [[{"role": "user", "content": each}] for each in (*parts, "Hello")]
    settings: dict[str, Any] = {"max_new_tokens": 8, "temperature": 0, **FREE}
    assert session.generate_many(prompts, **settings) == [session.generate(each, **settings) for each in prompts]


def test_one_that_leaves_makes_room(session: Session) -> None:
    settings: dict[str, Any] = {"max_new_tokens": 20, "temperature": 0, **FREE}
    flight, pieces = Flight(session, slots=2), {}
    first, second, third, fourth = (
        flight.join(session.request(prompt, **settings)) for prompt in ("The", "A", "Return", "It")
    )
    flight.step()
    flight.leave(first)
    flight.leave(third)
    assert (flight.riding, len(flight.waiting)) == (1, 1)
    land(flight, pieces)
    assert pieces.keys() == {second, fourth}
    assert joined(pieces[fourth]) == session.generate("It", **settings)
    with pytest.raises(SessionError, match="request 0 is not in flight: it has ended, or never joined"):
        flight.leave(first)


def test_what_a_flight_does_not_hold_is_named(session: Session) -> None:
    flight = Flight(session, slots=1, positions=20)
    with pytest.raises(SessionError, match="the prompt's 15 and 6 new tokens are more than the 20 positions of a row"):
        flight.join(session.request([9] * 15, max_new_tokens=6))
    with pytest.raises(SessionError, match="batch is 0"):
        Flight(session, slots=0)
    with pytest.raises(SessionError, match="the prompt has 401 tokens"):
        session.stream_many(["The", [9] * 401])
