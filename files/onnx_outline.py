"""The outline of an ONNX graph, read from its bytes without trust and without onnx: inputs, outputs, weights, ops.

Enters: a serialized model. Leaves: an `Outline`, or a `ValueError` where the bytes are no such thing, or where the
graph holds what no graph of Arriero's does: loops, functions, weights outside where the runtime supplies them. The
numbers are those of ONNX's protocol buffer. Standard library only.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

from ..errors import shortened

Dim = int | str
"""A dimension: its size, or the name of one that varies; empty where it is not said."""

Field = tuple[int, int | memoryview]
"""A field's number and value."""

INT64 = 7
"""ONNX's number of the type."""

DEEPEST = 4
"""Graphs within graphs at most."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor's or value's type, as ONNX numbers it, and its dimensions.

    Attributes:
        dtype: ONNX's number of the type.
        dims: Dimensions; None where they are not said.
        location: File that its data are said to lie in; empty where they lie in the graph.
    """

    dtype: int
    dims: tuple[Dim, ...] | None
    location: str = ""


@dataclass(frozen=True, slots=True)
class Node:
    """A node: its domain, operator, whole-number attributes and inputs."""

    domain: str
    op: str
    numbers: dict[str, int]
    inputs: tuple[str, ...] = ()


@dataclass(slots=True)
class Outline:
    """A graph's outline.

    Attributes:
        inputs: Inputs by name.
        outputs: Outputs by name.
        weights: Initializers by name.
        nodes: Nodes in order, those of inner graphs after the node that holds them.
        constants: One whole number each, by name, of those that hold no more.
    """

    inputs: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)
    nodes: list[Node] = field(default_factory=list)
    constants: dict[str, int] = field(default_factory=dict)


def read_outline(data: bytes) -> Outline:
    """Reads a serialized model's outline.

    Raises:
        ValueError: It is damaged, or holds what no graph of Arriero's does.
    """
    outline = Outline()
    graphs = [_part(value) for number, value in _fields(memoryview(data)) if _is_graph(number)]
    if len(graphs) != 1:
        raise ValueError(f"{len(graphs)} graphs in one file")
    _read_graph(graphs[0], outline, 0)
    return outline


def _is_graph(number: int) -> bool:
    if number in (20, 25):
        raise ValueError("functions or training in a graph that has none")
    return number == 7


def _read_graph(data: memoryview, outline: Outline, depth: int) -> None:
    if depth > DEEPEST:
        raise ValueError(f"graphs within graphs, more than {DEEPEST} deep")
    for number, value in _fields(data):
        if number == 1:
            _read_node(_part(value), outline, depth)
        elif number == 5:
            name, tensor = _tensor(_part(value))
            if depth and tensor.location:
                raise ValueError(f"a weight of an inner graph, {shortened(name)}, in another file")
            _add(outline.weights if not depth else {}, name, tensor)
        elif number in (11, 12) and not depth:
            name, tensor = _value_info(_part(value))
            _add(outline.inputs if number == 11 else outline.outputs, name, tensor)
        elif number == 15:
            raise ValueError("a sparse weight")


def _add(found: dict[str, Tensor], name: str, tensor: Tensor) -> None:
    if name in found:
        raise ValueError(f"{shortened(name)} is there twice")
    found[name] = tensor


def _read_node(data: memoryview, outline: Outline, depth: int) -> None:
    domain, op, numbers, inner = "", "", {}, []
    inputs, outputs, constant = list[str](), list[str](), None
    for number, value in _fields(data):
        if number in (1, 2):
            (inputs if number == 1 else outputs).append(_text(value))
        elif number == 4:
            op = _text(value)
        elif number == 7:
            domain = _text(value)
        elif number == 5:
            name, whole, graphs, held = _attribute(_part(value))
            constant = held if name == "value" else constant
            inner += graphs
            if whole is not None:
                numbers[name] = whole
    outline.nodes.append(Node(domain, op, numbers, tuple(inputs)))
    if op == "Constant" and outputs and constant is not None:
        outline.constants[outputs[0]] = constant
    for graph in inner:
        _read_graph(graph, outline, depth + 1)


def _attribute(data: memoryview) -> tuple[str, int | None, list[memoryview], int | None]:
    """An attribute's name, its whole number if it is one, the graphs in it, and the one number of a tensor in it."""
    name, whole, graphs, held = "", None, [], None
    for number, value in _fields(data):
        if number == 1:
            name = _text(value)
        elif number == 3 and isinstance(value, int):
            whole = value - (1 << 64) if value >> 63 else value
        elif number in (5, 10):
            inner, tensor = _tensor(_part(value))
            if tensor.location:
                raise ValueError(f"a constant {shortened(inner)} in another file")
            held = _one_number(_part(value), tensor)
        elif number in (6, 11):
            graphs.append(_part(value))
        elif number in (22, 23):
            raise ValueError("a sparse constant")
    return name, whole, graphs, held


def _one_number(data: memoryview, tensor: Tensor) -> int | None:
    """The number of a tensor of one 64-bit whole number, as bytes or as a field; None of any other."""
    if tensor.dtype != INT64 or tensor.dims not in ((), (1,)):
        return None
    for number, value in _fields(data):
        if number == 9 and not isinstance(value, int) and len(value) == 8:
            return int.from_bytes(value, "little", signed=True)
        if number == 7:
            return value if isinstance(value, int) else next(_varints(value), None)
    return None


def _tensor(data: memoryview) -> tuple[str, Tensor]:
    name, dtype, dims, location, is_outside = "", 0, list[Dim](), "", False
    for number, value in _fields(data):
        if number == 1:
            dims += [value] if isinstance(value, int) else _varints(value)
        elif number == 2 and isinstance(value, int):
            dtype = value
        elif number == 8:
            name = _text(value)
        elif number == 13:
            entry = {key: _text(text) for key, text in _fields(_part(value)) if key in (1, 2)}
            if entry.get(1) == "location":
                location = entry.get(2, "")
        elif number == 14:
            is_outside = value == 1
    if any(isinstance(size, int) and not 0 <= size < 1 << 48 for size in dims):
        raise ValueError(f"the weight {shortened(name)} has the shape {shortened(dims)}")
    return name, Tensor(dtype, tuple(dims), location or "an unnamed file" if is_outside else "")


def _value_info(data: memoryview) -> tuple[str, Tensor]:
    name, tensor = "", Tensor(0, None)
    for number, value in _fields(data):
        if number == 1:
            name = _text(value)
        elif number == 2:
            for kind, of_kind in _fields(_part(value)):
                if kind == 1:
                    tensor = _tensor_type(_part(of_kind))
    return name, tensor


def _tensor_type(data: memoryview) -> Tensor:
    dtype, dims = 0, None
    for number, value in _fields(data):
        if number == 1 and isinstance(value, int):
            dtype = value
        elif number == 2:
            dims = tuple(_dim(_part(dim)) for field, dim in _fields(_part(value)) if field == 1)
    return Tensor(dtype, dims)


def _dim(data: memoryview) -> Dim:
    found: Dim = ""
    for number, value in _fields(data):
        found = value if number == 1 and isinstance(value, int) else _text(value) if number == 2 else found
    return found


def _fields(data: memoryview) -> Iterator[Field]:
    """The fields of a message: numbers, and the bytes of what has a length."""
    at, end = 0, len(data)
    while at < end:
        key, at = _varint(data, at)
        kind = key & 7
        if kind == 0:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        size = {1: 8, 5: 4}.get(kind)
        if kind == 2:
            size, at = _varint(data, at)
        if size is None or size > end - at:
            raise ValueError("the graph's file is damaged")
        yield key >> 3, data[at : at + size]
        at += size


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            break
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value & (1 << 64) - 1, at
    raise ValueError("the graph's file is damaged")


def _varints(data: memoryview) -> Iterator[int]:
    at = 0
    while at < len(data):
        value, at = _varint(data, at)
        yield value


def _part(value: int | memoryview) -> memoryview:
    if isinstance(value, int):
        raise ValueError("the graph's file is damaged")
    return value


def _text(value: int | memoryview) -> str:
    return bytes(_part(value)).decode("utf-8")
