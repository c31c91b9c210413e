"""The cases over which every implementation of the sum over ranks is held against its meaning."""

import zlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .op import Attributes


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One call of the op on every rank."""

    name: str
    attributes: Attributes
    shape: tuple[int, ...]

    def parts(self) -> list[NDArray[np.float32]]:
        """Each rank's summand, equal at every call."""
        rng = np.random.default_rng(zlib.crc32(self.name.encode()))
        return [rng.standard_normal(self.shape).astype(np.float32) for _ in range(self.attributes.ranks)]


CASES = (
    Case(name="one rank", attributes=Attributes(ranks=1), shape=(1, 3, 8)),
    Case(name="one token", attributes=Attributes(ranks=2), shape=(1, 1, 32)),
    Case(name="a batch of pieces", attributes=Attributes(ranks=2), shape=(3, 17, 64)),
    Case(name="logits", attributes=Attributes(ranks=2), shape=(2, 1, 2048)),
)
