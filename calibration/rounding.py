"""Weights rounded to int8, E4M3 or int4, with the scales of their output channels or groups.

Enters: a weight [N, K], output channels first. Leaves: a `Rounded` whose values times scales stand for the weight.
The meaning is that of `plugins.quantisation`, computed in float32 by torch.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..plugins.quantisation import LARGEST, SMALLEST
from ..spec.types import TYPES

HELD = {kind: getattr(torch, TYPES[kind].torch) for kind in ("int8", "fp8", "int4")}
"""Torch's type of each kind's values; int4 is packed when it is written."""

SHRINKS = [1 - step / 40 for step in range(21)]
"""Clips that `mse` tries for a channel or group, as shares of its largest magnitude."""

DAMPING = 0.001
"""Share of the mean of the Hessian's diagonal that is added to it; the paper's 0.01 leaves more of E4M3's error."""

CHUNK = 1 << 18
"""Weights whose clips `mse` tries together, few enough to stay in a processor's cache."""

LEAF = 16
"""Columns that GPTQ corrects one by one; over more, the first half's errors correct the second in one product."""


@dataclass(slots=True)
class Rounded:
    """A quantised weight.

    Attributes:
        values_NK: Stored values, of a type of `HELD`.
        scale_NG: float32, one for each output channel and block of K / G columns.
    """

    values_NK: Tensor
    scale_NG: Tensor

    def wide(self) -> Tensor:
        """The weight that it stands for, float32."""
        wide_NK = self.values_NK.float()
        in_groups(wide_NK, self.scale_NG).mul_(self.scale_NG[..., None])
        return wide_NK


def in_groups(x_NK: Tensor, scale_NG: Tensor) -> Tensor:
    """A view [N, G, K / G] that scales [N, G, 1] broadcast over."""
    return x_NK.unflatten(1, (scale_NG.shape[1], -1))


def round_to(x: Tensor, kind: str) -> Tensor:
    """The nearest values of a format, ties to even, saturating; in float32. Overwrites `x`."""
    x = x.clamp_(SMALLEST[kind], LARGEST[kind])
    return x.to(torch.float8_e4m3fn).float() if kind == "fp8" else x.round_()


def scale_of(clip: Tensor, kind: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """The scale of a clip, as `dtype` can hold it; of zeros it is 1."""
    scale = (clip / LARGEST[kind]).to(dtype).float()
    return torch.where(scale > 0, scale, 1.0)


def fake_quantise(x_RK: Tensor, kind: str, scale: float | None) -> Tensor:
    """Activations as a product takes them in, rounded; without a scale each row has its own."""
    if kind in ("none", "int4"):
        return x_RK
    scale_R1 = scale_of(x_RK.abs().amax(1, keepdim=True), kind) if scale is None else torch.tensor(scale)
    return round_to(x_RK / scale_R1, kind) * scale_R1


def choose_scales(weight_NK: Tensor, kind: str, group: int, clip: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """The scales [N, K / group] of a weight.

    Args:
        weight_NK: The weight.
        kind: `int8`, `fp8` or `int4`.
        group: Columns that share a scale.
        clip: `absmax`, or `mse`: of some clips below it the one with the least squared error of the weight.
        dtype: Type that must hold the scales.
    """
    if clip == "absmax":
        return scale_of(weight_NK.unflatten(1, (-1, group)).abs().amax(2), kind, dtype)
    rows = max(1, CHUNK // weight_NK.shape[1])
    return torch.cat([_least_squares(part_NK, kind, group, dtype) for part_NK in weight_NK.split(rows)])


def _least_squares(weight_NK: Tensor, kind: str, group: int, dtype: torch.dtype) -> Tensor:
    """The scales of least squared error among those of `SHRINKS`, the largest of equals."""
    blocks_NGB = weight_NK.contiguous().unflatten(1, (-1, group))
    largest_NG = blocks_NGB.abs().amax(2)
    best_NG, least_NG = torch.ones_like(largest_NG), torch.full_like(largest_NG, torch.inf)
    for shrink in SHRINKS:
        scale_NG = scale_of(largest_NG * shrink, kind, dtype)
        rounded_NGB = round_to(blocks_NGB / scale_NG[..., None], kind)
        error_NG = rounded_NGB.mul_(scale_NG[..., None]).sub_(blocks_NGB).square_().sum(2)
        best_NG = torch.where(error_NG < least_NG, scale_NG, best_NG)
        least_NG = torch.minimum(error_NG, least_NG)
    return best_NG


def round_nearest(weight_NK: Tensor, scale_NG: Tensor, kind: str) -> Rounded:
    """Each weight to the nearest value."""
    values_NGB = round_to(in_groups(weight_NK, scale_NG) / scale_NG[..., None], kind)
    return Rounded(values_NGB.flatten(1).to(HELD[kind]), scale_NG)


def round_gptq(weight_NK: Tensor, scale_NG: Tensor, kind: str, hessian_KK: Tensor) -> Rounded:
    """Column by column, each error made up for by the columns that are not rounded yet.

    GPTQ (Frantar et al. 2022, arXiv:2210.17323), algorithm 1: the inverse Hessian's Cholesky factor gives the
    corrections. Columns go in order of falling diagonal (the paper's code calls it act-order), their scales fixed
    before.

    Args:
        weight_NK: The weight.
        scale_NG: Its scales.
        kind: The format.
        hessian_KK: Sum over inputs of x xᵀ; its factor 2 cancels.
    """
    order_K = hessian_KK.diagonal().argsort(descending=True, stable=True)
    left_KN = weight_NK.T[order_K]
    columns = _Columns(
        left_KN=left_KN,
        values_KN=torch.empty_like(left_KN, dtype=HELD[kind]),
        factor_KK=inverse_factor(hessian_KK[order_K][:, order_K]),
        scale_GN=scale_NG.T.contiguous(),
        groups=(order_K // (len(order_K) // scale_NG.shape[1])).cpu().tolist(),
        kind=kind,
    )
    columns.round(0, len(order_K))
    return Rounded(columns.values_KN[order_K.argsort()].T.contiguous(), scale_NG)


@dataclass(slots=True)
class _Columns:
    """GPTQ's columns, as rows: what is left of them to round, and what they became.

    Attributes:
        left_KN: The columns, corrected; a rounded column's place takes its error.
        values_KN: Stored values.
        factor_KK: `inverse_factor` of the Hessian.
        scale_GN: Scales.
        groups: The scale of each column.
        kind: The format.
    """

    left_KN: Tensor
    values_KN: Tensor
    factor_KK: Tensor
    scale_GN: Tensor
    groups: list[int]
    kind: str

    def round(self, start: int, end: int) -> None:
        """Rounds some columns, each after those before it."""
        left_KN, factor_KK = self.left_KN, self.factor_KK
        if end - start > LEAF:
            middle = (start + end) // 2
            self.round(start, middle)
            left_KN[middle:end].addmm_(factor_KK[start:middle, middle:end].T, left_KN[start:middle], alpha=-1)
            self.round(middle, end)
            return
        for at in range(start, end):
            scale_N = self.scale_GN[self.groups[at]]
            values_N = round_to(left_KN[at] / scale_N, self.kind)
            self.values_KN[at] = values_N
            left_KN[at].addcmul_(values_N, scale_N, value=-1).div_(factor_KK[at, at])
            left_KN[at + 1 : end].addr_(factor_KK[at, at + 1 : end], left_KN[at], alpha=-1)


def inverse_factor(hessian_KK: Tensor) -> Tensor:
    """The upper Cholesky factor U of the damped Hessian's inverse, UᵀU = H⁻¹, float32.

    Reversed in rows and columns, H's lower factor becomes an upper R with H = RRᵀ, so that U = R⁻¹: one factorisation
    and the inverse of a triangle instead of two factorisations and the inverse of a square.
    """
    hessian_KK = hessian_KK.double()  # float32's rounding may be larger than the damping
    diagonal_K = hessian_KK.diagonal()
    diagonal_K[diagonal_K == 0] = 1.0  # inputs never seen: rounded to nearest, correcting nothing
    diagonal_K += DAMPING * diagonal_K.mean()
    lower_KK = torch.linalg.cholesky(hessian_KK.flip(0, 1))
    eye_KK = torch.eye(len(lower_KK), device=lower_KK.device)
    return torch.linalg.solve_triangular(lower_KK.float(), eye_KK, upper=False).flip(0, 1)
