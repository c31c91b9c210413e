"""The decoder as a TensorRT engine: its weights on the GPU, its KV caches, and the step that runs one piece of tokens.

The same steps as `decoder`, which runs the graph on ONNX Runtime. Invariant: an engine's caches are updated in place;
past and present are one address.
"""

import hashlib
import importlib
import itertools
import mmap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import FolderError, SessionError
from ..folder import KERNELS
from ..plugins.gqa.tensorrt import PLUGIN as GQA
from ..plugins.launch import Kernels
from ..plugins.moe.tensorrt import PLUGIN as MOE
from ..plugins.tensorrt import MODULES, REMEDIES, register
from ..spec import EngineSpec, FolderSpec, Weight
from .device import Device, Graph, Memory

PIECE = 64 << 20
"""Bytes of a weight that are sent to the GPU at a time."""


class EngineDecoder:
    """An engine with its weights, ready to run.

    One context serves each profile. They never run at once, so they share the memory of their activations, and the
    buffers of the step's inputs and logits, which grow to what steps need.

    Args:
        trt: The module `tensorrt_rtx` or `tensorrt`.
        device: The GPU.
        engine: The deserialised engine.
        weights: Device memory of the weights that are inputs, by name.
        folder: The bundle's spec.
    """

    def __init__(
        self, trt: Any, device: Device, engine: Any, weights: Mapping[str, Memory], folder: FolderSpec
    ) -> None:
        assert folder.engine is not None
        self.trt, self.device, self.engine, self.weights = trt, device, engine, weights
        self.about, self.spec = folder.engine, folder.model
        profiles = range(len(self.about.profiles))
        size = max(engine.get_device_memory_size_for_profile_v2(index) for index in profiles)
        self.activations = Memory(device, size)
        self.contexts = [self._context(index) for index in profiles]
        self.buffers: dict[str, Memory] = {}
        self.bindings = itertools.count()
        self.bound: dict[int, object] = {}

    @property
    def longest(self) -> int:
        """Tokens of a row's piece at most."""
        return self.about.profiles[-1].max_length

    @property
    def longest_with_logits(self) -> int:
        """Tokens of a row's piece at most where each gets logits."""
        return self.about.profiles[-1].max_logits

    def caches(self, batch: int, positions: int) -> "EngineCaches":
        """KV buffers for a batch; the engine fixes how many positions a row's hold."""
        self.device.enter()
        return EngineCaches(self.device, self.about, batch, positions)

    def bind(self, caches: "EngineCaches", rows: slice) -> "EngineBinding":
        """Binds some rows of the caches, for any number of steps."""
        return EngineBinding(self, caches, rows)

    def reserve(self, sizes: Mapping[str, int]) -> None:
        """Makes the step's buffers at least so large; where one moves, nothing is bound any more."""
        for name, size in sizes.items():
            if name not in self.buffers or self.buffers[name].size < size:
                self.bound.clear()
                self.buffers[name] = Memory(self.device, size)

    def _context(self, profile: int) -> Any:
        strategy = self.trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if self.about.flavour == "tensorrt-rtx":
            config = self.engine.create_runtime_config()
            config.set_execution_context_allocation_strategy(strategy)
            if profile == 0:  # single tokens: shapes repeat, so the library captures them itself
                config.cuda_graph_strategy = self.trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
            context = self.engine.create_execution_context(config)
        else:
            context = self.engine.create_execution_context(strategy)
        if context is None:
            raise SessionError(
                "the engine does not fit this GPU's memory: build with a smaller --max-batch or --max-seq"
            )
        context.set_device_memory(self.activations.address, self.activations.size)
        accept(context.set_optimization_profile_async(profile, self.device.stream), f"profile {profile}")
        for name, memory in self.weights.items():
            accept(context.set_tensor_address(name, memory.address), name)
        return context


class EngineCaches:
    """KV buffers of a batch of sequences on the GPU, zeros at first."""

    def __init__(self, device: Device, about: EngineSpec, batch: int, positions: int) -> None:
        self.batch, self.positions = batch, positions
        self.row_bytes = {each.name: each.row_size for each in about.caches}
        self.buffers = {name: Memory(device, batch * size) for name, size in self.row_bytes.items()}
        for memory in self.buffers.values():
            memory.zero()


class EngineBinding:
    """An engine bound to the caches of some rows."""

    def __init__(self, decoder: EngineDecoder, caches: EngineCaches, rows: slice) -> None:
        self.decoder, self.caches, self.rows = decoder, caches, rows
        self.number = next(decoder.bindings)
        self.captures = decoder.about.flavour == "tensorrt" and not decoder.about.weight_streaming
        self.graph: Graph | None = None

    def step(
        self,
        ids_BS: NDArray[np.int64],
        past_B: NDArray[np.int32],
        positions_BR: NDArray[np.int64],
        features_MH: NDArray[np.float32] | None = None,
    ) -> NDArray[np.float32]:
        """Runs one piece and writes it to the caches.

        Args:
            ids_BS: Token ids, right-padded.
            past_B: Tokens in each row's cache before the piece.
            positions_BR: Positions of the piece that get logits.
            features_MH: Image features of the piece's image tokens, row by row; None where it has none.

        Returns:
            Logits [B, R, V].
        """
        device, decoder = self.decoder.device, self.decoder
        device.enter()
        logits = np.empty((*positions_BR.shape, decoder.spec.vocab_size), dtype=np.float32)
        inputs: dict[str, NDArray[Any]] = {"input_ids": ids_BS, "past_lengths": past_B, "logit_positions": positions_BR}
        decoder.reserve({name: array.nbytes for name, array in (*inputs.items(), ("logits", logits))})
        for name, array in inputs.items():
            device.upload(decoder.buffers[name].address, array)
        single = ids_BS.shape[1] == 1 and positions_BR.shape[1] == 1
        self._run({name: array.shape for name, array in inputs.items()}, 0 if single else len(decoder.contexts) - 1)
        device.download(decoder.buffers["logits"].address, logits)
        return logits

    def _run(self, shapes: dict[str, tuple[int, ...]], profile: int) -> None:
        """Runs a profile's context; single tokens as a graph, once they have run without one."""
        context, was_bound = self.decoder.contexts[profile], self._bind(shapes, profile)
        if profile == 0 and was_bound and self.captures:
            if self.graph is None:
                try:
                    self.graph = self.decoder.device.capture(lambda: self._enqueue(context))
                except SessionError:
                    self.captures = False  # a graph is faster, not necessary
            if self.graph is not None:
                self.graph.launch()
                return
        self._enqueue(context)

    def _bind(self, shapes: dict[str, tuple[int, ...]], profile: int) -> bool:
        """Gives the context this binding's shapes and addresses. Returns whether it had them already."""
        decoder, context = self.decoder, self.decoder.contexts[profile]
        if decoder.bound.get(profile) == (self.number, shapes):
            return True
        decoder.bound.pop(profile, None)
        self.graph = None
        for name, shape in shapes.items():
            accept(context.set_input_shape(name, shape), name)
        for name, memory in decoder.buffers.items():
            accept(context.set_tensor_address(name, memory.address), name)
        for each in decoder.about.caches:
            first = self.caches.buffers[each.name].address + self.rows.start * self.caches.row_bytes[each.name]
            past, present = f"past.{each.name}", f"present.{each.name}"
            accept(context.set_input_shape(past, (self.rows.stop - self.rows.start, *each.shape)), past)
            accept(context.set_tensor_address(past, first), past)
            accept(context.set_tensor_address(present, first), present)
        decoder.bound[profile] = (self.number, shapes)
        return False

    def _enqueue(self, context: Any) -> None:
        accept(context.execute_async_v3(self.decoder.device.stream), "the step")


def accept(answer: bool, what: str) -> None:
    """Raises a `SessionError` where TensorRT refuses."""
    if not answer:
        raise SessionError(f"the engine refuses {what}: see TensorRT's message above")


def load_engine(folder: Path, spec: FolderSpec, files: Mapping[str, Path]) -> EngineDecoder:
    """Loads a bundle's engine onto the GPU.

    Args:
        folder: The bundle.
        spec: Its spec.
        files: Where its weight files are, by name.

    Raises:
        SessionError: The GPU, the driver or TensorRT's version is not the one that the engine was built for.
        FolderError: The engine or a kernel is missing or damaged.
    """
    about = spec.engine
    assert about is not None
    data = read_engine(folder, about)
    trt = open_version(about)
    device = Device.open()
    capability = device.driver.capability()
    if capability not in about.capabilities:
        built_for = ", ".join(f"sm{each}" for each in about.capabilities)
        raise SessionError(f"{folder} was built for {built_for}, this GPU is sm{capability}: build for sm{capability}")
    if about.kernels:
        binaries = [each for each in about.kernels if each.capability == capability]
        kernels = Kernels(device.driver, folder / KERNELS, binaries)
        for creator in register(trt, (GQA, MOE)).values():
            creator.kernels, creator.capabilities = kernels, (capability,)
    log = trt.Logger(trt.Logger.ERROR)
    engine = trt.Runtime(log).deserialize_cuda_engine(data)
    if engine is None:
        raise SessionError(f"{about.flavour} does not take {folder / about.file}: build it again on this machine")
    if about.weight_streaming:
        engine.weight_streaming_budget_v2 = engine.get_weight_streaming_automatic_budget()
    weights = {weight.name: _upload(device, weight, files[weight.file]) for weight in spec.weights}
    return EngineDecoder(trt, device, engine, weights, spec)


def read_engine(folder: Path, about: EngineSpec) -> bytes:
    """Reads the engine and checks that it and its kernels are those that were built.

    Raises:
        FolderError: A file is missing, or another.
    """
    files = {about.file: about.sha256, **{f"{KERNELS}/{each.file}": each.sha256 for each in about.kernels}}
    data = b""
    for name, expected in files.items():
        path = folder / name
        try:
            found = path.read_bytes()
        except OSError as error:
            raise FolderError(f"{path}: {error.strerror}: build the bundle again") from error
        if hashlib.sha256(found).hexdigest() != expected:
            raise FolderError(f"{path} is not what was built (truncated or changed): build the bundle again")
        data = data or found
    return data


def open_version(about: EngineSpec) -> Any:
    """Imports the TensorRT that built an engine.

    Raises:
        SessionError: It is not installed, or of another version.
    """
    try:
        trt = importlib.import_module(MODULES[about.flavour])
    except (ImportError, OSError) as error:
        needed = f"this bundle needs {about.flavour} {about.version}, which does not load ({error})"
        raise SessionError(f"{needed}: {REMEDIES[about.flavour]}") from error
    if trt.__version__ != about.version:
        raise SessionError(
            f"this bundle was built by {about.flavour} {about.version}, here is {trt.__version__}: "
            f"install that version, or build again"
        )
    return trt


def _upload(device: Device, weight: Weight, path: Path) -> Memory:
    """Sends a weight to the GPU, a piece of the mapped file at a time."""
    size = weight.size
    memory = Memory(device, size)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        if weight.offset + size > len(mapped):
            raise FolderError(f"spec.json puts {weight.name!r} outside {path}: build the bundle again")
        for start in range(0, size, PIECE):
            piece = np.frombuffer(mapped, np.uint8, min(PIECE, size - start), weight.offset + start)
            device.upload(memory.address + start, piece)
            device.synchronise()
            del piece
    return memory
