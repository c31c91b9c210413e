"""Scales of int4 experts' groups in the model's 16-bit type, where it holds them as they are, [E, groups, N].

Enter: a canonical graph and its weight files. Leaves: which scales an engine takes so, and their values. Invariant: no
value changes; calibration chooses scales that the model's type holds, and checkpoints come with such. A kernel reads a
group's scales of neighbouring columns at once where they lie together.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ..plugins.moe import op as moe
from ..plugins.narrow_types import narrow, widen
from ..plugins.nodes import dims
from .supply import STORED

PIECE = 1 << 22
"""Scales that are looked at together."""


def narrow_scales(graph: ir.Graph, files: Mapping[str, Path]) -> dict[ir.Value, ir.DataType]:
    """The scales of a graph's int4 experts that may be given in 16 bits, both of a layer's or none."""
    found: dict[ir.Value, ir.DataType] = {}
    for node in graph:
        if node.op_type != moe.NAME or node.attributes["quantisation"].as_string() != "int4":
            continue
        hidden, scales = node.inputs[0], [value for value in node.inputs[4:6] if value is not None]
        assert hidden is not None
        dtype, in_groups = hidden.dtype, any(dims(value)[2] > 1 for value in scales)
        if dtype not in (ir.DataType.BFLOAT16, ir.DataType.FLOAT16) or not in_groups:
            continue
        if all(_holds(dtype, value.const_value, files) for value in scales):
            found |= dict.fromkeys(scales, dtype)
    return found


def narrowed(tensor: ir.TensorProtocol, files: Mapping[str, Path], dtype: ir.DataType) -> ir.TensorProtocol:
    """Such scales [E, N, groups] as an engine takes them, in memory."""
    assert isinstance(tensor, ir.ExternalTensor)
    wide_ENG = np.concatenate(list(_pieces(tensor, files))).reshape(tensor.shape.numpy())
    array = narrow(np.ascontiguousarray(wide_ENG.swapaxes(1, 2)), STORED[dtype])
    return ir.Tensor(array.view(dtype.numpy()), dtype=dtype, name=tensor.name)


def _holds(dtype: ir.DataType, tensor: Any, files: Mapping[str, Path]) -> bool:
    if not isinstance(tensor, ir.ExternalTensor) or f"{tensor.location}" not in files:
        return False
    with np.errstate(over="ignore"):  # an infinity is not what was narrowed
        return all(
            np.array_equal(widen(narrow(piece, STORED[dtype]), STORED[dtype]), piece)
            for piece in _pieces(tensor, files)
        )


def _pieces(tensor: ir.ExternalTensor, files: Mapping[str, Path]) -> Iterator[NDArray[np.float32]]:
    """The tensor's numbers from its file, some at a time."""
    size = tensor.shape.numpy()
    flat = np.memmap(files[f"{tensor.location}"], np.uint8, "r", tensor.offset or 0, int(np.prod(size)) * 4)
    for start in range(0, len(flat), 4 * PIECE):
        yield np.frombuffer(flat[start : start + 4 * PIECE].tobytes(), np.float32)
