"""The text that a calibration takes where nobody says how much.

Enters: a model's geometry. Leaves: a number of windows. A small model affords much text; of a large one's time most
would go into walking it, though it needs no more. So it is walked for about an hour, but never over fewer tokens than
its statistics want.
"""

import math

from ..spec.geometry import ModelSpec
from ..spec.parameters import count_parameters

MOST_WINDOWS = 128
"""Windows at most."""

FEWEST_TOKENS = 16_384
"""Tokens at least, where there are as many."""

TOKENS_AN_EXPERT = 256
"""Tokens at least that an expert sees if all see as many: eight times `FLOOR`, since they do not."""

OPERATIONS = 3e14
"""Operations of the walk that are spent without being asked for: an hour of two cores of 40 GFLOP/s each."""

FLOOR = 32
"""Tokens that an expert must have seen, where nobody says otherwise."""


def default_windows(spec: ModelSpec, window: int) -> int:
    """Windows of this length that a calibration takes where nobody says how many."""
    share = max((spec.experts / spec.experts_per_token for layer in spec.layers if layer.experts), default=1)
    tokens = max(OPERATIONS / walk_operations(spec), FEWEST_TOKENS, TOKENS_AN_EXPERT * share)
    return min(MOST_WINDOWS, math.ceil(tokens / window))


def walk_operations(spec: ModelSpec, *, all_experts: bool = False) -> float:
    """Operations of the walk for a token, without attention's products of activations and the head's."""
    total, active = count_parameters(spec)
    ends = spec.vocab_size * spec.hidden_size * (1 if spec.tied_embeddings else 2)
    return 2.0 * ((total if all_experts else active) - ends)
