"""A lowered decoder's graph held against `spec.json`, node by node: what it computes is what the spec says, or refused.

Enters: a graph's `Computation`, its weights and the spec. Leaves: nothing, or a `ValueError`. The order is that of
`export/llama4` and `export/decoder_graph`, whose graphs these are.
"""

from collections.abc import Sequence

from ..spec.folder import FolderSpec
from ..spec.geometry import LayerSpec, ModelSpec
from ..spec.stored_weights import Weight
from .angles import check_frequencies
from .computation import Computation, Ref, ints, whole, whole32
from .onnx_outline import FLOAT, INT32, Outline, floats_of
from .products import CPU, Experts, Products

GROUP, FEATURES = "group", "image_features"
"""The graph's inputs that are memory shared by ranks, and a tower's features."""


def check_decoder_nodes(outline: Outline, weights: Sequence[Weight], spec: FolderSpec) -> None:
    """Finds each node that the spec's decoder has, and no other.

    Raises:
        ValueError: The graph computes something else.
    """
    _Decoder(Computation(outline), weights, spec).check()


class _Decoder:
    """The decoder that the spec describes, or a rank's part of it."""

    def __init__(self, nodes: Computation, weights: Sequence[Weight], spec: FolderSpec) -> None:
        self.nodes, self.find, self.spec = nodes, nodes.find, spec
        self.products = Products(nodes, weights, spec.recipe)
        self.model: ModelSpec = spec.rank_model

    def check(self) -> None:
        """Follows the tokens from their embeddings to their logits."""
        x = self._embed()
        passed = [x]
        for index, layer in enumerate(self.model.layers):
            try:
                x = self._layer(index, layer, x)
            except ValueError as error:
                raise ValueError(f"layer {index}: {error}") from error
            passed.append(x)
        outputs: dict[str, Ref] = {"logits": self._head(x)}
        if self.spec.draft is not None:
            states = [passed[number] for number in self.spec.draft.spec.states]
            outputs["draft_states"] = self.find("Concat", *states, axis=-1)
        check_outputs(self.nodes, outputs)

    def _embed(self) -> Ref:
        """Embeddings, with image features in the places of image tokens."""
        model, find = self.model, self.find
        x: Ref = find(
            "Gather", self.products.weight("embed_tokens.weight", (model.vocab_size, model.hidden_size)), "input_ids"
        )
        if self.spec.vision is None:
            return x
        is_image = find("Equal", "input_ids", whole(self.spec.vision.spec.image_token))
        flags = find("Reshape", find("Cast", is_image, to=INT32), ints(-1))
        place = find("Max", find("Sub", find("CumSum", flags, whole32(0)), whole32(1)), whole32(0))
        placed = find("Reshape", place, find("Shape", "input_ids"))
        return find("Where", find("Unsqueeze", is_image, ints(2)), find("Gather", FEATURES, placed), x)

    def _layer(self, index: int, layer: LayerSpec, x: Ref) -> Ref:
        """One layer: attention and feed-forward, each behind a norm and beside a residual."""
        model, name = self.model, f"layers.{index}"
        normed = self._norm(x, f"{name}.input_layernorm.weight")
        attended = self._attend(normed, index, layer)
        width = model.heads * model.head_dim
        output = self.products.linear(attended, f"{name}.self_attn.o_proj.weight", model.hidden_size, width)
        middle = self.find("Add", x, self._sum(output, self.spec.parts))
        normed = self._norm(middle, f"{name}.post_attention_layernorm.weight")
        if layer.experts:
            fed = self._experts(normed, f"{name}.feed_forward", (x, middle, normed))
        else:
            fed = self._mlp(normed, f"{name}.feed_forward", model.dense_size)
        return self.find("Add", middle, self._sum(fed, self.spec.parts))

    def _norm(self, x: Ref, name: str) -> str:
        weight = self.products.weight(name, (self.model.hidden_size,))
        return self.find("RMSNormalization", x, weight, epsilon=self.model.norm_eps)

    def _attend(self, x: Ref, index: int, layer: LayerSpec) -> str:
        """Attention over the layer's caches."""
        model, name, past = self.model, f"layers.{index}.self_attn", f"past.{index}"
        sizes = {"q": model.heads, "k": model.kv_heads, "v": model.kv_heads}
        given: list[Ref] = [
            self.products.linear(x, f"{name}.{part}_proj.weight", heads * model.head_dim, model.hidden_size)
            for part, heads in sizes.items()
        ]
        given += [f"{past}.key", f"{past}.value", "past_lengths"]
        scales = self._cache_scales(name)
        if layer.rope:
            given.append(self._frequencies())
        elif scales:
            given.append("")
        has_temperature = not layer.rope and model.temperature_scale != 0
        output, key, value = self.nodes.find_all(
            "GroupedQueryAttention",
            *given,
            *scales,
            domain=CPU,
            heads=model.heads,
            kv_heads=model.kv_heads,
            scale=model.head_dim**-0.5,
            chunk=layer.chunk,
            qk_norm_eps=model.norm_eps if model.qk_norm and layer.rope else 0.0,
            temperature_scale=model.temperature_scale if has_temperature else 0.0,
            temperature_floor=model.temperature_floor,
            cache_bits=self.spec.cache_bits,
        )
        check_outputs(self.nodes, {f"present.{index}.key": key, f"present.{index}.value": value}, only=False)
        return output

    def _cache_scales(self, name: str) -> list[str]:
        """The static scales of quantised caches, where there are such."""
        recipe, model = self.spec.recipe, self.model
        if recipe is None or recipe.kv_cache == "none" or self.spec.cache_bits:
            return []
        return [
            self.products.held(f"{name}.{kind}_scale", (model.kv_heads, model.head_dim)) for kind in ("key", "value")
        ]

    def _frequencies(self) -> str:
        return frequencies(self.nodes, self.model)

    def _mlp(self, x: Ref, name: str, size: int) -> str:
        """A SwiGLU of this width."""
        linear, hidden = self.products.linear, self.model.hidden_size
        gate = linear(x, f"{name}.gate_proj.weight", size, hidden)
        up = linear(x, f"{name}.up_proj.weight", size, hidden)
        activated = self.find("Mul", self.find("Mul", gate, self.find("Sigmoid", gate)), up)
        return linear(activated, f"{name}.down_proj.weight", hidden, size)

    def _experts(self, x: Ref, name: str, shaped: Sequence[Ref]) -> str:
        """Routed experts and the shared one; `shaped` are values of the shape of the result."""
        model, spec = self.model, self.spec
        tokens = self.find("Reshape", x, ints(-1, model.hidden_size))
        logits = self.products.linear(tokens, f"{name}.router.weight", model.experts, model.hidden_size)
        count, sharers = model.experts // spec.expert_groups, spec.ranks // spec.expert_groups
        held = Experts(
            count=count,
            all_experts=model.experts,
            first=spec.rank // sharers * count,
            top_k=model.experts_per_token,
            hidden=model.hidden_size,
            width=model.expert_size,
        )
        routed = self.products.experts(tokens, logits, f"{name}.experts", held)
        if spec.experts_only:
            routed = self._sum(routed, spec.ranks)
        like = next((each for each in shaped if self.nodes.has("Shape", each)), x)
        placed = self.find("Reshape", routed, self.find("Shape", like))
        return self.find("Add", self._mlp(x, f"{name}.shared_expert", self._shared_size()), placed)

    def _shared_size(self) -> int:
        """The width of the shared expert, which all ranks share, in groups of experts or not."""
        return self.spec.model.expert_size // self.spec.parts

    def _sum(self, part: str, ranks: int) -> str:
        """The sum over ranks, where they have parts of it."""
        if ranks == 1:
            return part
        return self.find("AllReduce", part, GROUP, domain=CPU, ranks=ranks, rank=self.spec.rank)

    def _head(self, x: Ref) -> str:
        """Logits of the positions asked for."""
        spec, model = self.spec, self.model
        chosen = self.find("GatherND", x, self.find("Unsqueeze", "logit_positions", ints(2)), batch_dims=1)
        normed = self._norm(chosen, "norm.weight")
        parts, size = spec.parts, model.vocab_size
        start, stop = size * spec.rank // parts, size * (spec.rank + 1) // parts
        if parts == 1:
            start, stop = 0, size
        name = "embed_tokens.weight" if model.tied_embeddings and parts == 1 else "lm_head.weight"
        logits = self.products.linear(normed, name, stop - start, model.hidden_size)
        if parts > 1:
            logits = self.find("Pad", logits, ints(0, 0, start, 0, 0, size - stop))
        return self._sum(logits, parts)


def check_outputs(nodes: Computation, expected: dict[str, Ref], *, only: bool = True) -> None:
    """Holds outputs against the values that they are to be.

    Args:
        nodes: The graph.
        expected: The values by the outputs' names.
        only: Whether there are no others, but for caches, and no nodes that were not found.

    Raises:
        ValueError: One is another.
    """
    for name, value in expected.items():
        if name not in nodes.outline.outputs or nodes.ref(name) != value:
            raise ValueError(f"the output {name} is another value than spec.json's")
    if only:
        others = [each for each in nodes.outline.outputs if each not in expected and not each.startswith("present.")]
        if others:
            raise ValueError(f"an output more, {others[0]!r}")
        nodes.check_rest()


def frequencies(nodes: Computation, model: ModelSpec) -> str:
    """The name of RoPE's frequencies, which the graph holds.

    Raises:
        ValueError: They are none, or another model's.
    """
    name = "rope.inv_freq"
    tensor = nodes.outline.weights.get(name)
    if tensor is None or tensor.dtype != FLOAT or tensor.dims != (model.head_dim // 2,):
        raise ValueError(f"no {model.head_dim // 2} frequencies {name!r}")
    found = floats_of(tensor)
    if len(found) != model.head_dim // 2:
        raise ValueError("the graph's file is damaged")
    check_frequencies(found, model)
    return name
