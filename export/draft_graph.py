"""The canonical draft graph: an EAGLE-3 head in standard operators and the op of grouped-query attention.

Leaves: an onnx-ir model. Inputs: `input_ids` [B, S], each the token after the one whose state stands beside it;
`draft_states` [B, S, L·H], the decoder's hidden states; `hidden` [B, S, H'], the head's own of the token before;
`past_lengths`, `logit_positions` [B, R] and caches as the decoder's. Outputs: `logits` [B, R, V'] over the head's own
tokens in float32; `next_hidden` [B, R, H'], with which the next token goes on; the caches.

A token has a state of the decoder's or, where one is drafted behind another, of the head's: the other is zeros, which
the sum of both leaves out.
"""

import numpy as np
import onnx_ir as ir
import torch

from ..plugins.gqa import op as gqa
from ..plugins.gqa.body import body as gqa_body
from ..plugins.nodes import OPSET, Nodes, cast, ints, onnx_type
from ..spec.geometry import ModelSpec
from .assembly import IR_VERSION, Initializers, PlaceOf
from .draft_head import EMBEDDING, DraftHead
from .llama4 import inverse_frequencies

OVERLOAD = "rope_full"


def stitch_draft(head: DraftHead, model: ModelSpec, embedding: str, place_of: PlaceOf) -> ir.Model:
    """Builds the draft graph.

    Args:
        head: The head.
        model: The decoder's geometry.
        embedding: Name of the decoder's embedding, which is read where the head has none of its own.
        place_of: Finds a tensor in the weight files: one of the head's by the name that it has in its file.
    """
    return _Stitcher(head, model, embedding, place_of).stitch()


class _Stitcher:
    """The graph under construction."""

    def __init__(self, head: DraftHead, model: ModelSpec, embedding: str, place_of: PlaceOf) -> None:
        self.head, self.spec, self.model, self.embedding = head, head.spec, model, embedding
        self.as_model = head.spec.as_model(model.max_positions)
        self.dtype, self.model_dtype = onnx_type(self.spec.dtype), onnx_type(model.dtype)
        self.initializers = Initializers(place_of)
        frequencies: np.ndarray = inverse_frequencies(self.as_model).to(torch.float32).numpy()
        self.inv_freq = self.initializers.constant("rope.inv_freq", frequencies)
        spec = self.spec
        self.attributes = gqa.Attributes(heads=spec.heads, kv_heads=spec.kv_heads, scale=spec.head_dim**-0.5)

    def stitch(self) -> ir.Model:
        """Joins the pieces in order."""
        spec = self.spec
        ids = ir.val("input_ids", ir.DataType.INT64, ["batch", "sequence"])
        past = ir.val("past_lengths", ir.DataType.INT32, ["batch"])
        positions = ir.val("logit_positions", ir.DataType.INT64, ["batch", "logit_positions"])
        width = len(spec.states) * self.model.hidden_size
        states = ir.val("draft_states", self.model_dtype, ["batch", "sequence", width])
        hidden = ir.val("hidden", self.dtype, ["batch", "sequence", spec.hidden_size])
        nodes = Nodes("stem/")
        embedded = self._embed(nodes, ids)
        x = nodes.Add(self._fuse(nodes, states), hidden)
        written, caches, presents = nodes.list, list[ir.Value](), list[ir.Value]()
        for index in range(spec.layers):
            pasts, present = (self._caches(index, when) for when in ("past", "present"))
            nodes = Nodes(f"layers.{index}/")
            x = self._layer(nodes, index, x, embedded, past, pasts, present)
            written, caches, presents = written + nodes.list, caches + pasts, presents + present
        nodes = Nodes("lm_head/")
        logits, next_hidden = self._head(nodes, x, positions)
        graph = ir.Graph(
            [ids, past, positions, states, hidden, *caches],
            [logits, next_hidden, *presents],
            nodes=written + nodes.list,
            initializers=list(self.initializers.values.values()),
            opset_imports={"": OPSET, gqa.DOMAIN: gqa.VERSION},
            name="draft",
            doc_string="EAGLE-3 head: guesses tokens from a decoder's hidden states; its caches updated in place.",
        )
        body = gqa_body(self.attributes, spec.head_dim, True, self.dtype, OVERLOAD)
        return ir.Model(graph, ir_version=IR_VERSION, producer_name="arriero", functions=[body])

    def weight(self, name: str) -> ir.Value:
        """The initializer of one of the head's tensors, by `speculators`' name for it."""
        return self.initializers.weight(self.head.tensors[name][0])

    def _embed(self, nodes: Nodes, ids: ir.Value) -> ir.Value:
        """The tokens' embeddings, the head's own or the decoder's: [B, S, H']."""
        if self.head.has_embedding:
            embedded: ir.Value = nodes.Gather(self.weight(EMBEDDING), ids, axis=0)
            return embedded
        return cast(
            nodes, nodes.Gather(self.initializers.weight(self.embedding), ids, axis=0), self.model_dtype, self.dtype
        )

    def _fuse(self, nodes: Nodes, states: ir.Value) -> ir.Value:
        """The decoder's states in the head's width: [B, S, H']."""
        x, spec = cast(nodes, states, self.model_dtype, self.dtype), self.spec
        if spec.input_norm == "whole":
            x = self._norm(nodes, x, "input_norm.weight")
        elif spec.input_norm == "each":
            count, size = len(spec.states), self.model.hidden_size
            parts = [
                nodes.Slice(x, ints(index * size), ints((index + 1) * size), ints(2)) if count > 1 else x
                for index in range(count)
            ]
            normed = [self._norm(nodes, part, f"fc_norm.{index}.weight") for index, part in enumerate(parts)]
            x = nodes.Concat(*normed, axis=-1) if count > 1 else normed[0]
        return self._linear(nodes, x, "fc.weight")

    def _layer(
        self,
        nodes: Nodes,
        index: int,
        x: ir.Value,
        embedded: ir.Value,
        past: ir.Value,
        pasts: list[ir.Value],
        presents: list[ir.Value],
    ) -> ir.Value:
        """One layer; the first reads the embeddings beside the states."""
        name, residual = f"layers.{index}", x
        if index == 0:
            states = self._norm(nodes, x, f"{name}.hidden_norm.weight")
            residual = states if self.spec.norm_before_residual else x
            y = nodes.Concat(self._norm(nodes, embedded, f"{name}.input_layernorm.weight"), states, axis=-1)
        else:
            y = self._norm(nodes, x, f"{name}.input_layernorm.weight")
        attention = f"{name}.self_attn"
        query, key, value = (self._linear(nodes, y, f"{attention}.{part}_proj.weight") for part in "qkv")
        query, key = self._interleave(nodes, query, self.spec.heads), self._interleave(nodes, key, self.spec.kv_heads)
        attended = ir.Value(name=f"{name}/attended", type=ir.TensorType(self.dtype))
        attributes = {each: getattr(self.attributes, each) for each in self.attributes.__slots__}
        node = ir.Node(
            gqa.DOMAIN,
            gqa.NAME,
            [query, key, value, *pasts, past, self.inv_freq],
            attributes=ir.convenience.convert_attributes(attributes),
            overload=OVERLOAD,
            outputs=[attended, *presents],
            name=f"{name}/{gqa.NAME}",
        )
        nodes.list.append(node)
        x = nodes.Add(residual, self._linear(nodes, attended, f"{attention}.o_proj.weight"))
        y = self._norm(nodes, x, f"{name}.post_attention_layernorm.weight")
        gate, up = (self._linear(nodes, y, f"{name}.mlp.{part}_proj.weight") for part in ("gate", "up"))
        activated = nodes.Mul(nodes.Mul(gate, nodes.Sigmoid(gate)), up)
        after: ir.Value = nodes.Add(x, self._linear(nodes, activated, f"{name}.mlp.down_proj.weight"))
        return after

    def _interleave(self, nodes: Nodes, x: ir.Value, heads: int) -> ir.Value:
        """Heads whose first half of dims turns with the second, as Llama's do, as pairs side by side, as the op's do.

        Queries and keys are reordered alike, so that their products stay what they were.
        """
        size = self.spec.head_dim
        halves = nodes.Reshape(x, ints(0, 0, heads, 2, size // 2))
        pairs: ir.Value = nodes.Reshape(nodes.Transpose(halves, perm=[0, 1, 2, 4, 3]), ints(0, 0, heads * size))
        return pairs

    def _head(self, nodes: Nodes, x: ir.Value, positions: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Logits of the positions asked for, and the hidden states with which their next tokens go on."""
        spec = self.spec
        chosen = nodes.GatherND(x, nodes.Unsqueeze(positions, ints(2)), batch_dims=1)
        normed = self._norm(nodes, chosen, "norm.weight")
        next_hidden = ir.val("next_hidden", self.dtype, ["batch", "logit_positions", spec.hidden_size])
        nodes.node("Identity", [normed if spec.norm_output else chosen], outputs=[next_hidden])
        logits = ir.val("logits", ir.DataType.FLOAT, ["batch", "logit_positions", spec.vocab_size])
        product = self._linear(nodes, normed, "lm_head.weight")
        nodes.node("Cast", [product], outputs=[logits], attributes={"to": ir.DataType.FLOAT})
        return logits, next_hidden

    def _norm(self, nodes: Nodes, x: ir.Value, name: str) -> ir.Value:
        """RMS norm by one of the head's weights."""
        normed: ir.Value = nodes.RMSNormalization(x, self.weight(name), epsilon=self.spec.norm_eps)
        return normed

    def _linear(self, nodes: Nodes, x: ir.Value, name: str) -> ir.Value:
        """A product with one of the head's weights."""
        product: ir.Value = nodes.MatMul(x, nodes.Transpose(self.weight(name), perm=[1, 0]))
        return product

    def _caches(self, index: int, when: str) -> list[ir.Value]:
        shape: list[int | str | None] = ["batch", self.spec.kv_heads, "slots", self.spec.head_dim]
        return [ir.val(f"{when}.{index}.{kind}", self.dtype, shape) for kind in ("key", "value")]
