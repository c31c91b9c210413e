"""A GPU and a TensorRT that are not there: host memory for the driver's, ONNX Runtime for the engine.

What a session does around an engine (addresses, shapes, profiles, copies) runs for real; the engine's work is done by
the CPU's lowering of the same model, in float32, over the memory that the session bound.
"""

import ctypes
from pathlib import Path
from typing import Any

import numpy as np

from arriero.engine.cpu import lower_for_cpu
from arriero.folder import find_files, read_spec
from arriero.runtime.decoder import Decoder
from arriero.runtime.weights import map_weights

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
    """An engine of a float32 model folder, for `arriero.runtime.engine`."""

    def __init__(self, model: Path, driver: FakeDriver) -> None:
        spec = read_spec(model)
        lowered = lower_for_cpu(model, spec)
        files = find_files(model, spec.weight_files)
        self.driver = driver
        self.decoder = Decoder(
            lowered.graph, map_weights(lowered.weights, files), model, spec.model, lowered.session, 1
        )
        self.contexts: list[FakeContext] = []

    def create_execution_context(self, config: Any = None) -> "FakeContext":
        self.contexts.append(FakeContext(self, config))
        return self.contexts[-1]

    def create_runtime_config(self) -> Any:
        methods = {"set_execution_context_allocation_strategy": lambda self, strategy: None}
        return type("Config", (), {"cuda_graph_strategy": None, **methods})()

    def get_device_memory_size_for_profile_v2(self, profile: int) -> int:
        return 1 << (16 + profile)


class FakeContext:
    """Runs the decoder over the addresses and shapes it has been given."""

    def __init__(self, engine: FakeEngine, config: Any) -> None:
        self.engine, self.config = engine, config
        self.addresses: dict[str, int] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.profile: int | None = None
        self.runs: list[tuple[int, ...]] = []

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
        ids, past, positions = (self.array(name, kind) for name, kind in TYPES.items())
        self.runs.append(ids.shape)
        caches = FakeCaches()
        for name in self.shapes:
            if name.startswith("past."):
                assert self.addresses[name] == self.addresses[f"present.{name[5:]}"]
                caches.buffers[name[5:]] = self.array(name, np.float32)
        logits = self.engine.decoder.bind(caches, slice(0, len(ids))).step(ids, past, positions)  # type: ignore[arg-type]
        self.engine.driver.check(self.addresses["logits"], logits.nbytes)
        ctypes.memmove(self.addresses["logits"], logits.ctypes.data, logits.nbytes)
        return True

    def array(self, name: str, dtype: Any) -> np.ndarray[Any, Any]:
        shape = self.shapes[name]
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        self.engine.driver.check(self.addresses[name], size)
        raw = (ctypes.c_char * size).from_address(self.addresses[name])
        return np.frombuffer(raw, dtype).reshape(shape)


class FakeCaches:
    """What the decoder binds: buffers by name, float32 in ONNX's numbering."""

    onnx_type = 1

    def __init__(self) -> None:
        self.buffers: dict[str, np.ndarray[Any, Any]] = {}
