"""Two decoders walked layer by layer over windows of tokens.

Enters: both sides, and windows. Leaves: readings, the share of router choices that differ on the same input, and of a
reading that is out of line what is to blame. Image features are the reference's for both.
"""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ...spec.types import Progress
from ...walk.windows import Windows
from ..sides.side import Side
from .decoder_suspects import blame, blame_ends
from .decoder_units import DecoderUnits, TorchDecoder, open_decoder
from .expected_errors import expected_errors, expected_head_error
from .location import Blame, ModelPart, Reading
from .part_walk import PartWalk
from .readings import Errors, Pairs, Readings
from .units import Hidden, Units, weights_of


class DecoderWalk(PartWalk):
    """Both sides' decoders.

    Args:
        side: The candidate.
        other: The reference, whose layers PyTorch computes from its weights.
        windows: Token ids and images.
        progress: Called with each layer.

    Raises:
        AccuracyError: One of them is an engine.
    """

    part: ModelPart = "decoder"
    word = "layer"
    reference: TorchDecoder
    candidate: DecoderUnits

    def __init__(self, side: Side, other: Side, windows: Windows, progress: Progress) -> None:
        self.candidate, self.reference = open_decoder(side), TorchDecoder(other.spec, weights_of(other, "decoder"))
        self.layers = len(other.spec.layers)
        self.recipe, self.progress, self.windows = side.recipe, progress, windows
        self.features_MH = other.encode(windows, progress)
        self.flipped: dict[int, list[Tensor]] = defaultdict(list)

    @property
    def router_flips(self) -> dict[int, float]:
        """By layer, the share of choices of experts that differ on the same input."""
        return {index: float(torch.cat(flipped).float().mean()) for index, flipped in self.flipped.items()}

    def read_start(self, readings: Readings) -> list[Hidden]:
        """Reads the embedding."""
        errors, theirs_W = Errors(), self.enter()
        for theirs, ours in zip(theirs_W, self._embedded(self.candidate), strict=True):
            errors.add({"embed_tokens": (torch.from_numpy(theirs), torch.from_numpy(ours))})
        readings.take(self.part, -1, errors)
        return theirs_W

    def read_end(self, readings: Readings, x_W: Sequence[Hidden]) -> None:
        """Reads the head."""
        errors = Errors()
        for x_SH in x_W:
            errors.add({"lm_head": (self.reference.head(tail(x_SH)), self.candidate.head(tail(x_SH)))})
        expected = expected_head_error(self.reference, x_W[0], self.recipe)
        readings.take(self.part, self.layers, errors, {"lm_head": expected})

    def enter(self) -> list[Hidden]:
        """The reference's embeddings of each window."""
        return self._embedded(self.reference)

    def expected(self, index: int) -> dict[str, float]:
        """The errors to be expected of the half that the reference ran last, by unit."""
        return expected_errors(self.reference, index, self.recipe)

    def pairs(self, index: int, theirs: Units, ours: Units, last: str, before: Tensor) -> Pairs:
        """Both sides' outputs of a half; of experts only where both routers choose the same ones."""
        pairs = super().pairs(index, theirs, ours, last, before)
        if (routers := pairs.get("feed_forward.router")) is not None:
            kept_S = same_experts(routers, self.reference.spec.experts_per_token)
            self.flipped[index].append(~kept_S)
            for unit in {"feed_forward.experts", "out"} & pairs.keys():
                pairs[unit] = pairs[unit][0][kept_S], pairs[unit][1][kept_S]
        return pairs

    def blame(self, reading: Reading) -> Blame:
        """Says what is wrong with a unit that is out of line."""
        if not 0 <= reading.layer < self.layers:
            return blame_ends(reading, self.reference, self.candidate)
        return blame(reading, self.reference, self.candidate, self.input_of(reading))

    def _embedded(self, decoder: DecoderUnits) -> list[Hidden]:
        """The hidden states before the first layer, of each window."""
        windows = self.windows
        return [
            decoder.embed(ids_S, windows.image_token, windows.features_of(row, self.features_MH))
            for row, ids_S in enumerate(windows.ids_WS)
        ]


def same_experts(routers: tuple[Tensor, Tensor], count: int) -> Tensor:
    """Whether both routers choose the same experts, for each token."""
    theirs, ours = (logits_SE.topk(count, dim=-1).indices.sort(-1).values for logits_SE in routers)
    return (theirs == ours).all(-1)


def tail(x_SH: Hidden, rows: int = 64) -> Hidden:
    """The last rows: the head is the same for all."""
    return np.ascontiguousarray(x_SH[-rows:])
