"""From logits to the next token: greedy, or drawn after the filters that `transformers` knows, in its order.

Repetition penalty, then temperature, top-k, top-p, min-p. The same seed draws the same tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import SessionError


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        temperature: Divides the logits; 0 takes the largest.
        top_k: Keeps so many of the largest; 0 keeps all.
        top_p: Keeps the fewest whose probabilities reach this (Holtzman et al. 2020); 1 keeps all.
        min_p: Keeps those with at least this share of the largest probability (Nguyen et al. 2024); 0 keeps all.
        repetition_penalty: Divides the positive logits of tokens that occurred, multiplies the negative ones
            (Keskar et al. 2019); 1 is none.
        seed: Of the random draws; None is another one each time.
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
    """Draws tokens one after another."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self.rng = np.random.default_rng(sampling.seed)

    def __call__(self, logits_V: NDArray[np.float32], seen: Sequence[int]) -> int:
        """Chooses the next token.

        Args:
            logits_V: The model's logits.
            seen: The ids of the prompt and of what came since, for the repetition penalty.
        """
        sampling = self.sampling
        if sampling.repetition_penalty != 1 and len(seen):
            logits_V = penalise(logits_V, seen, sampling.repetition_penalty)
        if sampling.temperature == 0:
            return int(logits_V.argmax())
        scores_V = (logits_V - logits_V.max()).astype(np.float64) / sampling.temperature
        tokens, scores = keep_largest(scores_V, sampling.top_k)
        probabilities = softmax(scores)
        if sampling.top_p < 1:
            before = np.cumsum(probabilities) - probabilities
            probabilities = np.where(before < sampling.top_p, probabilities, 0)
            probabilities /= probabilities.sum()
        if sampling.min_p > 0:
            probabilities = np.where(probabilities >= sampling.min_p * probabilities[0], probabilities, 0)
        cumulative = np.cumsum(probabilities)
        drawn = np.searchsorted(cumulative, self.rng.random() * cumulative[-1], side="right")
        return int(tokens[min(drawn, np.flatnonzero(probabilities)[-1])])


def penalise(logits_V: NDArray[np.float32], seen: Sequence[int], penalty: float) -> NDArray[np.float32]:
    """Makes tokens that occurred less likely."""
    tokens = np.unique(np.asarray(seen))
    logits_V = logits_V.copy()
    scores = logits_V[tokens]
    logits_V[tokens] = np.where(scores < 0, scores * penalty, scores / penalty)
    return logits_V


def keep_largest(scores_V: NDArray[np.float64], count: int) -> tuple[NDArray[Any], NDArray[np.float64]]:
    """The `count` largest scores (0 is all; ties of the last are kept) and their tokens, largest first."""
    if 0 < count < len(scores_V):
        tokens = np.flatnonzero(scores_V >= np.partition(scores_V, -count)[-count])
    else:
        tokens = np.arange(len(scores_V))
    order = np.argsort(-scores_V[tokens], kind="stable")
    return tokens[order], scores_V[tokens[order]]


def softmax(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """Probabilities of scores that are sorted, largest first."""
    weights = np.exp(scores - scores[0])
    probabilities: NDArray[np.float64] = weights / weights.sum()
    return probabilities
