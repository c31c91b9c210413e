"""Resampling: an image at other sizes, antialiased.

Enters: an RGB image and the sizes that are wanted of it. Leaves: its pixels at each of them, in rows of red, of green
and of blue. The filter is a triangle as wide as the reduction, columns are resampled before rows, and pixels are
rounded to 8 bits between the two: what PyTorch's and Pillow's antialiased bilinear resizes do.

Each pass is the product with a matrix that is zero but for a band along its diagonal. It is taken a block of outputs
at a time, with the inputs that the block reads: BLAS is several times as fast at that as a loop over the few weights
of each output, though most of its factors are zero.

Shapes: H, W an image's rows and columns; B blocks of a side, K inputs and O outputs a block.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

STRIP = 192
"""The most rows whose columns are resampled at once. Few stay in a cache, many need fewer calls of BLAS."""

ACROSS, DOWN = 16, 8
"""Outputs a block, of columns and of rows. Fewer multiply by fewer zeros, more need fewer calls of BLAS."""

HALF = np.float32(0.5 + 2**-13)
"""Added before a pixel is cut off to 8 bits: halves are rounded up, also those that float32 makes a little less."""


def resample(image: Image.Image, into: Sequence[NDArray[np.uint8]]) -> None:
    """Gives an image other sizes. It is read once for all of them.

    Args:
        image: An image of mode RGB.
        into: Arrays that take the pixels, [height, 3, width] for each of the sizes.
    """
    height, width = image.height, image.width
    strip = math.ceil(height / math.ceil(height / STRIP))
    bands = [None if each.shape[2] == width else _blocks(width, each.shape[2], ACROSS) for each in into]
    wides = [each if len(each) == height else np.empty((height, *each.shape[1:]), np.uint8) for each in into]
    x_S3W = np.empty((strip, 3, width), np.float32)
    scratch = np.empty(3 * strip * max(each.shape[2] for each in into), np.float32)
    for top in range(0, height, strip):
        rows = image.crop((0, top, width, min(top + strip, height)))
        pixels_S3W = np.frombuffer(rows.tobytes("raw", "RGB;L"), np.uint8).reshape(-1, 3, width)
        x_S3W[: rows.height] = pixels_S3W
        for wide_H3W, band in zip(wides, bands, strict=True):
            wide_S3W = wide_H3W[top : top + strip]
            if band is None:
                wide_S3W[:] = pixels_S3W
            else:
                _resample_columns(x_S3W[: rows.height], wide_S3W, scratch, *band)
    for wide_H3W, y_H3W in zip(wides, into, strict=True):
        if wide_H3W is not y_H3W:
            _resample_rows(wide_H3W, y_H3W)


def _resample_columns(
    x_S3W: NDArray[np.float32],
    y_S3W: NDArray[np.uint8],
    scratch: NDArray[np.float32],
    starts: list[int],
    weights_KBO: NDArray[np.float32],
) -> None:
    inputs, _, outputs = weights_KBO.shape
    x_RW = x_S3W.reshape(-1, x_S3W.shape[2])
    y_RW = scratch[: y_S3W.size].reshape(len(x_RW), -1)
    for number, (start, weights_KO) in enumerate(zip(starts, weights_KBO.transpose(1, 0, 2), strict=True)):
        y_RO = y_RW[:, number * outputs : (number + 1) * outputs]
        np.matmul(x_RW[:, start : start + inputs], weights_KO[:, : y_RO.shape[1]], out=y_RO)
    y_RW += HALF
    y_S3W[:] = y_RW.reshape(y_S3W.shape)


def _resample_rows(x_H3W: NDArray[np.uint8], y_H3W: NDArray[np.uint8]) -> None:
    starts, weights_KBO = _blocks(len(x_H3W), len(y_H3W), DOWN)
    inputs, _, outputs = weights_KBO.shape
    for number, (start, weights_OK) in enumerate(zip(starts, weights_KBO.transpose(1, 2, 0), strict=True)):
        y_O3W = y_H3W[number * outputs : (number + 1) * outputs]
        y_OL = weights_OK[: len(y_O3W)] @ x_H3W[start : start + inputs].reshape(inputs, -1).astype(np.float32)
        y_OL += HALF
        y_O3W[:] = y_OL.reshape(y_O3W.shape)


def _blocks(size: int, wanted: int, outputs: int) -> tuple[list[int], NDArray[np.float32]]:
    """The filter that makes `wanted` pixels of `size`, in blocks of outputs.

    Returns:
        The first input of each block, and the weights [K, B, O]. Outputs beyond the last repeat it.
    """
    scale = size / wanted
    reach = max(scale, 1.0)
    outputs = min(outputs, wanted)
    inputs = min(size, math.ceil((outputs - 1) * scale + 2 * reach))
    blocks = -(-wanted // outputs)
    centres_BO = (np.arange(blocks * outputs).clip(max=wanted - 1).reshape(blocks, outputs) + 0.5) * scale
    starts_B1 = np.floor(centres_BO[:, :1] - reach + 0.5).clip(0, size - inputs)
    first_BO = (starts_B1 + 0.5 - centres_BO).astype(np.float32)
    distances_KBO = np.abs(first_BO + np.arange(inputs, dtype=np.float32)[:, None, None])
    weights_KBO = np.maximum(1 - distances_KBO / np.float32(reach), 0)
    weights_KBO /= weights_KBO.sum(axis=0)
    return starts_B1.ravel().astype(int).tolist(), weights_KBO
