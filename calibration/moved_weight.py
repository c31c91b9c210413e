"""A weight as it is stored, with the powers of two that its channels are multiplied and divided by.

Enters: a stored weight of any float type, and the exponents of what it reads and of what it makes. Leaves: the weight
that is rounded, in float32, some rows at a time or its columns in some order.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

PIECE = 1 << 21
"""Weights widened together: few enough to stay in a processor's cache, enough for several threads."""


@dataclass(slots=True)
class MovedWeight:
    """A weight [N, K], output channels first.

    Attributes:
        stored_NK: Its numbers, in any float type and layout.
        exponents_K: Octaves that each input channel is multiplied by.
        exponents_N: Octaves that each output channel is divided by; None is none.
    """

    stored_NK: Tensor
    exponents_K: Tensor
    exponents_N: Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        """N and K."""
        return self.stored_NK.shape

    def rows(self, which: slice | Tensor) -> Tensor:
        """Some output channels, [n, K]."""
        rows_NK = self.stored_NK[which].to(torch.float32, copy=True)
        rows_NK *= torch.exp2(self.exponents_K.float())
        if self.exponents_N is not None:
            rows_NK *= torch.exp2(-self.exponents_N[which].float())[:, None]
        return rows_NK

    def columns(self, order_K: Tensor) -> Tensor:
        """All of it with the input channels in some order, in front: [K, N]."""
        columns_KN = self.stored_NK.T[order_K].float()
        columns_KN *= torch.exp2(self.exponents_K[order_K].float())[:, None]
        if self.exponents_N is not None:
            columns_KN *= torch.exp2(-self.exponents_N.float())
        return columns_KN

    def pieces(self) -> Iterator[slice]:
        """Rows that are widened together, over all of them."""
        count, channels = self.shape
        step = max(1, PIECE // channels)
        return (slice(start, min(start + step, count)) for start in range(0, count, step))

    def largest_K(self) -> Tensor:
        """The largest magnitude of each input channel, over all output channels."""
        return torch.stack([self.rows(piece).abs_().amax(0) for piece in self.pieces()]).amax(0)

    def kept(self, dtype: torch.dtype) -> Tensor:
        """All of it in a float type, laid out as it is stored."""
        kept_NK = torch.empty_like(self.stored_NK, dtype=dtype)
        for piece in self.pieces():
            kept_NK[piece] = self.rows(piece).to(dtype)
        return kept_NK
