"""Evidence against one unit that is out of line, of a decoder or of a tower.

Enters: a reading, and the weights of reference and candidate. Leaves: a `Blame` of a tensor that is not the
reference's, or of a mistake which comes out as the candidate computes it. Factors that quantisers move between channels
are no fault: what a norm is divided by, and powers of two between two linears.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ...walk.numbers import Weights
from .location import Blame, Reading
from .weight_differences import ALIKE, HALVES, describe, difference

EXPLAINED = 3.0
"""Multiple of the expected error that a weight may differ by."""

FLOATS_DIFFER = 1e-4
"""Difference that is left to weights between two float types."""

DROPPED = "it is dropped: the layer's output lacks it"
INPUT_OR_OP = "its weights are right: the scale of its input is not, or what it computes"

Mistake = tuple[str, str, Callable[[], Tensor]]
"""The attribute, what is wrong with it, and the outputs of a model that makes that mistake."""


class Evidence(ABC):
    """The tensors of one layer on both sides, under suspicion.

    Args:
        reading: The unit that is out of line.
        reference: The reference's weights.
        candidate: The candidate's weights.
        prefix: Prefix of the layer's tensors.
        attention: ONNX's name of the attention op.
        heads: Number of heads of keys and values, and channels of each.

    Attributes:
        explained: The relative difference of weights that rounding explains.
        is_rounded: Whether the recipe rounds what the unit reads.
    """

    def __init__(
        self,
        reading: Reading,
        reference: Weights,
        candidate: Weights,
        *,
        prefix: str,
        attention: str,
        heads: tuple[int, int],
    ) -> None:
        self.unit, self.prefix, self.attention_op, self.heads = reading.unit, prefix, attention, heads
        self.their_weights, self.our_weights = reference, candidate
        self.explained = explained_by(reading)
        self.is_rounded = reading.expected > FLOATS_DIFFER

    def theirs(self, name: str) -> Tensor:
        """One of the layer's tensors in the reference."""
        return self.their_weights.wide(self.prefix + name)

    def ours(self, name: str) -> Tensor:
        """The candidate's tensor of that name."""
        return self.our_weights.wide(self.prefix + name)

    def full(self, name: str) -> str:
        """The checkpoint's name of a unit or tensor of the layer."""
        return self.their_weights.full_name(self.prefix + name)

    def norm_ratio(self, norm: str) -> Tensor:
        """The candidate's norm over the reference's, by channel."""
        theirs, ours = self.theirs(f"{norm}.weight"), self.ours(f"{norm}.weight")
        return torch.where((theirs == 0) | (ours == 0), 1.0, ours / theirs)

    def moved(self, theirs_NK: Tensor, ours_NK: Tensor) -> Tensor:
        """The powers of two, [K], by which a quantiser has multiplied columns of a linear."""
        return moved_octaves(theirs_NK, ours_NK) if self.is_rounded else torch.zeros(ours_NK.shape[1])

    def read_through(self, unit: str) -> Blame | None:
        """A linear's weight read through its norm, whose channels a quantiser may divide."""
        norm, name = norm_of(unit), f"{unit}.weight"
        ratio_K = self.norm_ratio(norm)
        theirs, ours = self.theirs(name), self.ours(name)
        through = times_columns(ours, ratio_K)
        head_dim = self.heads[1] if unit in ("self_attn.q_proj", "self_attn.k_proj") else None
        why = describe(theirs, through, self.explained, head_dim=head_dim, factor_K=1 / ratio_K)
        if why is None:
            return None
        if describe(theirs, ours, self.explained) is None:
            return self.norm_blame(norm, why)
        if (other := self.exchanged_with(unit, through)) is not None:
            return self.tensor_blame("MatMul", name, f"it has the weights of {other}")
        if why == HALVES:
            return self.attribute_blame(self.attention_op, "self_attn", "rope layout", f"of {unit} and its like: {why}")
        return self.tensor_blame("MatMul", name, why)

    @abstractmethod
    def norm_blame(self, norm: str, why: str) -> Blame | None:
        """A norm's weight, which makes a right weight a wrong one that differs as `why` says."""

    def exchanged_with(self, unit: str, weight_NK: Tensor) -> str | None:
        """Another unit whose weight it is."""
        return None

    def without_moved(self, before: str, after: str) -> tuple[Tensor, Tensor, Tensor]:
        """The candidate's weights of two linears, powers of two that were moved between their channels taken back.

        Args:
            before: The first linear, which reads a norm.
            after: The second linear, behind an attention or an activation.

        Returns:
            Both weights, and the factors that the first one's rows were divided by.
        """
        before_NK, after_NK = self.ours(f"{before}.weight"), self.ours(f"{after}.weight")
        before_NK = times_columns(before_NK, self.norm_ratio(norm_of(before)))
        factor_K = torch.exp2(self.moved(self.theirs(f"{after}.weight"), after_NK))
        after_NK = after_NK / factor_K
        if before == "self_attn.v_proj":
            factor_K = factor_K.view(self.heads[0], -1, self.heads[1])[:, 0].flatten()
        return before_NK * factor_K[:, None] if len(factor_K) == len(before_NK) else before_NK, after_NK, factor_K

    def mistake(
        self, op: str, unit: str, actual: Tensor, replayed: Tensor, mistakes: Sequence[Mistake], least: float
    ) -> Blame | None:
        """The mistake that comes out as the candidate computes it, where the right way does not.

        Args:
            op: ONNX's name of the unit's op.
            unit: The unit.
            actual: The candidate's output.
            replayed: The output without a mistake.
            mistakes: Known mistakes.
            least: Largest difference that is none.
        """
        differs = difference(replayed, actual)
        if differs <= least or not mistakes:
            return None
        remains, attribute, why = min((difference(make(), actual), attribute, why) for attribute, why, make in mistakes)
        return self.attribute_blame(op, unit, attribute, why) if remains <= max(least, ALIKE * differs) else None

    def tensor_blame(self, op: str, name: str, why: str) -> Blame:
        """A tensor of the layer is wrong."""
        return Blame(kind="tensor", op=op, name=self.full(name), why=why)

    def attribute_blame(self, op: str, unit: str, attribute: str, why: str) -> Blame:
        """An attribute of a unit's op is wrong."""
        return Blame(kind="attribute", op=op, name=self.full(unit), attribute=attribute, why=why)

    def op_blame(self, op: str, unit: str, why: str = INPUT_OR_OP) -> Blame:
        """A unit's op is wrong as a whole."""
        return Blame(kind="op", op=op, name=self.full(unit), why=why)


def norm_of(unit: str) -> str:
    """The norm before a unit's half of a layer."""
    return "input_layernorm" if unit.startswith("self_attn") else "post_attention_layernorm"


def explained_by(reading: Reading) -> float:
    """The relative difference of weights that the rounding expected of a unit explains."""
    return max(EXPLAINED * reading.expected, FLOATS_DIFFER)


def times_columns(weight_NK: Tensor, factor_K: Tensor) -> Tensor:
    """A weight with its columns multiplied, where there are as many."""
    return weight_NK * factor_K if weight_NK.shape[1] == len(factor_K) else weight_NK


def moved_octaves(theirs_NK: Tensor, ours_NK: Tensor) -> Tensor:
    """The powers of two by which a quantiser has multiplied columns, [K]; about zero, as it chooses them."""
    factor_K = (ours_NK * theirs_NK).sum(0) / theirs_NK.square().sum(0).clamp(min=1e-30)
    octaves_K = factor_K.abs().clamp(min=2.0**-20).log2().round()
    if not octaves_K.any() or bool((octaves_K == octaves_K[0]).all()):
        return torch.zeros_like(octaves_K)
    middle = (octaves_K.max() + octaves_K.min()) / 2
    return octaves_K - (middle.round() if abs(float(middle)) > 0.75 else 0.0)
