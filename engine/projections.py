"""The products around an attention layer, whose layout for TensorRT is chosen together.

Enters: the canonical graph. Leaves: which products make query, key and value and where their weights are, and which
sums take attention's own projection. Invariant: nothing is changed here.
"""

from collections.abc import Iterable

import onnx_ir as ir

from ..plugins.gqa import op as gqa

PLUGIN_DTYPES = (ir.DataType.BFLOAT16, ir.DataType.FLOAT16)
"""Types that the plugins compute in."""


def products_of(values: Iterable[ir.Value | None]) -> list[ir.Node]:
    """The products among the nodes that make values, in their order."""
    makers = [None if value is None else value.producer() for value in values]
    return [node for node in makers if node is not None and node.op_type == "MatMul"]


def transposes_of(products: Iterable[ir.Node]) -> list[ir.Node]:
    """The nodes that turn the weights [N, K] of products, of those that have such weights."""
    makers = [None if node.inputs[1] is None else node.inputs[1].producer() for node in products]
    return [node for node in makers if node is not None and node.op_type == "Transpose"]


def sizes_together(graph: ir.Graph) -> dict[ir.Value, int]:
    """Bytes of the initializers that lie in files. Those of one layer's query, key and value have the largest's.

    They are multiplied as one, where all of them are in one place.
    """
    stored = {value: value.const_value for value in graph.initializers.values()}
    sizes = {value: each.length or 0 for value, each in stored.items() if isinstance(each, ir.ExternalTensor)}
    for node in graph:
        if node.op_type == gqa.NAME:
            transposes = transposes_of(products_of(node.inputs[:3]))
            together = [weight for each in transposes if (weight := each.inputs[0]) in sizes]
            sizes.update(dict.fromkeys(together, max((sizes[weight] for weight in together), default=0)))
    return sizes


def adds_attention(node: ir.Node) -> bool:
    """Whether a node adds attention's projection to the residual in 16 bits.

    TensorRT-RTX would add within the product, into a copy of the residual. Added in float32, which gives the same 16
    bits, the sum is a part of the norm that follows, and nothing is copied.
    """
    products = products_of(node.inputs[1:2])
    if not products or node.outputs[0].dtype not in PLUGIN_DTYPES:
        return False
    product = products[0]
    source: ir.Node | None = product
    while source is not None and source.op_type != gqa.NAME and (source is product or source.op_type != "MatMul"):
        source = source.inputs[0].producer() if source.inputs and source.inputs[0] is not None else None
    return source is not None and source.op_type == gqa.NAME
