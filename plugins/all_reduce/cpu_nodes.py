"""The sum over ranks on the CPU: one node of the CPU's own kernels, which meet in memory that the ranks share."""

import onnx_ir as ir

from ..cpu.library import DOMAIN, GROUP_INPUT
from ..nodes import Nodes
from .op import NAME


def group_input() -> ir.Value:
    """The graph's input that is the shared memory."""
    return ir.val(GROUP_INPUT, ir.DataType.UINT8, ["group_bytes"])


def lower(nodes: Nodes, part: ir.Value, group: ir.Value, total: ir.Value, *, ranks: int, rank: int) -> None:
    """Writes the node of one sum.

    Args:
        nodes: Where the node goes.
        part: This rank's summand, float32.
        group: The graph's input `group_input`.
        total: The value to produce.
        ranks: Ranks of the group.
        rank: This one.
    """
    attributes = {"ranks": ranks, "rank": rank}
    nodes.node(NAME, [part, group], domain=DOMAIN, attributes=attributes, outputs=[total])
