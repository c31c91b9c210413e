"""The canonical decoder graph lowered for ONNX Runtime's CPU, in memory.

Enters: a model folder. Leaves: a `Lowered` graph that computes in float32 from the checkpoint's own weights, and the
list of regions in the safetensors files that the runtime hands to it. Float32 weights are used as they lie in the file;
others are widened when they are loaded, except the embedding, of which only the rows in use are.
"""

from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_ir as ir

from ..errors import BuildError
from ..plugins.gqa import cpu as gqa_cpu
from ..plugins.gqa import op as gqa
from ..plugins.moe import cpu as moe_cpu
from ..plugins.moe import op as moe
from ..plugins.nodes import Nodes
from ..spec import FolderSpec, Weight
from .supply import DTYPES, FLOAT, Supply

SESSION = {"session.disable_prepacking": "1"}
"""Prepacking would copy every weight: the file's pages are used instead."""


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
    path = folder / spec.graph
    try:
        model = ir.from_proto(onnx.load(path, load_external_data=False))
    except OSError as error:
        raise BuildError(f"{path}: {error.strerror}: export the model again") from error
    except Exception as error:  # protobuf and onnx-ir raise their own kinds for damaged bytes
        raise BuildError(f"{path}: damaged graph ({error}): export the model again") from error
    lowering = _Lowering(model.graph, spec.model.experts)
    lowered = ir.Model(lowering.lower(), ir_version=model.ir_version, producer_name="arriero")
    return Lowered(
        graph=ir.to_proto(lowered).SerializeToString(),
        weights=tuple(lowering.supply.weights.values()),
        session=SESSION,
    )


class _Lowering:
    """The new graph under construction; values keep their names, floats become float32."""

    def __init__(self, source: ir.Graph, router_experts: int) -> None:
        self.source, self.router_experts = source, router_experts
        self.supply = Supply()
        self.shared = gqa_cpu.Shared()
        self.mapped: dict[ir.Value, ir.Value] = {}

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
        sources = [value for value in node.inputs if value is not None]
        outputs = [self._value(value) for value in node.outputs]
        attributes = {name: attribute.value for name, attribute in node.attributes.items()}
        match node.domain, node.op_type:
            case "", "Transpose" if sources[0].is_initializer():
                pass  # the product that reads it takes the weight as it lies
            case "", "MatMul" if (weight := _transposed_weight(sources[1])) is not None:
                inputs = [self._input(sources[0]), self.supply.widened(weight)]
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
                inputs = [self._input(value) for value in sources]
                gqa_cpu.lower(nodes, inputs, outputs, gqa.Attributes(**attributes), self.shared)
            case moe.DOMAIN, moe.NAME:
                hidden, router_logits, gate_up, down = sources
                experts = list(zip(self.supply.slices(gate_up), self.supply.slices(down), strict=True))
                tokens = self._input(hidden), self._input(router_logits)
                in_part = len(experts) < self.router_experts
                moe_cpu.lower(nodes, *tokens, experts, outputs[0], moe.Attributes(**attributes), in_part=in_part)
            case domain, op_type:
                raise BuildError(f"{node.name}: {domain}.{op_type} has no lowering for the CPU: export the model again")

    def _value(self, value: ir.Value) -> ir.Value:
        """The new graph's value for one of the old graph's."""
        if value not in self.mapped:
            dtype = FLOAT if value.dtype in DTYPES else value.dtype
            kind = None if dtype is None else ir.TensorType(dtype)
            self.mapped[value] = ir.Value(name=value.name, shape=value.shape, type=kind)
        return self.mapped[value]

    def _input(self, value: ir.Value) -> ir.Value:
        return self.supply.widened(value) if value.is_initializer() else self._value(value)


def _transposed_weight(value: ir.Value) -> ir.Value | None:
    """The initializer that a value is the transpose of."""
    producer = value.producer()
    if producer is None or producer.op_type != "Transpose":
        return None
    source = producer.inputs[0]
    return source if source is not None and source.is_initializer() else None
