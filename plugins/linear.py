"""A quantised linear in ONNX: how calibration writes it, and how a lowering recognises it.

    int8, fp8, static:   x → QuantizeLinear → DequantizeLinear ─┐
                         weight → DequantizeLinear → Transpose ─┴ MatMul → Cast
    int8, fp8, dynamic:  the same of x over its token's scale, and a Mul with that scale behind the MatMul
    int4:                x ─┬ MatMul
                         weight → DequantizeLinear in blocks → Transpose ─┘

Weights are [N, K] as in a checkpoint, with a scale for each output channel, or for each block of its inputs. In int8
and fp8 the scales and the product are float32, which TensorRT makes an Int8 or FP8 GEMM with a float32 epilogue; with
scales in bfloat16 it would quantise activations in bfloat16. In int4 the scales have the graph's type, as TensorRT's
weight-only kernels demand. Blocks of int8 have scales of the graph's type too, with a Cast behind them, and are for
CPUs alone.
"""

from dataclasses import dataclass

import onnx_ir as ir

from .nodes import Nodes, cast, ints, number, onnx_type
from .quantisation import LARGEST

FLOAT = ir.DataType.FLOAT
STORED = {kind: onnx_type(kind) for kind in ("int8", "fp8", "int4")}
KINDS = {dtype: kind for kind, dtype in STORED.items()}


@dataclass(frozen=True, kw_only=True, slots=True)
class Linear:
    """A quantised linear found in a graph.

    Attributes:
        kind: `int8`, `fp8` or `int4`.
        x: The input, quantised or in `int4` multiplied as it is.
        x_scale: Its scale; None in `int4`.
        weight: The stored weight [N, K], an initializer.
        weight_scale: [N], or [N, K / block] of groups.
        own_scale: The scale that each token has of its own, which `x` is divided by and the product multiplied; None
            where there is none.
    """

    kind: str
    x: ir.Value
    x_scale: ir.Value | None
    weight: ir.Value
    weight_scale: ir.Value
    own_scale: ir.Value | None = None

    @property
    def unscaled(self) -> ir.Value:
        """The activations before the division by the tokens' own scales."""
        division = _producer(self.x, "Div")
        assert division is not None
        value = division.inputs[0]
        assert value is not None
        return value

    @property
    def bound(self) -> float:
        """The largest magnitude that the tokens' own scales are chosen for; 0 is none."""
        for node in self.scaling:
            limit = node.inputs[1] if node.op_type == "Min" else None
            if limit is not None and (tensor := ir.convenience.get_const_tensor(limit)) is not None:
                return float(tensor.numpy())
        return 0.0

    @property
    def scaling(self) -> list[ir.Node]:
        """The nodes that compute the tokens' own scales and divide by them: those behind `unscaled`."""
        pending, found = [self.x], list[ir.Node]()
        while pending:
            node = pending.pop().producer()
            if node is not None and node not in found:
                found.append(node)
                pending += [value for value in node.inputs if value is not None and value is not self.unscaled]
        return found


def token_scale(nodes: Nodes, x: ir.Value, kind: str, bound: float = 0.0) -> ir.Value:
    """Each token's own scale [..., 1] of its activations [..., K] in float32.

    Args:
        nodes: Where the nodes go.
        x: The activations.
        kind: `int8` or `fp8`.
        bound: The largest magnitude that a scale is chosen for; 0 is none.
    """
    largest = nodes.ReduceMax(nodes.Abs(x), ints(-1), keepdims=1)
    if bound:
        largest = nodes.Min(largest, number(bound))
    scale = nodes.Div(largest, number(LARGEST[kind]))
    whole: ir.Value = nodes.Where(nodes.Equal(scale, number(0)), number(1), scale)
    return whole


def write_input(
    nodes: Nodes, x: ir.Value, scale: ir.Value | None, kind: str, dtype: ir.DataType, bound: float = 0.0
) -> tuple[ir.Value, ir.Value | None]:
    """Quantises and dequantises activations [..., K] for any number of linears.

    Args:
        nodes: Where the nodes go.
        x: The activations, in `dtype`.
        scale: The static scale, float32; None takes each token's own.
        kind: `int8` or `fp8`.
        dtype: The graph's type.
        bound: As in `token_scale`.

    Returns:
        The product's input, float32, and the scale [..., 1] that multiplies the product, where there is one.
    """
    if scale is not None:
        return nodes.DequantizeLinear(nodes.QuantizeLinear(x, scale, output_dtype=STORED[kind]), scale), None
    wide = cast(nodes, x, dtype, FLOAT)
    own_scale = token_scale(nodes, wide, kind, bound)
    one = nodes.constant(number(1))
    stored = nodes.QuantizeLinear(nodes.Div(wide, own_scale), one, output_dtype=STORED[kind])
    return nodes.DequantizeLinear(stored, one), own_scale


def write_linear(
    nodes: Nodes,
    x: ir.Value,
    x_token_scale: ir.Value | None,
    weight: ir.Value,
    weight_scale: ir.Value,
    output: ir.Value,
    kind: str,
    dtype: ir.DataType,
) -> None:
    """Writes the product of an input that `write_input` has prepared (in `int4` of the activations as they are).

    Args:
        nodes: Where the nodes go.
        x: The input.
        x_token_scale: Its tokens' scales, where they are dynamic.
        weight: The stored weight [N, K].
        weight_scale: Its scales.
        output: The value to produce, in `dtype`.
        kind: The format.
        dtype: The graph's type.
    """
    if kind == "int4":
        wide = nodes.DequantizeLinear(weight, weight_scale, axis=1, block_size=_block(weight, weight_scale))
        nodes.node("MatMul", [x, nodes.Transpose(wide, perm=[1, 0])], outputs=[output])
        return
    assert weight_scale.shape is not None
    if len(weight_scale.shape) == 2:
        assert weight_scale.dtype is not None
        scale = cast(nodes, weight_scale, weight_scale.dtype, FLOAT)
        wide = nodes.DequantizeLinear(weight, scale, axis=1, block_size=_block(weight, weight_scale))
    else:
        wide = nodes.DequantizeLinear(weight, weight_scale, axis=0)
    product = nodes.MatMul(x, nodes.Transpose(wide, perm=[1, 0]))
    if x_token_scale is not None:
        product = nodes.Mul(product, x_token_scale)
    nodes.node("Cast", [product], outputs=[output], attributes={"to": dtype})


def _block(weight: ir.Value, weight_scale: ir.Value) -> int:
    """Inputs that share a scale."""
    assert weight.shape is not None
    assert weight_scale.shape is not None
    inputs, blocks = weight.shape.numpy()[1], weight_scale.shape.numpy()[1]
    return int(inputs // blocks)


def read_linear(product: ir.Node) -> Linear | None:
    """The quantised linear that a MatMul computes, or None."""
    if product.op_type != "MatMul":
        return None
    x, transposed = product.inputs
    transpose = _producer(transposed, "Transpose")
    dequantise = _producer(transpose.inputs[0], "DequantizeLinear") if transpose else None
    if dequantise is None or x is None:
        return None
    weight, weight_scale = dequantise.inputs[:2]
    if widened := _producer(weight_scale, "Cast"):
        weight_scale = widened.inputs[0]
    if weight is None or weight_scale is None or weight.dtype not in KINDS:
        return None
    kind = KINDS[weight.dtype]
    if kind == "int4":
        return Linear(kind=kind, x=x, x_scale=None, weight=weight, weight_scale=weight_scale)
    behind = _producer(x, "DequantizeLinear")
    quantise = _producer(behind.inputs[0], "QuantizeLinear") if behind else None
    if quantise is None or quantise.inputs[0] is None:
        return None
    x = quantise.inputs[0]
    return Linear(
        kind=kind,
        x=x,
        x_scale=quantise.inputs[1],
        weight=weight,
        weight_scale=weight_scale,
        own_scale=_own_scale(x, product.outputs[0]),
    )


def _own_scale(x: ir.Value, product: ir.Value) -> ir.Value | None:
    """The value that an input is divided by and its product multiplied with; nothing else reads that product."""
    division, readers = _producer(x, "Div"), product.consumers()
    if division is None or len(readers) != 1 or readers[0].op_type != "Mul":
        return None
    return division.inputs[1] if division.inputs[1] in readers[0].inputs else None


def _producer(value: ir.Value | None, op_type: str) -> ir.Node | None:
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == op_type else None


def is_as_written(product: ir.Node, linear: Linear, dtype: ir.DataType, bound: float = 0.0) -> bool:
    """Whether all nodes that lead to a quantised product are those that `write_input` and `write_linear` write.

    Args:
        product: The MatMul.
        linear: What `read_linear` has read of it.
        dtype: The graph's type.
        bound: As in `token_scale`.
    """
    nodes, x, own_scale = Nodes(""), linear.x, None
    if linear.own_scale is not None:
        widened = _producer(linear.unscaled, "Cast")
        source = linear.unscaled if dtype == FLOAT or widened is None else widened.inputs[0]
        if source is None:
            return False
        x, own_scale = write_input(nodes, source, None, linear.kind, dtype, bound)
    elif linear.kind != "int4":
        x, own_scale = write_input(nodes, linear.x, linear.x_scale, linear.kind, dtype)
    write_linear(nodes, x, own_scale, linear.weight, linear.weight_scale, ir.Value(), linear.kind, dtype)
    written = next(node for node in nodes.list if node.op_type == "MatMul")
    return all(map(_is_alike, product.inputs, written.inputs))


def _is_alike(one: ir.Value | None, other: ir.Value | None) -> bool:
    """Whether two values are computed by the same nodes from the same values."""
    if one is other:
        return True
    makers = [None if value is None else value.producer() for value in (one, other)]
    first, second = makers
    if first is None or second is None:
        return False
    return (
        (first.domain, first.op_type, len(first.inputs)) == (second.domain, second.op_type, len(second.inputs))
        and _settings(first) == _settings(second)
        and all(map(_is_alike, first.inputs, second.inputs))
    )


def _settings(node: ir.Node) -> dict[str, object]:
    """A node's attributes, tensors by their type, shape and bytes."""
    return {
        name: (value.dtype, tuple(value.shape), value.tobytes()) if isinstance(value, ir.TensorProtocol) else value
        for name, attribute in node.attributes.items()
        for value in [attribute.value]
    }
