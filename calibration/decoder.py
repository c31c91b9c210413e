"""One decoder layer quantised while calibration text runs through it.

Enters: the layer's input for all tokens. Leaves: every tensor of the quantised layer under its full name, a `Record`
for each weight, how many tokens each expert saw, and the unquantised layer's output, which the next layer takes in.
Experts are read, run, quantised and released one by one.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..plugins.quantisation import LARGEST
from ..spec.geometry import ModelSpec
from ..spec.recipe import Recipe
from ..walk.decoder import Hidden, LayerWalk
from ..walk.numbers import Weights
from .coverage import Coverage, starved
from .experts import ExpertQuantiser
from .linears import Linears, observer
from .product import ProductInput
from .smoothing import Reader

SEARCHED_EXPERTS = 4
"""The busiest experts, whose errors count in the search of the strength that all experts share."""


@dataclass(slots=True)
class LayerQuantiser:
    """The work on one decoder layer; `quantise` does all of it.

    Attributes:
        linears: The quantised layer's tensors, and what became of each weight.
        expert_tokens: Tokens that chose each expert; empty in a dense layer.
        unmeasured: Experts that are rounded without statistics of their own.
    """

    spec: ModelSpec
    index: int
    weights: Weights
    recipe: Recipe
    coverage: Coverage
    linears: Linears = field(init=False)
    expert_tokens: list[int] = field(init=False, default_factory=list)
    unmeasured: tuple[int, ...] = field(init=False, default=())
    walk: LayerWalk = field(init=False)

    def __post_init__(self) -> None:
        self.linears = Linears(self.weights, self.recipe, f"layers.{self.index}.", f"layer {self.index}")

    def quantise(self, x: Hidden, attended: Hidden, out: Hidden, progress: Callable[[float], None]) -> None:
        """Quantises the layer.

        Args:
            x: Its input.
            attended: Room for what is behind the attention.
            out: Room for its output.
            progress: Called with the share of the layer that is done.

        Raises:
            CalibrationError: An activation is not finite.
        """
        self.walk = LayerWalk(self.spec, self.index, self.weights, attended, out)
        self._quantise_attention(x)
        progress(0.3)
        feed_input, down_input = self._quantise_feed()
        progress(0.5)
        if self.spec.layers[self.index].experts:
            experts = ExpertQuantiser(self.linears, self.walk, self.coverage.all_experts, set(self.unmeasured))
            experts.quantise(feed_input, down_input, lambda share: progress(0.5 + share / 2))

    # Attention and feed-forward

    def _quantise_attention(self, x: Hidden) -> None:
        spec, linears, name = self.spec, self.linears, "self_attn."
        kv_size = spec.kv_heads * spec.head_dim
        source = linears.input("attention_input", spec.hidden_size, [f"{name}{part}_proj" for part in "qkv"])
        attended = linears.input("attention_output", spec.heads * spec.head_dim, [f"{name}o_proj"])
        keys, values = (linears.input(part, kv_size, []) for part in ("keys", "values"))
        self.walk.attend(x, observer(source, attended, keys, values))
        query, key, value, output = (self.walk.factor(f"{name}{part}_proj.weight") for part in "qkvo")
        projections = {f"{name}{part}_proj": weight for part, weight in zip("qkv", (query, key, value), strict=True)}
        linears.smooth(source, linears.readers(source, projections))
        linears.smooth(attended, linears.readers(attended, {f"{name}o_proj": output}), self._share_over_group)
        groups = attended.exponents_K.view(spec.kv_heads, -1, spec.head_dim)
        values.exponents_K = groups[:, 0].flatten()
        linears.emit_divided("input_layernorm.weight", source.exponents_K)
        for unit, weight in projections.items():
            linears.emit_linear(unit, weight, source, values.exponents_K if unit == f"{name}v_proj" else None)
        linears.emit_linear(f"{name}o_proj", output, attended)
        if self.recipe.kv_cache != "none":
            for part, cached in (("key", keys), ("value", values)):
                absmax_N = cached.statistics.absmax_K / torch.exp2(cached.exponents_K.float())
                scale_KD = absmax_N.view(spec.kv_heads, spec.head_dim) / LARGEST[self.recipe.kv_cache]
                linears.emit(f"{name}{part}_scale", torch.where(scale_KD > 0, scale_KD, 1.0))

    def _quantise_feed(self) -> tuple[ProductInput, ProductInput]:
        """The dense feed-forward or the shared expert, and the router. Returns the inputs of its products."""
        spec, linears = self.spec, self.linears
        has_experts = spec.layers[self.index].experts
        name = "feed_forward.shared_expert." if has_experts else "feed_forward."
        gate_name, up_name, down_name = (f"{name}{part}_proj" for part in ("gate", "up", "down"))
        router = ["feed_forward.router"] if has_experts else []
        source = linears.input("feed_input", spec.hidden_size, [gate_name, up_name, *router])
        activated = linears.input("down_input", spec.expert_size if has_experts else spec.dense_size, [down_name])
        self.walk.feed(observer(source, activated))
        gate, up, down = (self.walk.factor(f"{unit}.weight") for unit in (gate_name, up_name, down_name))
        weights = {gate_name: gate, up_name: up}
        weights |= {unit: self.walk.factor(f"{unit}.weight") for unit in router}
        readers = linears.readers(source, weights)
        if has_experts:
            self._count_tokens()
            readers += self._expert_readers()
        linears.smooth(source, readers)
        linears.smooth(activated, linears.readers(activated, {down_name: down}))
        linears.emit_divided("post_attention_layernorm.weight", source.exponents_K)
        for unit, weight in weights.items():
            linears.emit_linear(unit, weight, source, activated.exponents_K if unit == up_name else None)
        linears.emit_linear(down_name, down, activated)
        return source, activated

    # Experts

    def _count_tokens(self) -> None:
        counts_E = torch.bincount(self.walk.chosen().flatten(), minlength=self.spec.experts)
        self.expert_tokens = counts_E.tolist()
        is_quantised = self.linears.choice("feed_forward.experts").format != "none"
        if self.coverage.falls_back and not self.coverage.all_experts and is_quantised:
            self.unmeasured = starved(self.expert_tokens, self.coverage.floor)

    def _expert_readers(self) -> list[Reader]:
        """Some experts' first products over some of their tokens."""
        choice = self.linears.choice("feed_forward.experts")
        if choice.format == "none" or self.recipe.smoothing == "none":
            return []
        busiest = sorted(range(self.spec.experts), key=lambda expert: -self.expert_tokens[expert])[:SEARCHED_EXPERTS]
        readers = []
        for expert in busiest:
            tokens_N = (self.walk.chosen() == expert).any(dim=1).nonzero()[:, 0]
            source = self.linears.input("expert_input", self.spec.hidden_size, ["feed_forward.experts"])
            if len(tokens_N):
                source.statistics.update(next(self.walk.expert_inputs(expert, tokens_N))[1])
                weight_HN = self.walk.factor("feed_forward.experts.gate_up_proj", expert)
                readers.append(source.reader(weight_HN.T, choice))
        return readers

    def _share_over_group(self, magnitude_K: Tensor) -> Tensor:
        """Query heads of one kv head read the same values, so their channels are divided alike."""
        heads = magnitude_K.view(self.spec.kv_heads, -1, self.spec.head_dim)
        return heads.amax(1, keepdim=True).expand_as(heads).flatten()
