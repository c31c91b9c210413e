"""The metrics against formulas in numpy float64, and the intervals and limits on cases whose answer is known."""

import numpy as np
import pytest

from arriero.accuracy.gates import judge, overall
from arriero.accuracy.metrics import FEWEST_WINDOWS, Estimate, divergence_of, estimate
from arriero.accuracy.probabilities import likeliest_of, log_sum, rest_of
from arriero.accuracy.recorded import Golden
from arriero.spec.geometry import LayerSpec, ModelSpec

RNG = np.random.default_rng(0)


def golden_of(logits_SV: np.ndarray, top: int) -> Golden:
    spec = ModelSpec(
        vocab_size=logits_SV.shape[1], hidden_size=2, layers=(LayerSpec(rope=True, chunk=0, experts=False),), heads=1,
        kv_heads=1, head_dim=2, experts=1, experts_per_token=1, expert_size=1, dense_size=1, norm_eps=1e-5,
        qk_norm=False, rope_theta=1e4, max_positions=64, temperature_scale=0.0, temperature_floor=1.0, dtype="float32",
    )  # fmt: skip
    logits = logits_SV.astype(np.float32)
    total = log_sum(logits)
    ids, values = likeliest_of(logits, top)
    return Golden(
        source="", spec=spec, tokenizer="", format="none", ids_WS=np.zeros((1, len(logits) + 1), np.int32),
        top_ids_WNK=ids[None].astype(np.int32), top_logs_WNK=(values - total)[None],
        rest_logs_WN=(rest_of(logits, ids) - total[:, 0])[None], experts_LWSK=None, continued_PC=None,
        next_logs_WN=np.zeros((1, len(logits)), np.float32),
    )  # fmt: skip


def bucketed_divergence(p_logits: np.ndarray, q_logits: np.ndarray, top: int) -> np.ndarray:
    """Over the likeliest tokens of the first and one bucket of all others, in float64."""
    p, q = (np.exp(x - x.max(-1, keepdims=True)) for x in (p_logits, q_logits))
    p, q = (x / x.sum(-1, keepdims=True) for x in (p, q))
    order = np.argsort(-p, axis=-1)[:, :top]
    p_top, q_top = (np.take_along_axis(x, order, -1) for x in (p, q))
    p_all, q_all = (np.concatenate([x, 1 - x.sum(-1, keepdims=True)], axis=-1) for x in (p_top, q_top))
    terms = np.where(p_all > 1e-15, p_all * (np.log(np.maximum(p_all, 1e-300)) - np.log(q_all)), 0.0)
    return terms.sum(-1)


@pytest.mark.parametrize("top", [1, 5, 20])
def test_divergence_is_over_the_likeliest_tokens_and_one_bucket(top: int) -> None:
    p, q = RNG.normal(size=(7, 20)) * 2, RNG.normal(size=(7, 20)) * 2
    golden = golden_of(p, top)
    logits = q.astype(np.float32)
    found = divergence_of(golden, 0, slice(0, 7), logits, log_sum(logits))
    if top == 20:  # nothing is left for the bucket
        p_all, q_all = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (p, q))
        expected = (np.exp(p_all) * (p_all - q_all)).sum(-1)
    else:
        expected = bucketed_divergence(p, q, top)
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=1e-6)


def test_an_interval_holds_the_mean_it_was_drawn_around() -> None:
    """Of 95 % intervals over samples of a known mean, about so many hold it."""
    held = 0
    for seed in range(200):
        found = estimate(np.random.default_rng(seed).normal(3.0, 1.0, 40))
        held += found.low <= 3.0 <= found.high
    assert 180 <= held <= 199


def test_the_interval_of_a_ratio_is_that_of_its_logarithm() -> None:
    values = RNG.normal(0.1, 0.02, 30)
    plain, ratio = estimate(values), estimate(values, np.exp)
    assert ratio.value == pytest.approx(np.exp(plain.value))
    assert (ratio.low, ratio.high) == (pytest.approx(np.exp(plain.low)), pytest.approx(np.exp(plain.high)))


def test_few_windows_have_no_interval() -> None:
    found = estimate(np.zeros(FEWEST_WINDOWS - 1))
    assert (found.low, found.high) == (-np.inf, np.inf)
    assert overall(judge({"kl": found}, {"kl": 1.0})) == "undecided"


@pytest.mark.parametrize(
    ("low", "high", "outcome"), [(0.1, 0.2, "pass"), (0.25, 0.35, "undecided"), (0.31, 0.4, "regressed")]
)
def test_a_limit_is_held_against_the_whole_interval(low: float, high: float, outcome: str) -> None:
    most = judge({"kl": Estimate(value=(low + high) / 2, low=low, high=high)}, {"kl": 0.3})
    least = judge({"top1": Estimate(value=1 - (low + high) / 2, low=1 - high, high=1 - low)}, {"top1": 0.7})
    assert overall(most) == overall(least) == outcome


def test_a_broken_limit_goes_before_an_open_one() -> None:
    found = {"kl": Estimate(value=1, low=0.9, high=1.1), "top1": Estimate(value=0.9, low=0.8, high=1.0)}
    assert overall(judge(found, {"kl": 0.5, "top1": 0.9})) == "regressed"
    assert overall(judge(found, {"kl": 2.0, "top1": 0.9})) == "undecided"
    assert overall(judge(found, {"kl": 2.0, "top1": 0.7})) == "pass"


def test_a_metric_that_cannot_be_told_leaves_its_limit_open() -> None:
    assert overall(judge({}, {"greedy": 10.0})) == "undecided"
