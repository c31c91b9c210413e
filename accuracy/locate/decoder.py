"""One layer of a model, run on hidden states that are given, and what each of its units computes.

Enters: a side, a layer's number, its input. Leaves: the units' outputs by name (`self_attn.q_proj`, …), in two halves:
attention with its residual, feed-forward with its. PyTorch computes a checkpoint's layers from its weights; of a folder
the layer is cut out of the lowered graph and run by ONNX Runtime, so that what is seen is what runs. Memory holds one
layer.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import linear

from ...errors import AccuracyError
from ...runtime.backends.mapped_weights import map_weights
from ...runtime.backends.onnxruntime_decoder import CACHE_DTYPES, LONGEST_PIECE, HostCaches
from ...runtime.backends.onnxruntime_graph import open_graph
from ...runtime.pieces import cut
from ...spec.geometry import LayerSpec, ModelSpec
from ...walk.decoder import LayerWalk, Observe, embed, open_head
from ...walk.numbers import FolderWeights, Weights
from ..lowered_graph import Part
from ..sides import CheckpointSide, FolderSide, Side

NO_SPINNING = {"session.intra_op.allow_spinning": "0"}
"""Threads that wait for a layer in a loop would take the cores from PyTorch, which runs in turn with them."""

Hidden = NDArray[np.float32]
"""[S, H]: one sequence."""

Units = dict[str, Tensor]
"""Outputs [S, …] by unit, without `layers.N.`; behind the half's residual `attended` or `out`."""

ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn", "self_attn.o_proj")
DENSE = ("feed_forward.gate_proj", "feed_forward.up_proj", "feed_forward.down_proj")
EXPERTS = (
    "feed_forward.router",
    "feed_forward.shared_expert.gate_proj",
    "feed_forward.shared_expert.up_proj",
    "feed_forward.shared_expert.down_proj",
    "feed_forward.experts",
)
CUSTOM = {"self_attn": "GroupedQueryAttention", "feed_forward.experts": "MoeDispatch"}
"""Units that are custom ops, by the op's name in the graph."""


def units_of(layer: LayerSpec) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The units of the two halves, in the order in which they are computed."""
    return ATTENTION, EXPERTS if layer.experts else DENSE


class Layers(Protocol):
    """A model's layers, each run by itself."""

    spec: ModelSpec
    weights: Weights

    def embed(self, ids_S: NDArray[np.int64], image_token: int | None, features_MH: Hidden | None) -> Hidden:
        """The embeddings, with image features in the places of image tokens."""
        ...

    def attend(self, index: int, x_SH: Hidden) -> Units:
        """A layer's first half."""
        ...

    def feed(self, index: int, attended_SH: Hidden) -> Units:
        """A layer's second half."""
        ...

    def head(self, x_SH: Hidden) -> Tensor:
        """The logits [S, V] of the last hidden states."""
        ...

    def release(self) -> None:
        """Lets go of the layer that was run last."""
        ...


def open_layers(side: Side) -> Layers:
    """A side's layers.

    Raises:
        AccuracyError: It is an engine, whose layers are fused.
    """
    return OrtLayers(side) if isinstance(side, FolderSide) else TorchLayers(side.spec, weights_of(side))


def weights_of(side: Side) -> Weights:
    """A side's weights as the numbers that they stand for.

    Raises:
        AccuracyError: It is an engine.
    """
    if isinstance(side, CheckpointSide):
        return side.weights
    assert isinstance(side, FolderSide)
    if not side.is_open:
        raise AccuracyError(
            f"{side.path} is an engine, whose layers are fused: give --locate the model it was built of"
        )
    return FolderWeights(side.lowered.weights, side.files)


class TorchLayers:
    """Layers computed by PyTorch in float32.

    Args:
        spec: Geometry.
        weights: The weights.

    Attributes:
        inputs: What the units of the half that was run last took in: `attention_input`, `down_input`, ….
        walk: The walk that ran it.
    """

    def __init__(self, spec: ModelSpec, weights: Weights) -> None:
        self.spec, self.weights = spec, weights
        self.inputs: dict[str, Tensor] = {}
        self.walk: LayerWalk

    def embed(self, ids_S: NDArray[np.int64], image_token: int | None, features_MH: Hidden | None) -> Hidden:
        """The embeddings, with image features in the places of image tokens."""
        x_1SH = np.empty((1, len(ids_S), self.spec.hidden_size), np.float32)
        embed(self.weights, ids_S[None], x_1SH, image_token, features_MH)
        return x_1SH[0]

    def attend(self, index: int, x_SH: Hidden) -> Units:
        """A layer's first half."""
        self.walk = LayerWalk(self.spec, index, self.weights, np.empty_like(x_SH[None]), np.empty_like(x_SH[None]))
        self.inputs = observed(lambda observe: self.walk.attend(x_SH[None], observe))
        source, attended = self.inputs["attention_input"], self.inputs["attention_output"]
        found = {f"self_attn.{part}_proj": self._product(f"self_attn.{part}_proj", source) for part in "qkv"}
        found["self_attn"] = attended
        found["self_attn.o_proj"] = self._product("self_attn.o_proj", attended)
        return found | {"attended": torch.from_numpy(self.walk.attended[0])}

    def feed(self, index: int, attended_SH: Hidden) -> Units:
        """A layer's second half; of experts each by itself."""
        layer, zeros = self.spec.layers[index], np.zeros_like(attended_SH[None])
        self.walk = LayerWalk(self.spec, index, self.weights, np.ascontiguousarray(attended_SH)[None], zeros)
        self.inputs = observed(self.walk.feed)
        name = "feed_forward.shared_expert" if layer.experts else "feed_forward"
        found: Units = {}
        if layer.experts:
            found["feed_forward.router"] = self.walk.router_logits_TE
        for part, source in (("gate", "feed_input"), ("up", "feed_input"), ("down", "down_input")):
            found[f"{name}.{part}_proj"] = self._product(f"{name}.{part}_proj", self.inputs[source])
        out_SH = torch.from_numpy(self.walk.out[0].copy())
        if layer.experts:
            self.walk.out[:] = 0
            for expert in range(self.spec.experts):
                self.walk.feed_expert(expert, *self.expert(expert))
            found["feed_forward.experts"] = torch.from_numpy(self.walk.out[0])
            out_SH += found["feed_forward.experts"]
        return found | {"out": out_SH}

    def expert(self, expert: int) -> tuple[Tensor, Tensor]:
        """An expert's gate_up [H, 2I] and down [I, H]."""
        gate_up, down = (self.walk.weight(f"feed_forward.experts.{part}_proj", expert) for part in ("gate_up", "down"))
        return gate_up, down

    def head(self, x_SH: Hidden) -> Tensor:
        """The logits of the last hidden states."""
        return open_head(self.spec, self.weights)(torch.from_numpy(x_SH))

    def release(self) -> None:
        """Lets go of the pages read so far."""
        self.weights.release()

    def _product(self, unit: str, x_SK: Tensor) -> Tensor:
        return linear(x_SK, self.walk.weight(f"{unit}.weight"))


class Opened(NamedTuple):
    """A part of a graph as a session, with the weights that it reads."""

    session: ort.InferenceSession
    part: Part
    weights: dict[str, ort.OrtValue]


class OrtLayers:
    """Layers cut out of a folder's lowered graph.

    Args:
        side: A model, or a bundle for the CPU.
    """

    def __init__(self, side: FolderSide) -> None:
        self.spec, self.path, self.threads = side.spec, side.path, side.threads
        self.weights = weights_of(side)
        self.graph, self.files = side.lowered, side.files
        self.sessions: dict[tuple[str, ...], Opened] = {}

    def embed(self, ids_S: NDArray[np.int64], image_token: int | None, features_MH: Hidden | None) -> Hidden:
        """The embeddings, with image features in the places of image tokens."""
        feeds: dict[str, NDArray[Any]] = {"input_ids": ids_S[None]}
        if self.graph.takes_images:
            nothing = np.zeros((1, self.spec.hidden_size), np.float32)
            feeds["image_features"] = nothing if features_MH is None else features_MH
        return self._run(list(feeds), {"x": self._input(0)}, feeds)["x"].numpy()

    def attend(self, index: int, x_SH: Hidden) -> Units:
        """A layer's first half, in pieces over a cache as a session runs them."""
        layer, name = self.spec.layers[index], self._input(index)
        wanted = self._units(index, ATTENTION) | {"attended": self._attended(index)}
        caches = [f"{index}.{kind}" for kind in ("key", "value")]
        inputs = [name, "past_lengths", *(f"past.{cache}" for cache in caches)]
        session, part, _ = self._session(inputs, [*wanted.values(), *(f"present.{cache}" for cache in caches)])
        given = next(value for value in session.get_inputs() if value.name == f"past.{caches[0]}")
        room = len(x_SH) + layer.chunk  # more than is needed, so that a wrong chunk writes nowhere else
        alone = dataclasses.replace(self.spec, layers=(dataclasses.replace(layer, chunk=0),))
        buffers = HostCaches(alone, 1, room, given.type, given.shape[3])
        io = session.io_binding()
        kept = []
        for cache, buffer in zip(caches, buffers.buffers.values(), strict=True):
            kept.append(ort.OrtValue.ortvalue_from_numpy_with_onnx_type(buffer, CACHE_DTYPES[given.type][1]))
            io.bind_ortvalue_input(f"past.{cache}", kept[-1])
            io.bind_ortvalue_output(f"present.{cache}", kept[-1])
        pieces: dict[str, list[Tensor]] = {unit: [] for unit in wanted}
        at = 0
        for piece in cut([0], [len(x_SH)], self.spec.chunk, LONGEST_PIECE):
            end = at + piece.lengths[0]
            feeds = {name: np.ascontiguousarray(x_SH[None, at:end]), "past_lengths": np.array([at], np.int32)}
            feeds |= self._shapes(part, end - at)
            for each, array in feeds.items():
                io.bind_cpu_input(each, array)
            for value in wanted.values():
                io.bind_output(value, "cpu")
            session.run_with_iobinding(io)
            for unit, value in zip(wanted, io.get_outputs()[len(caches) :], strict=True):
                pieces[unit].append(rows_of(value.numpy()))
            at = end
        return {unit: torch.cat(rows) for unit, rows in pieces.items()}

    def feed(self, index: int, attended_SH: Hidden) -> Units:
        """A layer's second half."""
        wanted = self._units(index, units_of(self.spec.layers[index])[1]) | {"out": self._input(index + 1)}
        name, pieces = self._attended(index), []
        for start in range(0, len(attended_SH), LONGEST_PIECE):
            part_1NH = np.ascontiguousarray(attended_SH[None, start : start + LONGEST_PIECE])
            pieces.append(self._run([name], wanted, {name: part_1NH}))
        return {unit: torch.cat([piece[unit] for piece in pieces]) for unit in wanted}

    def head(self, x_SH: Hidden) -> Tensor:
        """The logits of the last hidden states."""
        name = self._input(len(self.spec.layers))
        positions = np.arange(len(x_SH), dtype=np.int64)[None]
        feeds: dict[str, NDArray[Any]] = {name: np.ascontiguousarray(x_SH)[None], "logit_positions": positions}
        return self._run([name, "logit_positions"], {"logits": "logits"}, feeds)["logits"]

    def release(self) -> None:
        """Lets go of the sessions."""
        self.sessions.clear()

    def _input(self, index: int) -> str:
        """The value that enters a layer, or the head behind the last."""
        count = len(self.spec.layers)
        return self.graph.input_of(f"layers.{index}/input_layernorm") if index < count else self.graph.head_input()

    def _attended(self, index: int) -> str:
        return self.graph.input_of(f"layers.{index}/post_attention_layernorm")

    def _units(self, index: int, units: tuple[str, ...]) -> dict[str, str]:
        """Values of the graph by unit; a unit that the graph does not have is left out."""
        named = {unit: self.graph.output_of(f"layers.{index}/{CUSTOM.get(unit, unit)}") for unit in units}
        return {unit: value for unit, value in named.items() if value is not None}

    def _run(self, inputs: list[str], wanted: Mapping[str, str], feeds: dict[str, NDArray[Any]]) -> Units:
        session, part, _ = self._session(inputs, list(wanted.values()))
        found = session.run(list(wanted.values()), feeds | self._shapes(part, feeds[inputs[0]].shape[1]))
        return dict(zip(wanted, map(rows_of, found), strict=True))

    def _shapes(self, part: Part, length: int) -> dict[str, NDArray[np.float32]]:
        """Zeros for values of which only the shape is asked for."""
        return {name: np.zeros((1, length, self.spec.hidden_size), np.float32) for name in part.shapes}

    def _session(self, inputs: list[str], outputs: list[str]) -> "Opened":
        key = (*inputs, *outputs)
        if key not in self.sessions:
            part = self.graph.cut(inputs, outputs)
            weights = map_weights(part.weights, self.files)
            session = open_graph(part.graph, weights, self.path, self.graph.flags | NO_SPINNING, self.threads)
            self.sessions[key] = Opened(session, part, weights)
        return self.sessions[key]


def rows_of(array: NDArray[np.float32]) -> Tensor:
    """[1, S, …] or [S, …] as rows."""
    tensor = torch.from_numpy(array)
    return tensor[0] if tensor.ndim == 3 else tensor


def observed(run: Callable[[Observe], None]) -> dict[str, Tensor]:
    """What the products of a walk take in."""
    parts: dict[str, list[Tensor]] = {}
    run(lambda name, rows: parts.setdefault(name, []).append(rows))
    return {name: torch.cat(rows) for name, rows in parts.items()}
