"""Greedy texts of the tiny Llama 4 under many settings, token by token those of `transformers`' `generate`."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import arriero
from arriero.runtime import Session

PROMPT = "The list type is a list. The list type"
SETTINGS: list[dict[str, Any]] = [
    {"max_new_tokens": 24},
    {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    {"no_repeat_ngram_size": 1, "max_length": 40},
    {"min_new_tokens": 20, "eos_token_id": list(range(300, 900))},
    {"min_length": 25, "eos_token_id": list(range(200, 1200))},
    {"suppress_tokens": list(range(290, 700)), "begin_suppress_tokens": list(range(700, 1500))},
    {
        "bad_words_ids": [[token] for token in range(260, 400)]
        + [[a, b] for a in range(400, 480) for b in range(400, 480)]
    },
    {"stop_strings": ["e", "list"]},
    {"max_length": 60, "max_new_tokens": 7},
]


@pytest.fixture(scope="module")
def both(tiny: Path, tiny_model: Path) -> tuple[Session, Any, Any]:
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    return arriero.load(tiny_model, max_seq=200), model, AutoTokenizer.from_pretrained(tiny)


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: ",".join(settings))
def test_greedy_tokens_are_those_of_generate(both: tuple[Session, Any, Any], settings: dict[str, Any]) -> None:
    session, model, tokenizer = both
    ids = tokenizer(PROMPT).input_ids
    settings = {**({} if {"max_new_tokens", "max_length"} & settings.keys() else {"max_new_tokens": 24}), **settings}
    expected = model.generate(torch.tensor([ids]), do_sample=False, tokenizer=tokenizer, **settings)[0, len(ids) :]
    assert session.generate(ids, do_sample=False, **settings).ids == expected.tolist()
