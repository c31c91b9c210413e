"""A recorded reference in memory, and how its windows are parted: read at once, run one by one, continued greedily."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..spec.geometry import ModelSpec, VisionSpec
from ..walk.windows import Windows
from .sides.side import Experts

DECODED = 16
"""Tokens at a window's end that run one at a time, at most."""

PROMPTS, PROMPT, CONTINUED = 8, 64, 32
"""Windows whose beginnings are continued greedily, the tokens of such a beginning, and those of a continuation."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Golden:
    """A reference, recorded. W windows of S tokens; N = S - 1 of them have a next one; K likeliest tokens.

    Attributes:
        source: Path of the reference, for messages.
        spec: Its geometry.
        tokenizer: Fingerprint of its tokenizer.
        format: How it is quantised, `none` where it is not.
        ids_WS: The tokens.
        is_image_WS: Whether a token belongs to an image; None, as the next three, where there are no images.
        tiles_W: How many tiles each window's images have.
        pixels_N3PP: All tiles, so that a later check needs no images.
        vision: Geometry of the vision tower.
        top_ids_WNK: The likeliest next tokens, in falling order.
        top_logs_WNK: Their log-probabilities, nats.
        rest_logs_WN: Log-probability of all others together.
        next_logs_WN: Log-probability of the token that comes.
        experts_LWSK: Chosen experts, in layers that have some; None where they cannot be seen.
        continued_PC: Beginnings and what the reference makes of them greedily; None where it does not generate.
    """

    source: str
    spec: ModelSpec
    tokenizer: str
    format: str
    ids_WS: NDArray[np.int32]
    is_image_WS: NDArray[np.bool_] | None = None
    tiles_W: NDArray[np.int32] | None = None
    pixels_N3PP: NDArray[np.float16] | None = None
    vision: VisionSpec | None = None
    top_ids_WNK: NDArray[np.int32]
    top_logs_WNK: NDArray[np.float32]
    rest_logs_WN: NDArray[np.float32]
    next_logs_WN: NDArray[np.float32]
    experts_LWSK: Experts | None
    continued_PC: NDArray[np.int32] | None

    @property
    def windows(self) -> Windows:
        """The tokens and their images."""
        ids_WS = self.ids_WS.astype(np.int64)
        if self.is_image_WS is None or self.tiles_W is None or self.pixels_N3PP is None:
            return Windows(ids_WS=ids_WS)
        return Windows(
            ids_WS=ids_WS,
            is_image_WS=self.is_image_WS,
            tiles_W=self.tiles_W.astype(np.int64),
            pixels_N3PP=self.pixels_N3PP,
            vision=self.vision,
        )

    @property
    def judged_WN(self) -> NDArray[np.bool_]:
        """Where the token that comes is one that a model writes: not an image's."""
        return ~self.windows.is_image_WS[:, 1:]

    @property
    def decoded(self) -> int:
        """How many of a window's last tokens run one at a time."""
        return decoded_tokens(self.ids_WS.shape[1])

    @property
    def beginnings(self) -> tuple[int, list[int]]:
        """Number of tokens of the beginnings that are continued, and the windows that they begin."""
        return beginnings(self.windows.is_image_WS)


def decoded_tokens(length: int) -> int:
    """Number of the last tokens that run one at a time, in windows of `length` tokens."""
    return min(DECODED, length // 4)


def prompt_length(length: int) -> int:
    """Number of the first tokens that are continued greedily, in windows of `length` tokens."""
    return min(PROMPT, length // 2)


def beginnings(is_image_WS: NDArray[np.bool_]) -> tuple[int, list[int]]:
    """Windows that are continued greedily, and after how many tokens: the fewest at which most are in no image.

    Args:
        is_image_WS: Whether a token is an image's; where none is, the first windows are taken after `prompt_length`.
    """
    windows, length = is_image_WS.shape
    shortest, enough = prompt_length(length), min(PROMPTS, windows)
    is_free_WS = ~is_image_WS[:, shortest : max(shortest, length - CONTINUED) + 1]
    at = int(is_free_WS.sum(0).clip(max=enough).argmax())
    return shortest + at, np.flatnonzero(is_free_WS[:, at])[:enough].tolist()
