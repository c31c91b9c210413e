"""A TensorRT engine made ready to execute: its weights on the GPU, the memory of its activations, its contexts.

Enters: a deserialised engine. Leaves: the execution contexts of the decoder and of the vision tower. Invariant: what an
engine needs is allocated here, once; while it runs TensorRT allocates nothing, so that a step can be captured.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ...errors import FolderError, SessionError
from ...files.agreement import check_weights
from ...files.mapping import map_file
from ...plugins.cpu.panels import lay_out
from ...plugins.launch import COUNTERS, Kernels
from ...spec.built_engine import Binary
from ...spec.stored_weights import Weight
from .compiled_cache import CompiledCache
from .device import Device, DeviceMemory, Uploads

Specialisation = Literal["EAGER", "LAZY", "NONE"]
"""When TensorRT-RTX compiles kernels for the shapes that come: before they run, in the background, or never."""

MARGIN = 256 << 20
"""Bytes of the GPU's memory that streamed weights leave free: for the driver, and for kernels that are loaded late."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Execution:
    """An engine on a GPU, kept alive with all that it needs as long as this object is.

    Attributes:
        trt: The module `tensorrt_rtx` or `tensorrt`.
        flavour: `tensorrt-rtx` or `tensorrt`.
        device: The GPU.
        engine: The deserialised engine.
        weights: Device memory of the weights that are inputs, by name.
        file: The engine's file and its SHA-256, by which TensorRT-RTX's compiled kernels are kept; None keeps none.
    """

    trt: Any
    flavour: str
    device: Device
    engine: Any
    weights: Mapping[str, DeviceMemory]
    file: tuple[Path, str] | None = None

    def activations(self, profiles: int, *, streams_weights: bool = False) -> DeviceMemory:
        """Allocates the memory of the first profiles' activations, which never run at once."""
        if streams_weights:
            self.engine.weight_streaming_budget_v2 = 0  # the scratch memory is largest then
        sizes = [self.engine.get_device_memory_size_for_profile_v2(index) for index in range(profiles)]
        return DeviceMemory(self.device, max(sizes))

    def stream_weights(self) -> None:
        """Gives the engine's own weights what is free of the GPU's memory; called when all else is allocated.

        Raises:
            SessionError: TensorRT refuses.
        """
        free = self.device.free_memory() - MARGIN
        budget = max(0, min(free, self.engine.streamable_weights_size))
        self.engine.weight_streaming_budget_v2 = budget
        if self.engine.weight_streaming_budget_v2 != budget:
            raise SessionError(
                f"TensorRT streams no weights within {budget >> 20} MiB of the GPU's memory: build with a smaller "
                "--max-batch or --max-seq"
            )

    def contexts(
        self, specialisations: Sequence[Specialisation], activations: DeviceMemory, communicator: Any = None
    ) -> "Contexts":
        """Tells how contexts of each of the first profiles are made, their weights bound.

        Args:
            specialisations: For each profile, how TensorRT-RTX specialises kernels to shapes.
            activations: The memory that they share.
            communicator: The ranks' communicator, as TensorRT takes it; None of a whole model.

        """
        compiled = None
        if self.flavour == "tensorrt-rtx" and self.file is not None:
            compiled = CompiledCache(self.engine.create_runtime_config(), *self.file)

        def make(profile: int) -> Any:
            context = self._context(profile, activations, specialisations[profile], compiled)
            if communicator is not None:  # each waits for all ranks
                accept(context.set_communicator(communicator), f"the communicator of profile {profile}")
            return context

        return Contexts(activations=activations, make=make, compiled=compiled)

    def _context(
        self, profile: int, activations: DeviceMemory, specialisation: Specialisation, compiled: CompiledCache | None
    ) -> Any:
        trt, engine = self.trt, self.engine
        strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if self.flavour == "tensorrt-rtx":
            config = engine.create_runtime_config()
            config.set_execution_context_allocation_strategy(strategy)
            # TensorRT-RTX would capture between plugins alone; a session captures the whole step.
            config.cuda_graph_strategy = trt.CudaGraphStrategy.DISABLED
            config.dynamic_shapes_kernel_specialization_strategy = getattr(
                trt.DynamicShapesKernelSpecializationStrategy, specialisation
            )
            if compiled is not None:
                config.set_runtime_cache(compiled.cache)
            context = engine.create_execution_context(config)
        else:
            context = engine.create_execution_context(strategy)
        if context is None:
            raise SessionError(
                "the engine does not fit this GPU's memory: build with a smaller --max-batch, --max-seq or --max-tiles"
            )
        context.nvtx_verbosity = trt.ProfilingVerbosity.NONE  # the engine's own is detailed, and costs time in each run
        context.set_device_memory(activations.address, activations.size)
        accept(context.set_optimization_profile_async(profile, self.device.stream), f"profile {profile}")
        for name, memory in self.weights.items():
            accept(context.set_tensor_address(name, memory.address), name)
        return context


@dataclass(frozen=True, kw_only=True, slots=True)
class Contexts:
    """Execution contexts that never run at once: they share the memory of their activations.

    Attributes:
        activations: That memory.
        make: Makes a context of a profile; raises a `SessionError` where TensorRT makes none, or refuses a weight.
        compiled: TensorRT-RTX's compiled kernels; None where they are not kept.
    """

    activations: DeviceMemory
    make: Callable[[int], Any]
    compiled: CompiledCache | None = None

    def save_compiled(self) -> None:
        """Keeps what has been compiled for the next session."""
        if self.compiled is not None:
            self.compiled.save()


def upload_weights(
    device: Device, weights: Iterable[Weight], files: Mapping[str, Path], *, of_rank: bool = False
) -> dict[str, DeviceMemory]:
    """Sends the weights that an engine has as inputs to the GPU. Returns the inputs' memory by name.

    The rows of weights that are parts of one input lie behind one another in its memory.

    Args:
        device: The GPU.
        weights: The weights.
        files: The files by name.
        of_rank: Whether they are one rank's, as in `check_weights`.

    Raises:
        FolderError: A weight is not in its file as it is said to be.
    """
    weights = list(weights)
    check_weights(weights, files, of_rank=of_rank)
    sizes, ends = Counter[str](), Counter[str]()
    for weight in weights:
        sizes[weight.part_of or weight.name] += weight.given_size
    uploads = Uploads(device) if weights else None
    found = {name: DeviceMemory(device, size) for name, size in sizes.items()}
    for weight in weights:
        assert uploads is not None
        name = weight.part_of or weight.name
        _upload(found[name].address + ends[name], uploads, weight, files[weight.file])
        ends[name] += weight.given_size
    device.synchronise()
    return found


def load_kernels(device: Device, folder: Path, binaries: Iterable[Binary]) -> Kernels:
    """Loads the kernels of one compute capability onto the GPU, with the counters that they share.

    Raises:
        SessionError: A kernel is missing or the driver refuses it.
    """
    counters = DeviceMemory(device, COUNTERS * 4)
    counters.zero()
    return Kernels(device.driver, folder, binaries, counters)


def accept(answer: bool, what: str) -> None:
    """Raises a `SessionError` where TensorRT refuses."""
    if not answer:
        raise SessionError(f"the engine refuses {what}: see TensorRT's message above")


def _upload(address: int, uploads: Uploads, weight: Weight, path: Path) -> None:
    """Sends a weight to the GPU from its mapped file, in the layout wanted."""
    with map_file(path) as mapped:
        if weight.offset + weight.size > len(mapped):
            raise FolderError(f"spec.json puts {weight.name!r} outside {path}: build the bundle again")
        region = np.frombuffer(mapped, np.uint8, weight.size, weight.offset)
        given = region
        if weight.layout != "rows" or weight.convert != weight.dtype:
            given = np.ascontiguousarray(lay_out(region, weight)).reshape(-1).view(np.uint8)
        if len(given) != weight.given_size:
            raise FolderError(
                f"spec.json wants {weight.name!r} in {weight.convert}, which no engine takes: build again"
            )
        uploads.send(address, given)
        del region, given
