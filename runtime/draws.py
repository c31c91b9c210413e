"""The choice of one token by its logits: the settings, the filters, and the token that a draw falls on.

Enters: logits less the largest of them, and a number from 0 to 1. Leaves: the token. Invariant: those that are left out
early are never the ones that the filters and the draw would have come to.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import checks
from .processors import FORBIDDEN


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """The settings by which tokens are chosen.

    Attributes:
        temperature: Divides the logits; 0 takes the largest.
        top_k: Keeps this number of the largest; 0 keeps all.
        top_p: Keeps the fewest whose probabilities reach this (Holtzman et al. 2020); 1 keeps all.
        min_p: Keeps those with at least this share of the largest probability (Nguyen et al. 2024); 0 keeps all.
        typical_p: Keeps the fewest whose information is nearest to the expected, and whose probabilities reach this
            (Meister et al. 2022); 1 keeps all.
        repetition_penalty: Divides the positive logits of tokens that occurred, multiplies the negative ones
            (Keskar et al. 2019); 1 is none.
        frequency_penalty: Subtracted from a new token's logit for each time that it occurred; as the next two, in
            OpenAI's meaning.
        presence_penalty: Subtracted once from the logit of a new token that occurred.
        logit_bias: Numbers from -100 to 100 that are added to logits, by token id.
        no_repeat_ngram_size: Forbids n-grams of this size to come twice; 0 forbids none.
        bad_words_ids: Sequences of tokens that are forbidden.
        min_new_tokens: New tokens before which no token ends the sequence.
        min_length: The same with the prompt's tokens; counts only without `min_new_tokens`.
        suppress_tokens: Tokens that are forbidden.
        begin_suppress_tokens: Tokens that are forbidden as the first new one.
        seed: The seed of the random draws; None is another one each time.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    no_repeat_ngram_size: int = 0
    bad_words_ids: Sequence[Sequence[int]] = ()
    min_new_tokens: int = 0
    min_length: int = 0
    suppress_tokens: Sequence[int] = ()
    begin_suppress_tokens: Sequence[int] = ()
    seed: int | None = None

    def __post_init__(self) -> None:
        def take(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        for name in ("top_k", "no_repeat_ngram_size", "min_new_tokens", "min_length"):
            take(name, checks.whole(name, getattr(self, name)))
        for name, expected, least, most in NUMBERS:
            take(name, checks.number(name, getattr(self, name), expected, least, most))
        for name in ("suppress_tokens", "begin_suppress_tokens"):
            take(name, checks.token_ids(name, getattr(self, name)))
        take("logit_bias", checks.biases("logit_bias", self.logit_bias))
        take("bad_words_ids", checks.token_lists("bad_words_ids", self.bad_words_ids))
        if self.seed is not None:
            take("seed", checks.whole("seed", self.seed))

    def check_vocabulary(self, vocabulary: int) -> None:
        """Raises a `SessionError` where a setting names a token that the vocabulary does not have."""
        for name in ("suppress_tokens", "begin_suppress_tokens"):
            checks.token_ids(name, getattr(self, name), vocabulary)
        checks.token_lists("bad_words_ids", self.bad_words_ids, vocabulary)
        checks.biases("logit_bias", self.logit_bias, vocabulary)


LEAST = math.ulp(0.0)
NUMBERS = (
    ("temperature", "a number from 0 up", 0.0, math.inf),
    ("top_p", "a number from 0 to 1", 0.0, 1.0),
    ("min_p", "a number from 0 to 1", 0.0, 1.0),
    ("typical_p", "a number above 0 and at most 1", LEAST, 1.0),
    ("repetition_penalty", "a number above 0", LEAST, math.inf),
    ("frequency_penalty", "a number from -2 to 2", -2.0, 2.0),
    ("presence_penalty", "a number from -2 to 2", -2.0, 2.0),
)
"""Settings that are fractions: what is expected of them, the least and the most."""


def chosen(below_N: NDArray[np.float32], sampling: Sampling, draw: float, total: float | None) -> int:
    """The place of the token that a draw chooses.

    Args:
        below_N: Logits less the largest of all, in descending order.
        sampling: The settings by which tokens are chosen.
        draw: A number from 0 to 1.
        total: The weight of all tokens where that of the likeliest is 1; None where only these count.
    """
    weights = np.exp(below_N.astype(np.float64) / sampling.temperature)
    cumulative = np.cumsum(weights)
    places, count = np.arange(len(below_N)), len(below_N)
    if total is None:
        total = cumulative[-1]
    if sampling.top_p < 1:
        count = min(count, int(np.searchsorted(cumulative, sampling.top_p * total)) + 1)
    if sampling.min_p > 0:
        count = min(count, int(np.count_nonzero(weights >= sampling.min_p * weights[0])))
    if sampling.typical_p < 1:
        kept = typical(weights[:count], sampling.typical_p)
        places, cumulative, count = places[kept], np.cumsum(weights[kept]), len(kept)
    if sampling.top_p < 1 or sampling.min_p > 0 or sampling.typical_p < 1:
        total = cumulative[count - 1]
    drawn = np.searchsorted(cumulative[:count], draw * total, side="right")
    last = np.searchsorted(cumulative[:count], cumulative[count - 1])  # later tokens weigh nothing
    return int(places[min(drawn, last)])


def typical(weights: NDArray[np.float64], mass: float) -> NDArray[np.int64]:
    """The places of the tokens whose information is nearest to the expected.

    Args:
        weights: Tokens' probabilities, but for a factor.
        mass: Sum of the probabilities that the tokens are to reach.
    """
    probabilities = weights / weights.sum()
    with np.errstate(divide="ignore", invalid="ignore"):
        information = -np.log(probabilities)
        expected = np.nansum(information * probabilities)
    distances = np.abs(information - expected)
    order = np.argsort(distances, kind="stable")
    last = min(int(np.searchsorted(np.cumsum(probabilities[order]), mass)), len(order) - 1)
    return np.flatnonzero(distances <= distances[order[last]])


def candidates(below_V: NDArray[np.float32], sampling: Sampling, draw: float) -> tuple[NDArray[np.int64], float | None]:
    """The tokens among which the draw and the filters can end; a whole vocabulary takes long to sort.

    Args:
        below_V: The logits less the largest of them.
        sampling: The settings by which tokens are chosen.
        draw: A share of all probability, 0 to 1: the token where the likeliest ones together pass it is the one drawn.

    Returns:
        Tokens, in no order, none of them less likely than one left out, and the weight of all tokens where that of the
        likeliest is 1; None where only these count.
    """
    if 0 < sampling.top_k < len(below_V):
        return largest(below_V, sampling.top_k), None
    with np.errstate(over="ignore", under="ignore"):
        weights_V = np.exp(below_V / np.float32(max(sampling.temperature, 1e-30)))
    total = float(weights_V.sum())
    if sampling.typical_p < 1 and sampling.top_p == 1 and sampling.min_p == 0:
        return np.arange(len(below_V)), total
    if sampling.min_p > 0:
        share, depths = 0.0, [-math.log(sampling.min_p) + 1e-3]
    else:
        share, depths = sampling.top_p if sampling.top_p < 1 else draw, [2.0**power for power in range(1, 7)]
    for depth in depths:
        tokens = np.flatnonzero(below_V >= -depth * sampling.temperature)
        if float(weights_V[tokens].sum()) > share * total:
            return tokens, total
    return np.arange(len(below_V)), total


def largest(below_V: NDArray[np.float32], count: int) -> NDArray[np.int64]:
    """The places of the largest logits, `count` of them and those equal to the last, in no order; none of -∞.

    Args:
        below_V: The logits less the largest of them.
        count: A number from 1 to that of the logits.
    """
    for depth in (4.0, 8.0, 16.0, 32.0):  # a comparison costs far less than a partition of them all
        near = np.flatnonzero(below_V >= -depth)
        if len(near) >= count:
            values = below_V[near]
            return near[values >= np.partition(values, -count)[-count]]
    allowed = np.flatnonzero(below_V > FORBIDDEN)
    if len(allowed) <= count:
        return allowed
    values = below_V[allowed]
    return allowed[values >= np.partition(values, -count)[-count]]
