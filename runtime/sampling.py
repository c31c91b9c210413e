"""From logits to the next token: greedy, or drawn after the filters that `transformers` knows, in its order.

Repetition penalty, then temperature, top-k, top-p, min-p. The same seed draws the same tokens.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..errors import SessionError


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """The settings by which tokens are chosen.

    Attributes:
        temperature: Divides the logits; 0 takes the largest.
        top_k: Keeps this number of the largest; 0 keeps all.
        top_p: Keeps the fewest whose probabilities reach this (Holtzman et al. 2020); 1 keeps all.
        min_p: Keeps those with at least this share of the largest probability (Nguyen et al. 2024); 0 keeps all.
        repetition_penalty: Divides the positive logits of tokens that occurred, multiplies the negative ones
            (Keskar et al. 2019); 1 is none.
        seed: The seed of the random draws; None is another one each time.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, valid, expected in (
            ("temperature", 0 <= self.temperature < float("inf"), "a number from 0 up"),
            ("top_k", self.top_k >= 0, "a whole number from 0 up"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "between 0 and 1"),
            ("seed", self.seed is None or self.seed >= 0, "a whole number from 0 up"),
            ("repetition_penalty", self.repetition_penalty > 0, "a number above 0"),
        ):
            if not valid:
                raise SessionError(f"{name} is {getattr(self, name)}, expected {expected}")


class Sampler:
    """Draws the tokens of one sequence, one after another."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self.rng = np.random.default_rng(sampling.seed)
        self.occurred_V: NDArray[np.bool_] | None = None
        self.counted = 0

    def __call__(self, logits_V: NDArray[np.float32], seen: Sequence[int]) -> int:
        """Chooses the next token.

        Args:
            logits_V: The model's logits.
            seen: The ids of the prompt and of the tokens since, for the repetition penalty: the same sequence every
                time, with more at its end.
        """
        sampling = self.sampling
        if sampling.repetition_penalty != 1:
            logits_V = penalise(logits_V, self._occurred(seen, len(logits_V)), sampling.repetition_penalty)
        if sampling.temperature == 0:
            return int(logits_V.argmax())
        draw = self.rng.random()
        below_V = logits_V - logits_V.max()
        tokens, total = candidates(below_V, sampling, draw)
        tokens = tokens[np.argsort(-below_V[tokens], kind="stable")]
        weights = np.exp(below_V[tokens].astype(np.float64) / sampling.temperature)
        cumulative = np.cumsum(weights)
        count = len(tokens)
        if total is None:
            total = cumulative[-1]
        if sampling.top_p < 1:
            count = min(count, int(np.searchsorted(cumulative, sampling.top_p * total)) + 1)
        if sampling.min_p > 0:
            count = min(count, int(np.count_nonzero(weights >= sampling.min_p * weights[0])))
        if sampling.top_p < 1 or sampling.min_p > 0:
            total = cumulative[count - 1]
        drawn = np.searchsorted(cumulative[:count], draw * total, side="right")
        last = np.searchsorted(cumulative[:count], cumulative[count - 1])  # later tokens weigh nothing
        return int(tokens[min(drawn, last)])

    def _occurred(self, seen: Sequence[int], vocabulary: int) -> NDArray[np.int64]:
        """The tokens that occurred, each once; only the new ones since the last call are looked at."""
        if self.occurred_V is None:
            self.occurred_V = np.zeros(vocabulary, dtype=np.bool_)
        self.occurred_V[np.asarray(seen[self.counted :], dtype=np.int64)] = True
        self.counted = len(seen)
        return np.flatnonzero(self.occurred_V)


def penalise(logits_V: NDArray[np.float32], tokens: NDArray[np.int64], penalty: float) -> NDArray[np.float32]:
    """Makes tokens that occurred less likely."""
    logits_V = logits_V.copy()
    scores = logits_V[tokens]
    logits_V[tokens] = np.where(scores < 0, scores * penalty, scores / penalty)
    return logits_V


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
        return np.flatnonzero(below_V >= np.partition(below_V, -sampling.top_k)[-sampling.top_k]), None
    with np.errstate(over="ignore", under="ignore"):
        weights_V = np.exp(below_V / np.float32(max(sampling.temperature, 1e-30)))
    total = float(weights_V.sum())
    if sampling.min_p > 0:
        share, depths = 0.0, [-math.log(sampling.min_p) + 1e-3]
    else:
        share, depths = sampling.top_p if sampling.top_p < 1 else draw, [2.0**power for power in range(1, 7)]
    for depth in depths:
        tokens = np.flatnonzero(below_V >= -depth * sampling.temperature)
        if float(weights_V[tokens].sum()) > share * total:
            return tokens, total
    return np.arange(len(below_V)), total
