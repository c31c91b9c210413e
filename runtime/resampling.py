"""Resampling: an image at other sizes, antialiased.

What enters is an RGB image and the sizes that are wanted of it; what leaves is its pixels at each of them, in rows of
red, of green and of blue. The filter is a triangle as wide as the reduction, columns are resampled before rows, and
pixels are rounded to 8 bits between the two: what PyTorch's and Pillow's antialiased bilinear resizes do.

Each pass is the product with a matrix that is zero but for a band along its diagonal. It is taken a block of outputs
at a time, with the inputs that the block reads: BLAS is several times as fast at that as a loop over the few weights
of each output, though most of what it multiplies is by zero.

Shapes: H, W an image's rows and columns; B blocks of a side, K inputs and O outputs a block.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

STRIP = 96
"""Rows whose columns are resampled at once: in float32 they should stay in a core's cache."""

ACROSS, DOWN = 16, 8
"""Outputs a block, of columns and of rows. Fewer multiply by fewer zeros, more need fewer calls of BLAS."""

HALF = np.float32(0.5)
"""Added before a pixel is cut off to 8 bits: halves are rounded up, as by Pillow and PyTorch."""


def resample(image: Image.Image, sizes: Sequence[tuple[int, int]]) -> list[NDArray[np.uint8]]:
    """An image at other sizes; it is read once for all of them.

    Args:
        image: Of mode RGB.
        sizes: Heights and widths.

    Returns:
        Pixels [height, 3, width] for each size.
    """
    height, width = image.height, image.width
    bands = [_blocks(width, wanted, ACROSS) for _, wanted in sizes]
    wides = [np.empty((height, 3, wanted), np.uint8) for _, wanted in sizes]
    x_3SW = np.empty((3, STRIP, width), np.float32)
    for top in range(0, height, STRIP):
        strip = image.crop((0, top, width, min(top + STRIP, height)))
        for x_SW, colour in zip(x_3SW, strip.split(), strict=True):
            x_SW[: strip.height] = np.asarray(colour)
        for wide_H3W, band in zip(wides, bands, strict=True):
            y_3SW = x_3SW if wide_H3W.shape[2] == width else _resample_columns(x_3SW, wide_H3W.shape[2], *band)
            y_S3W = y_3SW[:, : strip.height].transpose(1, 0, 2)
            np.add(y_S3W, HALF, out=wide_H3W[top : top + STRIP], casting="unsafe")
    return [_resample_rows(wide_H3W, wanted) for wide_H3W, (wanted, _) in zip(wides, sizes, strict=True)]


def _resample_columns(
    x_3SW: NDArray[np.float32], wanted: int, starts: list[int], weights_BKO: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Columns at another width, not rounded."""
    x_RW = x_3SW.reshape(-1, x_3SW.shape[2])
    y_RW = np.empty((len(x_RW), wanted), np.float32)
    inputs, outputs = weights_BKO.shape[1:]
    for number, (start, weights_KO) in enumerate(zip(starts, weights_BKO, strict=True)):
        y_RO = y_RW[:, number * outputs : (number + 1) * outputs]
        np.matmul(x_RW[:, start : start + inputs], weights_KO[:, : y_RO.shape[1]], out=y_RO)
    return y_RW.reshape(*x_3SW.shape[:2], wanted)


def _resample_rows(x_H3W: NDArray[np.uint8], wanted: int) -> NDArray[np.uint8]:
    """Rows at another height."""
    if len(x_H3W) == wanted:
        return x_H3W
    starts, weights_BKO = _blocks(len(x_H3W), wanted, DOWN)
    weights_BOK = np.ascontiguousarray(weights_BKO.transpose(0, 2, 1))
    outputs, inputs = weights_BOK.shape[1:]
    x_HL = x_H3W.reshape(len(x_H3W), -1)
    y_HL = np.empty((wanted, x_HL.shape[1]), np.uint8)
    for number, (start, weights_OK) in enumerate(zip(starts, weights_BOK, strict=True)):
        y_OL = y_HL[number * outputs : (number + 1) * outputs]
        x_KL = x_HL[start : start + inputs].astype(np.float32)
        np.add(weights_OK[: len(y_OL)] @ x_KL, HALF, out=y_OL, casting="unsafe")
    return y_HL.reshape(wanted, *x_H3W.shape[1:])


def _blocks(size: int, wanted: int, outputs: int) -> tuple[list[int], NDArray[np.float32]]:
    """The filter that makes `wanted` pixels of `size`, in blocks of outputs.

    Returns:
        The first input of each block, and the weights [B, K, O]. Outputs beyond the last repeat it.
    """
    scale = size / wanted
    reach = max(scale, 1.0)
    outputs = min(outputs, wanted)
    inputs = min(size, int((outputs - 1) * scale + 2 * reach) + 2)
    blocks = -(-wanted // outputs)
    centres_B1O = (np.arange(blocks * outputs).clip(max=wanted - 1).reshape(blocks, 1, outputs) + 0.5) * scale
    starts_B = (centres_B1O[:, 0, 0] - reach).astype(int).clip(0, size - inputs)
    x_BK1 = (starts_B[:, None] + np.arange(inputs) + 0.5)[:, :, None]
    weights_BKO = (1 - np.abs(x_BK1 - centres_B1O) / reach).clip(min=0)
    weights_BKO /= weights_BKO.sum(axis=1, keepdims=True)
    return starts_B.tolist(), weights_BKO.astype(np.float32)
