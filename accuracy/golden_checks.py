"""A golden file's contents, held against what a recording makes: shapes, finite numbers, signs, ids and order.

Enters: a `Golden` as it was read. Leaves: nothing, or an error that names the array and what is wrong with it.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .recorded import Golden

SLACK = 1e-3
"""Nats that rounding may put a sum of probabilities above 1."""

DTYPES = {
    "ids_WS": "int32",
    "is_image_WS": "bool",
    "tiles_W": "int32",
    "pixels_N3PP": "float16",
    "top_ids_WNK": "int32",
    "top_logs_WNK": "float32",
    "rest_logs_WN": "float32",
    "next_logs_WN": "float32",
    "experts_LWSK": "int16",
    "continued_PC": "int32",
}
"""Types of the arrays."""


def check_golden(golden: Golden) -> None:
    """Checks what a file holds.

    Raises:
        ValueError: An array has another type or shape than a recording gives it, or holds what none can.
    """
    for name, dtype in DTYPES.items():
        found = getattr(golden, name)
        if found is not None and str(found.dtype) != dtype:
            raise ValueError(f"{name} is {found.dtype}, expected {dtype}")
    if golden.ids_WS.ndim != 2 or not golden.ids_WS.shape[0] or golden.ids_WS.shape[1] < 2:
        raise ValueError(f"ids_WS has shape {list(golden.ids_WS.shape)}, expected windows of two tokens or more")
    _check_ids("ids_WS", golden.ids_WS, golden.spec.vocab_size)
    _check_logs(golden)
    _check_images(golden)
    _check_experts(golden)
    if (continued_PC := golden.continued_PC) is not None:
        if continued_PC.ndim != 2:
            raise ValueError(f"continued_PC has shape {list(continued_PC.shape)}, expected two axes")
        _check_ids("continued_PC", continued_PC, golden.spec.vocab_size)


def _check_logs(golden: Golden) -> None:
    """The log-probabilities: finite, at most 0, in falling order, and in all at most 1."""
    windows, length = golden.ids_WS.shape
    vocabulary = golden.spec.vocab_size
    top = golden.top_ids_WNK.shape[-1] if golden.top_ids_WNK.ndim else 0
    if not 0 < top <= vocabulary:
        raise ValueError(f"top_ids_WNK has {top} tokens each, expected 1 to {vocabulary}")
    for name in ("top_ids_WNK", "top_logs_WNK", "rest_logs_WN", "next_logs_WN"):
        _check_shape(name, getattr(golden, name), (windows, length - 1, *([top] if name.startswith("top") else [])))
    _check_ids("top_ids_WNK", golden.top_ids_WNK, vocabulary)
    if (np.diff(np.sort(golden.top_ids_WNK, axis=-1), axis=-1) == 0).any():
        raise ValueError("top_ids_WNK names a token twice")
    for name in ("top_logs_WNK", "rest_logs_WN", "next_logs_WN"):
        logs = getattr(golden, name)
        finite = np.isfinite(logs)
        if name == "rest_logs_WN" and top == vocabulary:
            finite |= np.isneginf(logs)  # there are no others
        _check_all(name, logs, finite, "a finite number")
        _check_all(name, logs, logs <= SLACK, "at most 0, the log of a probability")
    if (np.diff(golden.top_logs_WNK, axis=-1) > 0).any():
        raise ValueError("top_logs_WNK does not fall from the likeliest token on")
    with np.errstate(under="ignore"):
        total_WN = np.exp(golden.top_logs_WNK.astype(np.float64)).sum(-1) + np.exp(
            golden.rest_logs_WN.astype(np.float64)
        )
    _check_all("probabilities", total_WN, np.abs(total_WN - 1) < 10 * SLACK, "1 in all")
    is_next_WNK = golden.top_ids_WNK == golden.ids_WS[:, 1:, None]
    expected_WN = np.where(is_next_WNK, golden.top_logs_WNK, 0).sum(-1)
    same_WN = ~is_next_WNK.any(-1) | (np.abs(expected_WN - golden.next_logs_WN) < 10 * SLACK)
    _check_all("next_logs_WN", golden.next_logs_WN, same_WN, "what top_logs_WNK has for that token")


def _check_images(golden: Golden) -> None:
    """Images: all of the arrays or none, each token's mark, and the tiles."""
    found = golden.is_image_WS, golden.tiles_W, golden.pixels_N3PP, golden.vision
    if all(each is None for each in found):
        return
    if golden.is_image_WS is None or golden.tiles_W is None or golden.pixels_N3PP is None or golden.vision is None:
        raise ValueError("is_image_WS, tiles_W, pixels_N3PP and the vision tower's geometry belong together")
    side = golden.vision.image_size
    _check_shape("is_image_WS", golden.is_image_WS, golden.ids_WS.shape)
    _check_shape("tiles_W", golden.tiles_W, golden.ids_WS.shape[:1])
    _check_all("tiles_W", golden.tiles_W, golden.tiles_W >= 0, "0 or more")
    _check_shape("pixels_N3PP", golden.pixels_N3PP, (int(golden.tiles_W.sum(dtype=np.int64)), 3, side, side))
    _check_all("pixels_N3PP", golden.pixels_N3PP, np.isfinite(golden.pixels_N3PP), "a finite number")


def _check_experts(golden: Golden) -> None:
    """The experts of each token: in rising order, each once."""
    if (experts_LWSK := golden.experts_LWSK) is None:
        return
    layers = len(experts_LWSK) if experts_LWSK.ndim else 0  # of some the choice may not be seen
    if not 0 < layers <= sum(layer.experts for layer in golden.spec.layers):
        raise ValueError(f"experts_LWSK has {layers} layers, the model has fewer with experts")
    _check_shape("experts_LWSK", experts_LWSK, (layers, *golden.ids_WS.shape, golden.spec.experts_per_token))
    _check_ids("experts_LWSK", experts_LWSK, golden.spec.experts)
    if (np.diff(experts_LWSK, axis=-1) <= 0).any():
        raise ValueError("experts_LWSK is not in rising order")


def _check_shape(name: str, array: NDArray[Any], expected: tuple[int, ...]) -> None:
    if array.shape != expected:
        raise ValueError(f"{name} has shape {list(array.shape)}, expected {list(expected)}")


def _check_ids(name: str, ids: NDArray[Any], count: int) -> None:
    _check_all(name, ids, (ids >= 0) & (ids < count), f"0 to {count - 1}")


def _check_all(name: str, array: NDArray[Any], good: NDArray[np.bool_], expected: str) -> None:
    if not good.all():
        raise ValueError(f"{name} holds {array[~good].flat[0]}, expected {expected}")
