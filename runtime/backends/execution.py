"""A TensorRT engine made ready to execute: its library, its file, its weights on the GPU, its contexts.

Enters: a bundle's record of its engines. Leaves: the execution contexts of the decoder and of the vision tower.
Invariant: a file that is not the one that was built, or another TensorRT than built it, is refused before the GPU is
touched.
"""

import hashlib
import importlib
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import FolderError, SessionError
from ...files.agreement import check_weights
from ...files.mapping import map_file
from ...files.reading import read_bytes
from ...plugins.tensorrt_plugin import MODULES, REMEDIES
from ...spec.built_engine import EngineSpec
from ...spec.stored_weights import Weight
from .device import Device, DeviceMemory

LARGEST = 1 << 40
"""Bytes of an engine at most."""

PIECE = 64 << 20
"""Bytes of a weight that are sent to the GPU at a time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Execution:
    """An engine on a GPU, kept alive with all that it needs as long as this object is.

    Attributes:
        trt: The module `tensorrt_rtx` or `tensorrt`.
        flavour: `tensorrt-rtx` or `tensorrt`.
        device: The GPU.
        engine: The deserialised engine.
        weights: Device memory of the weights that are inputs, by name.
    """

    trt: Any
    flavour: str
    device: Device
    engine: Any
    weights: Mapping[str, DeviceMemory]

    def contexts(self, profiles: int, *, repeats: Container[int] = ()) -> "Contexts":
        """Makes a context for each of the first profiles, its weights bound.

        Args:
            profiles: Number of profiles.
            repeats: Profiles whose shapes repeat, so that TensorRT-RTX does well to capture a graph itself.

        Raises:
            SessionError: TensorRT makes none, or refuses a weight.
        """
        sizes = [self.engine.get_device_memory_size_for_profile_v2(index) for index in range(profiles)]
        activations = DeviceMemory(self.device, max(sizes))
        made = [self._context(index, activations, repeats=index in repeats) for index in range(profiles)]
        return Contexts(activations=activations, made=made)

    def _context(self, profile: int, activations: DeviceMemory, *, repeats: bool) -> Any:
        trt, engine = self.trt, self.engine
        strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if self.flavour == "tensorrt-rtx":
            config = engine.create_runtime_config()
            config.set_execution_context_allocation_strategy(strategy)
            if repeats:
                config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
            context = engine.create_execution_context(config)
        else:
            context = engine.create_execution_context(strategy)
        if context is None:
            raise SessionError(
                "the engine does not fit this GPU's memory: build with a smaller --max-batch, --max-seq or --max-tiles"
            )
        context.set_device_memory(activations.address, activations.size)
        accept(context.set_optimization_profile_async(profile, self.device.stream), f"profile {profile}")
        for name, memory in self.weights.items():
            accept(context.set_tensor_address(name, memory.address), name)
        return context


@dataclass(frozen=True, kw_only=True, slots=True)
class Contexts:
    """Execution contexts that never run at once: they share the memory of their activations."""

    activations: DeviceMemory
    made: Sequence[Any]


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


def read_built(path: Path, sha256: str) -> bytes:
    """Reads a file of a bundle.

    Raises:
        FolderError: It is missing, or not the one that was built.
    """
    remedy = "build the bundle again"
    try:
        found = read_bytes(path, remedy=remedy, folder=path.parent, most=LARGEST)
    except FileNotFoundError as error:
        raise FolderError(f"{path}: {error.strerror}: {remedy}") from error
    if hashlib.sha256(found).hexdigest() != sha256:
        raise FolderError(f"{path} is not what was built (truncated or changed): build the bundle again")
    return found


def deserialise(trt: Any, data: bytes, path: Path) -> Any:
    """Makes TensorRT's engine object of a serialized engine.

    Args:
        trt: The module `tensorrt_rtx` or `tensorrt`.
        data: The serialized engine.
        path: The file that it was read from.

    Raises:
        SessionError: TensorRT does not take it.
    """
    engine = trt.Runtime(trt.Logger(trt.Logger.ERROR)).deserialize_cuda_engine(data)
    if engine is None:
        raise SessionError(f"TensorRT does not take {path}: build it again on this machine")
    return engine


def upload_weights(device: Device, weights: Iterable[Weight], files: Mapping[str, Path]) -> dict[str, DeviceMemory]:
    """Sends the weights that an engine has as inputs to the GPU. Returns their memory by name.

    Raises:
        FolderError: A weight is not in its file as it is said to be.
    """
    weights = list(weights)
    check_weights(weights, files)
    return {weight.name: _upload(device, weight, files[weight.file]) for weight in weights}


def accept(answer: bool, what: str) -> None:
    """Raises a `SessionError` where TensorRT refuses."""
    if not answer:
        raise SessionError(f"the engine refuses {what}: see TensorRT's message above")


def _upload(device: Device, weight: Weight, path: Path) -> DeviceMemory:
    """Sends a weight to the GPU, a piece of the mapped file at a time."""
    size = weight.size
    memory = DeviceMemory(device, size)
    with map_file(path) as mapped:
        if weight.offset + size > len(mapped):
            raise FolderError(f"spec.json puts {weight.name!r} outside {path}: build the bundle again")
        for start in range(0, size, PIECE):
            piece = np.frombuffer(mapped, np.uint8, min(PIECE, size - start), weight.offset + start)
            device.upload(memory.address + start, piece)
            device.synchronise()
            del piece
    return memory
