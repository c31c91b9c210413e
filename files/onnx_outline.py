"""The outline of an ONNX graph, read from its bytes without trust and without onnx: inputs, outputs, weights, nodes.

Enters: a serialized model. Leaves: an `Outline`, or a `ValueError` where the bytes are no such thing, or where the
graph holds what no graph of Arriero's does: functions, inner graphs, a message twice where only one can be.
The numbers are those of ONNX's protocol buffer. Standard library only.
"""

import struct
import sys
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from ..errors import shortened

Dim = int | str
"""A dimension: its size, or the name of one that varies; empty where it is not said."""

Field = tuple[int, int | memoryview]
"""A field's number and value."""

FLOAT, INT32, INT64 = 1, 6, 7
"""ONNX's numbers of types."""

FORMS = {FLOAT: "f", INT32: "i", INT64: "q"}
"""Forms of their elements, as `struct` names them."""

LONGEST_CONSTANT = 64
"""Bytes of a constant that is known by its elements; a longer one is like no other."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor's or value's type, as ONNX numbers it, and its dimensions.

    Attributes:
        dtype: ONNX's number of the type.
        dims: Dimensions; None where they are not said.
        location: File that its data are said to lie in; empty where they lie in the graph.
        data: Its bytes, where they lie in the graph.
    """

    dtype: int
    dims: tuple[Dim, ...] | None
    location: str = ""
    data: bytes | memoryview = field(default=b"", compare=False)


@dataclass(frozen=True, slots=True)
class Constant:
    """A small tensor: its type, dimensions and elements."""

    dtype: int
    dims: tuple[Dim, ...]
    elements: tuple[float, ...]


Value = int | float | bytes | tuple[int, ...] | tuple[float, ...] | Constant | None
"""An attribute's value; None of what no attribute of ours is."""


@dataclass(frozen=True, slots=True)
class Node:
    """A node: its domain, operator, attributes, and the names of its inputs and outputs."""

    domain: str
    op: str
    attributes: Mapping[str, Value]
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()


@dataclass(slots=True)
class Outline:
    """A graph's outline.

    Attributes:
        inputs: Inputs by name.
        outputs: Outputs by name.
        weights: Initializers by name.
        nodes: Nodes in order.
        opsets: Versions of the sets of operators, by domain.
    """

    inputs: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)
    nodes: list[Node] = field(default_factory=list)
    opsets: dict[str, int] = field(default_factory=dict)


def read_outline(data: bytes) -> Outline:
    """Reads a serialized model's outline.

    Raises:
        ValueError: It is damaged, or holds what no graph of Arriero's does.
    """
    outline, graphs = Outline(), list[memoryview]()
    for number, value in _fields(memoryview(data)):
        if number in (20, 25):
            raise ValueError("functions or training in a graph that has none")
        if number == 7:
            graphs.append(_part(value))
        elif number == 8:
            domain, version = "", 0
            for key, said in _fields(_part(value)):
                domain = _text(said) if key == 1 else domain
                version = said if key == 2 and isinstance(said, int) else version
            outline.opsets[plain_domain(domain)] = version
    if len(graphs) != 1:
        raise ValueError(f"{len(graphs)} graphs in one file")
    _read_graph(graphs[0], outline)
    return outline


def plain_domain(domain: str) -> str:
    """A domain, the standard one by its shorter name."""
    return "" if domain == "ai.onnx" else domain


def _read_graph(data: memoryview, outline: Outline) -> None:
    for number, value in _fields(data):
        if number == 1:
            outline.nodes.append(_read_node(_part(value)))
        elif number == 5:
            _add(outline.weights, *_tensor(_part(value)))
        elif number in (11, 12):
            _add(outline.inputs if number == 11 else outline.outputs, *_value_info(_part(value)))
        elif number == 15:
            raise ValueError("a sparse weight")


def _add(found: dict[str, Tensor], name: str, tensor: Tensor) -> None:
    if name in found:
        raise ValueError(f"{shortened(name)} is there twice")
    found[name] = tensor


def _read_node(data: memoryview) -> Node:
    domain, op, inputs, outputs = "", "", list[str](), list[str]()
    attributes: dict[str, Value] = {}
    for number, value in _fields(data):
        if number in (1, 2):
            (inputs if number == 1 else outputs).append(_text(value))
        elif number == 4:
            op = _text(value)
        elif number == 7:
            domain = _text(value)
        elif number == 5:
            name, found = _attribute(_part(value))
            if name in attributes:
                raise ValueError(f"the attribute {shortened(name)} is there twice")
            attributes[name] = found
    while inputs and not inputs[-1]:
        inputs.pop()
    return Node(plain_domain(domain), op, attributes, tuple(inputs), tuple(outputs))


def _attribute(data: memoryview) -> tuple[str, Value]:
    """An attribute's name and value, which its type chooses among its fields."""
    name, kind, number_of = "", 0, dict[int, Value]()
    ints, floats = list[int](), list[float]()
    for number, value in _fields(data):
        if number == 1:
            name = _text(value)
        elif number == 20 and isinstance(value, int):
            kind = value
        elif number == 2 and not isinstance(value, int):
            number_of[1] = struct.unpack("<f", value)[0] if len(value) == 4 else None
        elif number == 3 and isinstance(value, int):
            number_of[2] = _signed(value)
        elif number == 4 and not isinstance(value, int):
            number_of[3] = bytes(value)
        elif number == 5:
            if 4 in number_of:
                raise ValueError(f"the attribute {shortened(name)} has two values")
            number_of[4] = _constant(_part(value))
        elif number == 7 and not isinstance(value, int):
            floats += _array("f", value)
        elif number == 8:
            ints += [_signed(each) for each in ([value] if isinstance(value, int) else _varints(value))]
        elif number in (6, 10, 11, 21, 22, 23):
            raise ValueError("an attribute of a graph, of several tensors, a sparse one, or one of a function")
    return name, {**number_of, 6: tuple(floats), 7: tuple(ints)}.get(kind)


def _constant(data: memoryview) -> Constant | None:
    """A constant, where it is small."""
    name, tensor = _tensor(data)
    if tensor.location:
        raise ValueError(f"a constant {shortened(name)} in another file")
    if tensor.dtype not in FORMS or len(tensor.data) > LONGEST_CONSTANT:
        return None
    return Constant(tensor.dtype, tensor.dims or (), tuple(_array(FORMS[tensor.dtype], tensor.data)))


def floats_of(tensor: Tensor) -> list[float]:
    """The elements of a float32 tensor that lies in the graph.

    Raises:
        ValueError: It is another, or damaged.
    """
    if tensor.dtype != FLOAT or tensor.location:
        raise ValueError("a tensor of another type or in another file")
    return _array("f", tensor.data)


def _array(form: str, data: bytes | memoryview) -> list[float]:
    """Numbers that lie one behind another, the least significant byte first."""
    if len(data) % struct.calcsize(f"<{form}"):
        raise ValueError("the graph's file is damaged")
    found: array[float] = array(form, bytes(data))
    if sys.byteorder != "little":
        found.byteswap()
    return found.tolist()


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def _tensor(data: memoryview) -> tuple[str, Tensor]:
    name, dtype, dims, location, is_outside = "", 0, list[Dim](), "", False
    raw: bytes | memoryview = b""
    elements = bytearray()
    for number, value in _fields(data):
        if number == 1:
            dims += [value] if isinstance(value, int) else _varints(value)
        elif number == 2 and isinstance(value, int):
            dtype = value
        elif number == 8:
            name = _text(value)
        elif number == 4 and not isinstance(value, int):
            elements += value
        elif number in (5, 7):
            some = [value] if isinstance(value, int) else list(_varints(value))
            elements += b"".join(
                (each & (1 << 64) - 1).to_bytes(8, "little")[: 8 if number == 7 else 4] for each in some
            )
        elif number == 9:
            raw = _part(value)
        elif number == 3:
            raise ValueError("a part of a tensor")
        elif number == 13:
            entry = {key: _text(text) for key, text in _fields(_part(value)) if key in (1, 2)}
            if entry.get(1) == "location":
                location = entry.get(2, "")
        elif number == 14:
            is_outside = value == 1
    if any(isinstance(size, int) and not 0 <= size < 1 << 48 for size in dims):
        raise ValueError(f"the weight {shortened(name)} has the shape {shortened(dims)}")
    place = location or "an unnamed file" if is_outside else ""
    return name, Tensor(dtype, tuple(dims), place, raw if len(raw) else bytes(elements))


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
        key = data[at]
        at += 1
        if key > 127:
            key, at = _varint(data, at - 1)
        kind = key & 7
        if kind == 2 and at < end and data[at] < 128:
            size: int | None = data[at]
            at += 1
        elif kind == 2:
            size, at = _varint(data, at)
        elif kind == 0:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        else:
            size = {1: 8, 5: 4}.get(kind)
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
