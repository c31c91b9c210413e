"""A TensorRT that is not there, over the driver of `executing_cuda`: ONNX Runtime does the engines' work.

What a session does around its engines (addresses, shapes, profiles, copies) runs for real; the engines' work is done by
the CPU's lowering of the same model, in float32, over the memory that the session bound.
"""

import copy
import ctypes
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from executing_cuda import ExecutingCuda

from arriero.engine.cpu_lowering import lower_for_cpu, lower_part_for_cpu
from arriero.files.folders import find_files, read_spec
from arriero.plugins.launch import Driver
from arriero.plugins.narrow_types import NUMPY_DTYPES, narrow, widen
from arriero.runtime.backends.mapped_weights import map_weights
from arriero.runtime.backends.onnxruntime_decoder import OnnxRuntimeDecoder
from arriero.runtime.backends.onnxruntime_tower import OnnxRuntimeTower

TRT = SimpleNamespace(
    CudaGraphStrategy=SimpleNamespace(DISABLED="disabled"),
    DynamicShapesKernelSpecializationStrategy=SimpleNamespace(EAGER="eager", LAZY="lazy", NONE="none"),
    ExecutionContextAllocationStrategy=SimpleNamespace(USER_MANAGED="user"),
    ProfilingVerbosity=SimpleNamespace(NONE="none"),
)
"""What a session takes of TensorRT's module."""

TYPES = {"input_ids": np.int64, "past_lengths": np.int32, "logit_positions": np.int64}


class FakeDriver(Driver):
    """CUDA's driver over host memory, `cuda`."""

    def __init__(self, capability: int = 89, **about: Any) -> None:
        self.cuda = ExecutingCuda(capability, **about)
        super().__init__(self.cuda)


class FakeEngine:
    """An engine of a float32 model folder; what it does with its inputs is its subclass's.

    Args:
        driver: The GPU's.
        dtype: Type that image features have in it.
    """

    def __init__(self, driver: FakeDriver, dtype: str = "float32") -> None:
        self.driver, self.dtype = driver, dtype
        self.contexts: list[FakeContext] = []
        self.streamable_weights_size, self.weight_streaming_budget_v2 = 1 << 40, -1

    def create_execution_context(self, config: Any = None) -> "FakeContext":
        self.contexts.append(FakeContext(self, config))
        return self.contexts[-1]

    def create_runtime_config(self) -> Any:
        config = SimpleNamespace(set_execution_context_allocation_strategy=lambda strategy: None)
        config.create_runtime_cache = FakeCache
        config.set_runtime_cache = lambda cache: setattr(config, "cache", cache)
        return config

    def get_device_memory_size_for_profile_v2(self, profile: int) -> int:
        return 1 << (16 + profile)


class FakeDecoder(FakeEngine):
    """A decoder's engine, for `arriero.runtime.backends.tensorrt_decoder`."""

    def __init__(self, model: Path, driver: FakeDriver, dtype: str = "float32", group: Any = None) -> None:
        super().__init__(driver, dtype)
        spec = read_spec(model)
        lowered = lower_for_cpu(model, spec)
        weights = map_weights(lowered.weights, find_files(model, spec.weight_files), of_rank=group is not None)
        self.decoder = OnnxRuntimeDecoder(
            lowered.graph, weights, model, spec.rank_model, lowered.session, 1, group=group
        )

    def run(self, context: "FakeContext") -> None:
        ids, past, positions = (context.array(name, kind) for name, kind in TYPES.items())
        context.runs.append(ids.shape)
        caches = FakeCaches()
        for name in context.shapes:
            if name.startswith("past."):
                assert context.addresses[name] == context.addresses[f"present.{name[5:]}"]
                caches.buffers[name[5:]] = context.array(name, np.float32)
        features = context.array("image_features", NUMPY_DTYPES[self.dtype]) if self.decoder.takes_images else None
        if features is not None and self.dtype != "float32":
            features = widen(features, self.dtype)
        binding = self.decoder.bind(caches, slice(0, len(ids)))  # type: ignore[arg-type]
        context.write("logits", binding.step(ids, past, positions, features))


class FakeTower(FakeEngine):
    """A vision tower's engine, for `arriero.runtime.backends.tensorrt_tower`."""

    def __init__(self, model: Path, driver: FakeDriver, dtype: str = "float32") -> None:
        super().__init__(driver, dtype)
        spec = read_spec(model)
        assert spec.vision is not None
        lowered = lower_part_for_cpu(model, spec.vision)
        weights = map_weights(lowered.weights, find_files(model, spec.weight_files))
        self.tower = OnnxRuntimeTower(lowered.graph, weights, model, lowered.session, 1)

    def run(self, context: "FakeContext") -> None:
        pixels = context.array("pixels", np.float32)
        context.runs.append(pixels.shape)
        context.write("image_features", narrow(self.tower.encode(pixels), self.dtype))


class FakeContext:
    """Runs an engine over the addresses and shapes it has been given."""

    def __init__(self, engine: Any, config: Any) -> None:
        self.engine, self.config = engine, config
        self.addresses: dict[str, int] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.profile: int | None = None
        self.runs: list[tuple[int, ...]] = []
        self.communicator: Any = None
        self.version = 0

    def set_communicator(self, communicator: Any) -> bool:
        self.communicator = communicator
        return True

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        self.profile = profile
        return True

    def set_device_memory(self, address: int, size: int) -> None:
        assert address % 256 == 0
        self.engine.driver.cuda.device.check(address, size)

    def is_stream_capturable(self, stream: int) -> bool:
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name], self.version = tuple(shape), self.version + 1
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name], self.version = address, self.version + 1
        return address % 256 == 0

    def execute_async_v3(self, stream: int) -> bool:
        assert self.profile is not None
        bound = copy.copy(self)
        bound.addresses, bound.shapes = self.addresses.copy(), self.shapes.copy()
        self.engine.driver.cuda.watch(stream, lambda: self.version)
        self.engine.driver.cuda.put(stream, lambda: self.engine.run(bound))
        return True

    def array(self, name: str, dtype: Any) -> np.ndarray[Any, Any]:
        """An input as it lies in the device's memory."""
        shape = self.shapes[name]
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        self.engine.driver.cuda.device.check(self.addresses[name], size)
        raw = (ctypes.c_char * size).from_address(self.addresses[name])
        return np.frombuffer(raw, dtype).reshape(shape)

    def write(self, name: str, array: np.ndarray[Any, Any]) -> None:
        """Puts an output where the session wants it."""
        self.engine.driver.cuda.device.check(self.addresses[name], array.nbytes)
        ctypes.memmove(self.addresses[name], array.ctypes.data, array.nbytes)


class FakeCache:
    """What TensorRT-RTX has compiled."""

    def __init__(self) -> None:
        self.data = b""

    def serialize(self) -> bytes:
        return b"compiled"

    def deserialize(self, data: bytes) -> bool:
        self.data = data
        return data == b"compiled"


class FakeCaches:
    """What the decoder binds: buffers by name, float32 in ONNX's numbering."""

    onnx_type = 1

    def __init__(self) -> None:
        self.buffers: dict[str, np.ndarray[Any, Any]] = {}
