"""The cases over which every implementation of mixture-of-experts dispatch is held against its meaning."""

import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..quantisation import LARGEST, Kind, quantise
from .op import Attributes


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One call of the op: its attributes and the numbers that fix its inputs' shapes.

    Attributes:
        experts: Experts that the router knows.
        held: Number of them that, from the attribute's first on, have their weights here; None is all.
        favourite: Where set, every token's largest logit is this expert's, so the others starve.
        group: Inputs of a weight that share a scale in `int4`; it divides `hidden` and `expert_size`.
        static: Whether quantised activations have static scales.
    """

    name: str
    attributes: Attributes
    tokens: int
    experts: int
    hidden: int = 32
    expert_size: int = 24
    held: int | None = None
    favourite: int | None = None
    group: int = 0
    static: bool = False

    @property
    def weights(self) -> int:
        """Number of experts whose weights the inputs hold."""
        return self.experts if self.held is None else self.held

    def inputs(self) -> dict[str, np.ndarray[Any, Any]]:
        """The op's inputs by name, floats in float32, weights as they are stored; equal at every call."""
        rng = np.random.default_rng(zlib.crc32(self.name.encode()))

        def normal(*shape: int) -> np.ndarray[Any, Any]:
            return rng.standard_normal(shape).astype(np.float32)

        router_logits = normal(self.tokens, self.experts)
        if self.favourite is not None:
            router_logits[:, self.favourite] += 10
        inputs = {
            "hidden": normal(self.tokens, self.hidden),
            "router_logits": router_logits,
            "gate_up": normal(self.weights, self.hidden, 2 * self.expert_size) / np.float32(self.hidden**0.5),
            "down": normal(self.weights, self.expert_size, self.hidden) / np.float32(self.expert_size**0.5),
        }
        kind = self.attributes.quantisation
        if kind == "none":
            return inputs
        for name in ("gate_up", "down"):
            weight_ENK = np.ascontiguousarray(inputs[name].swapaxes(1, 2))
            inputs[name], inputs[f"{name}_scale"] = quantised(weight_ENK, kind, self.group)
        if self.static:  # the clip lies within the activations' range, so that some saturate
            for name, clip in (("hidden_scale", 2.0), ("activated_scale", 1.0)):
                spread_E = rng.uniform(0.5, 1.5, self.weights)
                inputs[name] = (spread_E * clip / LARGEST[kind]).astype(np.float32)
        return inputs


def quantised(
    weight_ENK: np.ndarray[Any, Any], kind: str, group: int
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Stored weights and their scales [E, N, K / group], from absolute maxima; a group of 0 is all inputs."""
    experts, outputs, inputs = weight_ENK.shape
    blocks = weight_ENK.reshape(experts, outputs, inputs // (group or inputs), -1)
    scale = (np.abs(blocks).max(axis=3) / LARGEST[kind]).astype(np.float32)
    return quantise(blocks, scale[..., None], kind).reshape(weight_ENK.shape), scale


TOP_1, TOP_2 = Attributes(top_k=1), Attributes(top_k=2)


def from_expert(first: int, top_k: int = 1, quantisation: Kind = "none") -> Attributes:
    """The attributes of a node that holds the experts from `first` on."""
    return Attributes(top_k=top_k, quantisation=quantisation, first_expert=first)


CASES = (
    Case(name="one token", attributes=TOP_1, tokens=1, experts=8),
    Case(name="few tokens", attributes=TOP_1, tokens=5, experts=16),
    Case(name="many tokens", attributes=TOP_1, tokens=200, experts=8),
    Case(name="more experts than tokens", attributes=TOP_1, tokens=9, experts=128),
    Case(name="one expert takes all", attributes=TOP_1, tokens=40, experts=8, favourite=3),
    Case(name="two experts a token", attributes=TOP_2, tokens=33, experts=8),
    Case(name="two experts, many wide tokens", attributes=TOP_2, tokens=512, experts=8, hidden=1024, expert_size=64),
    Case(name="two experts, one token", attributes=TOP_2, tokens=1, experts=4),
    Case(name="every expert chosen", attributes=Attributes(top_k=4), tokens=7, experts=4),
    Case(name="a single expert", attributes=TOP_1, tokens=6, experts=1),
    Case(name="sizes that are no multiple of 16", attributes=TOP_1, tokens=13, experts=3, hidden=27, expert_size=19),
    Case(name="the first half of the experts", attributes=from_expert(0), tokens=30, experts=8, held=4),
    Case(name="the second half of the experts", attributes=from_expert(4), tokens=30, experts=8, held=4),
    Case(name="two of a token's experts held or not", attributes=from_expert(2, 2), tokens=33, experts=8, held=3),
    Case(name="one expert held of many", attributes=from_expert(127), tokens=9, experts=128, held=1),
    Case(name="every token goes elsewhere", attributes=from_expert(4), tokens=6, experts=8, held=4, favourite=3),
    Case(name="one token, experts held here", attributes=from_expert(2), tokens=1, experts=8, held=4, favourite=3),
)

INT8, FP8, INT4 = (Attributes(top_k=1, quantisation=kind) for kind in ("int8", "fp8", "int4"))
BOUNDED = Attributes(top_k=1, quantisation="fp8", activation_bound=0.75)
INT8_TOP_2, FP8_TOP_2, INT4_TOP_2 = (Attributes(top_k=2, quantisation=kind) for kind in ("int8", "fp8", "int4"))

QUANTISED_CASES = (
    Case(name="int8, one token", attributes=INT8, tokens=1, experts=8),
    Case(name="int8, many tokens", attributes=INT8, tokens=150, experts=8),
    Case(name="int8, static", attributes=INT8, tokens=40, experts=8, static=True),
    Case(name="int8, static, one token", attributes=INT8, tokens=1, experts=4, static=True),
    Case(name="int8, more experts than tokens", attributes=INT8, tokens=9, experts=128),
    Case(name="int8, blocks of 32", attributes=INT8, tokens=9, experts=64, hidden=64, expert_size=32),
    Case(name="int8, two experts a token", attributes=INT8_TOP_2, tokens=33, experts=8, static=True),
    Case(name="int8, odd sizes", attributes=INT8, tokens=13, experts=3, hidden=27, expert_size=19),
    Case(name="fp8, one token", attributes=FP8, tokens=1, experts=8),
    Case(name="fp8, many tokens", attributes=FP8, tokens=150, experts=8),
    Case(name="fp8, bounded", attributes=BOUNDED, tokens=20, experts=8),
    Case(name="fp8, static", attributes=FP8, tokens=40, experts=8, static=True),
    Case(name="fp8, static, one token", attributes=FP8, tokens=1, experts=4, static=True),
    Case(name="fp8, two experts a token", attributes=FP8_TOP_2, tokens=33, experts=8, static=True),
    Case(name="int4, one token", attributes=INT4, tokens=1, experts=8, hidden=64, expert_size=32, group=32),
    Case(name="int4, groups of 8", attributes=INT4, tokens=5, experts=4, hidden=48, expert_size=24, group=8),
    Case(name="int4, a group of one", attributes=INT4, tokens=5, experts=4, hidden=32, expert_size=64, group=32),
    Case(name="int4, groups of 32", attributes=INT4, tokens=70, experts=8, hidden=64, expert_size=96, group=32),
    Case(name="int4, groups of 64", attributes=INT4_TOP_2, tokens=20, experts=4, hidden=128, expert_size=64, group=64),
    Case(name="int4, groups of 128", attributes=INT4, tokens=20, experts=4, hidden=256, expert_size=128, group=128),
    Case(name="int4, no groups", attributes=INT4, tokens=12, experts=4, hidden=48, expert_size=32),
    Case(name="int8, held in part", attributes=from_expert(4, 2, "int8"), tokens=33, experts=8, held=4, static=True),
    Case(name="fp8, held in part", attributes=from_expert(0, 1, "fp8"), tokens=33, experts=8, held=4),
    Case(name="int4, held in part", attributes=from_expert(2, 1, "int4"), tokens=33, experts=8, held=4, expert_size=32),
)
"""Cases of the op over quantised experts."""
