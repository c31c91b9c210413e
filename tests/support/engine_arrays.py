"""Tensors as a TensorRT engine holds them, as arrays: where they lie, how wide they are, how they are quantised."""

import ctypes
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from onnx import helper

Array = np.ndarray[Any, Any]
T = onnx.TensorProto
NUMPY: dict[int, Any] = {
    T.FLOAT: np.float32, T.FLOAT16: np.float16, T.BFLOAT16: ml_dtypes.bfloat16, T.INT8: np.int8, T.INT32: np.int32,
    T.INT64: np.int64, T.BOOL: np.bool_, T.FLOAT8E4M3FN: ml_dtypes.float8_e4m3fn, T.INT4: ml_dtypes.int4,
}  # fmt: skip


def at(address: int, shape: Sequence[int], dtype: Any) -> Array:
    """The array that lies at an address."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return (
        np.frombuffer((ctypes.c_char * max(size, 1)).from_address(address), np.uint8)[:size].view(dtype).reshape(shape)
    )


def packed(values: Array) -> Array:
    """Four-bit values as a device holds them: two a byte, the first in the lower half; numpy has a byte for each."""
    halves = values.view(np.uint8).reshape(-1, 2) & 15
    return halves[:, 0] | halves[:, 1] << 4


def unpacked(held: Array, shape: Sequence[int]) -> Array:
    """Inverse of `packed`."""
    halves = np.stack([held & 15, held >> 4], axis=-1).reshape(shape)
    return ((halves ^ 8).astype(np.int8) - 8).astype(ml_dtypes.int4)


def narrow(dtype: Any) -> bool:
    return np.dtype(dtype) in (np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16))


def read_data(tensor: Any, files: Mapping[str, Path]) -> None:
    """Reads a tensor that lies in a weight file into the tensor itself."""
    if tensor.data_location != T.EXTERNAL:
        return
    where = {each.key: each.value for each in tensor.external_data}
    with files[where["location"]].open("rb") as file:
        file.seek(int(where.get("offset", 0)))
        tensor.raw_data = file.read(int(where["length"]))
    tensor.data_location = T.DEFAULT
    del tensor.external_data[:]


def to_numpy(tensor: Any) -> Array:
    found: Array = onnx.numpy_helper.to_array(tensor)
    return found.astype(NUMPY[tensor.data_type]) if found.dtype != NUMPY[tensor.data_type] else found


def along(node: Any, scale: Array, shape: Sequence[int]) -> Array:
    """A scale, or a zero point, as it meets a tensor of this shape."""
    named = {each.name: helper.get_attribute_value(each) for each in node.attribute}
    axis, block = named.get("axis", 1), named.get("block_size", 0)
    if scale.ndim == 0 or scale.size == 1:
        return scale.reshape(())
    if block:
        return np.repeat(scale, block, axis=axis)[tuple(slice(size) for size in shape)]
    return scale.reshape([-1 if index == axis % len(shape) else 1 for index in range(len(shape))])


def quantise(node: Any, inputs: Sequence[Array]) -> Array:
    x, scale = (each.astype(np.float32) for each in inputs[:2])
    named = {each.name: helper.get_attribute_value(each) for each in node.attribute}
    dtype = inputs[2].dtype if len(inputs) > 2 else NUMPY[named["output_dtype"]]
    divided = x / along(node, scale, x.shape)
    if np.dtype(dtype) == np.dtype(ml_dtypes.float8_e4m3fn):
        return np.clip(divided, -448, 448).astype(dtype)
    return np.clip(np.rint(divided), -128, 127).astype(dtype)


def dequantise(node: Any, inputs: Sequence[Array]) -> Array:
    x, scale = (each.astype(np.float32) for each in inputs[:2])
    return (x * along(node, scale, x.shape)).astype(inputs[1].dtype)
