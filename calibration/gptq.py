"""GPTQ: weights rounded column by column, each error made up for by the columns that are not rounded yet.

Enters: a weight [N, K] with its scales, and the outer products of its input. Leaves: a `Rounded`.

Frantar et al. 2022, arXiv:2210.17323, algorithm 1. Columns go in order of falling diagonal of the Hessian (the paper's
code calls it act-order), their scales fixed before. Corrections reach later columns in products of many columns at once
(the paper's lazy batches), in one of two ways of the same meaning:

- Through the Cholesky factor of the inverse Hessian, as the paper has it: N·K² operations, and K³ for the factor.
- Through the R rows whose outer products the Hessian is, where they are few. With the errors e of the columns rounded
  so far and r = X e, which they leave in the rows' outputs, the others are best corrected by
  X_lᵀ (X_l X_lᵀ + λI)⁻¹ r, l for the columns left: 4·N·K·R operations. The inverse grows by a block of columns at once.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .moved_weight import MovedWeight
from .outer_products import OuterProducts
from .rounding import HELD, Rounded, narrow, widen

DAMPING = 0.001
"""Share of the mean of the Hessian's diagonal that is added to it; the paper's 0.01 leaves more of E4M3's error."""

LEAF = 16
"""Columns that are corrected one by one; over more, the first half's errors correct the second in one product."""

BLOCK = 128
"""Columns rounded between two products with the rows."""

SMALLEST = 512
"""Size of a triangle whose factor and inverse are computed as one; larger ones by products of their quarters."""


@dataclass(slots=True)
class Corrections:
    """Knowledge of an input from before any weight that reads it is rounded.

    Attributes:
        order_K: The columns as they are rounded.
        factors: Of each block of columns its upper factor U of the inverse Hessian among columns left, its rows divided
            by their diagonal; a single one of all columns where there are no rows.
        rows_RK: The rows, in that order; None where they are many.
        pulls_RK: For each column the vector whose product with r corrects it.
    """

    order_K: Tensor
    factors: list[Tensor]
    rows_RK: Tensor | None = None
    pulls_RK: Tensor | None = None


def find_corrections(products: OuterProducts) -> Corrections:
    """The corrections by an input's outer products."""
    diagonal_K = products.diagonal_K.double()
    order_K = diagonal_K.argsort(descending=True, stable=True)
    # inputs never seen count as 1: rounded to nearest, correcting nothing
    damping = DAMPING * torch.where(diagonal_K == 0, 1.0, diagonal_K).mean()
    if products.sum_KK is not None:
        return Corrections(order_K, [unit_rows(inverse_factor(products.sum_KK[order_K][:, order_K], damping))])
    (rows_RK,) = products.rows
    return _through_rows(rows_RK[:, order_K], order_K, damping)


def _through_rows(rows_RK: Tensor, order_K: Tensor, damping: Tensor) -> Corrections:
    """Goes from the last block to the first: each adds its columns to those left.

    With P = (X_l X_lᵀ + λI)⁻¹ of the columns behind a block B, and V the upper factor of (I + Bᵀ P B)⁻¹, V serves
    within the block; Q = P - P B Vᵀ V Bᵀ P is the inverse that has the block's columns too (Woodbury), and Q B, which
    is P B Vᵀ V, pulls.
    """
    count, channels = rows_RK.shape
    inverse_RR = torch.eye(count, dtype=torch.float64, device=rows_RK.device) / damping
    pulls_RK, factors = torch.empty_like(rows_RK), []
    for start in reversed(range(0, channels, BLOCK)):
        block = slice(start, start + BLOCK)
        columns_RB = rows_RK[:, block].double()
        reached_RB = inverse_RR @ columns_RB
        inner_BB = columns_RB.T @ reached_RB
        inner_BB.diagonal().add_(1.0)
        factor_BB = torch.linalg.cholesky(inner_BB.flip(0, 1))
        eye_BB = torch.eye(len(factor_BB), dtype=torch.float64, device=rows_RK.device)
        factor_BB = torch.linalg.solve_triangular(factor_BB, eye_BB, upper=False).flip(0, 1)
        reached_RB = reached_RB @ factor_BB.T
        inverse_RR.addmm_(reached_RB, reached_RB.T, alpha=-1)
        pulls_RK[:, block] = reached_RB @ factor_BB
        factors.append(unit_rows(factor_BB).float())
    return Corrections(order_K, factors[::-1], rows_RK, pulls_RK)


def round_gptq(weight: MovedWeight, scale_NG: Tensor, kind: str, corrections: Corrections) -> Rounded:
    """Rounds a weight under scales that are fixed.

    Args:
        weight: The weight.
        scale_NG: Its scales.
        kind: The format.
        corrections: Those of its input.
    """
    order_K = corrections.order_K
    left_KN = weight.columns(order_K)
    if scale_NG.shape[1] == 1:  # a row's scale commutes with all that is done to it
        left_KN /= scale_NG[:, 0]
        scale_KN = None
    else:
        scale_KN = scale_NG.T[order_K // (len(order_K) // scale_NG.shape[1])]
    columns = _Columns(left_KN, torch.empty_like(left_KN, dtype=HELD[kind]), scale_KN, kind)
    if corrections.rows_RK is None:
        columns.round(0, len(order_K), corrections.factors[0], 0)
    else:
        columns.round_by_rows(corrections)
    values_KN = torch.empty_like(columns.values_KN)
    values_KN.view(torch.int8)[order_K] = columns.values_KN.view(torch.int8)
    return Rounded(values_KN.T.contiguous(), scale_NG)


@dataclass(slots=True)
class _Columns:
    """The columns of a weight, as rows: what is left of them to round, and what they became.

    Attributes:
        left_KN: The columns, corrected; a rounded column's place takes its error.
        values_KN: Stored values.
        scale_KN: Scales; None where the columns are divided by them already.
        kind: The format.
    """

    left_KN: Tensor
    values_KN: Tensor
    scale_KN: Tensor | None
    kind: str

    def round(self, start: int, end: int, factor_BB: Tensor, first: int) -> None:
        """Rounds some columns, each after those before it.

        Args:
            start: The first.
            end: Behind the last.
            factor_BB: The factor of a block that they are of.
            first: The block's first column.
        """
        left_KN = self.left_KN
        if end - start > LEAF:
            middle = start + max(LEAF, (end - start) // 2 // LEAF * LEAF)
            self.round(start, middle, factor_BB, first)
            coupling = factor_BB[start - first : middle - first, middle - first : end - first]
            left_KN[middle:end].addmm_(coupling.T, left_KN[start:middle], alpha=-1)
            self.round(middle, end, factor_BB, first)
            return
        for at in range(start, end):
            if at > start:
                coupling_B = factor_BB[start - first : at - first, at - first]
                left_KN[at].addmv_(left_KN[start:at].T, coupling_B, alpha=-1)
            scale_N = None if self.scale_KN is None else self.scale_KN[at]
            stored_N = narrow(left_KN[at].clone() if scale_N is None else left_KN[at] / scale_N, self.kind)
            self.values_KN[at], rounded_N = stored_N, widen(stored_N)
            if scale_N is None:
                left_KN[at] -= rounded_N
            else:
                left_KN[at].addcmul_(rounded_N, scale_N, value=-1)

    def round_by_rows(self, corrections: Corrections) -> None:
        """Rounds all columns, a block at a time, corrected by what the blocks before leave in the rows' outputs."""
        rows_RK, pulls_RK = corrections.rows_RK, corrections.pulls_RK
        assert rows_RK is not None
        assert pulls_RK is not None
        residual_RN = torch.zeros(len(rows_RK), self.left_KN.shape[1], device=rows_RK.device)
        for number, factor_BB in enumerate(corrections.factors):
            start = number * BLOCK
            block = slice(start, start + len(factor_BB))
            error_BN = self.left_KN[block].clone()
            self.left_KN[block].addmm_(pulls_RK[:, block].T, residual_RN)
            self.round(start, block.stop, factor_BB, start)
            rounded_BN = widen(self.values_KN[block])
            error_BN -= rounded_BN if self.scale_KN is None else rounded_BN.mul_(self.scale_KN[block])
            residual_RN.addmm_(rows_RK[:, block], error_BN)


def unit_rows(factor_KK: Tensor) -> Tensor:
    """An upper factor whose rows are divided by their diagonal. Overwrites it."""
    return factor_KK.div_(factor_KK.diagonal().clone()[:, None])


def inverse_factor(hessian_KK: Tensor, damping: Tensor) -> Tensor:
    """The upper Cholesky factor U of the damped Hessian's inverse, UᵀU = H⁻¹, float32.

    Reversed in rows and columns, H's lower factor becomes an upper R with H = RRᵀ, so that U = R⁻¹: one factorisation
    and the inverse of a triangle instead of two factorisations and the inverse of a square.
    """
    lower_KK = hessian_KK.flip(0, 1).double()  # float32's rounding may be larger than the damping
    diagonal_K = lower_KK.diagonal()
    diagonal_K[diagonal_K == 0] = 1.0
    diagonal_K += damping
    factorise(lower_KK)
    inverse_KK = lower_KK.float()
    del lower_KK
    invert(inverse_KK)
    return inverse_KK.flip(0, 1)


def factorise(square_KK: Tensor) -> None:
    """The lower Cholesky factor in place of a symmetric matrix whose lower triangle alone is read."""
    size = len(square_KK)
    if size <= SMALLEST:
        square_KK.copy_(torch.linalg.cholesky(square_KK))
        return
    half = size // 2
    top, side, rest = square_KK[:half, :half], square_KK[half:, :half], square_KK[half:, half:]
    factorise(top)
    side.copy_(torch.linalg.solve_triangular(top.T, side, upper=True, left=False))
    for start in range(0, len(rest), SMALLEST):
        panel = slice(start, start + SMALLEST)
        rest[start:, panel].addmm_(side[start:], side[panel].T, alpha=-1)
    factorise(rest)
    square_KK[:half, half:] = 0


def invert(lower_KK: Tensor) -> None:
    """The inverse of a lower triangle in its place."""
    size = len(lower_KK)
    if size <= SMALLEST:
        eye_KK = torch.eye(size, dtype=lower_KK.dtype, device=lower_KK.device)
        lower_KK.copy_(torch.linalg.solve_triangular(lower_KK, eye_KK, upper=False))
        return
    half = size // 2
    top, side, rest = lower_KK[:half, :half], lower_KK[half:, :half], lower_KK[half:, half:]
    invert(top)
    invert(rest)
    side.copy_((rest @ side).neg_() @ top)
