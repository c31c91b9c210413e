"""Whether a model folder's graphs compute what its `spec.json` says, before an engine is built of them.

Enters: a model folder, its spec and its weight files. Leaves: nothing, or a refusal. The graphs are lowered for the CPU
in memory and held against the spec as a bundle's are. What that lowering leaves out, because its kernels do it in their
own way, is looked for in the graphs themselves: transposes, types, and the nodes that quantised products are made of.
"""

from collections.abc import Collection, Mapping
from pathlib import Path

import onnx_ir as ir

from ..errors import FolderError, shortened
from ..files.agreement import check_decoder, check_tower, check_weights
from ..plugins.canonical_graph import read_graph
from ..plugins.linear import is_as_written, read_linear
from ..plugins.nodes import onnx_type
from ..spec.folder import FolderSpec
from .cpu_lowering import lower_for_cpu, lower_part_for_cpu
from .supply import DTYPES, FLOAT


def check_model(source: Path, spec: FolderSpec, files: Mapping[str, Path]) -> None:
    """Holds a model's graphs against its spec, and their weights against the files that hold them.

    Args:
        source: The model folder.
        spec: Its spec, or one rank's.
        files: The weight files, by name.

    Raises:
        BuildError: A graph is damaged, or not one that Arriero writes.
        FolderError: A graph computes something else than the spec says, or a weight lies elsewhere than it says.
    """
    lowered, path = lower_for_cpu(source, spec), source / spec.graph
    check_decoder(lowered.graph, lowered.weights, spec, path)
    check_weights(lowered.weights, files, of_rank=spec.ranks > 1)
    _check_forms(path, spec, files)
    if (vision := spec.vision) is not None and vision.graph:
        lowered, path = lower_part_for_cpu(source, vision), source / vision.graph
        check_tower(lowered.graph, lowered.weights, spec, path)
        check_weights(lowered.weights, files)
        _check_forms(path, spec, files)


def _check_forms(path: Path, spec: FolderSpec, files: Collection[str]) -> None:
    """Looks at what the lowering for the CPU leaves out.

    Raises:
        FolderError: Something of it is not as Arriero writes it.
    """
    graph = read_graph(path).graph
    dtype, recipe = onnx_type(spec.model.dtype), spec.recipe
    bound = 0.0 if recipe is None else recipe.activation_bound
    try:
        for value in graph.initializers.values():
            _check_place(value, files)
        # All are read before any is written anew, which gives their values more readers.
        linears = [(node, linear) for node in graph if (linear := read_linear(node)) is not None]
        for node in graph:
            _check_node(node, dtype)
        for node, linear in linears:
            if not is_as_written(node, linear, dtype, bound):
                raise ValueError(f"another product than a quantised one at {shortened(linear.weight.name)}")
    except ValueError as error:
        raise FolderError(
            f"{path}: not the graph that spec.json describes ({error}): write the folder again"
        ) from error


def _check_place(value: ir.Value, files: Collection[str]) -> None:
    """A weight is read by a node, and lies whole in one of the folder's files or in the graph."""
    tensor = value.const_value
    if not value.uses():
        raise ValueError(f"the weight {shortened(value.name)}, which no node reads")
    if isinstance(tensor, ir.ExternalTensor):
        if str(tensor.location) not in files:
            raise ValueError(f"the weight {shortened(value.name)} in {shortened(str(tensor.location))}, no weight file")
        if tensor.length not in (None, tensor.nbytes):
            raise ValueError(f"{tensor.length} bytes of the weight {shortened(value.name)}, expected {tensor.nbytes}")


def _check_node(node: ir.Node, dtype: ir.DataType) -> None:
    """A node of which the lowering takes the meaning for granted means it."""
    attributes = {name: attribute.value for name, attribute in node.attributes.items()}
    source = node.inputs[0] if node.inputs else None
    of_weight = source is not None and (source.is_initializer() or _is_dequantised(source))
    match node.op_type:
        case "Transpose" if of_weight and attributes.get("perm", (1, 0)) not in ([1, 0], (1, 0)):
            raise ValueError(f"{shortened(node.name)} turns the axes of a weight to {shortened(attributes['perm'])}")
        case "Gather" if of_weight and attributes.get("axis", 0) != 0:
            raise ValueError(f"{shortened(node.name)} takes rows along axis {shortened(attributes['axis'])}")
        case "Cast" if attributes.get("saturate", 1) != 1:
            raise ValueError(f"{shortened(node.name)} has saturate {shortened(attributes['saturate'])}, expected 1")
        case "Cast" if (to := ir.DataType(attributes["to"])) in DTYPES and to not in (FLOAT, dtype):
            raise ValueError(f"{shortened(node.name)} rounds to {to.name}, a model of {dtype.name} does not")


def _is_dequantised(value: ir.Value) -> bool:
    """Whether a value is a weight behind its DequantizeLinear."""
    node = value.producer()
    return (
        node is not None
        and node.op_type == "DequantizeLinear"
        and node.inputs[0] is not None
        and (node.inputs[0].is_initializer())
    )
