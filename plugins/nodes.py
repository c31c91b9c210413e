"""Writes ONNX nodes as calls: `nodes.Add(x, y)` appends a node and returns its output.

The one notation in which function bodies and lowerings are written. Numbers among the inputs become constants.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from ..spec.types import TYPES

OPSET = 24
"""Version of the standard operators in every graph that Arriero writes."""

Input = ir.Value | np.ndarray | None


def onnx_type(name: str) -> ir.DataType:
    """ONNX's type of a stored type."""
    return ir.DataType(TYPES[name].onnx)


class Nodes:
    """A list of nodes in the order written.

    Args:
        prefix: Put before the names of nodes and values, so that a person finds them in Netron.
    """

    def __init__(self, prefix: str = "") -> None:
        self.prefix = prefix
        self.list: list[ir.Node] = []

    def __getattr__(self, op_type: str) -> Callable[..., Any]:
        """A function that appends a node of this operator; `outputs=n` for several, `domain=` for another domain."""
        if op_type.startswith("_"):
            raise AttributeError(op_type)

        def call(*inputs: Input, outputs: int = 1, domain: str = "", **attributes: Any) -> Any:
            values = [self.constant(x) if isinstance(x, np.ndarray) else x for x in inputs]
            return self.node(op_type, values, outputs=outputs, domain=domain, attributes=attributes)

        return call

    def node(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        *,
        outputs: int | Sequence[ir.Value] = 1,
        domain: str = "",
        attributes: dict[str, Any] | None = None,
    ) -> Any:
        """Appends a node. Returns its output, or a tuple of them where there are several."""
        name = f"{self.prefix}{op_type}_{len(self.list)}"
        node = ir.Node(
            domain,
            op_type,
            inputs,
            attributes=ir.convenience.convert_attributes(attributes or {}),
            num_outputs=outputs if isinstance(outputs, int) else None,
            outputs=None if isinstance(outputs, int) else outputs,
            name=name,
        )
        if isinstance(outputs, int):
            for index, value in enumerate(node.outputs):
                value.name = f"{name}:{index}" if outputs > 1 else name
        self.list.append(node)
        return node.outputs[0] if len(node.outputs) == 1 else tuple(node.outputs)

    def constant(self, array: np.ndarray) -> ir.Value:
        """A constant as a value."""
        value: ir.Value = self.node("Constant", [], attributes={"value": ir.tensor(array)})
        return value


def dims(value: ir.Value | None) -> tuple[int, ...]:
    """A value's shape, all of whose dimensions are known."""
    assert value is not None
    assert value.shape is not None
    return value.shape.numpy()


def ints(*values: int) -> np.ndarray:
    """An int64 vector: shapes, axes, permutations."""
    return np.array(values, dtype=np.int64)


def number(value: float, dtype: type[np.generic] = np.float32) -> np.ndarray:
    """A scalar."""
    return np.array(value, dtype=dtype)


def cast(nodes: Nodes, x: ir.Value, source: ir.DataType, target: ir.DataType) -> ir.Value:
    """A Cast, or nothing where the types are equal."""
    if source == target:
        return x
    converted: ir.Value = nodes.Cast(x, to=target)
    return converted


Write = Callable[[Nodes, Sequence[ir.Value], Sequence[ir.Value]], None]


def function(
    domain: str, name: str, overload: str, inputs: Sequence[str], outputs: Sequence[str], write: Write
) -> ir.Function:
    """A model-local function whose body is what `write(nodes, inputs, outputs)` writes.

    Args:
        domain: The op's domain.
        name: The op's name.
        overload: Tells bodies of the same op apart, where attributes change their structure.
        inputs: Names of the inputs, in order.
        outputs: Names of the outputs, in order.
        write: Takes a `Nodes`, the input values, and the output values to produce.
    """
    values, results = ([ir.Value(name=each) for each in names] for names in (inputs, outputs))
    nodes = Nodes()
    write(nodes, values, results)
    graph = ir.Graph(values, results, nodes=nodes.list, opset_imports={"": OPSET})
    return ir.Function(domain, name, overload, graph=graph, attributes=())
