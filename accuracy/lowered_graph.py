"""A graph lowered for the CPU, looked into: the value that each unit computes, and subgraphs cut out.

Enters: a decoder's or a vision tower's graph. Nothing of its weights is read here. Nodes are named `layers.N/unit/…`
by export and lowering, and the last node of a unit computes what the unit stands for.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import onnx

from ..errors import AccuracyError
from ..spec.stored_weights import Weight


@dataclass(frozen=True, kw_only=True, slots=True)
class Subgraph:
    """Some nodes of a graph, as a graph of their own.

    Attributes:
        graph: Serialized ONNX.
        weights: Regions of weight files that the runtime hands to it.
        shapes: Inputs of which only the shape is asked for.
    """

    graph: bytes
    weights: tuple[Weight, ...]
    shapes: tuple[str, ...]


class LoweredGraph:
    """The graph of a folder.

    Args:
        graph: Serialized ONNX.
        weights: The regions of weight files that it is given.
        flags: Settings that its session needs.
    """

    def __init__(self, graph: bytes, weights: Sequence[Weight], flags: Mapping[str, str]) -> None:
        self.weights, self.flags = tuple(weights), dict(flags)
        self.model = onnx.load_from_string(graph)
        self.nodes = list(self.model.graph.node)
        self.producers = {name: number for number, node in enumerate(self.nodes) for name in node.output if name}
        self.units = {"/".join(node.name.split("/")[:2]): node for node in self.nodes}  # of a unit the last stays

    @property
    def takes_images(self) -> bool:
        """Whether image features are among its inputs."""
        return any(value.name == "image_features" for value in self.model.graph.input)

    def output_of(self, unit: str) -> str | None:
        """The value that a unit computes, as in `layers.3/self_attn.q_proj`; None where the graph has no such unit."""
        return self.units[unit].output[0] if unit in self.units else None

    def unit_reading(self, weight: str) -> str | None:
        """The unit that a weight is read in, as in `head/MatMul_11`; None where nothing reads it."""
        for node in self.nodes:
            if any(name.partition(":")[0] == weight for name in node.input):
                return "/".join(node.name.split("/")[:2])
        return None

    def with_bias(self, value: str, bias: str) -> str:
        """The sum of a value and a bias; the value itself where it is summed with none."""
        for node in self.nodes:
            if node.op_type == "Add" and {*node.input} == {value, bias}:
                return str(node.output[0])
        return value

    def input_of(self, unit: str) -> str:
        """The first input of a unit's first node.

        Raises:
            AccuracyError: The graph has no such unit.
        """
        for node in self.nodes:
            if node.name.startswith(f"{unit}/"):
                return str(node.input[0])
        raise AccuracyError(f"the graph has no {unit}: it is not as Arriero writes it, export the model again")

    def norm_input(self, weight: str) -> str:
        """The input of the norm that reads a weight.

        Raises:
            AccuracyError: The graph has no such norm.
        """
        for node in self.nodes:
            if node.op_type == "LayerNormalization" and weight in node.input:
                return str(node.input[0])
        raise AccuracyError(f"the graph reads {weight} in no norm: it is not as Arriero writes it, export it again")

    def head_input(self) -> str:
        """The hidden states behind the last layer.

        Raises:
            AccuracyError: The graph has no head.
        """
        for node in self.nodes:
            if node.name.startswith("lm_head/") and node.op_type == "GatherND":
                return str(node.input[0])
        raise AccuracyError("the graph has no lm_head: it is not as Arriero writes it, export the model again")

    def watching(self, names: Collection[str]) -> bytes:
        """The graph with some of its values as outputs too."""
        model = onnx.ModelProto()
        model.CopyFrom(self.model)
        model.graph.output.extend(_float_value(name) for name in names)
        return model.SerializeToString()

    def cut(self, inputs: Sequence[str], outputs: Sequence[str]) -> Subgraph:
        """The nodes between some values and others.

        Args:
            inputs: Values to be given: floats, or inputs of the graph.
            outputs: Values to be computed: floats, or outputs of the graph.

        Raises:
            AccuracyError: An output depends on more than the inputs.
        """
        layer = outputs[0].partition("/")[0]
        given = {value.name: value for value in (*self.model.graph.input, *self.model.graph.output)}
        known = {each.name: each for each in self.model.graph.initializer}
        wanted, used, shapes, needed = list(outputs), set[str](), set[str](), set[int]()
        while wanted:
            name = wanted.pop()
            if name in inputs or name in used:
                continue
            used.add(name)
            if name in known:
                continue
            number = self.producers.get(name)
            if number is None:
                raise AccuracyError(f"{outputs[0]} depends on {name}: the graph is not as Arriero writes it")
            needed.add(number)
            node = self.nodes[number]
            if (
                node.op_type == "Shape"
                and node.input[0] in self.producers
                and not node.input[0].startswith(f"{layer}/")
            ):
                shapes.update({node.input[0]} - {*inputs})  # of another layer: what all compute alike from the length
                continue
            wanted += list(_read(node))
        graph = onnx.GraphProto(name=layer)
        graph.node.extend(self.nodes[number] for number in sorted(needed))
        graph.initializer.extend(known[name] for name in used if name in known)
        graph.input.extend(given.get(name, _float_value(name)) for name in (*inputs, *sorted(shapes)))
        graph.output.extend(given.get(name, _float_value(name)) for name in outputs)
        model = onnx.ModelProto(ir_version=self.model.ir_version, opset_import=self.model.opset_import, graph=graph)
        weights = tuple(weight for weight in self.weights if weight.name in used)
        return Subgraph(graph=model.SerializeToString(), weights=weights, shapes=tuple(sorted(shapes)))


def _float_value(name: str) -> onnx.ValueInfoProto:
    value = onnx.ValueInfoProto(name=name)
    value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    return value


def _read(node: onnx.NodeProto) -> Iterator[str]:
    """All values that a node reads, those that its branches take from around them too."""
    yield from (name for name in node.input if name)
    for attribute in node.attribute:
        if attribute.HasField("g"):
            made = {name for inner in attribute.g.node for name in inner.output}
            made |= {each.name for each in attribute.g.initializer}
            for inner in attribute.g.node:
                yield from (name for name in _read(inner) if name not in made)
