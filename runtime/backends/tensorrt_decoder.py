"""The decoder as a TensorRT engine: its weights on the GPU, its KV caches, and the step that runs one piece of tokens.

Enters: pieces of tokens. Leaves: their logits in float32, as `OnnxRuntimeDecoder` gives them. Invariants: an engine's
caches are updated in place, past and present are one address; a step over single tokens whose caches and number of rows
have been twice is one launch of a captured graph, and allocates nothing.
"""

import threading
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import ArrieroWarning, SessionError
from ...files.folders import KERNELS
from ...plugins.gqa.plugin import PLUGIN as GQA
from ...plugins.launch import Kernels, round_up
from ...plugins.moe.plugin import PLUGIN as MOE
from ...plugins.narrow_types import NUMPY_DTYPES, narrow
from ...plugins.tensorrt_plugin import register
from ...spec.built_engine import EngineSpec
from ...spec.folder import FolderSpec
from ..shortlist import Row, Shortlist
from .device import Device, DeviceMemory
from .device_caches import CachePool, DeviceCaches
from .engine_file import check_machine, deserialise, open_version, read_built
from .exchange import Exchange
from .execution import Execution, accept, load_kernels, upload_weights
from .shortener import Shortener
from .token_steps import TokenStep, TokenSteps

DECODE, PIECES = 0, -1
"""The profiles of single tokens and of pieces."""

MOST_STEPS = 32
"""Steps over single tokens that are kept with their contexts and graphs: a flight's numbers of rows, and more."""

READY = 8
"""Contexts for them that a load makes; the others are made when there are more steps."""


class TensorRTDecoder:
    """A decoder's engine with its weights, ready to run.

    One context serves pieces, and one each step over single tokens. They never run at once, and share the memory of
    their activations.

    Args:
        trt: The module `tensorrt_rtx` or `tensorrt`.
        device: The GPU.
        engine: The deserialised engine.
        weights: Device memory of the weights that are inputs, by name.
        folder: The bundle's spec.
        path: The bundle; None where nothing compiled is kept.
        kernels: The bundle's kernels; without them logits are fetched whole.
        communicator: The ranks' communicator, as TensorRT takes it; None of a whole model.
    """

    def __init__(
        self,
        trt: Any,
        device: Device,
        engine: Any,
        weights: Mapping[str, DeviceMemory],
        folder: FolderSpec,
        path: Path | None = None,
        kernels: Kernels | None = None,
        communicator: Any = None,
    ) -> None:
        assert folder.engine is not None
        self.device, self.about, self.spec = device, folder.engine, folder.model
        about, most = self.about, folder.engine.profiles[DECODE].max_batch
        file = None if path is None else (path / about.file, about.sha256)
        self.execution = Execution(
            trt=trt, flavour=about.flavour, device=device, engine=engine, weights=weights, file=file
        )
        self.pool = CachePool(
            device, about.caches, most, clears=about.attention == "native", dropped=lambda: self.steps.forget()
        )
        feature_row = 0 if folder.vision is None else self.spec.hidden_size * NUMPY_DTYPES[self.spec.dtype].itemsize
        self.exchanges = [
            Exchange(device, about.profiles[index], self.spec.vocab_size, feature_row) for index in (DECODE, PIECES)
        ]
        self.lock = threading.RLock()
        self.shortener = (
            None if kernels is None else Shortener(device, kernels, self.exchanges[DECODE], most, self.lock)
        )
        activations = self.execution.activations(len(about.profiles), streams_weights=about.weight_streaming)
        if about.weight_streaming:
            self.pool.give(self.pool.take(most))  # the weights get what is left
            self.execution.stream_weights()
        pieces = len(about.profiles) - 1
        specialisations = ["EAGER", *["NONE"] * pieces]
        self.contexts = self.execution.contexts(specialisations, activations, communicator)  # type: ignore[arg-type]
        self.captures = not about.weight_streaming
        self.steps = TokenSteps(
            lambda: self.contexts.make(DECODE), MOST_STEPS if self.captures else 1, ready=min(most, READY)
        )
        self.pieces = self.contexts.make(pieces)
        self.cache_names = [(each, f"past.{each.name}", f"present.{each.name}") for each in about.caches]
        self.bound: tuple[int, ...] = ()
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.outstanding: list[weakref.ref[Shortlist]] = []

    @property
    def longest(self) -> int:
        """Tokens of a row's piece at most."""
        return self.about.profiles[-1].max_length

    @property
    def longest_with_logits(self) -> int:
        """Tokens of a row's piece at most where each gets logits."""
        return self.about.profiles[-1].max_logits

    takes_ragged = False

    @property
    def most(self) -> int | None:
        """None: pieces of several rows have no limit but the profiles' own."""
        return None

    @property
    def fault(self) -> str | None:
        """None: a GPU that has failed says so at the next call."""
        return None

    def check_files(self) -> None:
        """Nothing: the weights are the GPU's own copy."""

    def caches(self, batch: int, positions: int, *, sparse: bool = False) -> DeviceCaches:
        """Makes KV buffers for a batch; their size is the engine's, whatever `positions` are used."""
        self.device.enter()
        return DeviceCaches(self.pool, self.spec, self.about.caches, batch, positions)

    def bind(self, caches: DeviceCaches, rows: slice) -> "TensorRTBinding":
        """Binds some rows of the caches, for any number of steps."""
        return TensorRTBinding(self, caches, rows)

    def begin(self) -> None:
        """Enters the GPU's context, and fetches what shortlists in use may still ask for of the step before."""
        self.device.enter()
        for reference in self.outstanding:
            if (shortlist := reference()) is not None:
                shortlist.whole()
        self.outstanding.clear()


class TensorRTBinding:
    """An engine bound to some rows of its caches."""

    def __init__(self, decoder: TensorRTDecoder, caches: DeviceCaches, rows: slice) -> None:
        self.decoder, self.caches, self.rows = decoder, caches, rows
        self.batch = rows.stop - rows.start
        self.key = (caches.address, rows.start, self.batch)
        chunks = {layer.chunk for layer in decoder.spec.layers}
        self.capacities = {
            chunk: min(each.shape[1] for each in decoder.about.caches if self._chunk(each.name) == chunk)
            for chunk in chunks
        }

    def _chunk(self, name: str) -> int:
        return self.decoder.spec.layers[int(name.partition(".")[0])].chunk

    def step(
        self,
        ids_BS: NDArray[np.int64],
        past_B: NDArray[np.int32],
        positions_BR: NDArray[np.int64],
        features_MH: NDArray[np.float32] | None = None,
    ) -> NDArray[np.float32]:
        """Runs one piece: inputs to the GPU, the step, and the logits back into a new array."""
        with self.decoder.lock:
            return self._step(ids_BS, past_B, positions_BR, features_MH)

    def _step(
        self,
        ids_BS: NDArray[np.int64],
        past_B: NDArray[np.int32],
        positions_BR: NDArray[np.int64],
        features_MH: NDArray[np.float32] | None,
    ) -> NDArray[np.float32]:
        decoder = self.decoder
        shape = (*positions_BR.shape, decoder.spec.vocab_size)
        if ids_BS.shape[1] == 1 and positions_BR.shape[1] == 1 and features_MH is None:
            self._run_tokens(ids_BS, past_B)
            return decoder.exchanges[DECODE].fetch(shape)
        decoder.begin()
        exchange, context = decoder.exchanges[PIECES], decoder.pieces
        length = self._bucket(ids_BS.shape[1], past_B)
        padded_BS = np.zeros((self.batch, length), np.int64)
        padded_BS[:, : ids_BS.shape[1]] = ids_BS
        exchange.send(padded_BS, past_B, positions_BR)
        shapes = {
            "input_ids": padded_BS.shape, "past_lengths": past_B.shape, "logit_positions": positions_BR.shape
        }  # fmt: skip
        if exchange.features is not None:
            given_MH = np.zeros((1, decoder.spec.hidden_size), np.float32) if features_MH is None else features_MH
            exchange.send_features(narrow(given_MH, decoder.spec.dtype))
            shapes["image_features"] = given_MH.shape
        exchange.reserve_logits(positions_BR.size)
        self._bind_pieces(shapes)
        accept(context.execute_async_v3(decoder.device.stream), "the step")
        return exchange.fetch(shape)

    def decode(self, ids_B1: NDArray[np.int64], past_B: NDArray[np.int32]) -> Sequence[Row]:
        """Runs a token of each row. Returns each row's logits after it, shortened where there are kernels for it."""
        decoder = self.decoder
        with decoder.lock:
            self._run_tokens(ids_B1, past_B)
            if decoder.shortener is None:
                return list(decoder.exchanges[DECODE].fetch((self.batch, decoder.spec.vocab_size)))
            rows = decoder.shortener.read(self.caches.sharpness[self.rows])
            decoder.outstanding = [weakref.ref(row) for row in rows]
            return rows

    def _run_tokens(self, ids_B1: NDArray[np.int64], past_B: NDArray[np.int32]) -> None:
        """Runs a token of each row: a captured graph where this was done before."""
        decoder = self.decoder
        decoder.begin()
        exchange = decoder.exchanges[DECODE]
        exchange.views["sharpness"][: self.batch] = self.caches.sharpness[self.rows]
        exchange.send(ids_B1, past_B, NO_POSITIONS)
        known = decoder.steps.find(self.key)
        step = known or decoder.steps.add(self.key, self._bind_tokens)
        if known and step.graph is None and decoder.captures:
            self._capture(step)
        if step.graph is not None:
            step.graph.launch()
            return
        try:
            self._enqueue_tokens(step)
        except BaseException:
            decoder.steps.forget(self.key)  # a graph is captured of what has run
            raise

    def _enqueue_tokens(self, step: TokenStep) -> None:
        decoder = self.decoder
        accept(step.context.execute_async_v3(decoder.device.stream), "the step")
        if decoder.shortener is not None:
            decoder.shortener.enqueue(self.batch)

    def _capture(self, step: TokenStep) -> None:
        """Captures a step that comes again; TensorRT wants to have run it before."""
        decoder = self.decoder
        decoder.contexts.save_compiled()
        reason: object = "TensorRT says that the engine cannot be"
        try:
            if decoder.about.flavour == "tensorrt" or step.context.is_stream_capturable(decoder.device.stream):
                step.graph = decoder.device.capture(lambda: self._enqueue_tokens(step))
                return
        except SessionError as error:
            reason = error
        decoder.captures = False  # a graph is faster, not necessary
        warnings.warn(f"steps are not captured into a CUDA graph, so they take longer: {reason}", ArrieroWarning, 2)

    def _bind_tokens(self, context: Any) -> None:
        """Gives a context these rows, a token of each."""
        exchange = self.decoder.exchanges[DECODE]
        self._bind(context, exchange)
        shapes = {"input_ids": (self.batch, 1), "past_lengths": (self.batch,), "logit_positions": (self.batch, 1)}
        if exchange.features is not None:
            shapes["image_features"] = (1, self.decoder.spec.hidden_size)
        for name, shape in shapes.items():
            accept(context.set_input_shape(name, shape), name)

    def _bind_pieces(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Gives the context of pieces these rows and these shapes, where it has others."""
        decoder, exchange = self.decoder, self.decoder.exchanges[PIECES]
        wanted = (*self.key, *exchange.addresses.values(), exchange.logits.address)
        if decoder.bound != wanted:
            decoder.bound = ()  # what is bound in part is not taken for bound
            decoder.shapes.clear()
            self._bind(decoder.pieces, exchange)
            decoder.bound = wanted
        for name, shape in shapes.items():
            if decoder.shapes.get(name) != shape:
                decoder.shapes.pop(name, None)
                accept(decoder.pieces.set_input_shape(name, shape), name)
                decoder.shapes[name] = shape

    def _bind(self, context: Any, exchange: Exchange) -> None:
        """Gives a context the addresses of an exchange, and these rows of the caches."""
        for name in (*INPUTS, *(["image_features"] if exchange.features is not None else [])):
            accept(context.set_tensor_address(name, exchange.addresses[name]), name)
        accept(context.set_tensor_address("logits", exchange.logits.address), "logits")
        for each, past, present in self.decoder.cache_names:
            first = self.caches.addresses[each.name] + self.rows.start * self.caches.row_sizes[each.name]
            if not (
                context.set_input_shape(past, (self.batch, *each.shape))
                and context.set_tensor_address(past, first)
                and context.set_tensor_address(present, first)
            ):
                accept(False, past)

    def _bucket(self, length: int, past_B: NDArray[np.int32]) -> int:
        """A piece's length with its pads: few lengths are planned for, where the caches have room for the pads."""
        step = 1 if length <= SHORT else SHORT if length <= LONG else LONG
        room = [self.decoder.longest]
        for chunk, capacity in self.capacities.items():
            first = int((past_B % chunk).max() if chunk else past_B.max())
            room.append(capacity - first)
        return max(length, min(round_up(length, step), *room))


INPUTS = ("input_ids", "past_lengths", "logit_positions")
NO_POSITIONS = np.zeros(0, np.int64)
SHORT, LONG = 16, 64
"""Pieces of up to SHORT tokens keep their length; up to LONG they are padded to multiples of SHORT, above of LONG."""


def load_decoder(
    folder: Path,
    spec: FolderSpec,
    files: Mapping[str, Path],
    join: Callable[[], Any] | None = None,
) -> TensorRTDecoder:
    """Loads a bundle's engine onto the GPU, a rank's onto the GPU of its number.

    Args:
        folder: The bundle.
        spec: Its spec.
        files: The paths of its weight files, by name.
        join: Makes the communicator of the ranks, as TensorRT takes it; None of a whole model.

    Raises:
        SessionError: The GPU, the driver or TensorRT's version is not the one that the engine was built for.
        FolderError: The engine or a kernel is missing or damaged.
    """
    about = spec.engine
    assert about is not None
    device = Device.open(spec.rank)
    capability = check_machine(folder, about, device.driver, device.number)
    data = read_engine(folder, about)
    trt = open_version(about)
    binaries = [each for each in about.kernels if each.capability == capability]
    kernels = load_kernels(device, folder / KERNELS, binaries) if binaries else None
    for creator in register(trt, (GQA, MOE)).values():
        creator.kernels, creator.capabilities = kernels, (capability,)
        creator.rows = about.profiles[DECODE].max_batch
    engine = deserialise(trt, data, folder / about.file)
    weights = upload_weights(device, spec.weights, files, of_rank=spec.ranks > 1)
    communicator = None if join is None else join()
    return TensorRTDecoder(trt, device, engine, weights, spec, folder, kernels, communicator)


def read_engine(folder: Path, about: EngineSpec) -> bytes:
    """Reads the engine and checks that it and its kernels are those that were built.

    Raises:
        FolderError: A file is missing, or another.
    """
    data = read_built(folder / about.file, about.sha256)
    for kernel in about.kernels:
        read_built(folder / KERNELS / kernel.file, kernel.sha256)
    return data
