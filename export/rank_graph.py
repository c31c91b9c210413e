"""A decoder's canonical graph, quantised or not, made that of one rank.

Enters: the whole model's graph, a `Split`, and where the rank's portion of each tensor lies. Leaves: the same graph
over narrower weights and caches, with an `AllReduce` wherever the rank computes a part of a sum. Ranks differ in their
weights, in the number of their first expert and in the columns of the logits.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx_ir as ir

from ..errors import ExportError
from ..files.safetensors import Region
from ..plugins.all_reduce import op as all_reduce
from ..plugins.gqa import op as gqa
from ..plugins.gqa.body import body as gqa_body
from ..plugins.moe import op as moe
from ..plugins.moe.body import body as moe_body
from ..plugins.nodes import Nodes, dims, ints, onnx_type
from ..spec.geometry import ModelSpec
from .quantised_graph import PLACED
from .rank_weights import EMBEDDING, HEAD
from .split import Split

PlaceOf = Callable[[str], tuple[str, Region]]
"""The file's name and the region of the rank's portion of a tensor, by the tensor's name in the graph."""


def narrow_graph(model: ir.Model, spec: ModelSpec, split: Split, rank: int, place_of: PlaceOf) -> None:
    """Rewrites the whole model's decoder graph in place.

    Args:
        model: The graph.
        spec: Geometry of the whole model.
        split: Layout over ranks.
        rank: Whose graph it becomes.
        place_of: Finds the rank's portions.

    Raises:
        ExportError: The graph is not one that export or calibrate writes.
    """
    _Narrowing(model, spec, split, rank, place_of).rewrite()


def point_into(value: ir.Value, file: str, region: Region) -> None:
    """Points an initializer at a region of a file."""
    dtype, shape = PLACED[region.dtype], region.shape
    if dtype == ir.DataType.INT4:
        shape = (*shape[:-1], shape[-1] * 2)
    value.const_value = ir.ExternalTensor(
        file, region.offset, region.size, dtype, shape=ir.Shape(shape), name=str(value.name), base_dir=Path(".")
    )
    value.shape, value.type = ir.Shape(shape), ir.TensorType(dtype)


class _Narrowing:
    """The graph under change."""

    def __init__(self, model: ir.Model, spec: ModelSpec, split: Split, rank: int, place_of: PlaceOf) -> None:
        self.model, self.graph, self.spec = model, model.graph, spec
        self.split, self.rank, self.place_of = split, rank, place_of
        self.dtype = onnx_type(spec.dtype)

    def rewrite(self) -> None:
        """Sums first, since they are found by what the whole graph computes; then weights, caches and ops."""
        if self.split.experts_only:
            for node in self._of_type(moe.DOMAIN, moe.NAME):
                self._sum(node.outputs[0], f"{node.name}/{all_reduce.NAME}")
        else:
            self._untie_head()
            for index in range(len(self.spec.layers)):
                self._sum_layer(index)
            self._sum_logits()
            self._forget_shapes()
        for value in list(self.graph.initializers.values()):
            self._place(value)
        for value in (*self.graph.inputs, *self.graph.outputs):
            if str(value.name).startswith(("past.", "present.")) and value.shape is not None:
                shape = list(value.shape)
                value.shape = ir.Shape([shape[0], self.spec.kv_heads // self.split.parts, *shape[2:]])
        for node in self._of_type(gqa.DOMAIN, gqa.NAME):
            self._narrow_attention(node)
        for node in self._of_type(moe.DOMAIN, moe.NAME):
            self._narrow_experts(node)

    def _of_type(self, domain: str, op_type: str) -> list[ir.Node]:
        return [node for node in self.graph if (node.domain, node.op_type) == (domain, op_type)]

    def _sum_layer(self, index: int) -> None:
        """Puts a sum before each of a layer's two residual connections."""
        attended = self._product(f"layers.{index}.self_attn.o_proj.weight")
        residual = self._only(attended, "Add", index)
        self._sum(attended, f"layers.{index}/self_attn.o_proj/{all_reduce.NAME}")
        stream = residual.outputs[0]
        joins = [node for node in stream.consumers() if node.op_type == "Add" and not node.domain]
        fed = [value for node in joins for value in node.inputs if value is not stream]
        if len(fed) != 1 or fed[0] is None:
            raise self._unknown(index)
        self._sum(fed[0], f"layers.{index}/feed_forward/{all_reduce.NAME}")

    def _product(self, name: str) -> ir.Value:
        """The output of the linear whose weight's name ends so, in the graph's type."""
        found = [value for key, value in self.graph.initializers.items() if key.endswith(name)]
        value = found[0] if found else None
        while value is not None:
            readers = [node for node in value.consumers() if node.op_type in WAY]
            if len(readers) != 1:
                break
            value = readers[0].outputs[0]
            if readers[0].op_type == "MatMul":
                while [node.op_type for node in value.consumers()] in (["Mul"], ["Cast"]):
                    value = value.consumers()[0].outputs[0]
                return value
        raise ExportError(f"the graph has no linear {name!r}: export the model again")

    def _only(self, value: ir.Value, op_type: str, index: int) -> ir.Node:
        readers = value.consumers()
        if len(readers) != 1 or readers[0].op_type != op_type:
            raise self._unknown(index)
        return readers[0]

    @staticmethod
    def _unknown(index: int) -> ExportError:
        return ExportError(f"layer {index} of the graph is not as export writes it: export the model again")

    def _sum(self, part: ir.Value, name: str) -> None:
        """Puts an `AllReduce` between a value and all that read it."""
        producer = part.producer()
        assert producer is not None
        total = ir.Value(name=name, shape=part.shape, type=part.type)
        ir.convenience.replace_all_uses_with(part, total)
        node = ir.Node(
            all_reduce.DOMAIN,
            all_reduce.NAME,
            [part],
            attributes=[ir.AttrInt64("ranks", self.split.ranks)],
            outputs=[total],
            name=name,
        )
        self.graph.insert_after(producer, node)

    def _sum_logits(self) -> None:
        """Puts each rank's columns of the logits in their places, zeros beside them, and sums."""
        widening = self.graph.outputs[0].producer()
        part = None if widening is None else widening.inputs[0]
        if widening is None or widening.op_type != "Cast" or part is None:
            raise ExportError("the graph's logits are not as export writes them: export the model again")
        size = self.spec.vocab_size
        (((start, stop),),) = self.split.portion(HEAD, (size,), self.rank).spans
        nodes = Nodes("lm_head/columns/")
        padded = nodes.Pad(part, ints(0, 0, start, 0, 0, size - stop))
        padded.shape, padded.type = part.shape, part.type
        widening.replace_input_with(0, padded)
        self.graph.insert_before(widening, nodes.list)
        self._sum(padded, f"lm_head/{all_reduce.NAME}")
        part.shape = None

    def _untie_head(self) -> None:
        """Gives a head that is the embedding an initializer of its own, of the rank's rows."""
        if not self.spec.tied_embeddings:
            return
        name, embedding = next(each for each in self.graph.initializers.items() if each[0].endswith(EMBEDDING))
        turning = next((node for node in embedding.consumers() if node.op_type == "Transpose"), None)
        if turning is None:
            raise ExportError("the graph's LM head is not its embedding: export the model again")
        head = ir.Value(name=name.removesuffix(EMBEDDING) + HEAD, shape=embedding.shape, type=embedding.type)
        head.const_value = embedding.const_value
        self.graph.register_initializer(head)
        turning.replace_input_with(0, head)

    def _forget_shapes(self) -> None:
        """Forgets the shapes of what is narrower on a rank: from attention or a split linear up to a sum."""
        pending = [node.outputs[0] for node in self._of_type(gqa.DOMAIN, gqa.NAME)]
        for name in self.graph.initializers:
            if name.endswith(NARROWED) and ".experts." not in name:
                pending.append(self._product(name))
        while pending:
            value = pending.pop()
            value.shape = None
            for node in value.consumers():
                if node.op_type not in ("MatMul", gqa.NAME, moe.NAME):
                    pending += [output for output in node.outputs if output.shape is not None]

    def _place(self, value: ir.Value) -> None:
        """Points an initializer at the rank's portion, or cuts it out of one that the graph holds."""
        tensor, name = value.const_value, str(value.name)
        assert tensor is not None
        if isinstance(tensor, ir.ExternalTensor):
            point_into(value, *self.place_of(name))
            return
        whole = tuple(tensor.shape.numpy())
        portion = self.split.portion(name, whole, self.rank)
        if portion.shape == whole:
            return
        array = tensor.numpy()
        for axis, spans in enumerate(portion.spans):
            array = np.concatenate([array.take(range(*span), axis) for span in spans], axis)
        value.const_value, value.shape = ir.tensor(array, name=name), ir.Shape(array.shape)

    def _narrow_attention(self, node: ir.Node) -> None:
        for name in ("heads", "kv_heads"):
            count = node.attributes[name].as_int() // self.split.parts
            node.attributes[name] = ir.AttrInt64(name, count)
        cache = node.inputs[3]
        assert cache is not None
        attributes = gqa.Attributes(**{name: attribute.value for name, attribute in node.attributes.items()})
        rope = len(node.inputs) > 6 and node.inputs[6] is not None
        stored = None if cache.dtype == self.dtype else cache.dtype
        body = gqa_body(attributes, self.spec.head_dim, rope, self.dtype, node.overload, stored)
        self.model.functions[body.identifier()] = body

    def _narrow_experts(self, node: ir.Node) -> None:
        first = self.split.first_expert(self.spec, self.rank)
        if first:
            node.attributes["first_expert"] = ir.AttrInt64("first_expert", first)
        attributes = moe.Attributes(**{name: attribute.value for name, attribute in node.attributes.items()})
        in_part = dims(node.inputs[2])[0] < self.spec.experts
        body = moe_body(attributes, self.dtype, static=len(node.inputs) > 6, in_part=in_part, overload=node.overload)
        self.model.functions[body.identifier()] = body


WAY = ("DequantizeLinear", "Transpose", "MatMul")
"""The ops from a linear's weight to its product."""
NARROWED = tuple(f".{part}_proj.weight" for part in ("q", "k", "v", "gate", "up"))
"""Endings of the names of linears whose outputs are split."""


def external(model: ir.Model) -> Iterator[tuple[str, ir.ExternalTensor]]:
    """The tensors of a graph that lie in files, by name."""
    for name, value in model.graph.initializers.items():
        if isinstance(value.const_value, ir.ExternalTensor):
            yield name, value.const_value
