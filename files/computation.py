"""A graph's computation: its nodes found by what they compute, not by their names.

Enters: an `Outline`. Leaves: a `Computation`, of which each node that a model must have is asked for by its operator,
inputs and attributes, and which says in the end whether it has any other. Nodes that compute the same are one; casts to
float32 are left out, since a graph for the CPU computes in it and ONNX Runtime refuses inputs of other types.

Invariant: a graph of which each node was found computes what was asked for, and nothing else.
"""

import struct
from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import shortened
from .onnx_outline import FLOAT, INT32, INT64, Constant, Node, Outline, Value

Ref = str | Constant
"""A value: its name, or a constant's elements."""

OPSETS = {"": 24, "com.microsoft": 1, "arriero.cpu": 1, "arriero": 1}
"""Versions of the sets of operators that Arriero's graphs are written in."""

COMMUTATIVE = frozenset({"Add", "Mul", "Equal"})

DEFAULTS: Mapping[tuple[str, str], Value] = {
    ("RMSNormalization", "axis"): -1,
    ("RMSNormalization", "stash_type"): 1,
    ("LayerNormalization", "axis"): -1,
    ("LayerNormalization", "stash_type"): 1,
    ("Attention", "is_causal"): 0,
    ("Attention", "qk_matmul_output_mode"): 0,
    ("Attention", "softcap"): 0.0,
    ("RotaryEmbedding", "rotary_embedding_dim"): 0,
    ("Reshape", "allowzero"): 0,
    ("Gelu", "approximate"): b"none",
    ("Gather", "axis"): 0,
    ("Split", "axis"): 0,
    ("GroupedQueryAttention", "cache_bits"): 0,
    ("GroupedQueryAttention", "chunk"): 0,
}
"""Attributes that may be left out, and what they are then."""


@dataclass(frozen=True, slots=True)
class Key:
    """A node's computation: its operator, inputs and attributes."""

    domain: str
    op: str
    inputs: tuple[Ref, ...]
    attributes: frozenset[tuple[str, Value]]


class Computation:
    """A graph's nodes by what they compute.

    Args:
        outline: The graph.

    Raises:
        ValueError: Two values have one name, or the operators are of other versions than ours.
    """

    def __init__(self, outline: Outline) -> None:
        self.outline = outline
        self.same: dict[str, Ref] = {}
        self.made: dict[Key, tuple[str, ...]] = {}
        self.maker: dict[str, Key] = {}
        self.readers: dict[str, list[Key]] = {}
        self.like: dict[tuple[str, str, tuple[Ref, ...]], Key] = {}
        for domain, version in outline.opsets.items():
            if OPSETS.get(domain) != version:
                raise ValueError(f"version {version} of the operators {shortened(domain or 'of ONNX')}")
        for name in outline.weights:
            if name in outline.inputs:
                raise ValueError(f"{shortened(name)} is an input and a weight")
        for node in outline.nodes:
            self._add(node)
        self.left = dict.fromkeys(self.made)

    def ref(self, name: str) -> Ref:
        """The value of a name."""
        return self.same.get(name, name)

    def _add(self, node: Node) -> None:
        for name in node.outputs:
            if name in self.same or name in self.outline.inputs or name in self.outline.weights:
                raise ValueError(f"{shortened(name)} is there twice")
        if node.op == "Constant" and len(node.outputs) == 1:
            self.same[node.outputs[0]] = _elements(node) or node.outputs[0]
            return
        if len(node.inputs) == len(node.outputs) == 1 and _changes_nothing(node):
            self.same[node.outputs[0]] = self.ref(node.inputs[0])
            return
        key = _key(node.domain, node.op, tuple(map(self.ref, node.inputs)), node.attributes)
        known = self.made.get(key)
        if known is not None and len(known) >= len(node.outputs):
            self.same |= dict(zip(node.outputs, known, strict=False))
            return
        self.made[key] = node.outputs
        self.like[key.domain, key.op, key.inputs] = key
        for name in node.outputs:
            self.same[name] = name
            self.maker[name] = key
        for each in {each for each in key.inputs if isinstance(each, str)}:
            self.readers.setdefault(each, []).append(key)

    def find(self, op: str, *inputs: Ref, domain: str = "", **attributes: Value) -> str:
        """The output of the node that computes this.

        Raises:
            ValueError: The graph has none.
        """
        return self.find_all(op, *inputs, domain=domain, **attributes)[0]

    def find_all(self, op: str, *inputs: Ref, domain: str = "", **attributes: Value) -> tuple[str, ...]:
        """The outputs of the node that computes this; raises what `find` does."""
        key = _key(domain, op, inputs, attributes)
        found = self.made.get(key)
        if not found:
            raise ValueError(self._difference(key))
        self.left.pop(key, None)
        return found

    def has(self, op: str, *inputs: Ref, domain: str = "", **attributes: Value) -> bool:
        """Whether the graph has such a node."""
        return _key(domain, op, inputs, attributes) in self.made

    def reader(self, value: str, op: str, place: int) -> Key:
        """The one node of this operator that reads a value at this place.

        Raises:
            ValueError: There is none, or there are several.
        """
        found = [
            key for key in self.readers.get(value, ()) if key.op == op and key.inputs[place : place + 1] == (value,)
        ]
        if len(found) != 1:
            raise ValueError(f"{len(found)} nodes {op} over {shortened(value)}, expected one")
        return found[0]

    def _difference(self, key: Key) -> str:
        """The words for a node that is not there."""
        other = self.like.get((key.domain, key.op, key.inputs))
        what = ", ".join(shortened(each) if isinstance(each, str) else _words(each) for each in key.inputs)
        if other is None:
            return f"no {key.op} of {shortened(what)}, which spec.json wants"
        has, wants = dict(other.attributes), dict(key.attributes)
        name = next((each for each in sorted({*has, *wants}) if has.get(each) != wants.get(each)), "")
        found, expected = (shortened(values.get(name, "none")) for values in (has, wants))
        return f"{key.op} of {shortened(what)} has {shortened(name)} {found}, spec.json {expected}"

    def check_rest(self) -> None:
        """Refuses nodes that nobody asked for.

        Raises:
            ValueError: There are such; the first is named.
        """
        if self.left:
            key = next(iter(self.left))
            what = f"{shortened(key.op)} of {shortened(list(key.inputs))}"
            raise ValueError(f"nodes that spec.json has no use for, {len(self.left)} in all, the first {what}")


def ints(*elements: int) -> Constant:
    """A vector of 64-bit whole numbers."""
    return Constant(INT64, (len(elements),), elements)


def whole(element: int, dtype: int = INT64) -> Constant:
    """One whole number."""
    return Constant(dtype, (), (element,))


def whole32(element: int) -> Constant:
    """One whole number of 32 bits."""
    return whole(element, INT32)


def number(element: float) -> Constant:
    """One float32."""
    return Constant(FLOAT, (), (rounded(element),))


def rounded(value: float) -> float:
    """A number as float32 holds it.

    Raises:
        ValueError: It is too large.
    """
    try:
        found: float = struct.unpack("<f", struct.pack("<f", value))[0]
    except OverflowError as error:
        raise ValueError(f"{value} is no float32") from error
    return found


def _key(domain: str, op: str, inputs: tuple[Ref, ...], attributes: Mapping[str, Value]) -> Key:
    if op in COMMUTATIVE:
        inputs = tuple(sorted(inputs, key=str))
    found = (
        (name, rounded(value) if isinstance(value, float) else value)
        for name, value in attributes.items()
        if DEFAULTS.get((op, name), ...) != value
    )
    return Key(domain, op, inputs, frozenset(found))


def _elements(node: Node) -> Constant | None:
    """A constant node's elements."""
    match dict(node.attributes):
        case {"value": Constant() as value, **rest} if not rest:
            return value
        case {"value_ints": tuple() as values, **rest} if not rest:
            return ints(*map(int, values))
    return None


def _changes_nothing(node: Node) -> bool:
    """Whether a node's output is its input: an identity, or a cast to float32."""
    return not node.domain and (node.op == "Identity" or (node.op == "Cast" and dict(node.attributes) == {"to": FLOAT}))


def _words(constant: Constant) -> str:
    return str(list(constant.elements))
