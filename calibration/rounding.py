"""Weights rounded to int8, E4M3 or int4, with the scales of their output channels or groups.

Enters: a weight [N, K], output channels first. Leaves: a `Rounded` whose values times scales stand for the weight.
The meaning is that of `plugins.quantisation`, computed in float32 by torch.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..plugins.quantisation import LARGEST, SMALLEST

TORCH_STORED = {"int8": torch.int8, "fp8": torch.float8_e4m3fn, "int4": torch.int8}
"""How values are held here; int4 is packed when it is written."""

SHRINKS = [1 - step / 40 for step in range(21)]
"""Clips that `mse` tries for a channel or group, as shares of its largest magnitude."""

DAMPING = 0.001
"""Share of the mean of the Hessian's diagonal that is added to it; the paper's 0.01 leaves more of E4M3's error."""

BLOCK = 128
"""Columns that GPTQ corrects at once."""


@dataclass(slots=True)
class Rounded:
    """A quantised weight.

    Attributes:
        values_NK: What is stored, in `TORCH_STORED`.
        scale_NG: float32, one for each output channel and block of K / G columns.
    """

    values_NK: Tensor
    scale_NG: Tensor

    def wide(self) -> Tensor:
        """The weight that it stands for, float32."""
        return self.values_NK.float() * spread(self.scale_NG, self.values_NK.shape[1])


def spread(scale_NG: Tensor, columns: int) -> Tensor:
    """Each column's scale: [N, G] → [N, K]."""
    return scale_NG.repeat_interleave(columns // scale_NG.shape[1], dim=1)


def round_to(x: Tensor, kind: str) -> Tensor:
    """The nearest values of a format, ties to even, saturating; in float32."""
    x = x.clamp(SMALLEST[kind], LARGEST[kind])
    return x.to(torch.float8_e4m3fn).float() if kind == "fp8" else x.round()


def scale_of(clip: Tensor, kind: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """The scale of a clip, as `dtype` can hold it; of zeros it is 1."""
    scale = (clip / LARGEST[kind]).to(dtype).float()
    return torch.where(scale > 0, scale, 1.0)


def fake_quantise(x_RK: Tensor, kind: str, scale: float | None) -> Tensor:
    """What activations become on their way into a product; without a scale each row has its own."""
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
    blocks_NGB = weight_NK.unflatten(1, (-1, group))
    largest_NG = blocks_NGB.abs().amax(2)
    best_NG = scale_of(largest_NG, kind, dtype)
    if clip == "absmax":
        return best_NG
    least_NG = torch.full_like(largest_NG, torch.inf)
    for shrink in SHRINKS:
        scale_NG = scale_of(largest_NG * shrink, kind, dtype)
        rounded_NGB = round_to(blocks_NGB / scale_NG[..., None], kind) * scale_NG[..., None]
        error_NG = (rounded_NGB - blocks_NGB).square().sum(2)
        best_NG = torch.where(error_NG < least_NG, scale_NG, best_NG)
        least_NG = torch.minimum(error_NG, least_NG)
    return best_NG


def round_nearest(weight_NK: Tensor, scale_NG: Tensor, kind: str) -> Rounded:
    """Each weight to the nearest value."""
    values_NK = round_to(weight_NK / spread(scale_NG, weight_NK.shape[1]), kind)
    return Rounded(values_NK.to(TORCH_STORED[kind]), scale_NG)


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
    columns = weight_NK.shape[1]
    scale_NK = spread(scale_NG, columns)
    diagonal_K = hessian_KK.diagonal()
    order_K = diagonal_K.argsort(descending=True, stable=True)
    hessian_KK = hessian_KK[order_K][:, order_K].double()
    dead_K = hessian_KK.diagonal() == 0  # inputs never seen: rounded to nearest, correcting nothing
    hessian_KK.diagonal()[dead_K] = 1.0
    hessian_KK.diagonal().add_(DAMPING * hessian_KK.diagonal().mean())
    inverse_KK = torch.cholesky_inverse(torch.linalg.cholesky(hessian_KK))
    factor_KK = torch.linalg.cholesky(inverse_KK, upper=True).float()
    left_NK, scale_NK = weight_NK[:, order_K].clone(), scale_NK[:, order_K]
    values_NK = torch.empty_like(left_NK)
    for start in range(0, columns, BLOCK):
        end = min(start + BLOCK, columns)
        block_NB, errors_NB = left_NK[:, start:end], torch.empty(len(left_NK), end - start)
        factor_BB = factor_KK[start:end, start:end]
        for at in range(end - start):
            values_N = round_to(block_NB[:, at] / scale_NK[:, start + at], kind)
            values_NK[:, start + at] = values_N
            error_N = (block_NB[:, at] - values_N * scale_NK[:, start + at]) / factor_BB[at, at]
            block_NB[:, at:] -= error_N[:, None] * factor_BB[at, at:]
            errors_NB[:, at] = error_N
        left_NK[:, end:] -= errors_NB @ factor_KK[start:end, end:]
    return Rounded(values_NK[:, order_K.argsort()].to(TORCH_STORED[kind]), scale_NG)
