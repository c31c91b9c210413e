"""The decoder as a TensorRT engine: its weights on the GPU, its KV caches, and the step that runs one piece of tokens.

Enters: pieces of tokens. Leaves: their logits in float32, as `OnnxRuntimeDecoder` gives them. Invariant: an engine's
caches are updated in place; past and present are one address.
"""

import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import SessionError
from ...files.folders import KERNELS
from ...plugins.gqa.plugin import PLUGIN as GQA
from ...plugins.launch import Kernels
from ...plugins.moe.plugin import PLUGIN as MOE
from ...plugins.narrow_types import narrow
from ...plugins.tensorrt_plugin import register
from ...spec.built_engine import CacheInput, EngineSpec
from ...spec.folder import FolderSpec
from ...spec.geometry import ModelSpec
from .device import Device, DeviceGraph, DeviceMemory
from .execution import Execution, accept, deserialise, open_version, read_built, upload_weights
from .interface import Slots, cache_chunk, is_standing, slots_of


class TensorRTDecoder:
    """A decoder's engine with its weights, ready to run.

    One context serves each profile. They never run at once, so they share the buffers of the step's inputs and logits,
    which grow to what steps need.

    Args:
        trt: The module `tensorrt_rtx` or `tensorrt`.
        device: The GPU.
        engine: The deserialised engine.
        weights: Device memory of the weights that are inputs, by name.
        folder: The bundle's spec.
        communicator: The ranks' communicator, as TensorRT takes it; None of a whole model.
    """

    def __init__(
        self,
        trt: Any,
        device: Device,
        engine: Any,
        weights: Mapping[str, DeviceMemory],
        folder: FolderSpec,
        communicator: Any = None,
    ) -> None:
        assert folder.engine is not None
        self.device, self.about, self.spec = device, folder.engine, folder.model
        self.execution = Execution(trt=trt, flavour=self.about.flavour, device=device, engine=engine, weights=weights)
        self.contexts = self.execution.contexts(len(self.about.profiles), repeats=[0])  # single tokens
        if communicator is not None:
            for number, context in enumerate(self.contexts.made):  # each waits for all ranks
                accept(context.set_communicator(communicator), f"the communicator of profile {number}")
        no_features = np.zeros((1, self.spec.hidden_size), np.float32)
        self.no_features = None if folder.vision is None else no_features
        self.buffers: dict[str, DeviceMemory] = {}
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

    @property
    def most(self) -> int | None:
        """None: pieces of several rows have no limit but the profiles' own."""
        return None

    def caches(self, batch: int, positions: int) -> "DeviceCaches":
        """Makes KV buffers for a batch, zeros at first; their size is the engine's, whatever `positions` are used."""
        self.device.enter()
        return DeviceCaches(self.device, self.spec, self.about, batch, positions)

    def bind(self, caches: "DeviceCaches", rows: slice) -> "TensorRTBinding":
        """Binds some rows of the caches, for any number of steps."""
        return TensorRTBinding(self, caches, rows)

    def reserve(self, sizes: Mapping[str, int]) -> None:
        """Makes the step's buffers at least as large as `sizes`; where one moves, nothing is bound any more."""
        for name, size in sizes.items():
            if name not in self.buffers or self.buffers[name].size < size:
                self.bound.clear()
                self.buffers[name] = DeviceMemory(self.device, size)


class DeviceCaches:
    """KV buffers of a batch of sequences on the GPU, zeros at first."""

    def __init__(self, device: Device, spec: ModelSpec, about: EngineSpec, batch: int, positions: int) -> None:
        self.device, self.spec, self.about = device, spec, about.caches
        self.batch, self.positions = batch, positions
        self.row_bytes = {each.name: each.row_size for each in about.caches}
        self.buffers = {name: DeviceMemory(device, batch * size) for name, size in self.row_bytes.items()}
        for memory in self.buffers.values():
            memory.zero()

    def copy(self, source: int, target: int, past: int) -> None:
        """Copies a whole row over another, whatever it holds: the GPU is quick at that."""
        self.device.enter()
        for name, memory in self.buffers.items():
            size = self.row_bytes[name]
            self.device.copy(memory.address + source * size, memory.address + target * size, size)

    def read(self, row: int, start: int, stop: int) -> Slots:
        """Copies some positions of one chunk in a row to the host's memory: bytes, a line a head."""
        self.device.enter()
        found = {}
        for each in self.about:
            lines = np.empty((each.shape[0], (stop - start) * self._slot_size(each)), dtype=np.uint8)
            for address, line in zip(self._addresses(each, row, start), lines, strict=True):
                self.device.fetch(address, line)
            found[each.name] = lines
        self.device.synchronise()
        return found

    def write(self, row: int, start: int, slots: Slots, past: int) -> None:
        """Puts back what `read` gave from `start` on, where tokens after the first `past` attend to it."""
        self.device.enter()
        for each in self.about:
            if is_standing(cache_chunk(self.spec, each.name), start, past):
                for address, line in zip(self._addresses(each, row, start), slots[each.name], strict=True):
                    self.device.upload(address, line)

    def _addresses(self, cache: CacheInput, row: int, start: int) -> list[int]:
        """The address of a position in a row, for each head."""
        slot = slots_of(cache_chunk(self.spec, cache.name), start, start).start
        heads, capacity, _ = cache.shape
        first = self.buffers[cache.name].address + row * cache.row_size
        return [first + (head * capacity + slot) * self._slot_size(cache) for head in range(heads)]

    @staticmethod
    def _slot_size(cache: CacheInput) -> int:
        return cache.row_size // (cache.shape[0] * cache.shape[1])


class TensorRTBinding:
    """An engine bound to some rows of its caches."""

    def __init__(self, decoder: TensorRTDecoder, caches: DeviceCaches, rows: slice) -> None:
        self.decoder, self.caches, self.rows = decoder, caches, rows
        self.number = next(decoder.bindings)
        self.captures = decoder.about.flavour == "tensorrt" and not decoder.about.weight_streaming
        self.graph: DeviceGraph | None = None

    def step(
        self,
        ids_BS: NDArray[np.int64],
        past_B: NDArray[np.int32],
        positions_BR: NDArray[np.int64],
        features_MH: NDArray[np.float32] | None = None,
    ) -> NDArray[np.float32]:
        """Runs one piece: inputs to the GPU, the step, and the logits back into a new array."""
        device, decoder = self.decoder.device, self.decoder
        device.enter()
        logits = np.empty((*positions_BR.shape, decoder.spec.vocab_size), dtype=np.float32)
        inputs: dict[str, NDArray[Any]] = {"input_ids": ids_BS, "past_lengths": past_B, "logit_positions": positions_BR}
        if decoder.no_features is not None:
            given_MH = decoder.no_features if features_MH is None else features_MH
            inputs["image_features"] = narrow(given_MH, decoder.spec.dtype)
        decoder.reserve({name: array.nbytes for name, array in (*inputs.items(), ("logits", logits))})
        for name, array in inputs.items():
            device.upload(decoder.buffers[name].address, array)
        single = ids_BS.shape[1] == 1 and positions_BR.shape[1] == 1 and features_MH is None
        self._run(
            {name: array.shape for name, array in inputs.items()}, 0 if single else len(decoder.contexts.made) - 1
        )
        device.download(decoder.buffers["logits"].address, logits)
        return logits

    def _run(self, shapes: dict[str, tuple[int, ...]], profile: int) -> None:
        """Runs a profile's context; single tokens as a graph, once they have run without one."""
        context, was_bound = self.decoder.contexts.made[profile], self._bind(shapes, profile)
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
        decoder, context = self.decoder, self.decoder.contexts.made[profile]
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
    data = read_engine(folder, about)
    trt = open_version(about)
    device = Device.open(spec.rank)
    capability = device.driver.capability(device.number)
    if capability not in about.capabilities:
        built_for = ", ".join(f"sm{each}" for each in about.capabilities)
        raise SessionError(f"{folder} was built for {built_for}, this GPU is sm{capability}: build for sm{capability}")
    if about.kernels:
        binaries = [each for each in about.kernels if each.capability == capability]
        kernels = Kernels(device.driver, folder / KERNELS, binaries)
        for creator in register(trt, (GQA, MOE)).values():
            creator.kernels, creator.capabilities = kernels, (capability,)
    engine = deserialise(trt, data, folder / about.file)
    if about.weight_streaming:
        engine.weight_streaming_budget_v2 = engine.get_weight_streaming_automatic_budget()
    weights = upload_weights(device, spec.weights, files)
    return TensorRTDecoder(trt, device, engine, weights, spec, None if join is None else join())


def read_engine(folder: Path, about: EngineSpec) -> bytes:
    """Reads the engine and checks that it and its kernels are those that were built.

    Raises:
        FolderError: A file is missing, or another.
    """
    data = read_built(folder / about.file, about.sha256)
    for kernel in about.kernels:
        read_built(folder / KERNELS / kernel.file, kernel.sha256)
    return data
