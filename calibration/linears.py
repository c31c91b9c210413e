"""The linears of one layer on their way into a quantised model: measured, smoothed, rounded and collected.

Enters: stored weights, statistics of what each takes in, and what the recipe says of each. Leaves: tensors under their
full names, and a `Record` for each quantised weight. A smoothed channel is divided where it is made and multiplied
where it is read by the same power of two, so that nothing but the rounding changes what a layer computes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..spec.choice import Choice, choose
from ..spec.recipe import Recipe
from ..walk.accelerator import HOST
from ..walk.decoder import Observe
from ..walk.numbers import Weights
from .moved_weight import MovedWeight
from .product import Product, ProductInput, Record, quantise_product
from .shard import pack_int4
from .smoothing import Reader, awq_exponents, search, smoothquant_exponents
from .statistics import Statistics


@dataclass(slots=True)
class Linears:
    """The linears of one layer, of the decoder or of the vision tower.

    Attributes:
        weights: Where the tensors are read from.
        recipe: How they are quantised.
        prefix: Beginning of the names of the layer's tensors, as a recipe has them.
        title: The layer's name in messages.
        tensors: The quantised layer, by full names.
        records: The record of each quantised weight.
    """

    weights: Weights
    recipe: Recipe
    prefix: str
    title: str
    tensors: dict[str, Tensor] = field(init=False, default_factory=dict)
    records: list[Record] = field(init=False, default_factory=list)

    def choice(self, unit: str) -> Choice:
        """The recipe's choice for a unit."""
        return choose(self.recipe, self.prefix + unit)

    def input(self, name: str, channels: int, units: Sequence[str]) -> ProductInput:
        """An input to be measured; with its outer products where a unit that reads it asks for them."""
        choices = [self.choice(unit) for unit in units]
        wants_products = any(choice.rounding == "gptq" and choice.format != "none" for choice in choices)
        wants_histogram = any(choice.quantises_activations and choice.clip != "absmax" for choice in choices)
        title, device = f"{self.title}: {name}", self.weights.device
        return ProductInput(Statistics(title, channels, wants_products, wants_histogram, device), self.recipe)

    # Smoothing

    def readers(self, source: ProductInput, linears: dict[str, Tensor]) -> list[Reader]:
        """The quantised ones among the linears of an input."""
        choices = {unit: self.choice(unit) for unit in linears}
        return [
            source.reader(weight, choices[unit]) for unit, weight in linears.items() if choices[unit].format != "none"
        ]

    def smooth(
        self, source: ProductInput, readers: Sequence[Reader], share: Callable[[Tensor], Tensor] = lambda x_K: x_K
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

    # What is written

    def emit(self, name: str, tensor: Tensor) -> None:
        """Adds one of the layer's tensors."""
        self.tensors[self.weights.full_name(self.prefix + name)] = tensor.to(HOST)

    def emit_kept(self, name: str) -> None:
        """Adds a tensor as it is stored."""
        self.emit(name, self.weights.stored(self.prefix + name))

    def emit_divided(self, name: str, exponents_K: Tensor) -> None:
        """Adds a norm's weight or bias, or a linear's bias, whose channels come out divided by 2^exponents."""
        stored_K = self.weights.stored(self.prefix + name)
        self.emit(name, (stored_K.float() * torch.exp2(-exponents_K.to(HOST).float())).to(stored_K.dtype))

    def emit_linear(
        self, unit: str, weight_NK: Tensor, source: ProductInput, exponents_N: Tensor | None = None
    ) -> None:
        """Adds a linear's weight, quantised where the recipe says so.

        Args:
            unit: Its name without `.weight`.
            weight_NK: The weight.
            source: Its input, with the exponents chosen.
            exponents_N: Octaves that its output channels are divided by, where the next input is smoothed.
        """
        choice = self.choice(unit)
        dtype = self.weights.stored(f"{self.prefix}{unit}.weight").dtype
        weight = MovedWeight(weight_NK, source.exponents_K, exponents_N)
        if choice.format == "none":  # exact: powers of two
            self.emit(f"{unit}.weight", weight.kept(dtype))
            return
        product, record = quantise_product(self.prefix + unit, weight, source, choice, dtype)
        self.records.append(record)
        self.emit(f"{unit}.weight", laid_out(product, choice))
        scale_NG = product.weight.scale_NG
        self.emit(f"{unit}.weight_scale", scale_NG.to(dtype) if choice.group_size else scale_NG[:, 0].contiguous())
        if product.input_scale is not None:
            self.emit(f"{unit}.input_scale", torch.tensor(product.input_scale))


def observer(*inputs: ProductInput) -> Observe:
    """Sends each observed tensor to the statistics of its name, which one of the inputs must have."""
    named = {each.statistics.name.partition(": ")[2]: each.statistics for each in inputs}

    def observe(name: str, x_NK: Tensor) -> None:
        named[name].update(x_NK)

    return observe


def laid_out(product: Product, choice: Choice) -> Tensor:
    """A weight's stored values [N, K] as they are written, int4 packed."""
    values_NK = product.weight.values_NK
    return pack_int4(values_NK) if choice.format == "int4" else values_NK
