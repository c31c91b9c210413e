"""Tokens drawn from a shortlist are those of the whole row, over every setting; in doubt the row is fetched."""

import threading
from itertools import product
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from arriero.errors import SessionError
from arriero.runtime.draws import Sampling
from arriero.runtime.sampling import Sampler
from arriero.runtime.shortlist import Shortlist, whole


def shortened(logits_V: NDArray[np.float32], temperature: float, fetched: list[int], error: float = 0.0) -> Shortlist:
    """A row's shortlist, its sum of weights off by a share of it."""
    order = np.argsort(-logits_V, kind="stable")[:64]
    weights = np.exp((logits_V.astype(np.float64) - logits_V.max()) / temperature)

    def fetch() -> NDArray[np.float32]:
        fetched.append(1)
        return logits_V

    return Shortlist(
        tokens=order.astype(np.int32),
        logits=logits_V[order],
        total=float(weights.sum() * (1 + error)),
        sharpness=float(np.float32(1 / temperature)),
        odd=int(np.count_nonzero(~np.isfinite(logits_V))),
        vocabulary=len(logits_V),
        fetch=fetch,
        expect=lambda sharpness: None,
        lock=threading.RLock(),
    )


SETTINGS: list[dict[str, Any]] = [
    {"top_k": top_k, "top_p": top_p, "min_p": min_p, "typical_p": typical_p}
    for top_k, top_p, min_p, typical_p in product((0, 1, 5, 50, 64, 200), (1.0, 0.9, 0.3), (0.0, 0.05), (1.0, 0.6))
]


@pytest.mark.parametrize("spread", [0.5, 3.0, 12.0])
@pytest.mark.parametrize("size", [40, 64, 3000])
def test_every_setting_draws_the_whole_rows_token(size: int, spread: float) -> None:
    rng = np.random.default_rng(int(size + spread))
    enough = 0
    for number, (settings, temperature) in enumerate(product(SETTINGS, (0.0, 0.6, 1.7))):
        logits_V = (rng.standard_normal(size) * spread).astype(np.float32)
        if number % 3 == 0:
            logits_V = np.round(logits_V)  # many are equal
        sampling = Sampling(temperature=temperature, seed=number, **settings)
        fetched: list[int] = []
        row = shortened(logits_V, temperature or 1.0, fetched, error=rng.uniform(-5e-5, 5e-5))
        sampler, other = Sampler(sampling), Sampler(sampling)
        found = [sampler(row, [1]), sampler(row, [1])]
        assert found == [other(logits_V, [1]), other(logits_V, [1])], settings
        enough += not fetched
    assert enough > (150 if spread > 1 else 60)  # of 216


@pytest.mark.parametrize(
    "settings",
    [{"repetition_penalty": 1.2}, {"logit_bias": {7: 5.0}}, {"suppress_tokens": [3]}, {"temperature": 900.0}],
)
def test_what_changes_logits_takes_the_row(settings: dict[str, Any]) -> None:
    logits_V = np.random.default_rng(0).standard_normal(500).astype(np.float32)
    fetched: list[int] = []
    sampling = Sampling(**{"temperature": 0.8, "seed": 4, **settings})
    assert Sampler(sampling)(shortened(logits_V, 0.8, fetched), [7, 9]) == Sampler(sampling)(logits_V, [7, 9])
    assert fetched


def test_another_temperature_is_asked_for_next_time() -> None:
    logits_V = np.random.default_rng(0).standard_normal(500).astype(np.float32) * 9
    wanted: list[float] = []
    row = shortened(logits_V, 1.0, [])
    row.expect = wanted.append
    sampling = Sampling(temperature=0.5, seed=1)
    assert Sampler(sampling)(row, []) == Sampler(sampling)(logits_V, [])
    assert wanted == [2.0]


def test_a_row_that_is_not_finite_is_refused_as_ever() -> None:
    logits_V = np.random.default_rng(0).standard_normal(500).astype(np.float32)
    logits_V[400] = np.nan
    with pytest.raises(SessionError, match="1 of the model's 500 logits are no finite numbers"):
        Sampler(Sampling())(shortened(logits_V, 1.0, []), [])
    assert whole(logits_V) is logits_V
