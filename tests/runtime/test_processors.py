"""The changes of the logits against those of `transformers`, number by number."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
)

from arriero.errors import SessionError
from arriero.runtime.draws import Sampling
from arriero.runtime.sampling import Sampler, open_processors

VOCABULARY, PROMPT, ENDS = 12, [3, 7, 3, 1, 7, 3], (1, 2)
SETTINGS: list[dict[str, Any]] = [
    {"repetition_penalty": 1.7},
    {"repetition_penalty": 0.5},
    {"no_repeat_ngram_size": 1},
    {"no_repeat_ngram_size": 2},
    {"no_repeat_ngram_size": 3},
    {"no_repeat_ngram_size": 90},
    {"bad_words_ids": [[5], [1], [7, 3], [3, 7, 3], [4, 4, 4, 4, 4, 4, 4, 4, 4]]},
    {"bad_words_ids": [[1]]},
    {"min_new_tokens": 4},
    {"min_length": 9},
    {"min_length": 5},
    {"suppress_tokens": [0, 5, 11]},
    {"begin_suppress_tokens": [3, 4]},
    {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "bad_words_ids": [[9], [3, 4]], "min_new_tokens": 3}
    | {"suppress_tokens": [6], "begin_suppress_tokens": [8]},
]


def oracle(settings: dict[str, Any]) -> LogitsProcessorList:
    """The processors of `transformers`, in the order of its `generate`."""
    steps = LogitsProcessorList()
    if penalty := settings.get("repetition_penalty"):
        steps.append(RepetitionPenaltyLogitsProcessor(penalty))
    if size := settings.get("no_repeat_ngram_size"):
        steps.append(NoRepeatNGramLogitsProcessor(size))
    if words := settings.get("bad_words_ids"):
        steps.append(NoBadWordsLogitsProcessor(words, list(ENDS)))
    if least := settings.get("min_length"):
        steps.append(MinLengthLogitsProcessor(least, list(ENDS)))
    if least := settings.get("min_new_tokens"):
        steps.append(MinNewTokensLengthLogitsProcessor(len(PROMPT), least, list(ENDS)))
    if tokens := settings.get("suppress_tokens"):
        steps.append(SuppressTokensLogitsProcessor(tokens))
    if tokens := settings.get("begin_suppress_tokens"):
        steps.append(SuppressTokensAtBeginLogitsProcessor(tokens, len(PROMPT)))
    return steps


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_logits_change_as_in_transformers(settings: dict[str, Any]) -> None:
    rng = np.random.default_rng(4)
    steps = oracle(settings)
    for seed in range(3):
        ids = list(PROMPT)
        processors = open_processors(Sampling(**settings), ENDS, len(PROMPT))
        for _ in range(30):
            logits_V = (rng.normal(size=VOCABULARY) * 3).astype(np.float32)
            expected_V = steps(torch.tensor([ids]), torch.from_numpy(logits_V.copy())[None])[0].numpy()
            for process in processors:
                process(logits_V, ids)
            assert np.array_equal(logits_V, expected_V), (seed, ids)
            ids.append(int(rng.integers(VOCABULARY)))


def test_frequency_and_presence_penalties_count_new_tokens_alone() -> None:
    sampling = Sampling(frequency_penalty=0.5, presence_penalty=1.25)
    (process,) = open_processors(sampling, ENDS, len(PROMPT))
    ids: list[int] = list(PROMPT)
    for token in (4, 4, 9):
        logits_V = np.zeros(VOCABULARY, np.float32)
        process(logits_V, ids)
        counts = [ids[len(PROMPT) :].count(each) for each in range(VOCABULARY)]
        assert logits_V.tolist() == [-0.5 * count - 1.25 * (count > 0) for count in counts]
        ids.append(token)


def test_a_bias_moves_the_choice() -> None:
    logits_V = np.arange(VOCABULARY, dtype=np.float32)
    assert Sampler(Sampling(logit_bias={2: 100, 11: -100}))(logits_V, PROMPT) == 2
    assert Sampler(Sampling(logit_bias={"11": -100}))(logits_V, PROMPT) == 10  # type: ignore[dict-item]
    assert logits_V[11] == 11  # the model's own are left alone


def test_settings_that_forbid_every_token_say_so() -> None:
    for temperature in (0.0, 1.0):
        sampler = Sampler(Sampling(suppress_tokens=list(range(VOCABULARY)), temperature=temperature))
        with pytest.raises(SessionError, match="the settings forbid every token"):
            sampler(np.zeros(VOCABULARY, np.float32), PROMPT)


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    "settings", [{}, {"top_k": 5, "temperature": 1.0}, {"top_p": 0.5, "temperature": 1.0}], ids=str
)
def test_logits_that_are_not_finite_are_refused(odd: float, settings: dict[str, Any]) -> None:
    logits_V = np.zeros(VOCABULARY, np.float32)
    logits_V[4] = odd
    with pytest.raises(SessionError, match="1 of the model's 12 logits are no finite numbers"):
        Sampler(Sampling(**settings))(logits_V, PROMPT)


def test_large_logits_are_finite() -> None:
    logits_V = np.full(VOCABULARY, 3e38, np.float32)  # their sum is not
    assert Sampler(Sampling())(logits_V, PROMPT) == 0


def ngrams(ids: Sequence[int], size: int) -> list[tuple[int, ...]]:
    return [tuple(ids[start : start + size]) for start in range(len(ids) - size + 1)]


def test_no_ngram_comes_twice() -> None:
    sampler, ids = Sampler(Sampling(no_repeat_ngram_size=2)), [0]
    for _ in range(60):
        ids.append(sampler(np.zeros(3 * VOCABULARY, np.float32), ids))
    assert len(set(ngrams(ids, 2))) == len(ngrams(ids, 2))
