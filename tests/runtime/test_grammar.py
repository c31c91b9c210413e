"""Continuations that follow a grammar: alone, in flight, with guesses, drawn and greedy."""

import gc
import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

import arriero
from arriero.errors import SessionError
from arriero.runtime import Session
from arriero.runtime.flight import Flight
from arriero.runtime.grammars import guide

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": -20, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["a", "b\n", "ü"]}, "minItems": 1, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
DRAWN: dict[str, Any] = {"temperature": 1.0, "top_k": 0, "max_new_tokens": 300}


@pytest.fixture(scope="module")
def session(tiny_model: Path) -> Session:
    return arriero.load(tiny_model, max_seq=400)


@pytest.mark.parametrize(
    "settings", [{"temperature": 0}, {"temperature": 1.3, "seed": 2}, {"temperature": 1, "seed": 3, "top_k": 3}]
)
def test_an_answer_is_valid_against_its_schema(session: Session, settings: dict[str, Any]) -> None:
    found = session.generate("The list type", json_schema=SCHEMA, **{**DRAWN, **settings})
    assert found.finish == "stop"
    jsonschema.validate(json.loads(found.text), SCHEMA)
    assert session.generate("The list type", json_schema=json.dumps(SCHEMA), **{**DRAWN, **settings}) == found


def test_a_text_matches_its_expression_and_its_grammar(session: Session) -> None:
    found = session.generate("Hello", regex=r"[a-f]{3,5}-[0-9]{1,4};", seed=1, **DRAWN)
    assert re.fullmatch(r"[a-f]{3,5}-[0-9]{1,4};", found.text)
    lark = 'start: word (" " word){2}\nword: /[A-Z][a-z]{1,4}/'
    assert re.fullmatch(
        r"[A-Z][a-z]{1,4}( [A-Z][a-z]{1,4}){2}", session.generate("", grammar=lark, seed=1, **DRAWN).text
    )


def test_it_ends_only_where_the_grammar_may_end(session: Session) -> None:
    end = session.text.special_id("eos_token")
    assert end is not None
    wanted = {**DRAWN, "logit_bias": {end: 100}}
    found = session.generate("Hello", regex="(ab){2}(cd)*", **wanted)
    assert (found.text, found.finish, found.ids[-1]) == ("abab", "eos", end)
    unwanted = {**DRAWN, "logit_bias": {end: -100}, "temperature": 0}
    assert session.generate("Hello", regex="(ab){2}(cd)?", **unwanted).text == "ababcd"
    assert session.generate("Hello", regex="ab", eos_token_id=[], **DRAWN).finish == "stop"
    assert session.generate("Hello", regex="(ab)*", **{**DRAWN, "max_new_tokens": 0}).finish == "length"


def test_the_end_of_the_grammar_comes_before_that_of_the_length(session: Session) -> None:
    count = len(session.generate("Hello", regex="abcd", temperature=0).ids)
    assert session.generate("Hello", regex="abcd", temperature=0, max_new_tokens=count).finish == "stop"
    assert session.generate("Hello", regex="abcd", temperature=0, max_new_tokens=count - 1).finish == "length"


def test_a_text_token_that_ends_the_sequence_ends_it_where_the_grammar_may(session: Session) -> None:
    (a,) = session.text.encode("a", special_tokens=False)
    for seed in range(4):
        wanted = {**DRAWN, "logit_bias": {a: 100}, "seed": seed}
        found = session.generate("Hello", regex="(a|b)bb?a?", eos_token_id=[a], **wanted)
        assert re.fullmatch("(a|b)bb?a?", found.text)
        assert (found.ids[-1] == a) == (found.finish == "eos")
        assert a not in found.ids[:-1]


@pytest.mark.parametrize("drafts", [0, 3, 8])
def test_guesses_change_nothing(session: Session, drafts: int) -> None:
    prompt = '[{"id": 1, "name": "one"}, {"id": 2, "name": "two"}] ' * 2
    schema = {
        "type": "array",
        "items": {"type": "object", "properties": {"id": {"type": "integer"}, "name": {"type": "string"}}},
    }
    settings: dict[str, Any] = {"json_schema": schema, "max_new_tokens": 80, "temperature": 0.4, "seed": 5}
    plain = session.generate(prompt, logprobs=True, top_logprobs=2, **settings)
    found = session.generate(prompt, prompt_lookup_num_tokens=drafts, logprobs=True, top_logprobs=2, **settings)
    assert found == plain
    if drafts:
        assert found.drafted > found.accepted > 0 or found.drafted == found.accepted > 0
    for each, other in zip(found.logprobs, plain.logprobs, strict=True):
        assert each.token == other.token
        assert np.isclose(each.logprob, other.logprob, atol=1e-3)


def test_log_probabilities_are_the_models_own(session: Session) -> None:
    found = session.generate("The list", regex="[0-9]{4}", temperature=0, logprobs=True, top_logprobs=3)
    free = session.generate("The list", temperature=0, max_new_tokens=1, logprobs=True, top_logprobs=3)
    assert found.logprobs[0].top == free.logprobs[0].top
    assert found.logprobs[0].token not in [token for token, _ in found.logprobs[0].top]


@pytest.fixture(params=[-1.0, guide.LONG], ids=["masks beside the step", "masks when asked for"])
def masks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Masks that are computed by a thread of their own, however quick they are, and as they are without a test."""
    monkeypatch.setattr(guide, "LONG", request.param)


@pytest.mark.usefixtures("masks")
def test_many_follow_their_grammar_as_each_alone(session: Session) -> None:
    prompts = ["The list", "A", "Numbers are", "def f"]
    settings: dict[str, Any] = {**DRAWN, "seed": 9, "json_schema": SCHEMA}
    together = session.generate_many(prompts, slots=3, **settings)
    assert together == [session.generate(prompt, **settings) for prompt in prompts]
    for each in together:
        jsonschema.validate(json.loads(each.text), SCHEMA)


@pytest.mark.usefixtures("masks")
def test_a_flight_holds_sequences_with_and_without_grammars(session: Session) -> None:
    flight, texts = Flight(session, 4), dict[int, str]()
    asked: list[dict[str, Any]] = [
        {"regex": "[0-9]{30}"},
        {},
        {"json_schema": SCHEMA},
        {"regex": "x"},
        {"grammar": "start: /y{20}/"},
    ]
    numbers = [
        flight.join(session.request("The list", seed=3, **{**DRAWN, "max_new_tokens": 200}, **each)) for each in asked
    ]
    left, steps = numbers[4], 0
    while flight.waiting or flight.riding:
        for number, piece in flight.step():
            assert piece.error is None
            texts[number] = texts.get(number, "") + piece.text
        steps += 1
        if steps == 8 and left in texts:
            flight.leave(left)  # while its mask may be under way
    assert re.fullmatch("[0-9]{30}", texts[numbers[0]])
    assert texts[numbers[1]] == session.generate("The list", seed=3, **{**DRAWN, "max_new_tokens": 200}).text
    jsonschema.validate(json.loads(texts[numbers[2]]), SCHEMA)
    assert texts[numbers[3]] == "x"


def test_settings_that_leave_no_token_are_refused(session: Session) -> None:
    (seven,) = session.text.encode("7", special_tokens=False)
    with pytest.raises(SessionError, match="forbid every token that the grammar allows"):
        session.generate("Hello", regex="7", suppress_tokens=[seven], eos_token_id=[])
    with pytest.raises(SessionError, match="grammar and regex exclude each other"):
        session.generate("Hello", regex="7", grammar='start: "a"')


def test_processors_and_filters_work_within_the_grammar(session: Session) -> None:
    few = {"regex": "[0-9]{12}", "temperature": 2.0, "seed": 4}
    for settings in ({"top_k": 1}, {"top_p": 0.1}, {"min_p": 0.9}, {"typical_p": 0.2}, {"repetition_penalty": 3.0}):
        assert re.fullmatch("[0-9]{12}", session.generate("Hello", top_logprobs=None, **few, **settings).text)
    ids = session.generate("Hello", no_repeat_ngram_size=3, **{**few, "regex": "[a-h]{12}"}).ids
    assert len({tuple(ids[at : at + 3]) for at in range(len(ids) - 2)}) == len(ids) - 2


@pytest.mark.usefixtures("masks")
def test_threads_follow_their_grammars_side_by_side(session: Session) -> None:
    found: dict[int, str] = {}

    def ask(number: int) -> None:
        found[number] = session.generate("Hello", regex=f"[a-z]{{{number + 5}}}", seed=number, **DRAWN).text

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert {number: len(text) for number, text in found.items()} == {0: 5, 1: 6, 2: 7, 3: 8}


def test_the_thread_of_masks_ends_with_its_session(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def threads() -> Iterator[threading.Thread]:
        return (thread for thread in threading.enumerate() if thread.name == "masks")

    monkeypatch.setattr(guide, "LONG", -1.0)
    before = set(threads())
    other = arriero.load(tiny_model, max_seq=40)
    other.generate("Hello", regex="[a-z]{9}")
    (thread,) = set(threads()) - before
    del other
    gc.collect()
    thread.join(10)
    assert not thread.is_alive()
