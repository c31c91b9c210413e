"""Subgraphs of a folder's lowered graph, run by ONNX Runtime, so that what is seen is what runs.

Enters: names of values, and arrays for some of them. Leaves: the others' values. A subgraph is cut out and its weights
are mapped when it is first run; its session is kept until the next release.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...runtime.backends.mapped_weights import map_weights
from ...runtime.backends.onnxruntime_graph import open_graph
from ...runtime.backends.onnxruntime_package import ort
from ...walk.numbers import FolderWeights
from ..lowered_graph import LoweredGraph
from ..sides.folder_side import FolderSide
from .units import Units, rows_of

NO_SPINNING = {"session.intra_op.allow_spinning": "0"}
"""Threads that wait for a layer in a loop would take the cores from PyTorch, which runs in turn with them."""


class Opened(NamedTuple):
    """A subgraph's session, the inputs of which only the shape is asked for, and the weights that it reads."""

    session: ort.InferenceSession
    shapes: tuple[str, ...]
    weights: dict[str, ort.OrtValue]


class Subgraphs:
    """One lowered graph's.

    Args:
        side: A model, or a bundle for the CPU.
        graph: The graph of its decoder or of its tower.

    Attributes:
        weights: The graph's weights as numbers.
    """

    def __init__(self, side: FolderSide, graph: LoweredGraph) -> None:
        self.graph, self.path, self.files, self.threads = graph, side.path, side.files, side.threads
        self.weights = FolderWeights(graph.weights, side.files)
        self.sessions: dict[tuple[str, ...], Opened] = {}

    def open(self, inputs: list[str], outputs: list[str]) -> Opened:
        """The session that computes some values of others.

        Raises:
            AccuracyError: An output depends on more than the inputs.
        """
        key = (*inputs, *outputs)
        if key not in self.sessions:
            subgraph = self.graph.cut(inputs, outputs)
            weights = map_weights(subgraph.weights, self.files)
            session = open_graph(subgraph.graph, weights, self.path, self.graph.flags | NO_SPINNING, self.threads)
            self.sessions[key] = Opened(session, subgraph.shapes, weights)
        return self.sessions[key]

    def run(self, feeds: Mapping[str, NDArray[Any]], wanted: Mapping[str, str | None], shape: tuple[int, ...]) -> Units:
        """Computes units.

        Args:
            feeds: Arrays by the values that they are given for.
            wanted: Values by unit; a unit that the graph does not have is None, and left out.
            shape: The hidden states' shape.
        """
        values = {unit: value for unit, value in wanted.items() if value is not None}
        session, shapes, _ = self.open(list(feeds), list(values.values()))
        found = session.run(list(values.values()), {**feeds, **nothing(shapes, shape)})
        return dict(zip(values, map(rows_of, found), strict=True))

    def release(self) -> None:
        """Releases the sessions."""
        self.sessions.clear()


def nothing(names: tuple[str, ...], shape: tuple[int, ...]) -> dict[str, NDArray[np.float32]]:
    """Zeros for values of which only the shape is asked for."""
    return {name: np.zeros(shape, np.float32) for name in names}
