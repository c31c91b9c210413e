"""The canonical decoder graph: traced layers cloned and joined, embedding before them, norm and LM head behind.

Leaves: an onnx-ir model in the contract's inputs and outputs, its initializers named as in the checkpoint and read in
place from safetensors. Nothing in it is particular to a target.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir

from ..plugins.all_reduce import op as all_reduce
from ..plugins.gqa import op as gqa
from ..plugins.gqa.body import body as gqa_body
from ..plugins.moe import op as moe
from ..plugins.moe.body import body as moe_body
from ..plugins.nodes import OPSET, Nodes, ints
from ..shards import Region
from ..spec import LayerSpec, ModelSpec
from .llama4 import attention_attributes, inverse_frequencies
from .split import WHOLE, Split
from .trace import trace_layer

IR_VERSION = 11
DTYPES = {"float32": ir.DataType.FLOAT, "float16": ir.DataType.FLOAT16, "bfloat16": ir.DataType.BFLOAT16}
REGION_DTYPES = {"F32": ir.DataType.FLOAT, "F16": ir.DataType.FLOAT16, "BF16": ir.DataType.BFLOAT16}

Locate = Callable[[str], tuple[str, Region]]
"""The file's name and the region of a tensor or of the rank's portion of it, by its checkpoint name."""

Traced = dict[tuple[LayerSpec, Split], ir.Graph]
"""Layers traced so far, by their kind and layout."""

Progress = Callable[[str, int, int], None]
"""Told the phase, the steps done, and the steps in all."""


def stitch_decoder(
    spec: ModelSpec,
    prefix: str,
    locate: Locate,
    progress: Progress,
    *,
    split: Split = WHOLE,
    rank: int = 0,
    traced: Traced | None = None,
) -> ir.Model:
    """Builds the decoder graph, or one rank's.

    Args:
        spec: Geometry of the whole model; its dtype is the graph's.
        prefix: What the checkpoint's tensor names begin with.
        locate: Finds a tensor, or the rank's portion of it, in the weight files.
        progress: Told of each layer.
        split: Layout over ranks.
        rank: Whose graph.
        traced: Layers traced for another rank, extended here.
    """
    return Stitcher(spec, prefix, locate, split, rank, {} if traced is None else traced).stitch(progress)


class Stitcher:
    """The graph under construction."""

    def __init__(self, spec: ModelSpec, prefix: str, locate: Locate, split: Split, rank: int, traced: Traced) -> None:
        self.spec, self.prefix, self.locate = spec, prefix, locate
        self.split, self.rank, self.traced = split, rank, traced
        self.dtype = DTYPES[spec.dtype]
        self.experts = moe.Attributes(top_k=spec.experts_per_token, first_expert=split.first_expert(spec, rank))
        self.initializers: dict[str, ir.Value] = {}
        self.inv_freq = self._constant("rope.inv_freq", inverse_frequencies(spec).numpy())
        self.functions: dict[str, ir.Function] = {}

    def stitch(self, progress: Progress) -> ir.Model:
        """Joins the pieces in order."""
        spec = self.spec
        input_ids = ir.val("input_ids", ir.DataType.INT64, ["batch", "sequence"])
        past_lengths = ir.val("past_lengths", ir.DataType.INT32, ["batch"])
        logit_positions = ir.val("logit_positions", ir.DataType.INT64, ["batch", "logit_positions"])
        first = Nodes("embed_tokens/")
        embedding = self.weight("model.embed_tokens.weight")
        x = first.Gather(embedding, input_ids, axis=0)
        nodes = first.list
        caches: list[ir.Value] = []
        presents: list[ir.Value] = []
        for index, layer in enumerate(spec.layers):
            progress("layers", index, len(spec.layers))
            past = self._caches(index, layer, "past")
            present = self._caches(index, layer, "present")
            x, added = self._add_layer(index, layer, x, past_lengths, past, present)
            nodes, caches, presents = nodes + added, caches + past, presents + present
        progress("layers", len(spec.layers), len(spec.layers))
        logits, head = self._head(x, logit_positions, embedding)
        graph = ir.Graph(
            [input_ids, past_lengths, logit_positions, *caches],
            [logits, *presents],
            nodes=nodes + head,
            initializers=list(self.initializers.values()),
            opset_imports={"": OPSET, gqa.DOMAIN: gqa.VERSION},
            name="decoder",
            doc_string="Llama 4 text decoder; one graph for prefill and decode, its caches updated in place.",
        )
        return ir.Model(graph, ir_version=IR_VERSION, producer_name="arriero", functions=list(self.functions.values()))

    def weight(self, name: str) -> ir.Value:
        """The initializer of a checkpoint's tensor, which lies where the shard has it."""
        name = self.prefix + name
        if name not in self.initializers:
            file, region = self.locate(name)
            tensor = ir.ExternalTensor(
                file,
                region.offset,
                region.size,
                REGION_DTYPES[region.dtype],
                shape=ir.Shape(region.shape),
                name=name,
                base_dir=Path("."),
            )
            self.initializers[name] = _initializer(name, tensor)
        return self.initializers[name]

    def _constant(self, name: str, array: np.ndarray) -> ir.Value:
        self.initializers[name] = _initializer(name, ir.tensor(array, name=name))
        return self.initializers[name]

    def _caches(self, index: int, layer: LayerSpec, when: str) -> list[ir.Value]:
        slots = "chunk_slots" if layer.chunk else "slots"
        kv_heads = self.spec.kv_heads // self.split.ranks
        shape: list[int | str | None] = ["batch", kv_heads, slots, self.spec.head_dim]
        return [ir.val(f"{when}.{index}.{kind}", self.dtype, shape) for kind in ("key", "value")]

    def _add_layer(
        self,
        index: int,
        layer: LayerSpec,
        x: ir.Value,
        past_lengths: ir.Value,
        past: list[ir.Value],
        present: list[ir.Value],
    ) -> tuple[ir.Value, list[ir.Node]]:
        """Clones the traced layer of this kind onto the given values. Returns its output and its nodes."""
        kind = layer, self.split
        if kind not in self.traced:
            self.traced[kind] = trace_layer(self.spec, layer, self.split)
        traced = self.traced[kind]
        mapped: dict[ir.Value, ir.Value] = dict(zip(traced.inputs, [x, past_lengths, *past], strict=True))
        for name, value in traced.initializers.items():
            parameter = name.removeprefix("layer.")
            is_rope = parameter == "self_attn.inv_freq"
            mapped[value] = self.inv_freq if is_rope else self.weight(f"model.layers.{index}.{parameter}")
        outputs = dict(zip(traced.outputs[1:], present, strict=True))
        nodes = [self._clone(node, index, layer, mapped, outputs) for node in traced]
        return mapped[traced.outputs[0]], nodes

    def _clone(
        self,
        node: ir.Node,
        index: int,
        layer: LayerSpec,
        mapped: dict[ir.Value, ir.Value],
        outputs: dict[ir.Value, ir.Value],
    ) -> ir.Node:
        values = []
        for old in node.outputs:
            if old in outputs:
                mapped[old] = outputs[old]
            else:
                name, shape = f"layers.{index}/{old.name}", self._named_shape(old.shape)
                mapped[old] = ir.Value(name=name, shape=shape, type=old.type)
            values.append(mapped[old])
        attributes = list(node.attributes.values())
        if node.op_type == moe.NAME and self.experts.first_expert:
            attributes.append(ir.AttrInt64("first_expert", self.experts.first_expert))
        return ir.Node(
            node.domain,
            node.op_type,
            [mapped[value] if value is not None else None for value in node.inputs],
            attributes=attributes,
            overload=self._function(node, layer) if node.domain == gqa.DOMAIN else "",
            outputs=values,
            name=f"layers.{index}/{_node_name(node)}",
        )

    def _named_shape(self, shape: ir.Shape | None) -> ir.Shape | None:
        """A traced shape with the contract's names for its dimensions, or nothing where a name would be a sum."""
        if shape is None or any(not isinstance(dim, int) for dim in shape.dims[2:]) or len(shape) != 3:
            return None
        return ir.Shape(["batch", "sequence", *shape.dims[2:]])

    def _function(self, node: ir.Node, layer: LayerSpec) -> str:
        """Adds the function body of a custom op's node, once a kind. Returns the overload that the node calls."""
        if node.op_type == all_reduce.NAME:
            return ""  # it has no body
        if node.op_type == moe.NAME:
            if moe.NAME not in self.functions:
                in_part = self.split.expert_groups > 1
                self.functions[moe.NAME] = moe_body(self.experts, self.dtype, in_part=in_part)
            return ""
        overload = f"{'rope' if layer.rope else 'nope'}_{'chunked' if layer.chunk else 'full'}"
        if overload not in self.functions:
            attributes = attention_attributes(self.spec, layer, self.split)
            self.functions[overload] = gqa_body(attributes, self.spec.head_dim, layer.rope, self.dtype, overload)
        return overload

    def _head(self, x: ir.Value, logit_positions: ir.Value, embedding: ir.Value) -> tuple[ir.Value, list[ir.Node]]:
        """Norm and LM head of the positions asked for, in float32 at the end."""
        nodes = Nodes("lm_head/")
        chosen = nodes.GatherND(x, nodes.Unsqueeze(logit_positions, ints(2)), batch_dims=1)
        normed = nodes.RMSNormalization(chosen, self.weight("model.norm.weight"), epsilon=self.spec.norm_eps)
        shares_embedding = self.spec.tied_embeddings and self.split.ranks == 1
        weight = embedding if shares_embedding else self.weight("lm_head.weight")
        logits = nodes.MatMul(normed, nodes.Transpose(weight, perm=[1, 0]))
        if self.split.ranks > 1:
            logits = self._gather_logits(nodes, logits)
        output = ir.val("logits", ir.DataType.FLOAT, ["batch", "logit_positions", self.spec.vocab_size])
        nodes.node("Cast", [logits], outputs=[output], attributes={"to": ir.DataType.FLOAT})
        return output, nodes.list

    def _gather_logits(self, nodes: Nodes, part: ir.Value) -> ir.Value:
        """All columns of the logits from this rank's: each column is one rank's, and the others add zeros to it."""
        size = self.spec.vocab_size
        (((start, stop),),) = self.split.portion("lm_head.weight", (size,), self.rank).spans
        padded = nodes.Pad(part, ints(0, 0, start, 0, 0, size - stop))
        total: ir.Value = nodes.AllReduce(padded, domain=all_reduce.DOMAIN, ranks=self.split.ranks)
        return total


def _initializer(name: str, tensor: ir.TensorProtocol) -> ir.Value:
    shape = ir.Shape(tensor.shape.numpy())
    return ir.Value(name=name, shape=shape, type=ir.TensorType(tensor.dtype), const_value=tensor)


def _node_name(node: ir.Node) -> str:
    """A product or a norm is named by its weight, a sum by what it sums, a custom op by its type; others as traced."""
    summed = node.inputs[0].producer() if node.op_type == all_reduce.NAME and node.inputs[0] is not None else None
    if summed is not None:
        return f"{_node_name(summed)}/{all_reduce.NAME}"
    weight = node.inputs[1] if node.op_type in ("MatMul", "RMSNormalization") else None
    source = weight.producer() if weight is not None else None
    weight = source.inputs[0] if source is not None else weight
    if weight is not None:
        return str(weight.name).removeprefix("layer.").removesuffix(".weight")
    return node.op_type if node.domain else str(node.name).removeprefix("node_")
