"""A decoder's layers, each half run on hidden states that are given, and the outputs of its units.

Enters: a side, a layer's number, its input. Leaves: the units' outputs by name (`self_attn.q_proj`, …), in two halves:
attention with its residual, feed-forward with its. PyTorch computes a checkpoint's layers from its weights; of a folder
each half is a subgraph of the lowered graph. Memory holds one layer.
"""

import dataclasses
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import linear

from ...runtime.backends.onnxruntime_decoder import CACHE_DTYPES, LONGEST_PIECE, HostCaches
from ...runtime.backends.onnxruntime_package import ort
from ...runtime.pieces import cut
from ...spec.geometry import LayerSpec, ModelSpec
from ...walk.decoder import LayerWalk, embed, open_head
from ...walk.numbers import Weights
from ..sides.folder_side import FolderSide
from ..sides.side import Side
from .subgraphs import Subgraphs, nothing
from .units import Halves, Hidden, Units, observed, rows_of, weights_of

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


def fed_units(layer: LayerSpec) -> tuple[str, ...]:
    """The units of a layer's second half, in the order in which they are computed."""
    return EXPERTS if layer.experts else DENSE


class DecoderUnits(Halves, Protocol):
    """A decoder, each part run by itself."""

    spec: ModelSpec

    def embed(self, ids_S: NDArray[np.int64], image_token: int | None, features_MH: Hidden | None) -> Hidden:
        """The embeddings, with image features in the places of image tokens."""
        ...

    def head(self, x_SH: Hidden) -> Tensor:
        """The logits [S, V] of the last hidden states."""
        ...


def open_decoder(side: Side) -> DecoderUnits:
    """A side's decoder as it runs: a checkpoint's in PyTorch, a folder's on ONNX Runtime.

    Raises:
        AccuracyError: It is an engine, whose layers are fused.
    """
    return OrtDecoder(side) if isinstance(side, FolderSide) else TorchDecoder(side.spec, weights_of(side, "decoder"))


class TorchDecoder:
    """A decoder computed by PyTorch in float32.

    Args:
        spec: Geometry.
        weights: The weights.

    Attributes:
        inputs: Inputs of the units of the half that was run last: `attention_input`, `down_input`, ….
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
        """Releases the pages read so far."""
        self.weights.release()

    def _product(self, unit: str, x_SK: Tensor) -> Tensor:
        return linear(x_SK, self.walk.weight(f"{unit}.weight"))


class OrtDecoder:
    """A decoder whose parts are cut out of a folder's lowered graph.

    Args:
        side: A model, or a bundle for the CPU.
    """

    def __init__(self, side: FolderSide) -> None:
        self.spec = side.spec
        self.subgraphs = Subgraphs(side, side.lowered)
        self.graph = self.subgraphs.graph
        self.weights: Weights = self.subgraphs.weights

    def embed(self, ids_S: NDArray[np.int64], image_token: int | None, features_MH: Hidden | None) -> Hidden:
        """The embeddings, with image features in the places of image tokens."""
        feeds: dict[str, NDArray[Any]] = {"input_ids": ids_S[None]}
        if self.graph.takes_images:
            nothing = np.zeros((1, self.spec.hidden_size), np.float32)
            feeds["image_features"] = nothing if features_MH is None else features_MH
        return self._run(feeds, {"x": self._input(0)}, len(ids_S))["x"].numpy()

    def attend(self, index: int, x_SH: Hidden) -> Units:
        """A layer's first half, in pieces over a cache as a session runs them."""
        layer, name = self.spec.layers[index], self._input(index)
        wanted = self._units(index, ATTENTION) | {"attended": self._attended(index)}
        caches = [f"{index}.{kind}" for kind in ("key", "value")]
        inputs = [name, "past_lengths", *(f"past.{cache}" for cache in caches)]
        session, shapes, _ = self.subgraphs.open(inputs, [*wanted.values(), *(f"present.{cache}" for cache in caches)])
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
            feeds |= nothing(shapes, (1, end - at, self.spec.hidden_size))
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
        wanted = self._units(index, fed_units(self.spec.layers[index])) | {"out": self._input(index + 1)}
        name, pieces = self._attended(index), []
        for start in range(0, len(attended_SH), LONGEST_PIECE):
            part_1NH = np.ascontiguousarray(attended_SH[None, start : start + LONGEST_PIECE])
            pieces.append(self._run({name: part_1NH}, wanted, part_1NH.shape[1]))
        return {unit: torch.cat([piece[unit] for piece in pieces]) for unit in wanted}

    def head(self, x_SH: Hidden) -> Tensor:
        """The logits of the last hidden states."""
        name = self._input(len(self.spec.layers))
        positions = np.arange(len(x_SH), dtype=np.int64)[None]
        feeds: dict[str, NDArray[Any]] = {name: np.ascontiguousarray(x_SH)[None], "logit_positions": positions}
        return self._run(feeds, {"logits": "logits"}, len(x_SH))["logits"]

    def release(self) -> None:
        """Releases the sessions."""
        self.subgraphs.release()

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

    def _run(self, feeds: dict[str, NDArray[Any]], wanted: dict[str, str], length: int) -> Units:
        return self.subgraphs.run(feeds, wanted, (1, length, self.spec.hidden_size))
