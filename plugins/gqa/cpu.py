"""Grouped-query attention for ONNX Runtime's CPU: one node of `plugins.cpu`.

The node takes pieces of any lengths over caches of any fill, and writes these in place where past and present are
bound to one buffer.
"""

from collections.abc import Sequence
from dataclasses import asdict

import onnx_ir as ir

from ..cpu.library import DOMAIN
from ..nodes import Nodes
from . import op
from .op import Attributes


def lower(nodes: Nodes, inputs: Sequence[ir.Value | None], outputs: Sequence[ir.Value], attributes: Attributes) -> None:
    """Writes the node of one layer in float32, but for its caches.

    Args:
        nodes: Where it goes.
        inputs: The op's inputs; without `inv_freq` there is no rotation.
        outputs: The values to produce.
        attributes: The op's.
    """
    nodes.node(op.NAME, inputs, outputs=outputs, domain=DOMAIN, attributes=asdict(attributes))
