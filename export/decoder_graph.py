"""The canonical decoder graph: traced layers cloned and joined, embedding before them, norm and LM head behind.

Leaves: an onnx-ir model in the contract's inputs and outputs, its initializers named as in the checkpoint and read in
place from safetensors. Nothing in it is particular to a target.
"""

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from ..plugins.gqa import op as gqa
from ..plugins.gqa.body import body as gqa_body
from ..plugins.moe import op as moe
from ..plugins.moe.body import body as moe_body
from ..plugins.nodes import OPSET, Nodes, ints, number, onnx_type
from ..spec.geometry import LayerSpec, ModelSpec, VisionSpec
from ..spec.types import Progress
from .assembly import IR_VERSION, Initializers, PlaceOf, clone
from .llama4 import attention_attributes, inverse_frequencies
from .trace import trace_layer


def stitch_decoder(
    spec: ModelSpec,
    prefix: str,
    place_of: PlaceOf,
    progress: Progress,
    *,
    vision: VisionSpec | None = None,
    states: Sequence[int] = (),
) -> ir.Model:
    """Builds the decoder graph.

    Args:
        spec: Geometry; its dtype is the graph's.
        prefix: Beginning of the checkpoint's tensor names.
        place_of: Finds a tensor in the weight files.
        progress: Called for each layer.
        vision: Geometry of the vision tower whose features enter; None for text alone.
        states: Hidden states that a draft reads, each by the number of layers that it has been through: they leave
            side by side as `draft_states` [B, S, L·H]; none leave where there are none.
    """
    return Stitcher(spec, prefix, place_of, vision).stitch(progress, states)


class Stitcher:
    """The graph under construction."""

    def __init__(self, spec: ModelSpec, prefix: str, place_of: PlaceOf, vision: VisionSpec | None) -> None:
        self.spec, self.prefix, self.vision = spec, prefix, vision
        self.dtype = onnx_type(spec.dtype)
        self.initializers = Initializers(place_of)
        self.inv_freq = self.initializers.constant("rope.inv_freq", inverse_frequencies(spec).numpy())
        self.functions: dict[str, ir.Function] = {}

    @property
    def experts(self) -> moe.Attributes:
        """Attributes of the experts' op, in a model that has experts."""
        return moe.Attributes(top_k=self.spec.experts_per_token)

    def stitch(self, progress: Progress, states: Sequence[int]) -> ir.Model:
        """Joins the pieces in order."""
        spec = self.spec
        input_ids = ir.val("input_ids", ir.DataType.INT64, ["batch", "sequence"])
        past_lengths = ir.val("past_lengths", ir.DataType.INT32, ["batch"])
        logit_positions = ir.val("logit_positions", ir.DataType.INT64, ["batch", "logit_positions"])
        features = [] if self.vision is None else [ir.val("image_features", self.dtype, ["features", spec.hidden_size])]
        embedding = self.weight("model.embed_tokens.weight")
        x, nodes = self._embed(embedding, input_ids, features)
        caches: list[ir.Value] = []
        presents: list[ir.Value] = []
        passed = [x]
        for index, layer in enumerate(spec.layers):
            progress("layers", index, len(spec.layers))
            past = self._caches(index, layer, "past")
            present = self._caches(index, layer, "present")
            x, added = self._add_layer(index, layer, x, past_lengths, past, present)
            nodes, caches, presents = nodes + added, caches + past, presents + present
            passed.append(x)
        progress("layers", len(spec.layers), len(spec.layers))
        logits, head = self._head(x, logit_positions, embedding)
        side, beside = self._states([passed[number] for number in states])
        graph = ir.Graph(
            [input_ids, past_lengths, logit_positions, *features, *caches],
            [logits, *presents, *side],
            nodes=nodes + head + beside,
            initializers=list(self.initializers.values.values()),
            opset_imports={"": OPSET, gqa.DOMAIN: gqa.VERSION},
            name="decoder",
            doc_string="Llama 4 text decoder; one graph for prefill and decode, its caches updated in place.",
        )
        return ir.Model(graph, ir_version=IR_VERSION, producer_name="arriero", functions=list(self.functions.values()))

    def weight(self, name: str) -> ir.Value:
        """The initializer of a decoder's tensor, by its name in a text-only checkpoint."""
        return self.initializers.weight(self.prefix + name)

    def _embed(
        self, embedding: ir.Value, input_ids_BS: ir.Value, features: list[ir.Value]
    ) -> tuple[ir.Value, list[ir.Node]]:
        """Embeddings, with image features in the places of image tokens, in order. Returns them and their nodes."""
        nodes = Nodes("embed_tokens/")
        x_BSH = nodes.Gather(embedding, input_ids_BS, axis=0)
        if self.vision is None:
            return x_BSH, nodes.list
        is_image_BS = nodes.Equal(input_ids_BS, number(self.vision.image_token, np.int64))
        flags_T = nodes.Reshape(nodes.Cast(is_image_BS, to=ir.DataType.INT32), ints(-1))
        place_T = nodes.Sub(nodes.CumSum(flags_T, number(0, np.int32)), number(1, np.int32))
        place_BS = nodes.Reshape(nodes.Max(place_T, number(0, np.int32)), nodes.Shape(input_ids_BS))
        image_BSH = nodes.Gather(features[0], place_BS, axis=0)
        return nodes.Where(nodes.Unsqueeze(is_image_BS, ints(2)), image_BSH, x_BSH), nodes.list

    def _caches(self, index: int, layer: LayerSpec, when: str) -> list[ir.Value]:
        slots = "chunk_slots" if layer.chunk else "slots"
        shape: list[int | str | None] = ["batch", self.spec.kv_heads, slots, self.spec.head_dim]
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
        traced = trace_layer(self.spec, layer)
        mapped: dict[ir.Value, ir.Value] = dict(zip(traced.inputs, [x, past_lengths, *past], strict=True))
        for name, value in traced.initializers.items():
            parameter = name.removeprefix("layer.")
            is_rope = parameter == "self_attn.inv_freq"
            mapped[value] = self.inv_freq if is_rope else self.weight(f"model.layers.{index}.{parameter}")
        mapped |= dict(zip(traced.outputs[1:], present, strict=True))
        nodes = [self._clone(node, index, layer, mapped) for node in traced]
        return mapped[traced.outputs[0]], nodes

    def _clone(self, node: ir.Node, index: int, layer: LayerSpec, mapped: dict[ir.Value, ir.Value]) -> ir.Node:
        overload = self._function(node, layer) if node.domain == gqa.DOMAIN else ""
        return clone(node, mapped, f"layers.{index}", ("batch", "sequence"), overload=overload)

    def _function(self, node: ir.Node, layer: LayerSpec) -> str:
        """Adds the function body of a custom op's node, once a kind. Returns the overload that the node calls."""
        if node.op_type == moe.NAME:
            if moe.NAME not in self.functions:
                self.functions[moe.NAME] = moe_body(self.experts, self.dtype)
            return ""
        overload = f"{'rope' if layer.rope else 'nope'}_{'chunked' if layer.chunk else 'full'}"
        if overload not in self.functions:
            attributes = attention_attributes(self.spec, layer)
            self.functions[overload] = gqa_body(attributes, self.spec.head_dim, layer.rope, self.dtype, overload)
        return overload

    def _states(self, states: list[ir.Value]) -> tuple[list[ir.Value], list[ir.Node]]:
        """The hidden states that a draft reads, side by side. Returns the output, where there is one, and its node."""
        if not states:
            return [], []
        nodes = Nodes("draft_states/")
        output = ir.val("draft_states", self.dtype, ["batch", "sequence", len(states) * self.spec.hidden_size])
        nodes.node("Concat", states, outputs=[output], attributes={"axis": -1})
        return [output], nodes.list

    def _head(self, x: ir.Value, logit_positions: ir.Value, embedding: ir.Value) -> tuple[ir.Value, list[ir.Node]]:
        """Norm and LM head of the positions asked for, in float32 at the end."""
        nodes = Nodes("lm_head/")
        chosen = nodes.GatherND(x, nodes.Unsqueeze(logit_positions, ints(2)), batch_dims=1)
        normed = nodes.RMSNormalization(chosen, self.weight("model.norm.weight"), epsilon=self.spec.norm_eps)
        weight = embedding if self.spec.tied_embeddings else self.weight("lm_head.weight")
        logits = nodes.MatMul(normed, nodes.Transpose(weight, perm=[1, 0]))
        output = ir.val("logits", ir.DataType.FLOAT, ["batch", "logit_positions", self.spec.vocab_size])
        nodes.node("Cast", [logits], outputs=[output], attributes={"to": ir.DataType.FLOAT})
        return output, nodes.list
