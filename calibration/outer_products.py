"""Outer products of a product's input, by which GPTQ corrects: their sum, or while they are few the rows themselves.

Enters: rows of activations, some at a time. Leaves: the sum of x xᵀ over them, [K, K], in one of its two forms. Fewer
rows than a quarter of the channels take less memory and time than the sum would.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..walk.accelerator import HOST

FEW = 4
"""Rows are kept as they are while there are fewer of them than this part of the channels: beyond it the corrections
through rows need as many operations as those through the sum."""

PANEL = 1024
"""Columns of the sum computed together: what lies above the diagonal's blocks is the same as what lies below."""


@dataclass(slots=True)
class OuterProducts:
    """A sum of outer products.

    Attributes:
        channels: Columns of a row (K).
        device: Where it is kept.
        rows: The rows, while they are few.
        sum_KK: Their sum of x xᵀ behind that; its upper blocks are not filled before `whole`.
    """

    channels: int
    device: torch.device = HOST
    rows: list[Tensor] = field(default_factory=list)
    sum_KK: Tensor | None = None

    def update(self, x_NK: Tensor) -> None:
        """Takes in more rows."""
        if self.sum_KK is None:
            if (sum(map(len, self.rows)) + len(x_NK)) * FEW <= self.channels:
                self.rows.append(x_NK.clone())
                return
            self.sum_KK = torch.zeros(self.channels, self.channels, device=self.device)
            x_NK, self.rows = torch.cat([*self.rows, x_NK]), []
        for start in range(0, self.channels, PANEL):
            panel = slice(start, start + PANEL)
            self.sum_KK[start:, panel].addmm_(x_NK[:, start:].T, x_NK[:, panel])

    def divided(self, exponents_K: Tensor) -> "OuterProducts":
        """The products of x / 2^exponents, their sum whole."""
        factor_K = torch.exp2(-exponents_K.float())
        if self.sum_KK is None:
            rows_RK = torch.cat(self.rows) if self.rows else torch.zeros(0, self.channels, device=self.device)
            return OuterProducts(self.channels, self.device, [rows_RK * factor_K])
        moved_KK = (self.sum_KK * factor_K).mul_(factor_K[:, None])
        for start in range(0, self.channels, PANEL):
            panel = slice(start, start + PANEL)
            moved_KK[panel, start + PANEL :] = moved_KK[start + PANEL :, panel].T
        return OuterProducts(self.channels, self.device, [], moved_KK)

    @property
    def diagonal_K(self) -> Tensor:
        """The sum of each channel's squares."""
        if self.sum_KK is not None:
            return self.sum_KK.diagonal()
        return torch.stack([rows_RK.square().sum(0) for rows_RK in self.rows]).sum(0)
