"""Stored weights in the type and layout in which a graph is given them.

Enters: the bytes of one region of a weight file. Leaves: an array. What a kernel takes as it is stored is a view of
those bytes; everything else is made here.
"""

import numpy as np

from ...spec import BITS, BLOCK, PANEL, Weight
from ..narrow_types import NUMPY_DTYPES, Bytes, narrow, unpack_int4, widen

OFFSETS = {"uint4": 0x88888888, "uint8": 0x80808080, "bfloat16": 0, "float32": 0}
"""Sign bits of a 32-bit word of integers: flipping them turns signed values to unsigned ones."""


def lay_out(data: Bytes, weight: Weight) -> np.ndarray:
    """A region's bytes as the graph is given them."""
    if not weight.is_converted:
        dtype = np.dtype(np.uint8) if weight.layout == "panels" else NUMPY_DTYPES[weight.convert]
        return data.view(dtype).reshape(weight.given_shape)
    stored = data.view(NUMPY_DTYPES[weight.dtype])
    if weight.layout == "rows":
        values = stored if weight.dtype == weight.convert else widen(stored, weight.dtype)
        return values.reshape(weight.given_shape)
    arrange = {"panels": _panels, "scales": _panel_scales, "groups": _turned}[weight.layout]
    if not weight.stacked:
        return arrange(stored.reshape(weight.matrix[0], -1), weight)
    made = None
    for index, part in enumerate(stored.reshape(weight.shape[0], weight.matrix[0], -1)):
        arranged = arrange(part, weight)
        if made is None:
            made = np.empty((weight.shape[0], *arranged.shape), dtype=arranged.dtype)
        made[index] = arranged
    assert made is not None
    return made


def _panels(rows: np.ndarray, weight: Weight) -> Bytes:
    """A matrix [N, K] in panels of 32 outputs: for each four bytes of inputs the outputs' words, one after another."""
    if weight.convert == "float32":
        rows = rows if weight.dtype == "float32" else widen(rows, weight.dtype)
    size = BLOCK * BITS[weight.convert] // 8 // rows.itemsize
    rows = rows if rows.shape[1] % size == 0 else np.pad(rows, ((0, 0), (0, -rows.shape[1] % size)))
    words = _by_panel(np.ascontiguousarray(rows).view(np.uint32), weight).swapaxes(1, 2)
    made = np.ascontiguousarray(words)
    made ^= np.uint32(OFFSETS[weight.convert])
    return made.view(np.uint8).reshape(len(made), -1)


def _panel_scales(scales: np.ndarray, weight: Weight) -> np.ndarray:
    """Scales [N, groups] in panels, [N / 32, groups, 32], in the type wanted."""
    if weight.dtype != weight.convert:
        wide = scales if weight.dtype == "float32" else widen(scales, weight.dtype)
        scales = narrow(wide, weight.convert)
    return np.ascontiguousarray(_by_panel(scales, weight).swapaxes(1, 2))


def _turned(scales: np.ndarray, weight: Weight) -> np.ndarray:
    """Scales [N, groups] as [groups, N], in the type wanted."""
    turned = np.ascontiguousarray(scales.T)
    wide = turned if weight.dtype == "float32" else widen(turned, weight.dtype)
    return narrow(wide, weight.convert)


def _by_panel(rows: np.ndarray, weight: Weight) -> np.ndarray:
    """Rows [N, X] as [panels, 32, X]; missing rows are zeros."""
    halves = np.split(rows, 2) if weight.interleaved else [rows]
    each = PANEL // len(halves)
    padded = [np.pad(half, ((0, -len(half) % each), (0, 0))) if len(half) % each else half for half in halves]
    panels = [half.reshape(-1, each, half.shape[1]) for half in padded]
    return panels[0] if len(panels) == 1 else np.concatenate(panels, axis=1)


def stored_values(data: Bytes, weight: Weight, index: int | None = None) -> np.ndarray:
    """The values that a weight was made from by `lay_out`: integers as int8, floats in float32.

    Args:
        data: The bytes that `lay_out` made.
        weight: Its description.
        index: The expert whose part is wanted, of stacked ones.

    Returns:
        [N, K] or [N, groups].
    """
    made = data.reshape(-1, data.size // (weight.shape[0] if weight.stacked else 1))[index or 0]
    outputs, inputs = weight.matrix
    dtype = np.dtype(np.uint32) if weight.layout == "panels" else NUMPY_DTYPES[weight.convert]
    by_panel = np.ascontiguousarray(made.view(dtype).reshape(weight.panels, -1, PANEL).swapaxes(1, 2))
    halves = np.split(by_panel, 2, axis=1) if weight.interleaved else [by_panel]
    kept = outputs // len(halves)
    rows = np.concatenate([half.reshape(-1, half.shape[2])[:kept] for half in halves])
    if weight.layout == "scales":
        values = rows if weight.convert == "float32" else widen(rows, weight.convert)
    elif weight.convert == "float32":
        values = rows.view(np.float32)
    elif weight.convert == "bfloat16":
        values = widen(rows.view(np.uint16), "bfloat16")
    else:
        signed = (rows ^ np.uint32(OFFSETS[weight.convert])).view(np.uint8)
        values = unpack_int4(signed).reshape(outputs, -1) if weight.convert == "uint4" else signed.view(np.int8)
    return np.ascontiguousarray(values[:, :inputs])
