"""The parts of a graph: initializers that lie in safetensors files, and traced nodes cloned onto new values.

Enters: where each tensor lies, and traced graphs. Leaves: values and nodes of the graph under construction.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from ..files.safetensors import Region
from ..plugins.nodes import onnx_type
from ..spec.types import FLOATS_BY_CODE

IR_VERSION = 11

PlaceOf = Callable[[str], tuple[str, Region]]
"""The file's name and the region of a tensor, by its checkpoint name."""


class Initializers:
    """A graph's initializers, each made when it is first asked for.

    Args:
        place_of: Finds a tensor in the weight files.
    """

    def __init__(self, place_of: PlaceOf) -> None:
        self.place_of = place_of
        self.values: dict[str, ir.Value] = {}

    def weight(self, name: str) -> ir.Value:
        """A checkpoint's tensor by its full name, which lies where the shard has it."""
        if name not in self.values:
            self.values[name] = _initializer(name, external_tensor(name, *self.place_of(name)))
        return self.values[name]

    def constant(self, name: str, array: np.ndarray) -> ir.Value:
        """A small array that the graph itself holds."""
        if name not in self.values:
            self.values[name] = _initializer(name, ir.tensor(array, name=name))
        return self.values[name]


def external_tensor(name: str, file: str, region: Region) -> ir.ExternalTensor:
    """A tensor of floats that lies in a weight file."""
    return ir.ExternalTensor(
        file,
        region.offset,
        region.size,
        onnx_type(FLOATS_BY_CODE[region.dtype]),
        shape=ir.Shape(region.shape),
        name=name,
        base_dir=Path("."),
    )


def clone(
    node: ir.Node,
    mapped: dict[ir.Value, ir.Value],
    prefix: str,
    dimensions: Sequence[str],
    *,
    overload: str = "",
) -> ir.Node:
    """A copy of a traced node.

    Args:
        node: The traced node.
        mapped: The new graph's values by the traced graph's; extended by the node's outputs that are not in it yet.
        prefix: Put before the names of the node and of its values.
        dimensions: Names of the first dimensions of a value of three; those of others are left open.
        overload: Overload of the function that a custom op's node calls.
    """
    for old in node.outputs:
        if old not in mapped:
            mapped[old] = ir.Value(name=f"{prefix}/{old.name}", shape=_named(old.shape, dimensions), type=old.type)
    return ir.Node(
        node.domain,
        node.op_type,
        [mapped[value] if value is not None else None for value in node.inputs],
        attributes=list(node.attributes.values()),
        overload=overload,
        outputs=[mapped[old] for old in node.outputs],
        name=f"{prefix}/{name_of(node)}",
    )


def name_of(node: ir.Node) -> str:
    """A product or a norm is named by its weight, attention or a custom op by its type."""
    weight = node.inputs[1] if node.op_type in ("MatMul", "RMSNormalization", "LayerNormalization") else None
    source = weight.producer() if weight is not None else None
    weight = source.inputs[0] if source is not None else weight
    if weight is not None:
        return str(weight.name).removeprefix("layer.").removesuffix(".weight")
    return node.op_type if node.domain or node.op_type == "Attention" else str(node.name).removeprefix("node_")


def _named(shape: ir.Shape | None, dimensions: Sequence[str]) -> ir.Shape | None:
    """A traced shape with names for its first dimensions, or nothing where a name would be a sum."""
    if shape is None or any(not isinstance(dim, int) for dim in shape.dims[2:]) or len(shape) != 3:
        return None
    return ir.Shape([*dimensions, *shape.dims[len(dimensions) :]])


def _initializer(name: str, tensor: ir.TensorProtocol) -> ir.Value:
    shape = ir.Shape(tensor.shape.numpy())
    return ir.Value(name=name, shape=shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
