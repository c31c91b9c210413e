"""A GPU and a TensorRT that are not there: host memory for the driver's, ONNX Runtime for the engine.

What a session does around its engines (addresses, shapes, profiles, copies) runs for real; the engines' work is done by
the CPU's lowering of the same model, in float32, over the memory that the session bound.
"""

import ctypes
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from arriero.engine.cpu_lowering import lower_for_cpu, lower_tower_for_cpu
from arriero.files.folders import find_files, read_spec
from arriero.plugins.narrow_types import NUMPY_DTYPES, narrow, widen
from arriero.runtime.backends.mapped_weights import map_weights
from arriero.runtime.backends.onnxruntime_decoder import OnnxRuntimeDecoder
from arriero.runtime.backends.onnxruntime_tower import OnnxRuntimeTower

TRT = SimpleNamespace(
    CudaGraphStrategy=SimpleNamespace(WHOLE_GRAPH_CAPTURE="whole"),
    ExecutionContextAllocationStrategy=SimpleNamespace(USER_MANAGED="user"),
)
"""What a session takes of TensorRT's module."""

TYPES = {"input_ids": np.int64, "past_lengths": np.int32, "logit_positions": np.int64}


class FakeDriver:
    """CUDA's driver calls over host memory; counts what is allocated and what graphs replay."""

    def __init__(self, capability: int = 89) -> None:
        self.memory: dict[int, Any] = {}
        self.version, self.replays, self.captured = capability, 0, None

    def capability(self) -> int:
        return self.version

    def call(self, name: str, *arguments: Any) -> None:
        getattr(self, name)(*arguments)

    def cuMemAlloc_v2(self, pointer: Any, size: Any) -> None:
        buffer = ctypes.create_string_buffer(b"\xff" * size.value, size.value)  # not zeros: nobody may rely on them
        address = ctypes.addressof(buffer)
        self.memory[address] = buffer
        ctypes.cast(pointer, ctypes.POINTER(ctypes.c_uint64))[0] = address

    def cuMemFree_v2(self, address: Any) -> None:
        del self.memory[address.value]

    def cuMemcpyHtoDAsync_v2(self, target: Any, source: Any, size: Any, stream: Any) -> None:
        self.check(target.value, size.value)
        ctypes.memmove(target.value, source, size.value)

    def cuMemcpyDtoHAsync_v2(self, target: Any, source: Any, size: Any, stream: Any) -> None:
        self.check(source.value, size.value)
        ctypes.memmove(target, source.value, size.value)

    def cuMemcpyDtoDAsync_v2(self, target: Any, source: Any, size: Any, stream: Any) -> None:
        self.check(source.value, size.value)
        self.check(target.value, size.value)
        ctypes.memmove(target.value, source.value, size.value)

    def cuMemsetD8Async(self, address: Any, value: int, size: Any, stream: Any) -> None:
        self.check(address.value, size.value)
        ctypes.memset(address.value, value, size.value)

    def check(self, address: int, size: int) -> None:
        assert any(start <= address and address + size <= start + len(buffer) for start, buffer in self.memory.items())

    def cuStreamSynchronize(self, stream: Any) -> None:
        pass

    def cuDevicePrimaryCtxRetain(self, context: Any, device: int) -> None:
        pass

    def cuCtxSetCurrent(self, context: Any) -> None:
        pass

    def cuStreamCreate(self, stream: Any, flags: int) -> None:
        pass


class FakeEngine:
    """An engine of a float32 model folder; what it does with its inputs is its subclass's.

    Args:
        driver: The GPU's.
        dtype: Type that image features have in it.
    """

    def __init__(self, driver: FakeDriver, dtype: str = "float32") -> None:
        self.driver, self.dtype = driver, dtype
        self.contexts: list[FakeContext] = []

    def create_execution_context(self, config: Any = None) -> "FakeContext":
        self.contexts.append(FakeContext(self, config))
        return self.contexts[-1]

    def create_runtime_config(self) -> Any:
        methods = {"set_execution_context_allocation_strategy": lambda self, strategy: None}
        return type("Config", (), {"cuda_graph_strategy": None, **methods})()

    def get_device_memory_size_for_profile_v2(self, profile: int) -> int:
        return 1 << (16 + profile)


class FakeDecoder(FakeEngine):
    """A decoder's engine, for `arriero.runtime.backends.tensorrt_decoder`."""

    def __init__(self, model: Path, driver: FakeDriver, dtype: str = "float32", group: Any = None) -> None:
        super().__init__(driver, dtype)
        spec = read_spec(model)
        lowered = lower_for_cpu(model, spec)
        weights = map_weights(lowered.weights, find_files(model, spec.weight_files))
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
        lowered = lower_tower_for_cpu(model, spec.vision)
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

    def set_communicator(self, communicator: Any) -> bool:
        self.communicator = communicator
        return True

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        self.profile = profile
        return True

    def set_device_memory(self, address: int, size: int) -> None:
        self.engine.driver.check(address, size)

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = tuple(shape)
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        assert self.profile is not None
        self.engine.run(self)
        return True

    def array(self, name: str, dtype: Any) -> np.ndarray[Any, Any]:
        """An input as it lies in the device's memory."""
        shape = self.shapes[name]
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        self.engine.driver.check(self.addresses[name], size)
        raw = (ctypes.c_char * size).from_address(self.addresses[name])
        return np.frombuffer(raw, dtype).reshape(shape)

    def write(self, name: str, array: np.ndarray[Any, Any]) -> None:
        """Puts an output where the session wants it."""
        self.engine.driver.check(self.addresses[name], array.nbytes)
        ctypes.memmove(self.addresses[name], array.ctypes.data, array.nbytes)


class FakeCaches:
    """What the decoder binds: buffers by name, float32 in ONNX's numbering."""

    onnx_type = 1

    def __init__(self) -> None:
        self.buffers: dict[str, np.ndarray[Any, Any]] = {}
