"""A canonical graph, the decoder's, the vision tower's or the draft's, lowered for ONNX Runtime's CPU, in memory.

Enters: a model folder. Leaves: a `Lowered` graph that computes in float32 from the checkpoint's own weights, and the
list of regions in the safetensors files that the runtime hands to it. Embedding, linears that are not quantised and
FP8 weights are used as they lie in the file, int8 and int4 weights in the panels of the CPU's own kernels; others are
widened when they are loaded. The table in `cpu_rules` says how each linear is lowered; branches here name its rules.
"""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from ..errors import ArrieroError, BuildError, shortened_text
from ..plugins.all_reduce import cpu_nodes as all_reduce_cpu
from ..plugins.all_reduce import op as all_reduce
from ..plugins.canonical_graph import read_graph
from ..plugins.cpu import kernel_nodes as kernels
from ..plugins.cpu.kernel_nodes import Fp8, Panels
from ..plugins.cpu.library import DOMAIN
from ..plugins.gqa import cpu_nodes as gqa_cpu
from ..plugins.gqa import op as gqa
from ..plugins.linear import Linear, read_linear
from ..plugins.moe import op as moe
from ..plugins.nodes import Nodes, dims
from ..spec.folder import DraftPart, FolderSpec, VisionPart
from ..spec.stored_weights import Weight, slot_bytes
from ..spec.types import BITS, Stored
from .cpu_rules import INTEGERS, Rule, rule_of_experts, rule_of_quantised
from .supply import DTYPES, FLOAT, Supply

SESSION = {"session.disable_prepacking": "1"}
"""Prepacking would copy every weight: the file's pages are used instead."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Lowered:
    """A graph for one target and what its session needs besides.

    Attributes:
        graph: Serialized ONNX without weights.
        weights: The regions of weight files to supply, by initializer name.
        session: Session configuration entries.
    """

    graph: bytes
    weights: tuple[Weight, ...]
    session: dict[str, str]


def lower_for_cpu(folder: Path, spec: FolderSpec) -> Lowered:
    """Lowers a model folder's decoder.

    Raises:
        BuildError: The graph is damaged or holds an op that has no lowering.
    """
    return _lower(folder / spec.graph, spec.cache_bits, spec.rank)


def lower_part_for_cpu(folder: Path, part: VisionPart | DraftPart) -> Lowered:
    """Lowers a model folder's vision tower or draft; raises what `lower_for_cpu` does."""
    return _lower(folder / part.graph, 0, 0)


def _lower(path: Path, cache_bits: int, rank: int) -> Lowered:
    model = read_graph(path)
    try:
        lowering = _CpuLowering(model.graph, cache_bits, rank)
        lowered = ir.Model(lowering.lower(), ir_version=model.ir_version, producer_name="arriero")
        graph = ir.to_proto(lowered).SerializeToString()
    except ArrieroError:
        raise
    except Exception as error:  # a graph that is another than export writes breaks whatever is assumed of it
        said = shortened_text(f"{type(error).__name__}: {error}", 150)
        raise BuildError(f"{path}: not a graph as Arriero writes it ({said}): export the model again") from error
    return Lowered(
        graph=graph,
        weights=tuple(lowering.supply.weights.values()),
        session=SESSION,
    )


class _CpuLowering:
    """The new graph under construction; values keep their names, floats become float32."""

    def __init__(self, source: ir.Graph, cache_bits: int, rank: int) -> None:
        self.source, self.cache_bits = source, cache_bits
        self.rank, self.group = rank, all_reduce_cpu.group_input()
        self.supply = Supply()
        self.mapped: dict[ir.Value, ir.Value] = {}
        self.linears = {node: linear for node in source if (linear := read_linear(node)) is not None}
        self.absorbed = {node for product in self.linears for node in absorbed(product)}
        for linear in self.linears.values():
            if linear.own_scale is not None:
                self.absorbed |= set(linear.scaling)
        kinds = {linear.kind for linear in self.linears.values()}
        kinds |= {node.attributes["quantisation"].value for node in source if node.op_type == moe.NAME}
        self.has_panels = bool(kinds & set(INTEGERS))
        for node in source:
            if node.op_type == gqa.NAME and (self.has_panels or cache_bits):
                caches = [value for value in (*node.inputs[3:5], *node.outputs[1:3]) if value is not None]
                self.mapped |= {value: _narrow_cache(value, cache_bits) for value in caches}

    def lower(self) -> ir.Graph:
        """Lowers node by node, in order."""
        inputs = [self._value(value) for value in self.source.inputs]
        if any(node.op_type == all_reduce.NAME for node in self.source):
            inputs.append(self.group)
        written: list[ir.Node] = []
        for node in self.source:
            nodes = Nodes(f"{node.name}/")
            self._lower_node(nodes, node)
            written.extend(nodes.list)
        return ir.Graph(
            inputs,
            [self._value(value) for value in self.source.outputs],
            nodes=written,
            initializers=list(self.supply.initializers.values()),
            opset_imports={**self.source.opset_imports, **_own_domain(written)},
            name=self.source.name,
        )

    def _lower_node(self, nodes: Nodes, node: ir.Node) -> None:
        if node in self.absorbed:
            return  # the product that reads it takes the weight or the activations as they are
        sources = [value for value in node.inputs if value is not None]
        outputs = [self._value(value) for value in node.outputs]
        attributes = {name: attribute.value for name, attribute in node.attributes.items()}
        match node.domain, node.op_type:
            case "", "MatMul" if node in self.linears:
                self._lower_quantised(nodes, node)
            case "", "Transpose" if sources[0].is_initializer():
                pass  # the product that reads it takes the weight as it lies
            case "", "MatMul" if (weight := _transposed_weight(sources[1])) is not None:
                kernels.multiply_plain(nodes, self._input(sources[0]), self.supply.stored(weight), outputs[0])  # rule 5
            case "", "Gather" if sources[0].is_initializer():
                rows = nodes.Gather(self.supply.stored(sources[0]), self._input(sources[1]), axis=0)
                nodes.node("Cast", [rows], outputs=outputs, attributes={"to": FLOAT})
            case "", "Cast" if ir.DataType(attributes["to"]) in DTYPES:
                nodes.node("Cast", [self._input(sources[0])], outputs=outputs, attributes={"to": FLOAT})
            case "", _:
                optional = [None if value is None else self._input(value) for value in node.inputs]
                nodes.node(node.op_type, optional, outputs=outputs, attributes=attributes)
            case gqa.DOMAIN, gqa.NAME:
                used = node.inputs[:7] if self.cache_bits else node.inputs  # groups have scales of their own
                given = [None if value is None else self._input(value) for value in used]
                gqa_cpu.lower(nodes, given, outputs, gqa.Attributes(**attributes), self.cache_bits)
            case moe.DOMAIN, moe.NAME:
                self._lower_experts(nodes, sources, outputs[0], moe.Attributes(**attributes))
            case all_reduce.DOMAIN, all_reduce.NAME:
                part, ranks = self._input(sources[0]), attributes["ranks"]
                all_reduce_cpu.lower(nodes, part, self.group, outputs[0], ranks=ranks, rank=self.rank)
            case domain, op_type:
                raise BuildError(f"{node.name}: {domain}.{op_type} has no lowering for the CPU: export the model again")

    def _lower_quantised(self, nodes: Nodes, product: ir.Node) -> None:
        """A quantised linear, by rules 1 to 4."""
        linear = self.linears[product]
        match rule_of_quantised(linear):
            case Rule.INT8_OWN_SCALES:  # rule 1: the kernel does the work of the multiplication behind the product too
                scaled = product.outputs[0].consumers()[0]
                self._multiply_panels(nodes, linear, linear.unscaled, None, scaled.outputs[0])
                self.absorbed.add(scaled)
            case Rule.INT8_STATIC:  # rule 2
                self._multiply_panels(nodes, linear, linear.x, linear.x_scale, product.outputs[0])
            case Rule.INT4:  # rule 3
                self._multiply_panels(nodes, linear, linear.x, None, product.outputs[0])
            case Rule.FP8:  # rule 4
                self._multiply_fp8(nodes, linear, product)

    def _multiply_panels(
        self, nodes: Nodes, linear: Linear, source: ir.Value, x_scale: ir.Value | None, output: ir.Value
    ) -> None:
        """The product of integers in panels, of rules 1 to 3; without a static scale the kernel finds its own."""
        matrix = self._panels(linear.weight, linear.weight_scale, linear.kind)
        if x_scale is not None:
            matrix = dataclasses.replace(matrix, input_scale=self._input(x_scale))
        kernels.multiply(nodes, self._input(source), matrix, dims(linear.weight)[0], self._value(output))

    def _multiply_fp8(self, nodes: Nodes, linear: Linear, product: ir.Node) -> None:
        """The product of rule 4; of a token's own scale the kernel does the multiplication behind the product too."""
        weight, scale = self.supply.stored(linear.weight), self.supply.widened(linear.weight_scale)
        output, source, x_scale, bound = product.outputs[0], linear.x, None, 0.0
        if linear.own_scale is None:
            assert linear.x_scale is not None
            x_scale = self._input(linear.x_scale)
        else:
            scaled = output.consumers()[0]
            self.absorbed.add(scaled)
            output, source, bound = scaled.outputs[0], linear.unscaled, linear.bound
        matrix = Fp8(weight=weight, scale=scale, input_scale=x_scale, bound=bound)
        kernels.multiply_fp8(nodes, self._input(source), matrix, self._value(output))

    def _panels(
        self,
        weight: ir.Value,
        scale: ir.Value,
        kind: str,
        *,
        chosen_in: ir.DataType | None = None,
        interleaved: bool = False,
    ) -> Panels:
        """A quantised linear's matrix, or all experts' [E, N, K].

        Args:
            weight: As it is stored.
            scale: Its scales.
            kind: `int8` or `int4`.
            chosen_in: The type that the recipe chose scales in, where it is not the one that they are stored in.
            interleaved: Whether gates and ups come by turns.
        """
        shape, scales = dims(weight), dims(scale)
        groups = math.prod(scales[len(shape) - 1 :])
        group = 0 if groups == 1 else shape[-1] // groups
        scale_type: Stored = "bfloat16" if (chosen_in or scale.dtype) == ir.DataType.BFLOAT16 else "float32"
        if group % kernels.SMALLEST_GROUP:
            raise BuildError(f"{weight.name}: {group} inputs share a scale, and the CPU's kernels take eights of them")
        return Panels(
            weight=self.supply.panels(weight, convert=INTEGERS[kind], interleaved=interleaved),
            scale=self.supply.panel_scales(scale, convert=scale_type, interleaved=interleaved),
            bits=BITS[kind],
            group=group,
        )

    def _lower_experts(self, nodes: Nodes, sources: list[ir.Value], output: ir.Value, settings: moe.Attributes) -> None:
        """A layer of experts, by rules 6 to 8."""
        tokens = self._input(sources[0]), self._input(sources[1])
        weights, scales, statics = sources[2:4], sources[4:6], sources[6:]
        kind = settings.quantisation
        rule = rule_of_experts(kind)
        if rule is Rule.FLOAT_EXPERTS:  # rule 8
            gate_up, down = (self.supply.stored(weight) for weight in weights)
            kernels.dispatch_plain(nodes, *tokens, gate_up, down, output, settings)
            return
        count, _, width = dims(weights[1])
        if rule is Rule.FP8_EXPERTS:  # rule 7
            pair = [
                Fp8(
                    weight=self.supply.stored(weights[part]),
                    scale=self.supply.widened(scales[part], stacked=True),
                    input_scale=self.supply.widened(statics[part]) if statics else None,
                )
                for part in range(2)
            ]
            kernels.dispatch_fp8(nodes, *tokens, pair[0], pair[1], output, settings)
            return
        has_groups = kind == "int4" or dims(scales[0])[-1] > 1  # rule 6 from here on
        chosen_in = sources[0].dtype if has_groups else None
        into, back = (
            dataclasses.replace(
                self._panels(weights[part], scales[part], kind, chosen_in=chosen_in, interleaved=not part),
                input_scale=self.supply.widened(statics[part]) if statics else None,
            )
            for part in range(2)
        )
        kernels.dispatch(nodes, *tokens, into, back, output, settings, experts=count, width=width)

    def _value(self, value: ir.Value) -> ir.Value:
        """The new graph's value for one of the old graph's."""
        if value not in self.mapped:
            dtype = FLOAT if value.dtype in DTYPES else value.dtype
            kind = None if dtype is None else ir.TensorType(dtype)
            self.mapped[value] = ir.Value(name=value.name, shape=value.shape, type=kind)
        return self.mapped[value]

    def _input(self, value: ir.Value) -> ir.Value:
        return self.supply.widened(value) if value.is_initializer() else self._value(value)


def _narrow_cache(value: ir.Value, bits: int) -> ir.Value:
    """A cache in groups of `bits` bits; or of a quantised model: 16 bits stay 16, with more mantissa than bfloat16."""
    dtype = ir.DataType.FLOAT16 if value.dtype == ir.DataType.BFLOAT16 else value.dtype
    shape = value.shape
    if bits and shape is not None:
        dtype = ir.DataType.UINT8
        shape = ir.Shape([*shape[:3], slot_bytes(int(str(shape[3])), bits)])
    return ir.Value(name=value.name, shape=shape, type=None if dtype is None else ir.TensorType(dtype))


def _own_domain(nodes: list[ir.Node]) -> dict[str, int]:
    """The domain of the CPU's own kernels, where there are any: sessions load the library for it."""
    return {DOMAIN: kernels.VERSION} if any(node.domain == DOMAIN for node in nodes) else {}


def absorbed(product: ir.Node) -> list[ir.Node]:
    """The nodes that a quantised linear is written with, but for its product."""
    pending, found = list(product.inputs), []
    while pending:
        value = pending.pop()
        node = None if value is None else value.producer()
        if node is not None and node.op_type in ("Transpose", "DequantizeLinear", "QuantizeLinear"):
            found.append(node)
            pending += node.inputs[:1] if node.op_type != "QuantizeLinear" else []
            scale = node.inputs[1].producer() if node.op_type == "DequantizeLinear" and node.inputs[1] else None
            found += [scale] if scale is not None and scale.op_type == "Cast" else []  # of groups of int8
    return found


def _transposed_weight(value: ir.Value) -> ir.Value | None:
    """The initializer that a value is the transpose of."""
    producer = value.producer()
    if producer is None or producer.op_type != "Transpose":
        return None
    source = producer.inputs[0]
    return source if source is not None and source.is_initializer() else None
