"""A lowered draft's graph held against `spec.json`, node by node: what it computes is what the spec says, or refused.

Enters: a graph's outline, its weights and the specs of head and model. Leaves: nothing, or a `ValueError`. The order is
that of `export/draft_graph`, whose graphs these are.
"""

from collections.abc import Sequence
from glob import escape

from ..spec.folder import DraftPart
from ..spec.geometry import ModelSpec
from ..spec.recipe import Format, Override, Recipe
from ..spec.stored_weights import Weight
from ..spec.types import FLOATS
from .computation import Computation, Ref, ints
from .decoder_agreement import check_outputs, frequencies
from .onnx_outline import Outline
from .products import CPU, Products, plain_name


def check_draft_nodes(outline: Outline, weights: Sequence[Weight], draft: DraftPart, model: ModelSpec) -> None:
    """Finds each node that the spec's head has, and no other.

    Raises:
        ValueError: The graph computes something else.
    """
    _Head(Computation(outline), weights, draft, model).check()


def _recipe(form: Format, weights: Sequence[Weight]) -> Recipe | None:
    """The head's recipe: each linear in the one format or, where groups do not divide its inputs, as it was.

    Raises:
        ValueError: None is in that format.
    """
    if form == "none":
        return None
    units = {plain_name(weight.name).removesuffix(".weight"): weight.dtype for weight in weights}
    if form not in units.values():
        raise ValueError(f"no weight is {form}, as spec.json's draft is")
    overrides = [
        Override(pattern=escape(unit), format="none" if dtype in FLOATS else form) for unit, dtype in units.items()
    ]
    return Recipe(format=form, activations="dynamic", overrides=tuple(overrides))


class _Head:
    """The head that the spec describes."""

    def __init__(self, nodes: Computation, weights: Sequence[Weight], draft: DraftPart, model: ModelSpec) -> None:
        self.nodes, self.find, self.draft, self.model = nodes, nodes.find, draft.spec, model
        self.products = Products(nodes, weights, _recipe(draft.format, weights))
        self.names = {_plain(name): name for name in self.products.names}

    def check(self) -> None:
        """Follows the decoder's states to the tokens that are guessed."""
        draft, find = self.draft, self.find
        table = self.products.weight(
            self.names.get("embed_tokens.weight", ""), (self.model.vocab_size, draft.hidden_size)
        )
        embedded = find("Gather", table, "input_ids")
        x: Ref = find("Add", self._fuse(), "hidden")
        for index in range(draft.layers):
            try:
                x = self._layer(index, x, embedded)
            except ValueError as error:
                raise ValueError(f"layer {index}: {error}") from error
        chosen = find("GatherND", x, find("Unsqueeze", "logit_positions", ints(2)), batch_dims=1)
        normed = self._norm(chosen, "norm.weight")
        logits = self._linear(normed, "lm_head.weight", draft.vocab_size, draft.hidden_size)
        check_outputs(self.nodes, {"logits": logits, "next_hidden": normed if draft.norm_output else chosen})

    def _fuse(self) -> str:
        """The decoder's states in the head's width."""
        draft, find, size, count = self.draft, self.find, self.model.hidden_size, len(self.draft.states)
        x: Ref = "draft_states"
        if draft.input_norm == "whole":
            x = self._norm(x, "input_norm.weight", count * size)
        elif draft.input_norm == "each":
            bounds = [(index * size, (index + 1) * size) for index in range(count)]
            parts = [find("Slice", x, ints(first), ints(last), ints(2)) for first, last in bounds] if count > 1 else [x]
            normed = [self._norm(part, f"fc_norm.{index}.weight", size) for index, part in enumerate(parts)]
            x = find("Concat", *normed, axis=-1) if count > 1 else normed[0]
        return self._linear(x, "fc.weight", draft.hidden_size, count * size)

    def _layer(self, index: int, x: Ref, embedded: Ref) -> str:
        """One layer; the first reads the embeddings beside the states."""
        draft, find, name, residual, width = self.draft, self.find, f"layers.{index}", x, self.draft.hidden_size
        if index == 0:
            states = self._norm(x, f"{name}.hidden_norm.weight")
            residual = states if draft.norm_before_residual else x
            y = find("Concat", self._norm(embedded, f"{name}.input_layernorm.weight"), states, axis=-1)
            width = 2 * width
        else:
            y = self._norm(x, f"{name}.input_layernorm.weight")
        attended = self._attend(index, y, width)
        query = draft.heads * draft.head_dim
        output = self._linear(attended, f"{name}.self_attn.o_proj.weight", draft.hidden_size, query)
        middle = find("Add", residual, output)
        y = self._norm(middle, f"{name}.post_attention_layernorm.weight")
        gate, up = (
            self._linear(y, f"{name}.mlp.{part}_proj.weight", draft.mlp_size, draft.hidden_size)
            for part in ("gate", "up")
        )
        activated = find("Mul", find("Mul", gate, find("Sigmoid", gate)), up)
        return find(
            "Add", middle, self._linear(activated, f"{name}.mlp.down_proj.weight", draft.hidden_size, draft.mlp_size)
        )

    def _attend(self, index: int, x: Ref, width: int) -> str:
        """Attention over the layer's caches."""
        draft, name = self.draft, f"layers.{index}.self_attn"
        counts = {"q": draft.heads, "k": draft.kv_heads, "v": draft.kv_heads}
        query, key, value = (
            self._linear(x, f"{name}.{part}_proj.weight", heads * draft.head_dim, width)
            for part, heads in counts.items()
        )
        query, key = self._interleave(query, draft.heads), self._interleave(key, draft.kv_heads)
        caches = f"past.{index}.key", f"past.{index}.value", "past_lengths"
        output, *presents = self.nodes.find_all(
            "GroupedQueryAttention",
            *(query, key, value),
            *caches,
            frequencies(self.nodes, draft.as_model(self.model.max_positions)),
            domain=CPU,
            heads=draft.heads,
            kv_heads=draft.kv_heads,
            scale=draft.head_dim**-0.5,
            chunk=0,
            qk_norm_eps=0.0,
            temperature_scale=0.0,
            temperature_floor=1.0,
            cache_bits=0,
        )
        kinds = zip(("key", "value"), presents, strict=True)
        check_outputs(self.nodes, {f"present.{index}.{kind}": value for kind, value in kinds}, only=False)
        return output

    def _interleave(self, x: Ref, heads: int) -> str:
        """Heads as pairs side by side."""
        size, find = self.draft.head_dim, self.find
        halves = find("Reshape", x, ints(0, 0, heads, 2, size // 2))
        return find("Reshape", find("Transpose", halves, perm=(0, 1, 2, 4, 3)), ints(0, 0, heads * size))

    def _norm(self, x: Ref, name: str, size: int = 0) -> str:
        weight = self.products.weight(self.names.get(name, name), (size or self.draft.hidden_size,))
        return self.find("RMSNormalization", x, weight, epsilon=self.draft.norm_eps)

    def _linear(self, x: Ref, name: str, outputs: int, inputs: int) -> str:
        return self.products.linear(x, self.names.get(name, name), outputs, inputs)


def _plain(name: str) -> str:
    """A tensor's name as `speculators` has it: EAGLE's only layer is its `midlayer`."""
    return f"layers.0.{name.removeprefix('midlayer.')}" if name.startswith("midlayer.") else name
