"""Images on their way into a prompt: tiles through the vision tower, and the session's side of the decoder's input.

Enters: tiles, as the preprocessor cuts them. Leaves: image features, one for each image token, in order.

Shapes: N tiles, P pixels of a tile's side, M features of all tiles, H the decoder's hidden size.
"""

import hashlib
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from ...errors import FolderError
from ...spec.geometry import VisionSpec
from ..backends.onnxruntime import open_graph
from ..text import Text
from .placeholders import ImagePrompts

TILES = 1
"""Tiles that the tower computes at once. One of 577 positions fills the kernels; its activations stay in the
processor's cache, and several at once were 10 to 15 % slower."""

KEPT = 64
"""Tiles whose features are kept, those that came last: of Llama 4, 3 MB each."""


class Encoding(Protocol):
    """A loaded vision tower: ONNX Runtime's graph or TensorRT's engine."""

    def encode(self, pixels_N3PP: NDArray[np.float32]) -> NDArray[np.float32]:
        """Tiles, normalised → image features [M, H]."""
        ...


class Vision:
    """What a multimodal session has besides its decoder. Nothing is loaded before there is an image.

    Args:
        spec: The tower's geometry.
        text: The folder's tokenizer.
        open_tower: Loads the vision tower.
    """

    def __init__(self, spec: VisionSpec, text: Text, open_tower: Callable[[], Encoding]) -> None:
        self.spec, self.text, self.open_tower = spec, text, open_tower
        self.seen: dict[bytes, NDArray[np.float32]] = {}

    @cached_property
    def tower(self) -> Encoding:
        """The vision tower."""
        return self.open_tower()

    def encode(self, pixels_N3PP: NDArray[np.float32]) -> NDArray[np.float32]:
        """Tiles, normalised → image features [M, H]; a tile seen lately is not computed again.

        In a conversation the same images come with every turn.
        """
        keys = [hashlib.blake2b(np.ascontiguousarray(tile).data, digest_size=16).digest() for tile in pixels_N3PP]
        new = {key: index for index, key in enumerate(keys) if key not in self.seen}
        if new:
            found_MH = self.tower.encode(pixels_N3PP[list(new.values())])
            self.seen |= dict(zip(new, np.split(found_MH, len(new)), strict=True))
        features_MH = np.concatenate([self.seen[key] for key in keys])
        for key in list(self.seen)[: max(0, len(self.seen) - KEPT)]:
            del self.seen[key]
        return features_MH

    @cached_property
    def prompts(self) -> ImagePrompts:
        """Puts images into prompts.

        Raises:
            SessionError: The folder has no preprocessor's settings, or its tokenizer no tokens of images.
            FolderError: The preprocessor cuts other tiles than the tower takes.
        """
        prompts, spec = ImagePrompts(self.text), self.spec
        cut = {"size": prompts.settings.side, "features of a tile": prompts.patches, "image token": prompts.patch_id}
        for (name, found), taken in zip(cut.items(), (spec.image_size, spec.features, spec.image_token), strict=True):
            if found != taken:
                raise FolderError(
                    f"{prompts.folder}: the preprocessor's {name} is {found}, the vision tower's {taken}: correct "
                    "preprocessor_config.json or processor_config.json, and export again"
                )
        return prompts


class VisionTower:
    """A lowered vision graph with its weights, ready to run.

    Args:
        graph: Serialized ONNX.
        weights: Initializers by name.
        folder: The model's or bundle's folder.
        session: Session configuration entries that the graph needs.
        threads: Threads of one operator; None takes the processors that this process may use.

    Raises:
        SessionError: ONNX Runtime does not accept the graph, or there are no threads.
    """

    def __init__(
        self,
        graph: bytes,
        weights: Mapping[str, ort.OrtValue],
        folder: Path,
        session: Mapping[str, str],
        threads: int | None = None,
    ) -> None:
        self.weights = weights  # kept: the session reads the memory that these own
        self.session = open_graph(graph, weights, folder, session, threads)

    def encode(self, pixels_N3PP: NDArray[np.float32]) -> NDArray[np.float32]:
        """Tiles, normalised → image features [M, H], some tiles at a time."""
        parts = [
            self.session.run(["image_features"], {"pixels": pixels_N3PP[start : start + TILES]})[0]
            for start in range(0, len(pixels_N3PP), TILES)
        ]
        return np.concatenate(parts)
