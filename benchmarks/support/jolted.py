"""A bundle's decoder whose embeddings are moved by a unit in the last place, and its routers watched. For `ranks`.

Enters: a CPU bundle. Leaves: a session, and the experts that its routers choose. What a quantised model's logits do
under so small a jolt is what they do where a group parts its sums: a value that lies between two steps of a scale is
rounded to the other, and all behind it differ by as much as rounding does.
"""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from arriero.accuracy.lowered_graph import LoweredGraph
from arriero.files.folders import find_files, read_spec
from arriero.loading import cpu_decoder_graph
from arriero.runtime import Session
from arriero.runtime.backends.mapped_weights import map_weights
from arriero.runtime.backends.onnxruntime_decoder import OnnxRuntimeDecoder
from arriero.runtime.defaults import read_defaults
from arriero.runtime.state import Limits
from arriero.runtime.text import Text

UNIT = 2.0**-23
"""A unit in the last place of a float32 between 1 and 2."""


class WatchedBundle:
    """A bundle as a session whose routers are watched.

    Args:
        path: The bundle.
        positions: Tokens that a sequence may hold.
        jolt: What its embeddings are moved by, up or down, of themselves; 0 leaves them.
    """

    def __init__(self, path: Path, positions: int, jolt: float = 0.0) -> None:
        spec = read_spec(path)
        graph = LoweredGraph(*cpu_decoder_graph(path, spec))
        layers = [index for index, layer in enumerate(spec.model.layers) if layer.experts]
        names = [name for index in layers if (name := graph.output_of(f"layers.{index}/feed_forward.router"))]
        content = graph.watching(names)
        if jolt:
            content = _jolted(content, spec.model.hidden_size, jolt)
        mapped = map_weights(graph.weights, find_files(path, spec.weight_files, None))
        self.chosen: list[NDArray[np.int64]] = []
        decoder = OnnxRuntimeDecoder(
            content, mapped, path, spec.model, graph.flags, 1, watched=names, watch=self._watch
        )
        limits, defaults = Limits.of(spec.model, positions, None), read_defaults(path, spec.model.vocab_size)
        self.session = Session(decoder, Text(path), defaults, limits)

    def logits(self, ids_S: NDArray[np.int64]) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Logits [S, V] of a text, and the expert [layers, S] that each router likes best."""
        self.chosen = []
        logits_SV = self.session.logits(ids_S[None])[0]
        return logits_SV, np.concatenate(self.chosen, axis=1)

    def _watch(self, values: dict[str, NDArray[Any]]) -> None:
        self.chosen.append(np.stack([value.reshape(-1, value.shape[-1]).argmax(-1) for value in values.values()]))


def _jolted(content: bytes, hidden_size: int, jolt: float) -> bytes:
    """The graph with each dim of its embeddings moved up or down."""
    model = onnx.load_from_string(content)
    nodes = list(model.graph.node)
    name = next(node.input[0] for node in nodes if node.op_type == "RMSNormalization")
    index, node = next((index, node) for index, node in enumerate(nodes) if name in node.output)
    assert list(node.output) == [name]
    node.output[0] = f"{name}/still"
    moved = 1 + jolt * np.random.default_rng(0).choice([-1.0, 1.0], hidden_size)
    model.graph.initializer.append(onnx.numpy_helper.from_array(moved.astype(np.float32), "jolt"))
    model.graph.node.insert(index + 1, onnx.helper.make_node("Mul", [node.output[0], "jolt"], [name]))
    return model.SerializeToString()
