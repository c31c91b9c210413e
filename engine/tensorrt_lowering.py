"""A canonical graph as the ONNX that TensorRT's parser takes: custom ops as plugins or native layers.

Enters: a model folder's decoder or vision tower. Leaves: a `Network` whose weights still lie in the model's
safetensors, either as external data that the parser reads, or as network inputs that a session binds at load. Caches
have static capacities.

Invariant: each custom op's node records which way it was lowered: to a `plugin`, `native` layers, or the op's
`function`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import onnx_ir as ir

from ..errors import BuildError
from ..plugins.all_reduce import native as all_reduce_native
from ..plugins.all_reduce import op as all_reduce
from ..plugins.canonical_graph import read_graph
from ..plugins.gqa import native as gqa_native
from ..plugins.gqa import op as gqa
from ..plugins.launch import ALIGNMENT, round_up
from ..plugins.moe import op as moe
from ..plugins.moe.body import write_body as write_moe_body
from ..plugins.moe.kernel_geometry import group_of
from ..plugins.nodes import Nodes, dims, number
from ..plugins.tensorrt_plugin import NAMESPACE, VERSION
from ..spec.built_engine import CacheInput
from ..spec.folder import FolderSpec, VisionPart
from ..spec.geometry import ModelSpec
from ..spec.stored_weights import Weight
from ..spec.types import BITS
from .narrow_scales import narrow_scales, narrowed
from .projections import PLUGIN_DTYPES, adds_attention, products_of, sizes_together, transposes_of
from .supply import STORED

Way = Literal["plugin", "native", "function"]
Placement = Literal["inside", "experts", "outside"]
SMALL = 1 << 16
"""Bytes below which a weight stays inside the engine whatever the placement: norms, scales, frequencies."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Choices:
    """Choices about a network.

    Attributes:
        gqa: `plugin` or `native`; None takes the plugin where its kernels take the model's type.
        placement: The weights that become network inputs: none, the experts, or all large ones.
        max_seq: Positions that a sequence may hold.
    """

    gqa: Literal["plugin", "native"] | None
    placement: Placement
    max_seq: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Network:
    """A graph for TensorRT's parser.

    Attributes:
        graph: Serialized ONNX.
        weights: The network inputs that are weights, and where they lie.
        ways: The way that each custom op's node was lowered, by node name.
        caches: The cache inputs, in order.
        dtypes: Types of the tensors in the graph.
        sums: Names of the layers that stand for sums over ranks, and how many ranks take part.
    """

    graph: bytes
    weights: tuple[Weight, ...]
    ways: Mapping[str, Way]
    caches: tuple[CacheInput, ...]
    dtypes: frozenset[str]
    sums: Mapping[str, int] = field(default_factory=dict)


def lower_for_tensorrt(
    folder: Path, spec: FolderSpec, choices: Choices, files: Mapping[str, Path] | None = None
) -> Network:
    """Lowers a model folder's decoder.

    Args:
        folder: The model folder.
        spec: Its spec.
        choices: Choices about the network.
        files: Paths of the weight files by name, to find what needs fewer bits than it is stored in; None leaves all.

    Raises:
        BuildError: The graph is damaged, or a choice does not fit it.
    """
    return _lower(folder / spec.graph, spec.rank_model, choices, files or {})


def lower_tower_for_tensorrt(folder: Path, spec: FolderSpec, vision: VisionPart, placement: Placement) -> Network:
    """Lowers a model folder's vision tower; raises what `lower_for_tensorrt` does."""
    return _lower(folder / vision.graph, spec.model, Choices(gqa=None, placement=placement, max_seq=0), {})


def _lower(path: Path, spec: ModelSpec, choices: Choices, files: Mapping[str, Path]) -> Network:
    model = read_graph(path)
    lowering = _TensorrtLowering(model.graph, spec, choices, files)
    graph = lowering.lower()
    lowered = ir.Model(graph, ir_version=model.ir_version, producer_name="arriero")
    return Network(
        graph=ir.to_proto(lowered).SerializeToString(),
        weights=tuple(lowering.weights.values()),
        ways=lowering.ways,
        caches=tuple(lowering.caches),
        dtypes=frozenset(STORED[dtype] for dtype in lowering.dtypes if dtype in STORED),
        sums=lowering.sums,
    )


@dataclass
class _TensorrtLowering:
    """The new graph under construction; values keep their names and types."""

    source: ir.Graph
    spec: ModelSpec
    choices: Choices
    files: Mapping[str, Path]
    mapped: dict[ir.Value, ir.Value] = field(default_factory=dict)
    inputs: list[ir.Value] = field(default_factory=list)
    weights: dict[str, Weight] = field(default_factory=dict)
    initializers: dict[str, ir.Value] = field(default_factory=dict)
    ways: dict[str, Way] = field(default_factory=dict)
    caches: list[CacheInput] = field(default_factory=list)
    dtypes: set[ir.DataType] = field(default_factory=set)
    sums: dict[str, int] = field(default_factory=dict)
    replaced: set[ir.Node] = field(default_factory=set)

    def lower(self) -> ir.Graph:
        """Lowers node by node, in order."""
        # What is inside TensorRT reads from the files, as it is stored.
        narrow = {} if self.choices.placement == "inside" else narrow_scales(self.source, self.files)
        experts, sizes = self._expert_weights(), sizes_together(self.source)
        for value in self.source.inputs:
            self.inputs.append(self._value(value))
        for value in self.source.initializers.values():
            small = sizes.get(value, 0) < SMALL
            self._place(value, is_small=small, is_expert=value in experts, dtype=narrow.get(value))
        written: list[ir.Node] = []
        for node in self.source:
            nodes = Nodes(f"{node.name}/")
            self._lower_node(nodes, node)
            written.extend(nodes.list)
        return ir.Graph(
            self.inputs,
            [self._value(value) for value in self.source.outputs],
            nodes=[node for node in written if node not in self.replaced],
            initializers=list(self.initializers.values()),
            opset_imports={**self.source.opset_imports, gqa.DOMAIN: gqa.VERSION, gqa_native.DOMAIN: 1},
            name=self.source.name,
        )

    def _expert_weights(self) -> set[ir.Value]:
        """The initializers that only custom ops read as experts' weights and their scales."""
        layers = (node for node in self.source if node.op_type == moe.NAME)
        return {value for node in layers for value in node.inputs[2:6] if value is not None and value.is_initializer()}

    def _place(self, value: ir.Value, *, is_small: bool, is_expert: bool, dtype: ir.DataType | None = None) -> None:
        """Puts a weight into the engine or among the network's inputs, groups' scales turned to a 16-bit `dtype`."""
        tensor = value.const_value
        assert tensor is not None
        self.dtypes.add(tensor.dtype)
        outside = self.choices.placement == "outside" or (self.choices.placement == "experts" and is_expert)
        if not outside or not isinstance(tensor, ir.ExternalTensor) or is_small:
            if dtype is not None:
                tensor = narrowed(tensor, self.files, dtype)
            new = ir.Value(
                name=value.name,
                shape=ir.Shape(tensor.shape.numpy()),
                type=ir.TensorType(tensor.dtype),
                const_value=tensor,
            )
            self.initializers[f"{value.name}"] = new
        else:
            weight = self.weights[f"{value.name}"] = Weight(
                name=f"{value.name}",
                file=str(tensor.location),
                offset=tensor.offset or 0,
                shape=tensor.shape.numpy(),
                dtype=STORED[tensor.dtype],
                convert=STORED[dtype or tensor.dtype],
                layout="rows" if dtype is None else "groups",
                stacked=dtype is not None,
            )
            kind = ir.TensorType(dtype or tensor.dtype)
            new = ir.Value(name=value.name, shape=ir.Shape(weight.given_shape), type=kind)
            self.inputs.append(new)
        self.mapped[value] = new

    def _lower_node(self, nodes: Nodes, node: ir.Node) -> None:
        inputs = [None if value is None else self._value(value) for value in node.inputs]
        outputs = [self._value(value) for value in node.outputs]
        attributes = {name: attribute.value for name, attribute in node.attributes.items()}
        match node.domain, node.op_type:
            case "", "Attention":
                self._lower_patches(nodes, node, outputs)
            case "", "Add" if adds_attention(node):
                wide = nodes.Add(*(nodes.Cast(value, to=ir.DataType.FLOAT) for value in _given(inputs)))
                nodes.node("Cast", [wide], outputs=outputs, attributes={"to": _dtype(outputs[0])})
            case "", _:
                nodes.node(node.op_type, inputs, outputs=outputs, attributes=attributes)
            case gqa.DOMAIN, gqa.NAME:
                self._lower_attention(nodes, f"{node.name}", inputs, outputs, gqa.Attributes(**attributes))
            case moe.DOMAIN, moe.NAME:
                self._lower_experts(nodes, f"{node.name}", inputs, outputs, moe.Attributes(**attributes))
            case all_reduce.DOMAIN, all_reduce.NAME:
                self.sums[f"{node.name}"] = attributes["ranks"]
                all_reduce_native.mark(nodes, f"{node.name}", _present(inputs, 0), outputs[0])
            case domain, op_type:
                raise BuildError(
                    f"{node.name}: {domain}.{op_type} has no lowering for TensorRT: export the model again"
                )

    def _lower_patches(self, nodes: Nodes, node: ir.Node, outputs: list[ir.Value]) -> None:
        """Attention between patches. The query is scaled in float32, before its one rounding.

        TensorRT's parser would scale query and key in their own type. Where there is no fused kernel, for float32 and
        for some head dims, the attention may be several layers.
        """
        query, *others = _given(node.inputs)
        rounding, heads = query.producer(), node.attributes["q_num_heads"].as_int()
        channels = None if query.shape is None else query.shape[-1]
        if rounding is None or rounding.op_type != "Cast" or not isinstance(channels, int):
            raise BuildError(f"{node.name}: its query is not one that export rotates: export the model again")
        wide, factor = self._value(_present(rounding.inputs, 0)), number((channels // heads) ** -0.5)
        inputs = [nodes.Cast(nodes.Mul(wide, factor), to=_dtype(query)), *map(self._value, others)]
        settings = {"q_num_heads": heads, "kv_num_heads": heads, "scale": 1.0, "TRT_decomposable": 1}
        nodes.node("Attention", inputs, outputs=outputs, attributes=settings)

    def _lower_attention(
        self,
        nodes: Nodes,
        name: str,
        inputs: list[ir.Value | None],
        outputs: list[ir.Value],
        attributes: gqa.Attributes,
    ) -> None:
        query, cache = _present(inputs, 0), _present(inputs, 3)
        dtype, stored = _dtype(query), _dtype(cache)
        assert cache.shape is not None
        head_dim = cache.shape[3]
        assert isinstance(head_dim, int)
        quantised = stored != dtype
        way: Way = self.choices.gqa or ("plugin" if dtype in PLUGIN_DTYPES else "native")
        if way == "plugin" and dtype not in PLUGIN_DTYPES:
            raise BuildError(
                f"the attention plugin computes in bfloat16 and float16, this model is {STORED[dtype]}: "
                "export with --dtype bfloat16, or build with --gqa native"
            )
        if way == "native" and quantised:
            raise BuildError(
                f"TensorRT's own attention has no {STORED[stored]} cache: build with --gqa plugin, "
                "or calibrate without --kv-cache"
            )
        self.ways[name] = way
        if way == "plugin":
            rope = len(inputs) > 6 and inputs[6] is not None
            given = _given(inputs)
            if (projection := self._fused(nodes, name, given[:3])) is not None:
                given[:3] = [projection] * 3
            width = 0 if projection is None else attributes.heads * head_dim
            settings = _plugin_attributes(attributes, rope=int(rope), width=width)
            nodes.node(gqa.NAME, given, outputs=outputs, domain=gqa.DOMAIN, attributes=settings)
        else:
            gqa_native.lower(nodes, _given(inputs), outputs, attributes, head_dim, dtype)

    def _fused(self, nodes: Nodes, name: str, projected: list[ir.Value]) -> ir.Value | None:
        """One product in place of the three that make query, key and value, so that no layer copies its parts.

        Weights inside the engine are joined when it is built, those outside lie behind one another in one input. None
        where they are not 16-bit ones, all inside or all outside.
        """
        products = products_of(projected)
        transposes = transposes_of(products)
        weights = [_present(node.inputs, 0) for node in transposes]
        if len(weights) < 3 or len({node.inputs[0] for node in products}) > 1:
            return None
        names = [f"{value.name}" for value in weights]
        if all(each in self.initializers for each in names):
            joined = nodes.Concat(*(_present(node.inputs, 1) for node in products), axis=1)
        elif all(each in self.weights for each in names) and len({_dtype(value) for value in weights}) == 1:
            joined = nodes.Transpose(self._stacked(f"{name}/weight", weights), perm=[1, 0])
            self.replaced.update(transposes)
        else:
            return None
        self.replaced.update(products)
        return nodes.MatMul(_present(products[0].inputs, 0), joined)

    def _stacked(self, name: str, weights: Sequence[ir.Value]) -> ir.Value:
        """One input of the network in place of several matrices of equal width, whose rows lie behind one another."""
        for value in weights:
            self.inputs.remove(value)
            weight = self.weights.pop(f"{value.name}")  # put behind: their order is that of the rows
            self.weights[weight.name] = replace(weight, part_of=name)
        shape = ir.Shape([sum(dims(value)[0] for value in weights), dims(weights[0])[1]])
        self.inputs.append(ir.Value(name=name, shape=shape, type=ir.TensorType(_dtype(weights[0]))))
        return self.inputs[-1]

    def _lower_experts(
        self,
        nodes: Nodes,
        name: str,
        inputs: list[ir.Value | None],
        outputs: list[ir.Value],
        attributes: moe.Attributes,
    ) -> None:
        dtype = _dtype(_present(inputs, 0))
        self.ways[name] = "plugin" if dtype in PLUGIN_DTYPES else "function"
        if self.ways[name] == "plugin":
            if attributes.quantisation == "int4":
                axis = 2 if _dtype(_present(inputs, 4)) == ir.DataType.FLOAT else 1  # in 16 bits they are turned
                pairs = zip(inputs[2:4], inputs[4:6], strict=True)
                group_of([(dims(weight)[2], dims(scale)[axis]) for weight, scale in pairs])
            settings = _plugin_attributes(attributes)
            nodes.node(moe.NAME, _given(inputs), outputs=outputs, domain=moe.DOMAIN, attributes=settings)
            return
        names = moe.INPUTS + moe.WEIGHT_SCALES + moe.ACTIVATION_SCALES
        given = {key: value for key, value in zip(names, inputs, strict=False) if value is not None}
        in_part = dims(inputs[2])[0] < self.spec.experts
        write_moe_body(nodes, given, outputs[0], attributes=attributes, dtype=dtype, in_part=in_part)

    def _value(self, value: ir.Value) -> ir.Value:
        """The new graph's value for one of the old graph's; caches get their capacity."""
        if value not in self.mapped:
            shape = value.shape
            if (cache := _cache_of(value)) is not None:
                shape = self._cache_shape(value, cache)
            if value.dtype is not None:
                self.dtypes.add(value.dtype)
            self.mapped[value] = ir.Value(name=value.name, shape=shape, type=value.type)
        return self.mapped[value]

    def _cache_shape(self, value: ir.Value, layer: int) -> ir.Shape:
        model = self.spec
        slots = min(model.layers[layer].chunk or self.choices.max_seq, self.choices.max_seq)
        # TensorRT wants addresses that are multiples of ALIGNMENT, those of any row of a batch among them.
        slot_size = max(1, model.kv_heads * model.head_dim * BITS[STORED[_dtype(value)]] // 8)
        slots = round_up(slots, ALIGNMENT // math.gcd(ALIGNMENT, slot_size))
        shape = (model.kv_heads, slots, model.head_dim)
        if f"{value.name}".startswith("past."):
            name = f"{value.name}".removeprefix("past.")
            self.caches.append(CacheInput(name=name, shape=shape, dtype=STORED[_dtype(value)]))
        return ir.Shape(["batch", *shape])


def _cache_of(value: ir.Value) -> int | None:
    """The layer whose cache a graph's input or output is."""
    when, _, rest = f"{value.name}".partition(".")
    return int(rest.partition(".")[0]) if when in ("past", "present") else None


def _plugin_attributes(attributes: gqa.Attributes | moe.Attributes, **more: int) -> dict[str, int | float | str]:
    named = {name: getattr(attributes, name) for name in attributes.__slots__}
    return {**named, **more, "plugin_namespace": NAMESPACE, "plugin_version": VERSION}


def _present(inputs: Sequence[ir.Value | None], index: int) -> ir.Value:
    value = inputs[index]
    assert value is not None
    return value


def _given(inputs: Sequence[ir.Value | None]) -> list[ir.Value]:
    return [value for value in inputs if value is not None]


def _dtype(value: ir.Value) -> ir.DataType:
    assert value.dtype is not None
    return value.dtype
