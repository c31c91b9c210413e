"""A graph's products with weights, in each form that lowering gives them, found where a model has a linear or experts.

Enters: a `Computation` and the weights of `spec.json`, whose names, types and shapes are those of the graph and of the
files. Leaves: the value that a linear or a layer of experts computes, or a `ValueError`. The forms are those of the
table in `engine/cpu_rules`.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from ..errors import shortened
from ..spec.choice import choose
from ..spec.recipe import Recipe
from ..spec.stored_weights import Weight
from ..spec.types import BITS
from .computation import Computation, Ref
from .onnx_outline import FLOAT

CPU = "arriero.cpu"

Shape = tuple[int, ...]

READ = {
    "rows": ("float32", "float16", "bfloat16", "fp8"),
    "panels": ("float32", "bfloat16", "uint8", "uint4"),
    "scales": ("float32", "bfloat16"),
}
"""Types that the CPU's kernels read, by how a weight is laid out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Experts:
    """The experts of a layer that a graph holds.

    Attributes:
        count: How many.
        all_experts: The router's experts (E).
        first: The router's number of the first of them.
        top_k: Experts that a token is sent to.
        hidden: Width of a token (H).
        width: Width of an expert (I).
    """

    count: int
    all_experts: int
    first: int
    top_k: int
    hidden: int
    width: int


class Products:
    """The products of one graph.

    Args:
        computation: The graph's nodes.
        weights: The weights that it is given.
        recipe: How they are quantised; None where they are not.
    """

    def __init__(self, computation: Computation, weights: Iterable[Weight], recipe: Recipe | None) -> None:
        self.nodes, self.recipe = computation, recipe
        self.bound = recipe.activation_bound if recipe else 0.0
        self.given = {weight.name: weight for weight in weights}
        self.names: dict[str, list[str]] = {}
        for name in computation.outline.weights:
            self.names.setdefault(plain_name(name), []).append(name)

    def weight(self, plain: str, shape: Shape) -> str:
        """The name of a weight in rows that there is one of, in its own type or in float32.

        Raises:
            ValueError: It is not there, or has another shape.
        """
        return self._only(plain, shape, [name for name in self._named(plain) if self.given[name].layout == "rows"])

    def _named(self, plain: str) -> list[str]:
        return [name for name in self.names.get(plain, ()) if name in self.given]

    def _only(self, plain: str, shape: Shape, names: list[str], *, interleaved: bool = False) -> str:
        """The one of some names, whose weight has this shape and lies as a lowering lays it."""
        if len(names) != 1:
            raise ValueError(f"{len(names)} weights {shortened(plain)}, expected one")
        weight = self.given[names[0]]
        if weight.shape != shape:
            said = f"{shortened(list(weight.shape))}, expected {list(shape)}"
            raise ValueError(f"the weight {shortened(plain)} has the shape {said}")
        if (weight.stacked, weight.interleaved) != (len(shape) == 3, interleaved) or weight.convert not in READ[
            weight.layout
        ]:
            raise ValueError(f"the weight {shortened(plain)} is laid out as no kernel reads it")
        return names[0]

    def _check_format(self, plain: str, name: str, activations: str) -> None:
        """Holds how a unit's weight and activations are quantised against the recipe."""
        dtype = self.given[name].dtype
        found = dtype if dtype in ("int8", "fp8", "int4") else "none"
        choice = None if self.recipe is None else choose(self.recipe, plain.removesuffix(".weight"))
        wanted = "none" if choice is None else choice.format
        if found != wanted:
            raise ValueError(f"the weight {shortened(plain)} is {dtype}, by spec.json's recipe {wanted}")
        if choice is not None and choice.quantises_activations and activations != choice.activations:
            raise ValueError(f"the activations of {shortened(plain)} have {activations} scales, by spec.json others")

    def linear(self, x: Ref, plain: str, outputs: int, inputs: int) -> str:
        """The product of activations [..., inputs] with the weight [outputs, inputs] of a plain name.

        Raises:
            ValueError: The graph has none of a form that is known.
        """
        panels = [name for name in self._named(plain) if self.given[name].layout == "panels"]
        shape = (outputs, inputs)
        if panels:
            return self._panels(x, self._only(plain, shape, panels), plain, shape)
        name = self.weight(plain, shape)
        if self.given[name].dtype == "fp8":
            return self._fp8(x, name, plain)
        self._check_format(plain, name, "none")
        return self.nodes.find("PlainLinear", x, name, domain=CPU)

    def _panels(self, x: Ref, name: str, plain: str, shape: Shape) -> str:
        """The product of a matrix in panels."""
        weight = self.given[name]
        inputs, group = [x, name], 0
        if weight.convert in ("uint8", "uint4"):
            scale, group = self._panel_scale(f"{plain}_scale", shape)
            statics = self.nodes.reader(name, "Linear", 1).inputs[3:4]
            inputs += [scale, *(self._static(each, ()) for each in statics)]
        self._check_format(plain, name, "static" if len(inputs) > 3 else "dynamic")
        bits = BITS[weight.convert]
        return self.nodes.find("Linear", *inputs, domain=CPU, bits=bits, group=group, outputs=shape[0])

    def _panel_scale(self, plain: str, shape: Shape, *, interleaved: bool = False) -> tuple[str, int]:
        """The scales of panels [..., outputs, groups], and the inputs that share one; 0 where all do."""
        names = [name for name in self._named(plain) if self.given[name].layout == "scales"]
        found = self.given[names[0]].shape if names else ()
        groups = math.prod(found[len(shape) - 1 :])
        if not groups or shape[-1] % groups:
            raise ValueError(f"the scales {shortened(plain)} have the shape {shortened(list(found))}")
        name = self._only(plain, (*shape[:-1], *found[len(shape) - 1 :]), names, interleaved=interleaved)
        return name, 0 if groups == 1 else shape[-1] // groups

    def held(self, plain: str, dims: Shape) -> str:
        """The name of a scale that the graph itself holds."""
        names = self.names.get(plain, [])
        return self._static(names[0] if len(names) == 1 else plain, dims)

    def _static(self, value: Ref, dims: Shape) -> str:
        """A static scale that the graph holds."""
        tensor = self.nodes.outline.weights.get(value) if isinstance(value, str) else None
        if tensor is None or tensor.location or tensor.dtype != FLOAT or tensor.dims not in (dims, dims or (1,)):
            raise ValueError(f"{shortened(value)} is no scale of activations")
        return str(value)

    def _fp8(self, x: Ref, name: str, plain: str) -> str:
        """The product of an E4M3 matrix; the activations' scale is static, or each token's own."""
        inputs: list[Ref] = [x, name, self.weight(f"{plain}_scale", self.given[name].shape[:1])]
        statics = [self._static(each, ()) for each in self.nodes.reader(name, "Fp8Linear", 1).inputs[3:]]
        self._check_format(plain, name, "static" if statics else "dynamic")
        bound = 0.0 if statics else self.bound
        return self.nodes.find("Fp8Linear", *inputs, *statics, domain=CPU, bound=bound)

    def experts(self, x: Ref, logits: Ref, plain: str, held: Experts) -> str:
        """Sums of what a layer's routed experts add to each token.

        Args:
            x: Tokens [T, H].
            logits: The router's logits [T, E].
            plain: Plain name of the experts.
            held: Which of them.
        """
        gate_up, down = (f"{plain}.{part}_proj" for part in ("gate_up", "down"))
        count, hidden, width = held.count, held.hidden, held.width
        found = {(self.given[name].layout, self.given[name].dtype) for name in self._named(gate_up)}
        shapes = (count, 2 * width, hidden), (count, hidden, width)
        if {layout for layout, _ in found} == {"panels"}:
            return self._panel_experts(x, logits, plain, shapes, held)
        if found == {("rows", "fp8")}:
            return self._fp8_experts(x, logits, plain, shapes, held)
        names = self.weight(gate_up, (count, hidden, 2 * width)), self.weight(down, (count, width, hidden))
        for name in names:
            self._check_format(plain, name, "none")
        settings = {"top_k": held.top_k, "first_expert": held.first}
        return self.nodes.find("PlainMoeDispatch", x, logits, *names, domain=CPU, **settings)

    def _panel_experts(self, x: Ref, logits: Ref, unit: str, shapes: tuple[Shape, Shape], held: Experts) -> str:
        """Experts in panels, one node for all."""
        inputs: list[Ref] = [x, logits]
        groups, kinds = list[int](), set[str]()
        for part, shape in zip(("gate_up", "down"), shapes, strict=True):
            plain, interleaved = f"{unit}.{part}_proj", part == "gate_up"
            name = self._only(plain, shape, self._named(plain), interleaved=interleaved)
            scale, group = self._panel_scale(f"{plain}_scale", shape, interleaved=interleaved)
            inputs += [name, scale]
            groups.append(group)
            kinds.add(self.given[name].convert)
        found = self.nodes.reader(str(inputs[2]), "MoeDispatch", 2)
        statics = [self._static(each, (held.count,)) for each in found.inputs[6:]]
        if len(kinds) != 1 or len(statics) not in (0, 2):
            raise ValueError(f"experts of {len(kinds)} types with {len(statics)} scales of activations")
        for name in (str(inputs[2]), str(inputs[4])):
            self._check_format(unit, name, "static" if statics else "dynamic")
        return self.nodes.find(
            "MoeDispatch",
            *inputs,
            *statics,
            domain=CPU,
            bits=BITS[kinds.pop()],
            group=groups[0],
            down_group=groups[1],
            top_k=held.top_k,
            first_expert=held.first,
            experts=held.count,
            width=held.width,
        )

    def _fp8_experts(self, x: Ref, logits: Ref, unit: str, shapes: tuple[Shape, Shape], held: Experts) -> str:
        """Experts in E4M3, one node for all."""
        inputs: list[Ref] = [x, logits]
        for part, shape in zip(("gate_up", "down"), shapes, strict=True):
            plain = f"{unit}.{part}_proj"
            inputs += [self.weight(plain, shape), self.weight(f"{plain}_scale", (*shape[:2], 1))]
        found = self.nodes.reader(str(inputs[2]), "Fp8MoeDispatch", 2)
        statics = [self._static(each, (held.count,)) for each in found.inputs[6:]]
        for name in (str(inputs[2]), str(inputs[4])):
            self._check_format(unit, name, "static" if statics else "dynamic")
        settings = {"top_k": held.top_k, "first_expert": held.first, "bound": 0.0 if statics else self.bound}
        return self.nodes.find("Fp8MoeDispatch", *inputs, *statics, domain=CPU, **settings)


def plain_name(name: str) -> str:
    """A weight's name without its layout and type, and without what stands before a decoder's names."""
    return name.partition(":")[0].removeprefix("language_model.").removeprefix("model.")
