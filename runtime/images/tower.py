"""The vision tower as a session holds it: loaded with the first image, and asked for no tile that it has seen lately.

Enters: tiles, as the preprocessor cuts them. Leaves: image features, one for each image token, in order.

Shapes: N tiles, P pixels of a tile's side, M features of all tiles, H the decoder's hidden size.
"""

import hashlib
from collections.abc import Callable
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from ...spec.geometry import VisionSpec
from ..backends.interface import TowerBackend

KEPT = 64
"""Tiles whose features are kept, those that came last: 3 MB each in Llama 4."""


class Tower:
    """A vision tower that is loaded when there is an image.

    Args:
        spec: The tower's geometry.
        open_backend: Loads the tower.
    """

    def __init__(self, spec: VisionSpec, open_backend: Callable[[], TowerBackend]) -> None:
        self.spec, self.open_backend = spec, open_backend
        self.seen: dict[bytes, NDArray[np.float32]] = {}

    @cached_property
    def backend(self) -> TowerBackend:
        """The loaded tower."""
        return self.open_backend()

    def encode(self, pixels_N3PP: NDArray[np.float32]) -> NDArray[np.float32]:
        """Computes the image features [M, H] of normalised tiles; a tile seen lately is not computed again.

        In a conversation the same images come with every turn.
        """
        keys = [hashlib.blake2b(np.ascontiguousarray(tile).data, digest_size=16).digest() for tile in pixels_N3PP]
        new = {key: index for index, key in enumerate(keys) if key not in self.seen}
        if new:
            found_MH = self.backend.encode(pixels_N3PP[list(new.values())])
            self.seen |= dict(zip(new, np.split(found_MH, len(new)), strict=True))
        features_MH = np.concatenate([self.seen[key] for key in keys])
        for key in list(self.seen)[: max(0, len(self.seen) - KEPT)]:
            del self.seen[key]
        return features_MH
