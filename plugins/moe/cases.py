"""The cases over which every implementation of mixture-of-experts dispatch is held against its meaning."""

import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from .op import Attributes


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One call of the op: its attributes and the numbers that fix its inputs' shapes.

    Attributes:
        favourite: Where set, every token's largest logit is this expert's, so the others starve.
    """

    name: str
    attributes: Attributes
    tokens: int
    experts: int
    hidden: int = 32
    expert_size: int = 24
    favourite: int | None = None

    def inputs(self) -> dict[str, np.ndarray[Any, Any]]:
        """The op's inputs by name, in float32; the same for each call."""
        rng = np.random.default_rng(zlib.crc32(self.name.encode()))

        def normal(*shape: int) -> np.ndarray[Any, Any]:
            return rng.standard_normal(shape).astype(np.float32)

        router_logits = normal(self.tokens, self.experts)
        if self.favourite is not None:
            router_logits[:, self.favourite] += 10
        return {
            "hidden": normal(self.tokens, self.hidden),
            "router_logits": router_logits,
            "gate_up": normal(self.experts, self.hidden, 2 * self.expert_size) / np.float32(self.hidden**0.5),
            "down": normal(self.experts, self.expert_size, self.hidden) / np.float32(self.expert_size**0.5),
        }


TOP_1, TOP_2 = Attributes(top_k=1), Attributes(top_k=2)

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
)
