"""The vision tower's graph on ONNX Runtime.

Enters: tiles, as the preprocessor cuts them. Leaves: image features in float32. Invariant: `TILES` tiles are computed
at once, so that the activations' memory does not grow with the images.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .onnxruntime_graph import open_graph
from .onnxruntime_package import ort

TILES = 1
"""Tiles that the tower computes at once. One of 577 positions fills the kernels; its activations stay in the
processor's cache, and several at once were 10 to 15 % slower."""


class OnnxRuntimeTower:
    """A lowered vision tower with its weights, ready to run.

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
        """Computes the image features [M, H] of normalised tiles, `TILES` at a time."""
        parts = [
            self.session.run(["image_features"], {"pixels": pixels_N3PP[start : start + TILES]})[0]
            for start in range(0, len(pixels_N3PP), TILES)
        ]
        return np.concatenate(parts)
