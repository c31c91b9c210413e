"""The canonical decoder graph lowered for ONNX Runtime's CPU, in memory.

Enters: a model folder. Leaves: a `Lowered` graph that computes in float32 from the checkpoint's own weights, and the
list of regions in the safetensors files that the runtime hands to it. Float32 weights are used as they lie in the file;
others are widened when they are loaded, except the embedding, of which only the rows in use are.
"""

import math
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
from ..spec import DType, FolderSpec, Weight

FLOAT = ir.DataType.FLOAT
DTYPES: dict[ir.DataType, DType] = {
    ir.DataType.FLOAT: "float32",
    ir.DataType.FLOAT16: "float16",
    ir.DataType.BFLOAT16: "bfloat16",
}
SESSION = {"session.disable_prepacking": "1"}
"""Prepacking would copy every weight: the file's pages are used instead."""

PLACEHOLDER = "spec.json"
"""External location of initializers, which the runtime supplies by name."""


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
    lowering = _Lowering(model.graph)
    graph = lowering.lower()
    lowered = ir.Model(graph, ir_version=model.ir_version, producer_name="arriero")
    return Lowered(
        graph=ir.to_proto(lowered).SerializeToString(), weights=tuple(lowering.weights.values()), session=SESSION
    )


class _Lowering:
    """The new graph under construction; values keep their names."""

    def __init__(self, source: ir.Graph) -> None:
        self.source = source
        self.weights: dict[str, Weight] = {}
        self.initializers: dict[str, ir.Value] = {}
        self.shared = gqa_cpu.Shared()
        self.mapped: dict[ir.Value, ir.Value] = {}
        self.nodes: list[ir.Node] = []

    def lower(self) -> ir.Graph:
        """Lowers node by node, in order."""
        inputs = [self._value(value) for value in self.source.inputs]
        for node in self.source:
            if node.op_type == "Transpose" and self._initializer(node.inputs[0]) is not None:
                continue
            nodes = Nodes(f"{node.name}/")
            match node.domain, node.op_type:
                case gqa.DOMAIN, gqa.NAME:
                    attributes = gqa.Attributes(**{a.name: a.value for a in node.attributes.values()})
                    gqa_cpu.lower(
                        nodes,
                        [self._input(value) for value in node.inputs],
                        [self._value(value) for value in node.outputs],
                        attributes,
                        self.shared,
                    )
                case moe.DOMAIN, moe.NAME:
                    self._lower_moe(nodes, node)
                case "", "MatMul" if self._transposed(node.inputs[1]) is not None:
                    weight = self._supplied(self._transposed(node.inputs[1]))
                    self._write(nodes, node, "FusedMatMul", [self._input(node.inputs[0]), weight], {"transB": 1})
                case "", "Gather" if self._initializer(node.inputs[0]) is not None:
                    self._lower_embedding(nodes, node)
                case "", _:
                    self._copy(nodes, node)
                case _:
                    raise BuildError(
                        f"{node.domain}.{node.op_type} has no lowering for the CPU: export with this version"
                    )
            self.nodes.extend(nodes.list)
        return ir.Graph(
            inputs,
            [self._value(value) for value in self.source.outputs],
            nodes=self.nodes,
            initializers=list(self.initializers.values()),
            opset_imports={**self.source.opset_imports, "com.microsoft": 1},
            name=self.source.name,
        )

    def _lower_moe(self, nodes: Nodes, node: ir.Node) -> None:
        hidden, router_logits, gate_up, down = node.inputs
        count = int(gate_up.shape[0])
        experts = [(self._expert(gate_up, index), self._expert(down, index)) for index in range(count)]
        attributes = moe.Attributes(**{a.name: a.value for a in node.attributes.values()})
        moe_cpu.lower(
            nodes, self._input(hidden), self._input(router_logits), experts, self._value(node.outputs[0]), attributes
        )

    def _lower_embedding(self, nodes: Nodes, node: ir.Node) -> None:
        """Rows are taken in the stored type and widened after."""
        table, ids = node.inputs
        rows = nodes.Gather(self._supplied(table, widened=False), self._input(ids), axis=0)
        nodes.node("Cast", [rows], outputs=[self._value(node.outputs[0])], attributes={"to": FLOAT})

    def _copy(self, nodes: Nodes, node: ir.Node) -> None:
        attributes = {name: attribute.value for name, attribute in node.attributes.items()}
        if node.op_type == "Cast" and ir.DataType(attributes["to"]) in DTYPES:
            attributes["to"] = FLOAT
        self._write(nodes, node, node.op_type, [self._input(value) for value in node.inputs], attributes)

    def _write(
        self, nodes: Nodes, node: ir.Node, op_type: str, inputs: list[ir.Value | None], attributes: dict[str, object]
    ) -> None:
        domain = "com.microsoft" if op_type == "FusedMatMul" else ""
        outputs = [self._value(value) for value in node.outputs]
        nodes.node(op_type, inputs, outputs=outputs, domain=domain, attributes=attributes)

    def _value(self, value: ir.Value) -> ir.Value:
        """The new graph's value for one of the old graph's, float32 where that was another float."""
        if value not in self.mapped:
            dtype = FLOAT if value.dtype in DTYPES else value.dtype
            kind = None if dtype is None else ir.TensorType(dtype)
            self.mapped[value] = ir.Value(name=value.name, shape=value.shape, type=kind)
        return self.mapped[value]

    def _input(self, value: ir.Value | None) -> ir.Value | None:
        if value is None:
            return None
        return self._value(value) if self._initializer(value) is None else self._supplied(value)

    @staticmethod
    def _initializer(value: ir.Value | None) -> ir.TensorProtocol | None:
        return value.const_value if value is not None and value.is_initializer() else None

    def _transposed(self, value: ir.Value | None) -> ir.Value | None:
        """The initializer that a value is the transpose of."""
        producer = value.producer() if value is not None else None
        if producer is None or producer.op_type != "Transpose":
            return None
        return producer.inputs[0] if self._initializer(producer.inputs[0]) is not None else None

    def _supplied(self, value: ir.Value | None, *, widened: bool = True) -> ir.Value:
        """The new graph's initializer for a weight, which the runtime supplies; small constants stay inside."""
        assert value is not None
        tensor = self._initializer(value)
        if not isinstance(tensor, ir.ExternalTensor):
            name = str(value.name)
            self.initializers.setdefault(
                name, ir.Value(name=name, shape=tensor.shape, type=value.type, const_value=tensor)
            )
            return self.initializers[name]
        stored = DTYPES[tensor.dtype]
        convert: DType = "float32" if widened else stored
        suffix = "" if convert == "float32" or stored == "float32" else f":{stored}"
        return self._region(f"{value.name}{suffix}", tensor, tensor.offset or 0, tensor.shape.numpy(), convert)

    def _expert(self, value: ir.Value | None, index: int) -> ir.Value:
        """The initializer of one expert's matrix within a stacked weight."""
        assert value is not None
        tensor = self._initializer(value)
        assert isinstance(tensor, ir.ExternalTensor)
        shape = tuple(tensor.shape.numpy())[1:]
        size = int(tensor.length) // int(tensor.shape[0])
        return self._region(f"{value.name}[{index}]", tensor, (tensor.offset or 0) + index * size, shape, "float32")

    def _region(
        self, name: str, tensor: ir.ExternalTensor, offset: int, shape: tuple[int, ...], convert: DType
    ) -> ir.Value:
        if name not in self.weights:
            self.weights[name] = Weight(
                name=name,
                file=str(tensor.location),
                offset=offset,
                shape=tuple(map(int, shape)),
                dtype=DTYPES[tensor.dtype],
                convert=convert,
            )
            dtype = FLOAT if convert == "float32" else tensor.dtype
            length = dtype.itemsize * math.prod(shape)
            placeholder = ir.ExternalTensor(
                PLACEHOLDER, 0, int(length), dtype, shape=ir.Shape(shape), name=name, base_dir=""
            )
            self.initializers[name] = ir.Value(
                name=name, shape=placeholder.shape, type=ir.TensorType(dtype), const_value=placeholder
            )
        return self.initializers[name]
