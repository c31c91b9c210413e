"""The decoder graph on ONNX Runtime, its KV caches, and the step that runs one piece of tokens over them.

Enters: pieces of tokens. Leaves: their logits in float32. Invariant: a graph's caches are updated in place; past and
present are bound to one buffer.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import SessionError
from ...plugins.cpu.library import GROUP_INPUT
from ...spec.geometry import ModelSpec
from ...spec.types import TYPES
from ..room import cache_bytes, check_fits, layer_slots
from .interface import Slots, cache_chunk, is_standing, slots_of, standing
from .mapped_weights import MappedWeights
from .onnxruntime_graph import open_graph
from .onnxruntime_package import ort
from .sparse_memory import PAGE, SparseMemory

LONGEST_PIECE = 512
"""Tokens that prefill computes at once, of all rows; bounds the memory of attention and of the experts."""

Watch = Callable[[dict[str, NDArray[Any]]], None]
"""A function that takes values of the graph by name, after each step."""

CACHE_DTYPES: dict[str, tuple[np.dtype[Any], int]] = {
    kind: (np.dtype(TYPES[name].held), TYPES[name].onnx)
    for kind, name in (
        ("tensor(float)", "float32"),
        ("tensor(float16)", "float16"),
        ("tensor(uint8)", "uint8"),
        ("tensor(int8)", "int8"),
        ("tensor(float8e4m3fn)", "fp8"),
    )
}
"""numpy's type of a cache's elements, and ONNX's number of their type, by ONNX Runtime's name of it."""


def cache_form(session: ort.InferenceSession, spec: ModelSpec) -> tuple[str, int, int]:
    """Type of a graph's caches by ONNX Runtime's name, elements of a slot, and bytes of a token in one layer."""
    cache = next(value for value in session.get_inputs() if value.name == "past.0.key")
    elements = int(cache.shape[3])
    return cache.type, elements, 2 * spec.kv_heads * elements * CACHE_DTYPES[cache.type][0].itemsize


class HostCaches:
    """KV buffers of a batch of sequences, zeros at first: key, value [B, K, C, D] of each layer.

    Args:
        spec: Geometry.
        batch: Rows (B).
        positions: Positions that a row can hold; a chunked layer's buffers hold one chunk at most.
        kind: ONNX Runtime's name of their type.
        size: Elements of a slot, D but in caches of groups.
        sparse: Whether a row takes the memory of the tokens that it holds, and not of all that it could.
    """

    def __init__(
        self, spec: ModelSpec, batch: int, positions: int, kind: str, size: int, *, sparse: bool = False
    ) -> None:
        self.spec, self.batch, self.positions = spec, batch, positions
        dtype, self.onnx_type = CACHE_DTYPES[kind]
        self.buffers: dict[str, NDArray[Any]] = {}
        self.memories: dict[str, SparseMemory] = {}
        for index, slots in enumerate(layer_slots(spec, positions)):
            for kind in ("key", "value"):
                shape, name = (batch, spec.kv_heads, slots, size), f"{index}.{kind}"
                if sparse:
                    self.memories[name] = SparseMemory(int(np.prod(shape)) * dtype.itemsize)
                    self.buffers[name] = self.memories[name].array(shape, dtype)
                else:
                    self.buffers[name] = np.zeros(shape, dtype=dtype)

    def row_bytes(self, tokens: int) -> int:
        """Bytes that a row takes at most while it holds this number of tokens."""
        total = 0
        for name, buffer in self.buffers.items():
            _, heads, slots, size = buffer.shape
            used = min(tokens, slots) if name in self.memories else slots
            length, whole = (count * size * buffer.itemsize for count in (used, slots))
            total += heads * min(-(-length // PAGE) * PAGE + PAGE, whole)
        return total

    def release(self, row: int) -> None:
        """Gives back the memory of a row that nobody has."""
        for name, memory in self.memories.items():
            stride = self.buffers[name].strides[0]
            memory.give_back(row * stride, (row + 1) * stride)

    def copy(self, source: int, target: int, past: int) -> None:
        """Copies the slots of a row that later tokens attend to over another row, where it holds `past` tokens."""
        for name, buffer in self.buffers.items():
            slots = standing(cache_chunk(self.spec, name), past)
            buffer[target, :, :slots] = buffer[source, :, :slots]

    def read(self, row: int, start: int, stop: int) -> Slots:
        """Copies some positions of one chunk in a row: [K, positions, D] of each cache."""
        return {
            name: buffer[row, :, slots_of(cache_chunk(self.spec, name), start, stop)].copy()
            for name, buffer in self.buffers.items()
        }

    def write(self, row: int, start: int, slots: Slots, past: int) -> None:
        """Puts back what `read` gave from `start` on, where tokens after the first `past` attend to it."""
        for name, values in slots.items():
            chunk = cache_chunk(self.spec, name)
            if is_standing(chunk, start, past):
                self.buffers[name][row, :, slots_of(chunk, start, start + values.shape[1])] = values


def bind_caches(io: ort.IOBinding, caches: HostCaches, rows: slice) -> list[Any]:
    """Binds some rows as a graph's caches, past and present in one buffer. Returns what must live as long as they."""
    kept: list[Any] = []
    for name, buffer in caches.buffers.items():
        value = ort.OrtValue.ortvalue_from_numpy_with_onnx_type(buffer[rows], caches.onnx_type)
        kept.append((buffer, value))
        io.bind_ortvalue_input(f"past.{name}", value)
        io.bind_ortvalue_output(f"present.{name}", value)
    return kept


class OnnxRuntimeDecoder:
    """A lowered decoder with its weights, ready to run.

    Args:
        graph: Serialized ONNX.
        weights: Initializers by name.
        folder: The model's or bundle's folder.
        spec: Geometry.
        session: Session configuration entries that the graph needs.
        threads: Threads of one operator; None takes the processors that this process may use.
        watched: Names of the graph's other outputs to be looked at.
        watch: Takes their values after each step.
        group: The memory that a rank shares with the others of its group; None of a whole model.

    Raises:
        SessionError: ONNX Runtime does not accept the graph, there are no threads, or the kernels that the graph
            needs were not compiled.
    """

    longest = longest_with_logits = most = LONGEST_PIECE
    takes_ragged = True

    def __init__(
        self,
        graph: bytes,
        weights: MappedWeights,
        folder: Path,
        spec: ModelSpec,
        session: Mapping[str, str],
        threads: int | None = None,
        watched: Sequence[str] = (),
        watch: Watch = lambda values: None,
        group: NDArray[np.uint8] | None = None,
    ) -> None:
        self.spec, self.watched, self.watch, self.group = spec, watched, watch, group
        self.weights = weights  # kept: the session reads the memory that these own
        self.session = open_graph(graph, weights, folder, session, threads, has_arena=False, is_rank=group is not None)
        self.takes_images = any(value.name == "image_features" for value in self.session.get_inputs())
        states = next((value for value in self.session.get_outputs() if value.name == "draft_states"), None)
        self.states_width = 0 if states is None else int(states.shape[2])

    @property
    def fault(self) -> str | None:
        """Why it computes nothing any more: a weight file is not as it was; None while all are."""
        try:
            self.check_files()
        except SessionError as error:
            return str(error)
        return None

    def check_files(self) -> None:
        """Looks whether the weight files are as they were when they were mapped.

        Raises:
            SessionError: One is gone or has changed.
        """
        self.weights.watched.check()

    def caches(self, batch: int, positions: int, *, sparse: bool = False) -> HostCaches:
        """Makes KV buffers for a batch, zeros at first, whose rows hold `positions` tokens each."""
        kind, elements, slot = cache_form(self.session, self.spec)
        self.check_files()
        needed = 4 * batch * self.spec.vocab_size
        if not sparse:
            needed += cache_bytes(self.spec, batch, positions, slot)
        check_fits(f"a batch of {batch} rows of {positions} tokens", needed, "start fewer rows, or of fewer tokens")
        return HostCaches(self.spec, batch, positions, kind, elements, sparse=sparse)

    def bind(self, caches: HostCaches, rows: slice) -> "OnnxRuntimeBinding":
        """Binds some rows of the caches, for any number of steps."""
        return OnnxRuntimeBinding(self, caches, rows)


class OnnxRuntimeBinding:
    """A graph bound to some rows of its caches."""

    def __init__(self, decoder: OnnxRuntimeDecoder, caches: HostCaches, rows: slice) -> None:
        self.session, self.watched, self.watch = decoder.session, decoder.watched, decoder.watch
        self.weights = decoder.weights
        self.vocab_size, self.states_width = decoder.spec.vocab_size, decoder.states_width
        self.no_features = np.zeros((1, decoder.spec.hidden_size), np.float32) if decoder.takes_images else None
        self.unread: Any = None
        self.io = self.session.io_binding()
        self.kept = bind_caches(self.io, caches, rows)
        if decoder.group is not None:
            shared = ort.OrtValue.ortvalue_from_numpy(decoder.group)  # the same memory
            self.kept.append((decoder.group, shared))
            self.io.bind_ortvalue_input(GROUP_INPUT, shared)

    def step(
        self,
        ids_BS: NDArray[np.int64],
        past_B: NDArray[np.int32],
        positions_BR: NDArray[np.int64],
        features_MH: NDArray[np.float32] | None = None,
    ) -> NDArray[np.float32]:
        """Runs one piece; the logits are a new array, which ONNX Runtime fills in place."""
        return self._run(ids_BS, past_B, positions_BR, features_MH, None)

    def step_with_states(
        self,
        ids_BS: NDArray[np.int64],
        past_B: NDArray[np.int32],
        positions_BR: NDArray[np.int64],
        features_MH: NDArray[np.float32] | None = None,
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Runs one piece; logits and states are new arrays, which ONNX Runtime fills in place."""
        states_BSW = np.empty((*ids_BS.shape, self.states_width), np.float32)
        return self._run(ids_BS, past_B, positions_BR, features_MH, states_BSW), states_BSW

    def _run(
        self,
        ids_BS: NDArray[np.int64],
        past_B: NDArray[np.int32],
        positions_BR: NDArray[np.int64],
        features_MH: NDArray[np.float32] | None,
        states_BSW: NDArray[np.float32] | None,
    ) -> NDArray[np.float32]:
        inputs: dict[str, NDArray[Any]] = {"input_ids": ids_BS, "past_lengths": past_B, "logit_positions": positions_BR}
        if self.no_features is not None:
            inputs["image_features"] = self.no_features if features_MH is None else features_MH
        inputs = {name: np.ascontiguousarray(array) for name, array in inputs.items()}  # alive until the step is done
        for name, array in inputs.items():
            self.io.bind_cpu_input(name, array)
        logits_BRV = np.empty((*positions_BR.shape, self.vocab_size), dtype=np.float32)
        value = ort.OrtValue.ortvalue_from_numpy(logits_BRV)  # the same memory
        self.io.bind_ortvalue_output("logits", value)
        if self.states_width:
            states = self._unread(ids_BS.shape) if states_BSW is None else ort.OrtValue.ortvalue_from_numpy(states_BSW)
            self.io.bind_ortvalue_output("draft_states", states)
        for name in self.watched:
            self.io.bind_output(name, "cpu")
        self.session.run_with_iobinding(self.io)
        if ids_BS.shape[1] == 1:
            self.weights.settle()  # not before: the first token is waited for
        if self.watched:  # asking for outputs makes an object of each cache
            watched = (value.numpy() for value in self.io.get_outputs()[-len(self.watched) :])
            self.watch(dict(zip(self.watched, watched, strict=True)))
        return logits_BRV

    def _unread(self, shape: tuple[int, ...]) -> Any:
        """Memory for states that nobody reads, kept for the next piece of as many tokens."""
        if self.unread is None or self.unread.shape()[:2] != list(shape):
            self.unread = ort.OrtValue.ortvalue_from_shape_and_type([*shape, self.states_width], np.float32)
        return self.unread

    def decode(self, ids_B1: NDArray[np.int64], past_B: NDArray[np.int32]) -> Sequence[NDArray[np.float32]]:
        """Runs a token of each row. Returns each row's logits after it."""
        logits_BV: NDArray[np.float32] = self.step(ids_B1, past_B, np.zeros_like(ids_B1))[:, 0]
        return list(logits_BV)
