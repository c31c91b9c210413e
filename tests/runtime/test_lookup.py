"""Guessed tokens change nothing but the time."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import arriero
from arriero.errors import SessionError
from arriero.export import export_checkpoint
from arriero.runtime import Session
from arriero.runtime.lookup import Lookup

PROSE = (
    "The list type has a method that returns the number of items in the list. The list type has a method that removes "
    "an item from the list, and a method that returns the number of items. The method returns a list. "
)


@pytest.fixture(scope="module")
def session(tiny_model: Path) -> Session:
    return arriero.load(tiny_model, max_seq=500)


@pytest.mark.parametrize("drafts", [1, 4, 10])
@pytest.mark.parametrize("repeats", [1, 2, 4])
def test_greedy_text_is_the_same_with_guesses(session: Session, drafts: int, repeats: int) -> None:
    settings: dict[str, Any] = {"max_new_tokens": 150, "temperature": 0, "eos_token_id": []}
    plain = session.generate(PROSE * repeats, **settings)  # over one and two boundaries of chunks
    found = session.generate(PROSE * repeats, prompt_lookup_num_tokens=drafts, **settings)
    assert found == plain
    assert plain.drafted == 0
    assert 0 < found.accepted <= found.drafted


def test_drawn_text_is_the_same_with_guesses(session: Session) -> None:
    settings: dict[str, Any] = {
        "max_new_tokens": 150,
        "temperature": 0.5,
        "repetition_penalty": 1.02,
        "top_k": 0,
        "seed": 4,
    }
    settings["eos_token_id"] = []
    plain = session.generate(PROSE * 2, **settings)
    found = session.generate(PROSE * 2, prompt_lookup_num_tokens=5, **settings)
    assert found == plain
    assert 0 < found.accepted < found.drafted


def test_ends_among_guesses_end_it_there(session: Session) -> None:
    settings: dict[str, Any] = {"max_new_tokens": 60, "temperature": 0, "eos_token_id": []}
    free = session.generate(PROSE * 2, **settings)
    for change in ({"max_new_tokens": 17}, {"eos_token_id": free.ids[30]}, {"stop_strings": free.text[40:47]}):
        ended: dict[str, Any] = {**settings, **change}
        assert session.generate(PROSE * 2, prompt_lookup_num_tokens=8, **ended) == session.generate(PROSE * 2, **ended)


def test_guesses_in_short_chunks_are_the_greedy_search_of_transformers(
    make_llama4: Callable[..., Any], tmp_path: Path
) -> None:
    reference = make_llama4(seed=1, vocab_size=24, attention_chunk_size=4)  # few tokens: it soon repeats itself
    reference.save_pretrained(tmp_path / "checkpoint")
    session = arriero.load(export_checkpoint(tmp_path / "checkpoint", tmp_path / "model"))
    prompt = np.random.default_rng(0).integers(3, 24, 13).tolist()
    settings: dict[str, Any] = {"max_new_tokens": 150, "do_sample": False, "eos_token_id": None, "pad_token_id": 2}
    whole = reference.generate(torch.tensor([prompt]), **settings)
    found = session.generate(prompt, 150, prompt_lookup_num_tokens=6, temperature=0, eos_token_id=[])
    assert found.ids == whole[0, len(prompt) :].tolist()
    assert found.accepted > 50


def test_what_was_guessed_wrongly_is_not_kept_for_later_prompts(tiny_model: Path, session: Session) -> None:
    keeping = arriero.load(tiny_model, max_seq=500, prefix_bytes=1 << 26)
    settings: dict[str, Any] = {"max_new_tokens": 120, "temperature": 0, "eos_token_id": []}
    ids = session.text.encode(PROSE * 2)
    answered = keeping.generate(ids, prompt_lookup_num_tokens=10, **settings)
    turn = [*ids, *answered.ids, 50]
    found = keeping.generate(turn, prompt_lookup_num_tokens=10, **settings)
    assert found == session.generate(turn, **settings)
    assert found.reused == (len(turn) - 2) // 32 * 32


def test_a_draft_is_what_followed_the_last_time() -> None:
    lookup = Lookup(4)
    assert lookup.draft([1, 2, 3, 9, 1, 2, 3, 7, 8, 1, 2], 4) == []
    assert lookup.draft([1, 2, 3, 9, 1, 2, 3, 7, 8, 1, 2, 3], 4) == [7, 8]
    assert lookup.draft([1, 2, 3, 9, 1, 2, 3, 7, 8, 1, 2, 3, 9], 4) == [1, 2]
    assert lookup.draft([1, 2, 3, 9, 1, 2, 3, 7, 8, 1, 2, 3, 9, 4], 4) == []
    assert Lookup(4).draft([1, 2, 3, 1, 2, 3], 1) == [1]
    assert Lookup(0).draft([1, 2, 3, 1, 2, 3], 4) == []
    assert Lookup(4).draft([1, 2, 3, 4, 5, 6, 3, 4, 5, 9, 1, 2, 3, 4, 5], 4) == [6, 3]  # five are worth more than three


def test_drafts_are_as_long_as_they_are_right() -> None:
    lookup = Lookup(6)
    lengths = []
    for drafted, accepted in ((2, 2), (4, 4), (6, 3), (4, 0), (1, 1)):
        lookup.judge(drafted, accepted)
        lengths.append(lookup.length)
    assert lengths == [4, 6, 4, 1, 2]


def test_drafts_of_less_than_no_tokens_are_refused(session: Session) -> None:
    with pytest.raises(SessionError, match="prompt_lookup_num_tokens is -1, expected a whole number from 0 up"):
        session.stream("The", prompt_lookup_num_tokens=-1)
