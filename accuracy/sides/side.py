"""One of the two that are compared: it scores token ids block by block, with the experts that each token chose."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from ...spec.geometry import ModelSpec, VisionSpec
from ...spec.recipe import Recipe
from ...spec.types import Progress
from ...walk.windows import Windows

Experts = NDArray[np.int16]
"""The experts of each token, in rising order: [L, N, K], L the layers that have experts."""


class Block(NamedTuple):
    """Some tokens of one row, scored.

    Attributes:
        row: Number of the row.
        start: Number of the first token.
        logits_NV: Logits after each token.
        experts_LNK: Experts that each token chose; None where they cannot be seen.
    """

    row: int
    start: int
    logits_NV: NDArray[np.float32]
    experts_LNK: Experts | None


class Side(Protocol):
    """One of the two that are compared.

    Attributes:
        path: The checkpoint, model or bundle.
        spec: The decoder's geometry.
        vision: The vision tower's geometry; None where there is none.
        recipe: How it is quantised; None where it is not.
        blind: Why its choice of experts cannot be seen, as in `inside an engine`; None where it can.
    """

    path: Path
    spec: ModelSpec
    vision: VisionSpec | None
    recipe: Recipe | None
    blind: str | None

    def score(self, windows: Windows, decoded: int, progress: Progress) -> Iterator[Block]:
        """Scores rows.

        Args:
            windows: Token ids, and their images, which the side's own vision tower reads.
            decoded: Number of a row's last tokens that run one at a time, where the side can.
            progress: Called with the tokens done.
        """
        ...

    def encode(self, windows: Windows, progress: Progress) -> NDArray[np.float32] | None:
        """The image features [M, H] of all tiles; None where there are none."""
        ...

    def generate(self, windows: Windows, window: int, prompt: int, count: int) -> list[int] | None:
        """Continues a window's first tokens greedily by `count` tokens; None where it does not generate."""
        ...

    def close(self) -> None:
        """Releases the weights; they come back when they are needed."""
        ...


def likeliest(logits_NV: NDArray[np.float32], image_token: int | None) -> NDArray[np.int64]:
    """The likeliest tokens [N] but for an image's, which no model writes."""
    if image_token is not None:
        logits_NV = logits_NV.copy()
        logits_NV[:, image_token] = -np.inf
    found_N: NDArray[np.int64] = logits_NV.argmax(-1)
    return found_N


def chosen_by(logits_LNE: NDArray[np.float32], count: int) -> Experts:
    """The experts that routers choose by their logits; of equal ones the first."""
    return in_order(np.argsort(-logits_LNE, axis=-1, kind="stable")[..., :count])


def in_order(chosen: NDArray[Any]) -> Experts:
    """Experts [..., K] as sets: in rising order."""
    return np.sort(chosen, axis=-1).astype(np.int16)
