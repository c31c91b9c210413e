"""A layer's routed experts quantised, one by one: each is read, run, quantised and released.

Enters: a layer behind its router, and what its shared expert takes in. Leaves: stacked weights with their scales, and a
`Record` for each product. An expert that is not to be measured is rounded without statistics of its own: to nearest,
its smoothing that of the layer's input alone, and where scales of activations are static, by the largest that the
layer's other experts saw (the shared expert's where there is none).
"""

import dataclasses
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..plugins.quantisation import LARGEST
from ..spec.choice import Choice
from ..walk.decoder import LayerWalk
from .linears import Linears, laid_out, observer
from .moved_weight import MovedWeight
from .product import ProductInput, quantise_product
from .statistics import Statistics

UNIT = "feed_forward.experts"
SCALES = {"gate_up": "hidden_scale", "down": "activated_scale"}
"""The products of an expert, and the names of their inputs' static scales."""


@dataclass(slots=True)
class ExpertQuantiser:
    """The work on one layer's experts; `quantise` does all of it.

    Attributes:
        linears: Where tensors and records go.
        walk: The layer, its router's logits known.
        all_experts: Whether every expert is measured over every token.
        unmeasured: Experts that are rounded without statistics of their own.
    """

    linears: Linears
    walk: LayerWalk
    all_experts: bool
    unmeasured: Collection[int]
    largest: dict[str, float] = field(init=False, default_factory=dict)
    stacks: dict[str, Tensor] = field(init=False, default_factory=dict)
    scales: dict[str, dict[int, float]] = field(init=False, default_factory=dict)

    def quantise(self, feed_input: ProductInput, down_input: ProductInput, progress: Callable[[float], None]) -> None:
        """Quantises all of them.

        Args:
            feed_input: The input that the shared expert has too, its smoothing chosen.
            down_input: The input of the shared expert's second product.
            progress: Called with the share that is done.
        """
        experts = self.walk.spec.experts
        ordered = sorted(range(experts), key=lambda expert: expert in self.unmeasured)  # those without come last
        for done, expert in enumerate(ordered, start=1):
            self._quantise(expert, feed_input, down_input)
            progress(done / experts)
        for name, stack in self.stacks.items():
            self.linears.emit(name, stack)
        for name, values in self.scales.items():
            self.linears.emit(f"{UNIT}.{name}", torch.tensor([values[expert] for expert in range(experts)]))

    def _quantise(self, expert: int, feed_input: ProductInput, down_input: ProductInput) -> None:
        linears, choice = self.linears, self.linears.choice(UNIT)
        dtype = linears.weights.stored(f"{linears.prefix}input_layernorm.weight").dtype
        gate_up, down = (self.walk.factor(f"{UNIT}.{part}_proj", expert) for part in ("gate_up", "down"))
        source, activated = self._inputs(expert)
        observe = observer(source, activated) if choice.format != "none" else lambda name, x: None
        self.walk.feed_expert(expert, gate_up, down, observe, all_tokens=self.all_experts)
        source.exponents_K, source.strength = feed_input.exponents_K, feed_input.strength
        if choice.format == "none":
            for part, weight_KN, read in (("gate_up", gate_up, source), ("down", down, activated)):
                kept_KN = MovedWeight(weight_KN.T, read.exponents_K).kept(dtype).T
                self._keep(f"{UNIT}.{part}_proj", expert, kept_KN)
            return
        rows_N = None
        if expert in self.unmeasured:
            self._borrow(choice, source, activated, feed_input, down_input)
        else:
            linears.smooth(activated, [activated.reader(down.T, choice)])
            rows_N = torch.cat([torch.zeros_like(activated.exponents_K), activated.exponents_K])
            self._note_largest(source, activated)
        moved = MovedWeight(gate_up.T, source.exponents_K, rows_N), MovedWeight(down.T, activated.exponents_K)
        for part, weight, read in zip(SCALES, moved, (source, activated), strict=True):
            name = f"{UNIT}.{part}_proj"
            product, record = quantise_product(f"{linears.prefix}{name}[{expert}]", weight, read, choice, dtype)
            linears.records.append(dataclasses.replace(record, measured=expert not in self.unmeasured))
            self._keep(name, expert, laid_out(product, choice))
            self._keep(f"{name}_scale", expert, product.weight.scale_NG)
            if product.input_scale is not None:
                self.scales.setdefault(SCALES[part], {})[expert] = product.input_scale

    def _inputs(self, expert: int) -> Iterator[ProductInput]:
        """The inputs of an expert's two products; of one that is not measured, samples for the report alone."""
        spec, linears = self.walk.spec, self.linears
        for name, channels in (("expert_input", spec.hidden_size), ("expert_activated", spec.expert_size)):
            if expert in self.unmeasured:
                statistics = Statistics(
                    f"{linears.title}: {name}", channels, wants_histogram=False, device=linears.weights.device
                )
                yield ProductInput(statistics, linears.recipe)
            else:
                yield linears.input(name, channels, [UNIT])

    def _note_largest(self, *inputs: ProductInput) -> None:
        for part, read in zip(SCALES, inputs, strict=True):
            exponents_K = read.exponents_K if part == "gate_up" else torch.zeros_like(read.exponents_K)
            self.largest[part] = max(self.largest.get(part, 0.0), read.statistics.absmax(exponents_K))

    def _borrow(self, choice: Choice, *inputs: ProductInput) -> None:
        """Gives the inputs of an expert that is not measured the scales of others."""
        source, activated, feed_input, down_input = inputs
        for part, read, other in (("gate_up", source, feed_input), ("down", activated, down_input)):
            exponents_K = other.exponents_K if part == "gate_up" else torch.zeros_like(other.exponents_K)
            largest = self.largest.get(part) or other.statistics.absmax(exponents_K)
            read.borrowed = largest / LARGEST[choice.format] if choice.quantises_activations else None

    def _keep(self, name: str, expert: int, tensor: Tensor) -> None:
        """Puts an expert's tensor into its place among those of all."""
        if name not in self.stacks:
            self.stacks[name] = torch.empty(self.walk.spec.experts, *tensor.shape, dtype=tensor.dtype)
        self.stacks[name][expert] = tensor
