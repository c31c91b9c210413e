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
from .computation import Computation, Ref, ints, number, whole
from .onnx_outline import FLOAT, INT64, Branch, Constant

CPU, MICROSOFT = "arriero.cpu", "com.microsoft"
FP8, LARGEST_FP8 = 17, 448.0
"""ONNX's number of E4M3, and its largest value."""

Shape = tuple[int, ...]

READ = {
    "rows": ("float32", "float16", "bfloat16"),
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
            return self.fp8(x, name, f"{plain}_scale", plain)
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

    def fp8(self, x: Ref, name: str, scale_name: str, unit: str) -> str:
        """The product of an E4M3 matrix; the activations' scale is static, or each token's own."""
        scale = self.weight(scale_name, self.given[name].shape[:1])
        rounded = self.nodes.reader(name, "FusedMatMul", 1).inputs[0]
        maker = self.nodes.maker.get(rounded) if isinstance(rounded, str) else None
        if maker is None or maker.op != "QuantizeLinear" or len(maker.inputs) != 2:
            raise ValueError(f"the product of {shortened(name)} is of activations that are not rounded")
        is_own = isinstance(maker.inputs[1], Constant)
        self._check_format(unit, name, "dynamic" if is_own else "static")
        if is_own:
            own = self._token_scale(x)
            product = self._rounded_product(self.nodes.find("Div", x, own), name, scale, number(1))
            return self.nodes.find("Mul", product, own)
        return self._rounded_product(x, name, scale, self._static(maker.inputs[1], ()))

    def _rounded_product(self, x: Ref, name: str, scale: str, x_scale: Ref) -> str:
        """The product of activations rounded to E4M3 by a scale."""
        rounded = self.nodes.find("QuantizeLinear", x, x_scale, output_dtype=FP8)
        product = self.nodes.find("FusedMatMul", rounded, name, domain=MICROSOFT, transB=1)
        return self.nodes.find("Mul", self.nodes.find("Mul", product, scale), x_scale)

    def _token_scale(self, x: Ref) -> str:
        """Each token's own scale of its activations."""
        find = self.nodes.find
        largest = find("ReduceMax", find("Abs", x), ints(-1), keepdims=1)
        if self.bound:
            largest = find("Min", largest, number(self.bound))
        scale = find("Div", largest, number(LARGEST_FP8))
        return find("Where", find("Equal", scale, number(0)), number(1), scale)

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
        if f"{gate_up}[0]" in self.names:
            return _Branches(self, x, logits, (gate_up, down), held).find()
        if {self.given[name].layout for name in self._named(gate_up)} == {"panels"}:
            shapes = (count, 2 * width, hidden), (count, hidden, width)
            return self._panel_experts(x, logits, plain, shapes, held)
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


class _Branches:
    """Experts in E4M3: a branch each, for the tokens that chose it."""

    def __init__(self, products: Products, x: Ref, logits: Ref, plain: tuple[str, str], held: Experts) -> None:
        self.products, self.nodes, self.x, self.plain, self.held = products, products.nodes, x, plain, held
        chosen, experts = self.nodes.find_all("TopK", logits, ints(held.top_k), axis=1)[:2]
        self.scores, self.experts = self.nodes.find("Sigmoid", chosen), experts

    def find(self) -> str:
        """The output."""
        nodes, find, count, first = self.nodes, self.nodes.find, self.held.count, self.held.first
        last, top_k = first + count, self.held.top_k
        hot = find("OneHot", self.experts, whole(last), ints(0, 1))
        busy = find("Greater", find("ReduceSum", hot, ints(0, 1), keepdims=0), whole(0))
        if first:
            busy = find("Slice", busy, ints(first), ints(last), ints(0))
        each = nodes.find_all("Split", busy, num_outputs=count) if count > 1 else (busy,)
        idle = Branch((Constant(INT64, (0, 1), ()), Constant(FLOAT, (0, self.held.hidden), ())))
        pairs = [
            nodes.find_all("If", each[index], then_branch=Branch(self._expert(index)), else_branch=idle)
            for index in range(count)
        ]
        places = find("Concat", *(pair[0] for pair in pairs), axis=0)
        unordered = find("Concat", *(pair[1] for pair in pairs), axis=0)
        blank = unordered
        if count < self.held.all_experts:
            blank = find("Expand", number(0), find("Mul", find("Shape", self.x), ints(top_k, 1)))
        scattered = find("ScatterND", blank, places, unordered)
        if top_k == 1:
            return scattered
        shaped = find("Reshape", scattered, ints(-1, top_k, self.held.hidden))
        return find("ReduceSum", shaped, ints(1), keepdims=0)

    def _expert(self, index: int) -> tuple[str, str]:
        """The places and outputs of an expert that has tokens."""
        find = self.nodes.find
        chosen = find("Equal", self.experts, whole(self.held.first + index))
        pairs = find("Transpose", find("NonZero", chosen), perm=(1, 0))
        tokens = find("Slice", pairs, ints(0), ints(1), ints(1))
        choices = find("Slice", pairs, ints(1), ints(2), ints(1))
        places = find("Add", find("Mul", tokens, whole(self.held.top_k)), choices)
        scores = find("Unsqueeze", find("GatherND", self.scores, pairs), ints(1))
        given = find("Mul", find("GatherND", self.x, tokens), scores)
        hidden, width = self.held.hidden, self.held.width
        both = self._product(given, 0, index, (2 * width, hidden))
        gate, up = self.nodes.find_all("Split", both, axis=1, num_outputs=2)[:2]
        activated = find("Mul", up, find("Mul", gate, find("Sigmoid", gate)))
        return places, self._product(activated, 1, index, (hidden, width))

    def _product(self, x: Ref, part: int, index: int, shape: Shape) -> str:
        """The product of one expert's matrix."""
        plain = self.plain[part]
        name = self.products.weight(f"{plain}[{index}]", shape)
        return self.products.fp8(x, name, f"{plain}_scale[{index}]", plain.rpartition(".")[0])


def plain_name(name: str) -> str:
    """A weight's name without its layout and type, and without what stands before a decoder's names."""
    return name.partition(":")[0].removeprefix("language_model.").removeprefix("model.")
