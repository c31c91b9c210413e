"""The filters against those of `transformers`, by the distribution that is left."""

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from arriero.errors import SessionError
from arriero.runtime.draws import Sampling
from arriero.runtime.sampling import Sampler

SEEN = [3, 3, 7]


def distribution(logits: np.ndarray[Any, Any], sampling: Sampling) -> np.ndarray[Any, Any]:
    """What `transformers` would draw from."""
    steps = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)])
    steps.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        steps.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        steps.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        steps.append(MinPLogitsWarper(sampling.min_p))
    if sampling.typical_p < 1:
        steps.append(TypicalLogitsWarper(sampling.typical_p))
    filtered = steps(torch.tensor([SEEN]), torch.from_numpy(logits)[None].double())
    probabilities: np.ndarray[Any, Any] = filtered.softmax(-1)[0].numpy()
    return probabilities


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.6},
        {"top_k": 5},
        {"top_p": 0.8},
        {"min_p": 0.2},
        {"repetition_penalty": 1.5},
        {"temperature": 1.3, "top_k": 12, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.2},
    ],
    ids=str,
)
def test_the_draws_follow_the_distribution_of_transformers(settings: dict[str, Any]) -> None:
    logits = np.random.default_rng(1).normal(size=24).astype(np.float32) * 2
    sampling = Sampling(**{"temperature": 1.0, **settings, "seed": 0})
    expected = distribution(logits, sampling)
    sampler, count = Sampler(sampling), 20_000
    drawn = Counter(sampler(logits, SEEN) for _ in range(count))
    found = np.array([drawn[token] / count for token in range(24)])
    assert not found[expected == 0].any()
    assert np.abs(found - expected).max() < 0.02


@pytest.mark.parametrize("scale", [0.05, 1.0, 6.0])  # nearly even, and with few likely ones
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.3},
        {"top_p": 0.9},
        {"top_p": 0.999, "temperature": 2.5},
        {"min_p": 0.001},
        {"top_k": 50, "top_p": 0.9, "min_p": 0.01, "temperature": 0.6},
        {"top_p": 0.7, "min_p": 0.3},
        {"top_k": 50},
        {"top_k": 2999, "temperature": 0.8},
        {"top_p": 0.0},
        {"typical_p": 0.3},
        {"typical_p": 0.9, "top_p": 0.95},
        {"typical_p": 0.6, "top_k": 40, "min_p": 0.02, "temperature": 1.4},
    ],
    ids=str,
)
def test_a_draw_of_a_large_vocabulary_is_where_the_likeliest_pass_it(settings: dict[str, Any], scale: float) -> None:
    logits = (np.random.default_rng(2).normal(size=3000) * scale).astype(np.float32)
    sampling = Sampling(**{"temperature": 1.0, **settings, "seed": 5})
    probabilities = distribution(logits, sampling)
    order = np.argsort(-probabilities, kind="stable")
    rng, sampler = np.random.default_rng(5), Sampler(sampling)
    expected = [order[np.searchsorted(np.cumsum(probabilities[order]), rng.random())] for _ in range(100)]
    assert [sampler(logits, []) for _ in range(100)] == expected


def test_the_penalty_follows_a_sequence_as_it_grows() -> None:
    logits = np.random.default_rng(3).normal(size=40).astype(np.float32)
    sampling, ids = Sampling(temperature=1, repetition_penalty=3.0, seed=0), [3, 3, 7]
    sampler, rng = Sampler(sampling), np.random.default_rng(0)
    for _ in range(60):
        steps = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(3.0)])
        scores = steps(torch.tensor([ids]), torch.from_numpy(logits)[None].double())[0]
        probabilities = scores.softmax(-1).numpy()
        order = np.argsort(-probabilities, kind="stable")
        ids.append(int(order[np.searchsorted(np.cumsum(probabilities[order]), rng.random())]))
        assert sampler(logits, ids[:-1]) == ids[-1]


@given(
    st.lists(st.floats(-30, 30, width=32), min_size=1, max_size=40),
    st.integers(0, 50),
    st.floats(0.01, 1),
    st.floats(0, 1),
    st.floats(0.01, 5),
)
def test_some_token_is_always_left(
    logits: list[float], top_k: int, top_p: float, min_p: float, temperature: float
) -> None:
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=0)
    assert 0 <= Sampler(sampling)(np.array(logits, dtype=np.float32), []) < len(logits)


def test_temperature_zero_takes_the_largest_after_the_penalty() -> None:
    logits = np.array([1.0, 2.0, 3.0, 4.0], dtype=np.float32)
    assert Sampler(Sampling())(logits, [3]) == 3
    assert Sampler(Sampling(repetition_penalty=2))(logits, [3]) == 2


def test_a_tiny_temperature_is_nearly_greedy() -> None:
    logits = np.array([1.0, 2.0, 300.0, 4.0], dtype=np.float32)
    assert Sampler(Sampling(temperature=1e-39, seed=0))(logits, []) == 2


def test_a_seed_draws_the_same_tokens_again() -> None:
    logits = np.zeros(1000, dtype=np.float32)
    first, again, other = ([Sampler(Sampling(temperature=1, seed=seed))(logits, [])] for seed in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_p": -0.1}, "top_p is -0.1"),
        ({"min_p": 1.5}, "min_p is 1.5"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_a_setting_out_of_range_is_named(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(SessionError, match=said):
        Sampling(**settings)
