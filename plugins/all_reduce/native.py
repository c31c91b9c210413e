"""The sum over ranks in TensorRT: its own collective layer, over the communicator that a session sets.

ONNX has no such operator, and TensorRT's parser knows none. So the graph has an `Identity` in the sum's place, and
once it is parsed a collective layer takes over what that one is read for.
"""

from collections.abc import Mapping
from typing import Any

import onnx_ir as ir

from ...errors import BuildError
from ..nodes import Nodes

NO_ROOT = -1


def mark(nodes: Nodes, name: str, part: ir.Value, total: ir.Value) -> None:
    """Writes the node that stands for one sum.

    Args:
        nodes: Where the node goes.
        name: Name of the sum's node in the canonical graph, by which the layer is found.
        part: This rank's summand.
        total: The value to produce.
    """
    nodes.node("Identity", [part], outputs=[total])
    nodes.list[-1].name = name


def add_collectives(trt: Any, definition: Any, sums: Mapping[str, int]) -> None:
    """Puts a collective layer in the place of each layer that stands for a sum.

    Args:
        trt: The module `tensorrt_rtx` or `tensorrt`.
        definition: TensorRT's definition of the network, parsed.
        sums: The layers' names, and how many ranks take part in each.

    Raises:
        BuildError: TensorRT has no such layer, or the parser left one out.
    """
    if not hasattr(definition, "add_dist_collective"):
        raise BuildError(f"TensorRT {trt.__version__} has no collectives: build a group with TensorRT 11 or RTX 1.7")
    layers = [definition.get_layer(index) for index in range(definition.num_layers)]
    totals: dict[str, Any] = {}
    for layer in layers:
        name = layer.name
        if name in sums:
            operation, reduction = trt.CollectiveOperation.ALL_REDUCE, trt.ReduceOperation.SUM
            made = definition.add_dist_collective(layer.get_input(0), operation, reduction, NO_ROOT, None)
            if made is None:
                raise BuildError(f"TensorRT does not take the sum {name!r} over ranks: build with --debug")
            layer.name = f"{name}/part"  # names are unique
            made.num_ranks, made.name = sums[name], name
            totals[layer.get_output(0).name] = made.get_output(0)
    if len(totals) != len(sums):
        raise BuildError(f"TensorRT's parser kept {len(totals)} of {len(sums)} sums over ranks: export the model again")
    for layer in layers:
        for index in range(layer.num_inputs):
            given = layer.get_input(index)
            if given is not None and given.name in totals:
                layer.set_input(index, totals[given.name])
