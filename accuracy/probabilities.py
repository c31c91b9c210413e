"""A side's logits as log-probabilities, in nats.

Enters: logits [N, V] after N tokens. Leaves: log-probabilities of the likeliest tokens, of those that come, and of all
others together. Nothing of the vocabulary's size is kept but for one block at a time.
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..errors import AccuracyError
from .sides.side import Block

Logs = NDArray[np.float32]


def predicting(block: Block, length: int, path: Path) -> tuple[slice, Logs]:
    """The tokens of a block that have a next one, and their logits.

    Raises:
        AccuracyError: A logit is not finite.
    """
    end = min(block.start + len(block.logits_NV), length - 1)
    logits_NV = block.logits_NV[: end - block.start]
    finite_N = np.isfinite(logits_NV).all(-1)
    if not finite_N.all():
        at = block.start + int(finite_N.argmin())
        raise AccuracyError(
            f"{path}: the logits after token {at} of window {block.row} are NaN or infinite: its weights or scales are "
            "damaged, or its arithmetic overflows"
        )
    return slice(block.start, end), logits_NV


def log_sum(logits_NV: Logs) -> Logs:
    """Log of the summed exponentials, [N, 1]; minus infinity where all logits are."""
    largest_N1 = logits_NV.max(-1, keepdims=True)
    largest_N1[np.isneginf(largest_N1)] = 0.0
    terms_NV = logits_NV - largest_N1
    np.exp(terms_NV, out=terms_NV)
    with np.errstate(divide="ignore"):
        found_N1: Logs = np.log(terms_NV.sum(-1, keepdims=True)) + largest_N1
    return found_N1


def likeliest_of(logits_NV: Logs, count: int) -> tuple[NDArray[np.int64], Logs]:
    """The `count` likeliest tokens and their logits, [N, K], in falling order; of equal ones the lowest first."""
    ids_NK = np.sort(np.argpartition(logits_NV, -count, axis=-1)[:, -count:], axis=-1)
    values_NK = np.take_along_axis(logits_NV, ids_NK, axis=-1)
    order_NK = np.argsort(-values_NK, axis=-1, kind="stable")
    return np.take_along_axis(ids_NK, order_NK, axis=-1), np.take_along_axis(values_NK, order_NK, axis=-1)


def rest_of(logits_NV: Logs, ids_NK: NDArray[np.int64]) -> Logs:
    """Log of the summed exponentials of all other logits, [N]."""
    others_NV = logits_NV.copy()
    np.put_along_axis(others_NV, ids_NK, -np.inf, axis=-1)
    return log_sum(others_NV)[:, 0]


def next_of(logits_NV: Logs, ids_WS: NDArray[np.integer], block: Block, total_N1: Logs) -> Logs:
    """The log-probabilities of the tokens that come, [N]."""
    start = block.start + 1
    next_N1 = ids_WS[block.row, start : start + len(logits_NV), None].astype(np.int64)
    log_N1: Logs = np.take_along_axis(logits_NV, next_N1, axis=-1) - total_N1
    return log_N1[:, 0]
