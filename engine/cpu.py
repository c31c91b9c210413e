"""A canonical graph, the decoder's or the vision tower's, lowered for ONNX Runtime's CPU, in memory.

Enters: a model folder. Leaves: a `Lowered` graph that computes in float32 from the checkpoint's own weights, and the
list of regions in the safetensors files that the runtime hands to it. Float32 weights are used as they lie in the file;
others are widened when they are loaded, except the embedding, of which only the rows in use are.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from ..errors import BuildError
from ..plugins.gqa import cpu as gqa_cpu
from ..plugins.gqa import op as gqa
from ..plugins.linear import Linear, read_linear
from ..plugins.moe import cpu as moe_cpu
from ..plugins.moe import op as moe
from ..plugins.nodes import Nodes, dims
from ..plugins.product import Matrix, largest_block, multiply, multiply_planes, multiply_stored, quantise
from ..spec import FolderSpec, Stored, VisionPart, Weight
from .graph import open_graph
from .supply import DTYPES, FLOAT, Supply

SESSION = {"session.disable_prepacking": "1"}
"""Prepacking would copy every weight: the file's pages are used instead."""
INTEGER_SESSION = {"session.prepack.enable_parallel": "1"}
"""Integer kernels are slow without it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Lowered:
    """A graph for one target and what its session needs besides.

    Attributes:
        graph: Serialized ONNX without weights.
        weights: The regions of weight files to supply, by initializer name.
        session: Session configuration entries.
    """

    graph: bytes
    weights: tuple[Weight, ...]
    session: dict[str, str]


def lower_for_cpu(folder: Path, spec: FolderSpec) -> Lowered:
    """Lowers a model folder's decoder.

    Raises:
        BuildError: The graph is damaged or holds an op that has no lowering.
    """
    return _lower(folder / spec.graph, spec.model.experts)


def lower_tower_for_cpu(folder: Path, vision: VisionPart) -> Lowered:
    """Lowers a model folder's vision tower; raises what `lower_for_cpu` does."""
    return _lower(folder / vision.graph, 0)


def _lower(path: Path, router_experts: int) -> Lowered:
    model = open_graph(path)
    lowering = _Lowering(model.graph, router_experts)
    lowered = ir.Model(lowering.lower(), ir_version=model.ir_version, producer_name="arriero")
    return Lowered(
        graph=ir.to_proto(lowered).SerializeToString(),
        weights=tuple(lowering.supply.weights.values()),
        session=INTEGER_SESSION if lowering.has_integers else SESSION,
    )


class _Lowering:
    """The new graph under construction; values keep their names, floats become float32."""

    def __init__(self, source: ir.Graph, router_experts: int) -> None:
        self.source, self.router_experts = source, router_experts
        self.supply = Supply()
        self.shared = gqa_cpu.Shared()
        self.mapped: dict[ir.Value, ir.Value] = {}
        self.linears = {node: linear for node in source if (linear := read_linear(node)) is not None}
        self.absorbed = {node for product in self.linears for node in absorbed(product)}
        self.blocks = {node: block for node, linear in self.linears.items() if (block := _int8_block(linear))}
        self.absorbed |= {part for node in self.blocks for part in self.linears[node].scaling}
        self.quantised: dict[tuple[ir.Value, ir.Value], ir.Value] = {}

    @property
    def has_integers(self) -> bool:
        """Whether weights are given to integer kernels."""
        return any(weight.convert in ("int8", "uint8", "uint4") for weight in self.supply.weights.values())

    def lower(self) -> ir.Graph:
        """Lowers node by node, in order."""
        inputs = [self._value(value) for value in self.source.inputs]
        written: list[ir.Node] = []
        for node in self.source:
            nodes = Nodes(f"{node.name}/")
            self._lower_node(nodes, node)
            written.extend(nodes.list)
        return ir.Graph(
            inputs,
            [self._value(value) for value in self.source.outputs],
            nodes=written,
            initializers=list(self.supply.initializers.values()),
            opset_imports={**self.source.opset_imports, "com.microsoft": 1},
            name=self.source.name,
        )

    def _lower_node(self, nodes: Nodes, node: ir.Node) -> None:
        if node in self.absorbed:
            return  # the product that reads it takes the weight or the activations as they are
        sources = [value for value in node.inputs if value is not None]
        outputs = [self._value(value) for value in node.outputs]
        attributes = {name: attribute.value for name, attribute in node.attributes.items()}
        match node.domain, node.op_type:
            case "", "MatMul" if node in self.linears:
                if node in self.blocks:
                    self._lower_unscaled(nodes, node)
                else:
                    self.mapped[node.outputs[0]] = self._lower_linear(nodes, self.linears[node])
            case "", "Transpose" if sources[0].is_initializer():
                pass  # the product that reads it takes the weight as it lies
            case "", "MatMul" if (weight := _transposed_weight(sources[1])) is not None:
                x = self._input(sources[0])
                if self._has_planes(node, weight):
                    self.mapped[node.outputs[0]] = self._lower_planes(nodes, x, weight)
                    return
                inputs = [x, self.supply.widened(weight)]
                nodes.node("FusedMatMul", inputs, outputs=outputs, domain="com.microsoft", attributes={"transB": 1})
            case "", "Gather" if sources[0].is_initializer():
                rows = nodes.Gather(self.supply.stored(sources[0]), self._input(sources[1]), axis=0)
                nodes.node("Cast", [rows], outputs=outputs, attributes={"to": FLOAT})
            case "", "Cast" if ir.DataType(attributes["to"]) in DTYPES:
                nodes.node("Cast", [self._input(sources[0])], outputs=outputs, attributes={"to": FLOAT})
            case "", _:
                optional = [None if value is None else self._input(value) for value in node.inputs]
                nodes.node(node.op_type, optional, outputs=outputs, attributes=attributes)
            case gqa.DOMAIN, gqa.NAME:
                given = [None if value is None else self._input(value) for value in node.inputs]
                gqa_cpu.lower(nodes, given, outputs, gqa.Attributes(**attributes), self.shared)
            case moe.DOMAIN, moe.NAME:
                self._lower_experts(nodes, sources, outputs[0], moe.Attributes(**attributes))
            case domain, op_type:
                raise BuildError(f"{node.name}: {domain}.{op_type} has no lowering for the CPU: export the model again")

    def _lower_linear(self, nodes: Nodes, linear: Linear) -> ir.Value:
        """A quantised linear; an input that several read is quantised once."""
        count, size = dims(linear.weight)
        x = self._input(linear.x)
        if linear.x_scale is None:
            block = size // dims(linear.weight_scale)[1]
            weight = self.supply.part(linear.weight, convert="uint4", shape=(count, size // block, block))
            return multiply(
                nodes, x, Matrix(kind="int4", weight=weight, scale=self.supply.widened(linear.weight_scale))
            )
        x_scale = self._input(linear.x_scale)
        if (linear.x, linear.x_scale) not in self.quantised:
            self.quantised[linear.x, linear.x_scale] = quantise(nodes, x, x_scale, linear.kind)
        is_int8 = linear.kind == "int8"
        matrix = Matrix(
            kind=linear.kind,
            weight=self.supply.part(linear.weight, convert="int8" if is_int8 else "float32", transposed=is_int8),
            scale=self.supply.widened(linear.weight_scale),
            is_turned=not is_int8,
        )
        return multiply_stored(nodes, self.quantised[linear.x, linear.x_scale], x_scale, matrix)

    def _lower_unscaled(self, nodes: Nodes, product: ir.Node) -> None:
        """An int8 linear whose kernel quantises activations itself, so that there is nothing to scale around it."""
        linear, block = self.linears[product], self.blocks[product]
        count, size = dims(linear.weight)
        matrix = Matrix(
            kind="int8",
            weight=self.supply.part(linear.weight, convert="uint8", shape=(count, size // block, block)),
            scale=self.supply.part(linear.weight_scale, shape=(count, 1), repeats=size // block),
            has_blocks=True,
        )
        scaled = product.outputs[0].consumers()[0]
        self.mapped[scaled.outputs[0]] = multiply(nodes, self._input(linear.unscaled), matrix)
        self.absorbed.add(scaled)

    def _has_planes(self, node: ir.Node, weight: ir.Value) -> bool:
        """Whether a linear is the unquantised head of a quantised model: its 16 bits are read as such, not as 32."""
        is_head = str(node.name).startswith("lm_head/") and bool(self.linears)
        return is_head and weight.dtype != FLOAT and largest_block(dims(weight)[1]) > 0

    def _lower_planes(self, nodes: Nodes, x: ir.Value, weight: ir.Value) -> ir.Value:
        count, size = dims(weight)
        block = largest_block(size)
        shape = (count, size // block, block)
        high, low = (
            Matrix(
                kind="int8",
                weight=self.supply.plane(weight, name, shape, "uint8"),
                scale=self.supply.plane(weight, name, shape, "float32"),
                has_blocks=True,
            )
            for name in ("high", "low")
        )
        return multiply_planes(nodes, x, high, low)

    def _lower_experts(self, nodes: Nodes, sources: list[ir.Value], output: ir.Value, settings: moe.Attributes) -> None:
        tokens = self._input(sources[0]), self._input(sources[1])
        weights, scales, statics = sources[2:4], sources[4:6], sources[6:]
        count, hidden = dims(weights[0])[0], dims(weights[1])[2]
        in_part = count < self.router_experts
        sizes = [dims(weight)[1] for weight in weights]
        group = sizes[0] // dims(scales[0])[1] if settings.quantisation == "int4" else 0
        block = 0 if in_part else moe_cpu.stacked_block(settings, sizes, group, static=bool(statics))
        if block:
            pair = [self._stacked(weights[part], scales[part], block, interleaved=not part) for part in range(2)]
            moe_cpu.lower_stacked(nodes, *tokens, pair[0], pair[1], block, output, settings)
            return
        experts = self._experts(sources[2:], settings)
        moe_cpu.lower(nodes, *tokens, experts, hidden, output, settings, in_part=in_part)

    def _stacked(self, weight: ir.Value, scale: ir.Value, block: int, *, interleaved: bool) -> moe_cpu.Stacked:
        """All experts' matrices of one kind, and their scales block by block."""
        laid_out: dict[str, Any] = {"transposed": True, "stacked": True, "interleaved": interleaved}
        repeats = dims(weight)[1] // dims(scale)[1] // block
        unsigned: Stored = "uint4" if weight.dtype == ir.DataType.INT4 else "uint8"
        return moe_cpu.Stacked(
            weight=self.supply.part(weight, convert=unsigned, **laid_out),
            scale=self.supply.part(scale, repeats=repeats, **laid_out),
        )

    def _experts(self, sources: list[ir.Value], settings: moe.Attributes) -> list[tuple[Matrix, Matrix]]:
        """Each expert's two matrices, from the op's weights and scales."""
        weights, scales, input_scales = sources[:2], sources[2:4], sources[4:]
        experts = []
        for index in range(dims(weights[0])[0]):
            pair = [self._expert_matrix(part, index, settings, weights, scales, input_scales) for part in range(2)]
            experts.append((pair[0], pair[1]))
        return experts

    def _expert_matrix(
        self,
        part: int,
        index: int,
        settings: moe.Attributes,
        weights: list[ir.Value],
        scales: list[ir.Value],
        input_scales: list[ir.Value],
    ) -> Matrix:
        kind, weight = settings.quantisation, weights[part]
        _, rows, columns = dims(weight)
        if kind == "none":
            return Matrix(kind=kind, weight=self.supply.part(weight, index))
        if kind == "int4":
            blocks = dims(scales[part])[1]
            turned = self.supply.part(
                weight, index, convert="uint4", shape=(blocks, rows // blocks, columns), transposed=True
            )
            return Matrix(kind=kind, weight=turned, scale=self.supply.part(scales[part], index, transposed=True))
        return Matrix(
            kind=kind,
            weight=self.supply.part(weight, index, convert="int8" if kind == "int8" else "float32"),
            scale=self.supply.part(scales[part], index, shape=(columns,)),
            input_scale=self.supply.part(input_scales[part], index) if input_scales else None,
            input_bound=settings.activation_bound,
        )

    def _value(self, value: ir.Value) -> ir.Value:
        """The new graph's value for one of the old graph's."""
        if value not in self.mapped:
            dtype = FLOAT if value.dtype in DTYPES else value.dtype
            kind = None if dtype is None else ir.TensorType(dtype)
            self.mapped[value] = ir.Value(name=value.name, shape=value.shape, type=kind)
        return self.mapped[value]

    def _input(self, value: ir.Value) -> ir.Value:
        return self.supply.widened(value) if value.is_initializer() else self._value(value)


def _int8_block(linear: Linear) -> int:
    """Inputs of an int8 linear that its kernel quantises together; 0 where activations are quantised as written."""
    return 0 if linear.kind != "int8" or linear.own_scale is None else largest_block(dims(linear.weight)[1])


def absorbed(product: ir.Node) -> list[ir.Node]:
    """The nodes that a quantised linear is written with, but for its product."""
    pending, found = list(product.inputs), []
    while pending:
        value = pending.pop()
        node = None if value is None else value.producer()
        if node is not None and node.op_type in ("Transpose", "DequantizeLinear", "QuantizeLinear"):
            found.append(node)
            pending += node.inputs[:1] if node.op_type != "QuantizeLinear" else []
    return found


def _transposed_weight(value: ir.Value) -> ir.Value | None:
    """The initializer that a value is the transpose of."""
    producer = value.producer()
    if producer is None or producer.op_type != "Transpose":
        return None
    source = producer.inputs[0]
    return source if source is not None and source.is_initializer() else None
