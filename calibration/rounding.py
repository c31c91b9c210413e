"""Weights rounded to int8, E4M3 or int4, with the scales of their output channels or groups.

Enters: a weight [N, K], output channels first. Leaves: a `Rounded` whose values times scales stand for the weight.
GPTQ's rounding stands in `gptq`.
The meaning is that of `plugins.quantisation`, computed in float32 by torch.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..plugins.quantisation import LARGEST, SMALLEST
from ..spec.types import TYPES
from .moved_weight import MovedWeight

HELD = {kind: getattr(torch, TYPES[kind].torch) for kind in ("int8", "fp8", "int4")}
"""Torch's type of each kind's values; int4 is packed when it is written."""

SHRINKS = [1 - step / 40 for step in range(21)]
"""Clips that `mse` tries for a channel or group, as shares of its largest magnitude."""

SIGN_AND_VALUE = -0x7810_0000
"""Bits of a float32, as a signed integer, that E4M3 has too: sign, four of the exponent's, three of the mantissa's."""

CHUNK = 1 << 18
"""Weights whose clips `mse` tries together, few enough to stay in a processor's cache."""


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
        wide_NK = widen(self.values_NK)
        in_groups(wide_NK, self.scale_NG).mul_(self.scale_NG[..., None])
        return wide_NK


def in_groups(x_NK: Tensor, scale_NG: Tensor) -> Tensor:
    """A view [N, G, K / G] that scales [N, G, 1] broadcast over."""
    return x_NK.unflatten(1, (scale_NG.shape[1], -1))


def narrow(x: Tensor, kind: str) -> Tensor:
    """The nearest values of a format as they are stored, ties to even, saturating. Overwrites `x`."""
    x.clamp_(SMALLEST[kind], LARGEST[kind])
    return (x if kind == "fp8" else x.round_()).to(HELD[kind])


def widen(stored: Tensor) -> Tensor:
    """Stored values in float32; E4M3 by its bits, which takes half of the time that PyTorch's table of them does."""
    if stored.dtype != torch.float8_e4m3fn:
        return stored.float()
    bits = stored.view(torch.int8).to(torch.int32)
    bits <<= 20  # the exponent's and the mantissa's to their places in a float32, the sign, extended, to its own
    bits &= SIGN_AND_VALUE
    return bits.view(torch.float32).mul_(2.0**120)  # the difference of the exponents' biases


def round_to(x: Tensor, kind: str) -> Tensor:
    """The nearest values of a format, as `narrow` makes them, in float32. Overwrites `x`."""
    return widen(narrow(x, kind)) if kind == "fp8" else x.clamp_(SMALLEST[kind], LARGEST[kind]).round_()


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
    values_NGB = narrow(in_groups(weight_NK, scale_NG) / scale_NG[..., None], kind)
    return Rounded(values_NGB.flatten(1), scale_NG)


def choose_and_round(weight: MovedWeight, kind: str, group: int, clip: str, dtype: torch.dtype) -> Rounded:
    """Scales chosen, as `choose_scales` does, and each weight rounded to the nearest value, in one pass.

    Args:
        weight: The weight.
        kind: `int8`, `fp8` or `int4`.
        group: Columns that share a scale.
        clip: As `choose_scales` has it.
        dtype: Type that must hold the scales.
    """
    count, channels = weight.shape
    device = weight.stored_NK.device
    values_NK = torch.empty(count, channels, dtype=HELD[kind], device=device)
    scale_NG = torch.empty(count, channels // group, device=device)
    for piece in weight.pieces():
        rows_NK = weight.rows(piece)
        scale_NG[piece] = choose_scales(rows_NK, kind, group, clip, dtype)
        in_groups(rows_NK, scale_NG[piece]).div_(scale_NG[piece, :, None])
        values_NK[piece].view(torch.int8).copy_(narrow(rows_NK, kind).view(torch.int8))
    return Rounded(values_NK, scale_NG)
