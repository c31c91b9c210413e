"""Changes of a graph, one of one node each: of its operator's inputs and attributes."""

from collections.abc import Callable, Iterator

import numpy as np
import onnx
from onnx import numpy_helper

Change = Callable[[onnx.GraphProto], None]


def nodes_of(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from nodes_of(attribute.g)
        yield node


def changes(node: onnx.NodeProto, other: str) -> Iterator[Change]:
    """One change each of a node: of its operator, its inputs and attributes."""

    def edited(edit: Callable[[onnx.NodeProto], None]) -> Change:
        def change(graph: onnx.GraphProto) -> None:
            edit(next(each for each in nodes_of(graph) if list(each.output) == list(node.output)))

        return change

    for place in (index for index, name in enumerate(node.input) if name != other):
        yield edited(lambda each, place=place: each.input.__setitem__(place, other))
    if len(node.input) > 1 and node.op_type not in ("Add", "Mul", "Equal"):
        yield edited(lambda each: each.input.extend([each.input.pop(0)]))
    for index, attribute in enumerate(node.attribute):
        if attribute.HasField("i"):
            yield edited(lambda each, index=index: setattr(each.attribute[index], "i", each.attribute[index].i + 1))
        elif attribute.HasField("f"):
            wide = attribute.f * 1.01 + 1e-4
            yield edited(lambda each, index=index, wide=wide: setattr(each.attribute[index], "f", wide))
        elif attribute.ints:
            yield edited(lambda each, index=index: each.attribute[index].ints.__setitem__(0, 77))
        elif attribute.HasField("t"):
            array = numpy_helper.to_array(attribute.t)
            yield edited(
                lambda each, index=index, array=array: each.attribute[index].t.CopyFrom(
                    numpy_helper.from_array(np.append(array, array.dtype.type(5)))
                )
            )


def signature(node: onnx.NodeProto) -> tuple[str, ...]:
    """Nodes of one are changed alike."""
    parts = (name.partition(":")[0].split("/") for name in (*node.input, *node.output))
    return (node.op_type, *("".join(sign for sign in part[-1].split(".")[-1] if not sign.isdigit()) for part in parts))
