"""A canonical graph, the decoder's, the vision tower's or the draft's, made that of a quantised model.

Enters: the graph as it is before quantising, and where each tensor of the quantised model lies. Leaves: the same graph
with quantised linears (as `plugins.linear` writes them), experts and caches, its initializers in those places.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ..files.safetensors import Region
from ..plugins.gqa import op as gqa
from ..plugins.gqa.body import body as gqa_body
from ..plugins.linear import STORED, write_input, write_linear
from ..plugins.moe import op as moe
from ..plugins.moe.body import body as moe_body
from ..plugins.nodes import Nodes, onnx_type
from ..spec.choice import Choice, choose
from ..spec.draft import DraftSpec
from ..spec.geometry import ModelSpec
from ..spec.recipe import Recipe
from ..spec.types import CODES, MODEL_TYPES

PLACED = {CODES[name]: onnx_type(name) for name in MODEL_TYPES}
"""Types in the graph by the shards' codes; bytes hold two int4."""

Places = Mapping[str, tuple[str, Region]]
"""The file and region of each tensor, by its full name."""


def quantise_graph(model: ir.Model, spec: ModelSpec | DraftSpec, recipe: Recipe, places: Places, folder: Path) -> None:
    """Rewrites a decoder's, a vision tower's or a draft's graph in place.

    Args:
        model: The graph.
        spec: Geometry.
        recipe: Recipe that the weights were quantised by.
        places: Where the quantised model's tensors lie.
        folder: Where the files are that hold its scales.
    """
    _Rewriting(model, spec, recipe, places, folder).rewrite()


class _Rewriting:
    """The graph under change."""

    def __init__(
        self, model: ir.Model, spec: ModelSpec | DraftSpec, recipe: Recipe, places: Places, folder: Path
    ) -> None:
        self.folder = folder
        self.model, self.graph, self.recipe, self.places = model, model.graph, recipe, places
        self.dtype = onnx_type(spec.dtype)
        self.head_dim = spec.head_dim
        self.inputs: dict[tuple[ir.Value, str, float | None], tuple[ir.Value, ir.Value | None]] = {}
        self.used_functions: dict[tuple[str, str, str], ir.Function] = {}

    def rewrite(self) -> None:
        """Rewrites node by node; function bodies that are called no more go."""
        for value in list(self.graph.initializers.values()):
            if isinstance(value.const_value, ir.ExternalTensor):
                self._place(value)
        for node in list(self.graph):
            match node.domain, node.op_type:
                case "", "MatMul":
                    self._rewrite_linear(node)
                case moe.DOMAIN, moe.NAME:
                    self._rewrite_experts(node)
                case gqa.DOMAIN, gqa.NAME:
                    self._rewrite_attention(node)
        for identifier in list(self.model.functions):
            del self.model.functions[identifier]
        self.model.functions.update(self.used_functions)

    def _place(self, value: ir.Value) -> None:
        """Points an initializer into the new shards."""
        name = str(value.name)
        file, region = self.places[name]
        dtype, shape = PLACED[region.dtype], region.shape
        if dtype == ir.DataType.INT4:
            shape = (*shape[:-1], shape[-1] * 2)
        value.const_value = ir.ExternalTensor(
            file, region.offset, region.size, dtype, shape=ir.Shape(shape), name=name, base_dir=Path(".")
        )
        value.shape, value.type = ir.Shape(shape), ir.TensorType(dtype)

    def _initializer(self, name: str) -> ir.Value:
        """The new initializer of a tensor in the shards."""
        if name not in self.graph.initializers:
            value = ir.Value(name=name)
            self._place(value)
            self.graph.register_initializer(value)
        return self.graph.initializers[name]

    def _constant(self, name: str) -> ir.Value:
        """A small scale, held in the graph itself: lowerings compute with it, and runtimes fold what they compute."""
        if name not in self.graph.initializers:
            array = self._read(name)
            value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(ir.DataType.FLOAT))
            value.const_value = ir.tensor(array, name=name)
            self.graph.register_initializer(value)
        return self.graph.initializers[name]

    def _read(self, name: str) -> NDArray[np.float32]:
        """A scale's values."""
        file, region = self.places[name]
        values = np.fromfile(self.folder / file, np.float32, region.size // 4, offset=region.offset)
        return values.reshape(region.shape)

    def _rewrite_linear(self, node: ir.Node) -> None:
        x, transposed = node.inputs
        transpose = None if transposed is None else transposed.producer()
        weight = None if transpose is None else transpose.inputs[0]
        if x is None or transpose is None or weight is None or not weight.is_initializer():
            return
        full = str(weight.name)
        choice = choose(self.recipe, short_name(full))
        if choice.format == "none":
            return
        nodes = Nodes(f"{node.name}/")
        output = ir.Value(name=node.outputs[0].name, shape=node.outputs[0].shape, type=node.outputs[0].type)
        token_scale = None
        if choice.quantises_activations:
            x, token_scale = self._quantised_input(nodes, x, full.removesuffix("weight") + "input_scale", choice)
        weight_scale = self._initializer(f"{full}_scale")
        write_linear(nodes, x, token_scale, weight, weight_scale, output, choice.format, self.dtype)
        self._replace(node, nodes)
        if not transpose.outputs[0].uses():
            self.graph.remove(transpose, safe=True)

    def _quantised_input(
        self, nodes: Nodes, x: ir.Value, scale_name: str, choice: Choice
    ) -> tuple[ir.Value, ir.Value | None]:
        """A quantised input, written once for the linears that read it with the same scale."""
        value = float(self._read(scale_name)) if choice.activations == "static" else None
        key = x, choice.format, value
        if key not in self.inputs:
            scale = None if value is None else self._constant(scale_name)
            self.inputs[key] = write_input(nodes, x, scale, choice.format, self.dtype, self.recipe.activation_bound)
        return self.inputs[key]

    def _rewrite_experts(self, node: ir.Node) -> None:
        hidden, router_logits, gate_up, down = node.inputs
        assert gate_up is not None
        assert down is not None
        unit = str(gate_up.name).removesuffix(".gate_up_proj")
        choice = choose(self.recipe, short_name(unit))
        attributes = {name: attribute.value for name, attribute in node.attributes.items()}
        if choice.format == "none":
            self._keep_function(node)
            return
        scales = [self._initializer(f"{unit}.{part}_proj_scale") for part in ("gate_up", "down")]
        is_static = choice.quantises_activations and choice.activations == "static"
        if is_static:
            scales += [self._constant(f"{unit}.{name}") for name in moe.ACTIVATION_SCALES]
        attributes["quantisation"] = choice.format
        if self.recipe.activation_bound and choice.quantises_activations and not is_static:
            attributes["activation_bound"] = self.recipe.activation_bound
        overload = f"{choice.format}_{'static' if is_static else 'dynamic'}"
        body = moe_body(moe.Attributes(**attributes), self.dtype, static=is_static, overload=overload)
        self._call(node, [hidden, router_logits, gate_up, down, *scales], attributes, body)

    def _rewrite_attention(self, node: ir.Node) -> None:
        kind = self.recipe.kv_cache
        if kind == "none":
            self._keep_function(node)
            return
        inputs = [*node.inputs, *[None] * (len(gqa.INPUTS) - len(node.inputs))]
        attributes = {name: attribute.value for name, attribute in node.attributes.items()}
        caches = [inputs[3], inputs[4], *node.outputs[1:]]
        for cache in caches:
            assert cache is not None
            cache.type = ir.TensorType(STORED[kind])
        layer = str(node.name).partition("/")[0]
        scales = [self._constant(f"{self._prefix()}{layer}.self_attn.{name}") for name in gqa.CACHE_SCALES]
        body = gqa_body(
            gqa.Attributes(**attributes),
            self.head_dim,
            inputs[6] is not None,
            self.dtype,
            f"{node.overload}_{kind}",
            STORED[kind],
        )
        self._call(node, [*inputs, *scales], attributes, body)

    def _prefix(self) -> str:
        """Beginning of the checkpoint's names of layers."""
        return next(name for name in self.places if "layers." in name).partition("layers.")[0]

    def _call(
        self, node: ir.Node, inputs: Sequence[ir.Value | None], attributes: Mapping[str, Any], body: ir.Function
    ) -> None:
        """Replaces a custom op's node by one with other inputs and attributes, and the function body that it calls."""
        self.used_functions[body.identifier()] = body
        nodes = Nodes()
        outputs = [ir.Value(name=value.name, shape=value.shape, type=value.type) for value in node.outputs]
        nodes.list.append(
            ir.Node(
                node.domain,
                node.op_type,
                inputs,
                attributes=ir.convenience.convert_attributes(dict(attributes)),
                overload=body.overload,
                outputs=outputs,
                name=node.name,
            )
        )
        self._replace(node, nodes)

    def _keep_function(self, node: ir.Node) -> None:
        identifier = node.op_identifier()
        self.used_functions[identifier] = self.model.functions[identifier]

    def _replace(self, node: ir.Node, nodes: Nodes) -> None:
        """Puts nodes in the place of one; the last of them produces its outputs."""
        self.graph.insert_before(node, nodes.list)
        for old, new in zip(node.outputs, nodes.list[-1].outputs, strict=True):
            ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
        self.graph.remove(node, safe=True)


def short_name(name: str) -> str:
    """A unit's name as a recipe has it."""
    return name.removeprefix("language_model.").removeprefix("model.").removesuffix(".weight")
