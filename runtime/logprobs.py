"""Log-probabilities of a chosen token and of the likeliest, in the model's own distribution.

Enters: logits as the model has computed them, before any setting changes them. Leaves: natural logarithms of
probabilities, in OpenAI's meaning.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .draws import largest


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """A new token's log-probability, and those of the likeliest tokens in its place.

    Attributes:
        token: The chosen token's id.
        logprob: The natural logarithm of its probability.
        top: The likeliest tokens and theirs, the likeliest first; of equals the one of the lower id.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


def read_logprobs(logits_V: NDArray[np.float32], token: int, top: int) -> TokenLogprobs:
    """Computes a token's log-probability, and those of the `top` likeliest."""
    below_V = logits_V - logits_V.max()
    total = float(np.log(np.exp(below_V).sum(dtype=np.float64)))
    tokens = largest(below_V, min(top, len(below_V))) if top else np.empty(0, np.int64)
    tokens = tokens[np.argsort(-below_V[tokens], kind="stable")][:top]
    likeliest = tuple((int(each), float(below_V[each]) - total) for each in tokens)
    return TokenLogprobs(token, float(below_V[token]) - total, likeliest)
