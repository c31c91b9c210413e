"""Graphs with the CPU's own ops, run on ONNX Runtime."""

from collections.abc import Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from arriero.plugins.cpu.kernel_nodes import Panels
from arriero.plugins.cpu.library import DOMAIN, library
from arriero.plugins.cpu.panels import lay_out
from arriero.plugins.nodes import OPSET, Nodes
from arriero.spec.stored_weights import Weight
from arriero.spec.types import Stored

Array = np.ndarray[Any, Any]
CONVERT: dict[int, tuple[Stored, Stored]] = {
    4: ("int4", "uint4"),
    8: ("int8", "uint8"),
    16: ("bfloat16", "bfloat16"),
    32: ("float32", "float32"),
}


def in_panels(
    stored: Array,
    scale: Array | None,
    bits: int,
    group: int = 0,
    *,
    gated: bool = False,
    x_scale: Array | None = None,
    name: str = "",
) -> Panels:
    """A matrix [N, K], or experts' [E, N, K], of integers or floats, with scales [N, groups] or [E, N, groups]."""
    shape, how = stored.shape, {"stacked": stored.ndim == 3, "interleaved": gated}
    if bits == 4:
        nibbles = stored.astype(np.int8).astype(np.uint8) & 15
        stored = nibbles[..., 0::2] | nibbles[..., 1::2] << 4 if shape[-1] % 2 == 0 else nibbles
    dtype, convert = CONVERT[bits]
    made = [initializer(f"{name}weight", _laid_out(stored, shape, dtype, convert, layout="panels", **how))]
    if scale is not None:
        kind: Stored = "bfloat16" if scale.dtype == ml_dtypes.bfloat16 else "float32"
        panels = _laid_out(scale, scale.shape, kind, kind, layout="scales", **how)
        made.append(initializer(f"{name}scale", panels.view(scale.dtype)))
    return Panels(
        weight=made[0],
        scale=made[1] if scale is not None else None,
        bits=bits,
        group=group,
        input_scale=None if x_scale is None else initializer(f"{name}x_scale", x_scale),
    )


def _laid_out(array: Array, shape: tuple[int, ...], dtype: Stored, convert: Stored, **how: Any) -> Array:
    about = Weight(name="w", file="f", offset=0, shape=shape, dtype=dtype, convert=convert, **how)
    return lay_out(np.ascontiguousarray(array).reshape(-1).view(np.uint8), about)


def initializer(name: str, array: Array) -> ir.Value:
    """A graph's constant of this name."""
    kind = ir.TensorType(ir.DataType.from_numpy(array.dtype))
    return ir.Value(name=name, shape=ir.Shape(array.shape), type=kind, const_value=ir.tensor(array, name=name))


def run_graph(
    inputs: Sequence[ir.Value], output: ir.Value, nodes: Nodes, given: Sequence[ir.Value], feeds: Mapping[str, Array]
) -> Array:
    imports = {"": OPSET, DOMAIN: 1, "com.microsoft": 1}
    graph = ir.Graph(inputs, [output], nodes=nodes.list, initializers=given, opset_imports=imports, name="case")
    options = ort.SessionOptions()
    options.intra_op_num_threads = 2
    options.register_custom_ops_library(str(library()))
    data = ir.to_proto(ir.Model(graph, ir_version=11)).SerializeToString()
    session = ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    found: Array = session.run(None, dict(feeds))[0]
    return found
