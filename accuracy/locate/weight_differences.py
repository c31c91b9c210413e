"""In what way one weight differs from another: transposed, permuted, scaled, or otherwise.

Enters: the reference's weight and the candidate's, [N, K], factors that were moved between channels taken out. Leaves:
a sentence, or nothing where they differ no more than rounding explains.
"""

import torch
from torch import Tensor

MOST_ROWS = 8192
"""Rows that are searched for one another; the search takes memory by their square."""

ALIKE = 0.3
"""Share of a difference that may remain where a mistake explains it."""

PERMUTED = "its rows stand in another order"
HALVES = "its rows stand as a RoPE over halves wants them, not over neighbouring pairs"


def difference(reference_NK: Tensor, found_NK: Tensor) -> float:
    """Relative, in the Frobenius norm; infinite between different shapes."""
    if reference_NK.shape != found_NK.shape:
        return float("inf")
    return float((found_NK - reference_NK).norm() / reference_NK.norm().clamp(min=1e-30))


def describe(
    reference_NK: Tensor,
    found_NK: Tensor,
    explained: float,
    *,
    head_dim: int | None = None,
    factor_K: Tensor | None = None,
) -> str | None:
    """Says in what way two weights differ.

    Args:
        reference_NK: The weight as it should be.
        found_NK: As it is.
        explained: The relative difference that rounding explains.
        head_dim: Rows of a head, of queries and keys.
        factor_K: Factors that a quantiser multiplied columns by before it chose the rows' scales; None is nothing.
    """
    differs = difference(reference_NK, found_NK)
    if differs <= explained:
        return None
    left = max(explained, ALIKE * differs)
    if reference_NK.shape[0] == reference_NK.shape[1] and difference(reference_NK.T, found_NK) <= left:
        return "it is transposed"
    order_N = matching_rows(reference_NK, found_NK)
    if order_N is not None and difference(reference_NK[order_N], found_NK) <= left:
        halves_N = None if head_dim is None else half_split(len(order_N), head_dim)
        is_split = halves_N is not None and (torch.equal(order_N, halves_N) or torch.equal(order_N, halves_N.argsort()))
        return HALVES if is_split else PERMUTED
    otherwise = f"it differs by {differs:.3g} of its norm, rounding explains {explained:.1g}"
    scale_N = (reference_NK if factor_K is None else reference_NK * factor_K).abs().amax(1)
    return _scaled(reference_NK, found_NK, scale_N, left) or otherwise


def matching_rows(reference_NK: Tensor, found_NK: Tensor) -> Tensor | None:
    """For each row of one the row of the other that points the same way; None where all rows match their own."""
    if reference_NK.shape != found_NK.shape or len(reference_NK) > MOST_ROWS:
        return None
    left, right = (torch.nn.functional.normalize(each, dim=1) for each in (found_NK, reference_NK))
    order_N = (left @ right.T).argmax(1)
    return None if torch.equal(order_N, torch.arange(len(order_N))) else order_N


def half_split(rows: int, head_dim: int) -> Tensor:
    """The rows of each head with the first ones of its pairs before the second ones."""
    within_D = torch.arange(head_dim).view(-1, 2).T.flatten()
    return (torch.arange(0, rows, head_dim)[:, None] + within_D).flatten()


def _scaled(reference_NK: Tensor, found_NK: Tensor, scale_N: Tensor, left: float) -> str | None:
    """The fault of the rows' scales, in words; None where there is another."""
    used_N = reference_NK.any(1)
    reference_NK, found_NK, scale_N = reference_NK[used_N], found_NK[used_N], scale_N[used_N]
    if not len(reference_NK):
        return None
    ratio_N = (found_NK * reference_NK).sum(1) / reference_NK.square().sum(1)
    if difference(reference_NK * ratio_N[:, None], found_NK) > left:
        return None
    if not ratio_N.any():
        return "it is zero"
    off_N = (ratio_N - 1).abs() > 0.2
    middle = float(ratio_N[off_N].median()) if off_N.any() else 1.0
    alike = bool(((ratio_N[off_N] / middle - 1).abs() < 0.2).all())
    if alike and off_N.any():
        if off_N.all():
            return f"it is {middle:.3g} times what it should be"
        return f"{int(off_N.sum())} of its {len(off_N)} rows are {middle:.3g} times what they should be"
    same_scales = (scale_N.sort().values - (scale_N * ratio_N).sort().values).norm() / scale_N.norm() < 0.05
    return "its scales stand in another order than its rows" if same_scales else "its rows are scaled wrongly"
