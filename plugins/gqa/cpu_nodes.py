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


def lower(
    nodes: Nodes,
    inputs: Sequence[ir.Value | None],
    outputs: Sequence[ir.Value],
    attributes: Attributes,
    cache_bits: int = 0,
) -> None:
    """Writes the node of one layer in float32, but for its caches.

    Args:
        nodes: Where the node goes.
        inputs: The op's inputs; without `inv_freq` there is no rotation.
        outputs: The values to produce.
        attributes: The op's attributes.
        cache_bits: Bits of caches of groups; 0 where caches have another form.
    """
    settings = asdict(attributes) | {"cache_bits": cache_bits}
    nodes.node(op.NAME, inputs, outputs=outputs, domain=DOMAIN, attributes=settings)
