"""One decoder layer quantised while calibration text runs through it.

Enters: the layer's input for all tokens. Leaves: every tensor of the quantised layer under its full name, a `Record`
for each weight, how many tokens each expert saw, and the unquantised layer's output, which the next layer takes in.
Experts are read, run, quantised and let go one by one.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..errors import CalibrationError
from ..export.choice import Choice, choose
from ..export.walk import Hidden, LayerWalk, Observe, Weights
from ..geometry import ModelSpec
from ..plugins.quantisation import LARGEST
from ..spec import Recipe
from .product import Input, Product, Record, quantise_product
from .shard import pack_int4
from .smoothing import Reader, awq_exponents, search, smoothquant_exponents
from .statistics import Statistics

SEARCHED_EXPERTS = 4
"""The busiest experts, whose errors count in the search of the strength that all experts share."""


FLOOR = 32
"""Tokens that an expert must have seen, where nobody says otherwise."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What calibration asks of the routing.

    Attributes:
        floor: Tokens that every expert must have seen.
        all_experts: Whether every expert is measured over every token.
    """

    floor: int = FLOOR
    all_experts: bool = False


@dataclass(slots=True)
class LayerQuantiser:
    """The work on one layer; `quantise` does all of it.

    Attributes:
        tensors: The quantised layer, by full names.
        records: What became of each weight.
        expert_tokens: Tokens that chose each expert; empty in a dense layer.
    """

    spec: ModelSpec
    index: int
    weights: Weights
    recipe: Recipe
    limits: Limits
    tensors: dict[str, Tensor] = field(init=False, default_factory=dict)
    records: list[Record] = field(init=False, default_factory=list)
    expert_tokens: list[int] = field(init=False, default_factory=list)
    walk: LayerWalk = field(init=False)

    def quantise(self, x: Hidden, attended: Hidden, out: Hidden, progress: Callable[[float], None]) -> None:
        """Quantises the layer.

        Args:
            x: Its input.
            attended: Room for what is behind the attention.
            out: Room for its output.
            progress: Told the share of the layer that is done.

        Raises:
            CalibrationError: An activation is not finite, or an expert saw too few tokens.
        """
        self.walk = LayerWalk(self.spec, self.index, self.weights, attended, out)
        self._quantise_attention(x)
        progress(0.3)
        feed_input = self._quantise_feed()
        progress(0.5)
        if self.spec.layers[self.index].experts:
            self._quantise_experts(feed_input, lambda share: progress(0.5 + share / 2))

    # Attention and feed-forward

    def _quantise_attention(self, x: Hidden) -> None:
        spec, name = self.spec, "self_attn."
        kv_size = spec.kv_heads * spec.head_dim
        source = self._input("attention_input", spec.hidden_size, [f"{name}{part}_proj" for part in "qkv"])
        attended = self._input("attention_output", spec.heads * spec.head_dim, [f"{name}o_proj"])
        keys, values = (self._input(part, kv_size, []) for part in ("keys", "values"))
        self.walk.attend(x, observer(source, attended, keys, values))
        query, key, value, output = (self.walk.weight(f"{name}{part}_proj.weight") for part in "qkvo")
        projections = {f"{name}{part}_proj": weight for part, weight in zip("qkv", (query, key, value), strict=True)}
        self._smooth(source, self._readers(source, projections))
        self._smooth(attended, self._readers(attended, {f"{name}o_proj": output}), self._share_over_group)
        groups = attended.exponents_K.view(spec.kv_heads, -1, spec.head_dim)
        values.exponents_K = groups[:, 0].flatten()
        projections[f"{name}v_proj"] = divided_rows(value, values.exponents_K)
        self._emit_norm("input_layernorm", source)
        for unit, weight in projections.items():
            self._emit_linear(unit, weight, source)
        self._emit_linear(f"{name}o_proj", output, attended)
        if self.recipe.kv_cache != "none":
            for part, cached in (("key", keys), ("value", values)):
                absmax_N = cached.statistics.absmax_K / torch.exp2(cached.exponents_K.float())
                scale_KD = absmax_N.view(spec.kv_heads, spec.head_dim) / LARGEST[self.recipe.kv_cache]
                self._emit(f"{name}{part}_scale", torch.where(scale_KD > 0, scale_KD, 1.0))

    def _quantise_feed(self) -> Input:
        """The dense feed-forward or the shared expert, and the router. Returns the input that experts have too."""
        spec, has_experts = self.spec, self.spec.layers[self.index].experts
        name = "feed_forward.shared_expert." if has_experts else "feed_forward."
        gate_name, up_name, down_name = (f"{name}{part}_proj" for part in ("gate", "up", "down"))
        router = ["feed_forward.router"] if has_experts else []
        source = self._input("feed_input", spec.hidden_size, [gate_name, up_name, *router])
        activated = self._input("down_input", spec.expert_size if has_experts else spec.dense_size, [down_name])
        self.walk.feed(observer(source, activated))
        gate, up, down = (self.walk.weight(f"{unit}.weight") for unit in (gate_name, up_name, down_name))
        linears = {gate_name: gate, up_name: up}
        linears |= {unit: self.walk.weight(f"{unit}.weight") for unit in router}
        readers = self._readers(source, linears)
        if has_experts:
            self._count_tokens()
            readers += self._expert_readers()
        self._smooth(source, readers)
        self._smooth(activated, self._readers(activated, {down_name: down}))
        linears[up_name] = divided_rows(up, activated.exponents_K)
        self._emit_norm("post_attention_layernorm", source)
        for unit, weight in linears.items():
            self._emit_linear(unit, weight, source)
        self._emit_linear(down_name, down, activated)
        return source

    # Experts

    def _count_tokens(self) -> None:
        counts_E = torch.bincount(self.walk.chosen().flatten(), minlength=self.spec.experts)
        self.expert_tokens = counts_E.tolist()
        starved = [expert for expert, tokens in enumerate(self.expert_tokens) if tokens < self.limits.floor]
        if starved and not self.limits.all_experts and self._choice("feed_forward.experts").format != "none":
            saw = self.expert_tokens[starved[0]]
            raise CalibrationError(
                f"layer {self.index}: expert {starved[0]} saw {saw} tokens, fewer than {self.limits.floor}"
                f" ({len(starved)} of {self.spec.experts} experts did): give more text, or --all-experts, which "
                "measures every expert over every token"
            )

    def _expert_readers(self) -> list[Reader]:
        """Some experts' first products over some of their tokens."""
        choice = self._choice("feed_forward.experts")
        if choice.format == "none" or self.recipe.smoothing == "none":
            return []
        busiest = sorted(range(self.spec.experts), key=lambda expert: -self.expert_tokens[expert])[:SEARCHED_EXPERTS]
        readers = []
        for expert in busiest:
            tokens_N = (self.walk.chosen() == expert).any(dim=1).nonzero()[:, 0]
            source = self._input("expert_input", self.spec.hidden_size, ["feed_forward.experts"])
            if len(tokens_N):
                source.statistics.update(next(self.walk.expert_inputs(expert, tokens_N))[1])
                weight_HN = self.walk.weight("feed_forward.experts.gate_up_proj", expert)
                readers.append(source.reader(weight_HN.T, choice))
        return readers

    def _quantise_experts(self, feed_input: Input, progress: Callable[[float], None]) -> None:
        spec, unit = self.spec, "feed_forward.experts"
        choice, dtype = self._choice(unit), self.weights.stored(f"layers.{self.index}.input_layernorm.weight").dtype
        kept: dict[str, list[Tensor]] = {}
        scales: dict[str, list[float]] = {"hidden_scale": [], "activated_scale": []}
        for expert in range(spec.experts):
            gate_up, down = (self.walk.weight(f"{unit}.{part}_proj", expert) for part in ("gate_up", "down"))
            source = self._input("expert_input", spec.hidden_size, [unit])
            activated = self._input("expert_activated", spec.expert_size, [unit])
            observe = observer(source, activated) if choice.format != "none" else lambda name, x: None
            self.walk.feed_expert(expert, gate_up, down, observe, all_tokens=self.limits.all_experts)
            source.exponents_K, source.strength = feed_input.exponents_K, feed_input.strength
            parts = {"gate_up": (gate_up.T, source), "down": (down.T, activated)}
            if choice.format != "none":
                self._smooth(activated, [activated.reader(down.T, choice)])
                rows_N = torch.cat([torch.zeros(spec.expert_size, dtype=torch.int32), activated.exponents_K])
                parts["gate_up"] = divided_rows(gate_up.T, rows_N), source
            for part, (weight_NK, read) in parts.items():
                name = f"{unit}.{part}_proj"
                if choice.format == "none":
                    moved_KN = (weight_NK * torch.exp2(read.exponents_K.float())).T
                    kept.setdefault(name, []).append(moved_KN.to(dtype).contiguous())
                    continue
                product, record = quantise_product(
                    self._named(f"{name}[{expert}]"), weight_NK, read, choice, torch.float32
                )
                self.records.append(record)
                kept.setdefault(name, []).append(laid_out(product, choice, transposed=True))
                kept.setdefault(f"{name}_scale", []).append(product.weight.scale_NG.T.contiguous())
                if product.input_scale is not None:
                    scales["hidden_scale" if part == "gate_up" else "activated_scale"].append(product.input_scale)
            progress((expert + 1) / spec.experts)
        for name, parts_E in kept.items():
            self._emit(name, torch.stack(parts_E))
            parts_E.clear()
        for name, values in scales.items():
            if values:
                self._emit(f"{unit}.{name}", torch.tensor(values))

    # Smoothing

    def _readers(self, source: Input, linears: dict[str, Tensor]) -> list[Reader]:
        """The quantised ones among the linears of an input."""
        choices = {unit: self._choice(unit) for unit in linears}
        return [
            source.reader(weight, choices[unit]) for unit, weight in linears.items() if choices[unit].format != "none"
        ]

    def _smooth(
        self, source: Input, readers: Sequence[Reader], share: Callable[[Tensor], Tensor] = lambda x_K: x_K
    ) -> None:
        """Chooses an input's exponents.

        Args:
            source: The input.
            readers: The quantised linears that read it.
            share: Makes magnitudes equal for channels that must be divided alike.
        """
        recipe = self.recipe
        if recipe.smoothing == "none" or not readers:
            return
        if recipe.smoothing == "awq":
            mean_K = share(source.statistics.mean_K)
            source.exponents_K, source.strength = search(readers, lambda a: awq_exponents(mean_K, a), recipe.strength)
            return
        absmax_K = share(source.statistics.absmax_K)
        weight_K = share(torch.stack([reader.largest_K for reader in readers]).amax(0))
        source.exponents_K, source.strength = search(
            readers, lambda a: smoothquant_exponents(absmax_K, weight_K, a), recipe.strength
        )

    def _share_over_group(self, magnitude_K: Tensor) -> Tensor:
        """Query heads of one kv head read the same values, so their channels are divided alike."""
        heads = magnitude_K.view(self.spec.kv_heads, -1, self.spec.head_dim)
        return heads.amax(1, keepdim=True).expand_as(heads).flatten()

    # What is written

    def _emit_norm(self, name: str, source: Input) -> None:
        stored = self.weights.stored(f"layers.{self.index}.{name}.weight")
        self._emit(f"{name}.weight", (stored.float() * torch.exp2(-source.exponents_K.float())).to(stored.dtype))

    def _emit_linear(self, unit: str, weight_NK: Tensor, source: Input) -> None:
        choice = self._choice(unit)
        dtype = self.weights.stored(f"layers.{self.index}.{unit}.weight").dtype
        if choice.format == "none":  # exact: powers of two
            self._emit(f"{unit}.weight", (weight_NK * torch.exp2(source.exponents_K.float())).to(dtype))
            return
        product, record = quantise_product(self._named(unit), weight_NK, source, choice, dtype)
        self.records.append(record)
        emit_product(self._emit, unit, product, choice, dtype)

    def _emit(self, name: str, tensor: Tensor) -> None:
        self.tensors[self.weights.full_name(f"layers.{self.index}.{name}")] = tensor

    def _named(self, unit: str) -> str:
        return f"layers.{self.index}.{unit}"

    def _choice(self, unit: str) -> Choice:
        return choose(self.recipe, self._named(unit))

    def _input(self, name: str, channels: int, units: Sequence[str]) -> Input:
        """An input to be measured; with its outer products where a unit that reads it asks for them."""
        choices = [self._choice(unit) for unit in units]
        wants_hessian = any(choice.rounding == "gptq" and choice.format != "none" for choice in choices)
        wants_histogram = any(choice.quantises_activations and choice.clip != "absmax" for choice in choices)
        statistics = Statistics(f"layer {self.index}: {name}", channels, wants_hessian, wants_histogram)
        return Input(statistics, self.recipe)


def observer(*inputs: Input) -> Observe:
    """Sends each observed tensor to the statistics of its name; others are let pass."""
    named = {each.statistics.name.partition(": ")[2]: each.statistics for each in inputs}

    def observe(name: str, x_NK: Tensor) -> None:
        named[name].update(x_NK)

    return observe


def divided_rows(weight_NK: Tensor, exponents_N: Tensor) -> Tensor:
    """A linear whose output channels come out divided by 2^exponents."""
    return weight_NK * torch.exp2(-exponents_N.float())[:, None]


def laid_out(product: Product, choice: Choice, *, transposed: bool = False) -> Tensor:
    """A weight's stored values as they are written, int4 packed."""
    values = product.weight.values_NK.T.contiguous() if transposed else product.weight.values_NK
    return pack_int4(values) if choice.format == "int4" else values


def emit_product(
    emit: Callable[[str, Tensor], None], unit: str, product: Product, choice: Choice, dtype: torch.dtype
) -> None:
    """A quantised linear's tensors: the weight [N, K], `_scale` [N] or [N, K / group], and the input's scale."""
    emit(f"{unit}.weight", laid_out(product, choice))
    scale_NG = product.weight.scale_NG
    emit(f"{unit}.weight_scale", scale_NG.to(dtype) if choice.format == "int4" else scale_NG[:, 0].contiguous())
    if product.input_scale is not None:
        emit(f"{unit}.input_scale", torch.tensor(product.input_scale))
