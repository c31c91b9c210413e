"""CUDA's driver library without a GPU: memory of the host, kernels in Triton's interpreter, streams that run late.

Enter: the calls that `plugins.launch.Driver` makes. Leaves: what a card would have computed, or the error it would have
given: for an allocation, a free or a wait while a stream is captured, for misaligned or freed addresses, for a thread
without a context, for a stream of another context. Work in a stream runs when somebody waits for it, so that what is
read or changed too early is seen. To be used in a process whose Triton interprets; see `gpu_process`.
"""

import bisect
import ctypes
import json
import mmap
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib import import_module
from typing import Any

import numpy as np

from arriero.plugins.launch import Kernel

INVALID_VALUE, OUT_OF_MEMORY, INVALID_IMAGE, NO_CONTEXT, INVALID_HANDLE, NOT_FOUND = 1, 2, 200, 201, 400, 500
ILLEGAL_ADDRESS, MISALIGNED, CAPTURE_UNSUPPORTED, CAPTURE_INVALIDATED = 700, 716, 900, 901
NAMES = {
    INVALID_VALUE: "invalid argument",
    OUT_OF_MEMORY: "out of memory",
    INVALID_IMAGE: "device kernel image is invalid",
    NO_CONTEXT: "invalid device context",
    INVALID_HANDLE: "invalid resource handle",
    NOT_FOUND: "named symbol not found",
    ILLEGAL_ADDRESS: "an illegal memory access was encountered",
    MISALIGNED: "misaligned address",
    CAPTURE_UNSUPPORTED: "operation not permitted when stream is capturing",
    CAPTURE_INVALIDATED: "operation failed due to a previous error during capture",
}
UNSAFE = frozenset({
    "cuMemAlloc_v2", "cuMemFree_v2", "cuMemHostAlloc", "cuMemFreeHost", "cuStreamSynchronize", "cuEventSynchronize",
    "cuModuleLoadData", "cuGraphExecDestroy", "cuStreamCreate", "cuMemGetInfo_v2",
})  # fmt: skip
"""Calls that end a capture of the same thread."""
WITHOUT_CONTEXT = frozenset({
    "cuInit", "cuDriverGetVersion", "cuDeviceGetAttribute", "cuDevicePrimaryCtxRetain", "cuCtxSetCurrent",
    "cuGetErrorString",
})  # fmt: skip
CONTEXT = 0xC0DE
POISONED = 64 << 20
"""Larger memory is not filled: it would be real."""

Op = Callable[[], None]


class Refusal(Exception):  # noqa: N818
    """A call that a card refuses, with CUDA's number for it."""

    def __init__(self, code: int) -> None:
        super().__init__(NAMES[code])
        self.code = code


@dataclass
class Stream:
    """Work that waits, and the work that is being captured."""

    waiting: list[Op] = field(default_factory=list)
    captured: list[Op] | None = None
    thread: int = 0
    broken: bool = False


class Memory:
    """Regions of the host's memory, by where they begin."""

    def __init__(self) -> None:
        self.starts: list[int] = []
        self.regions: dict[int, tuple[int, Any]] = {}
        self.largest = self.allocations = 0

    def allocate(self, size: int) -> int:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_NORESERVE  # what is not touched is not there
        raw = mmap.mmap(-1, max(size, 1) + 512, flags=flags)
        first = ctypes.addressof((ctypes.c_char * 1).from_buffer(raw))
        address = -(-first // 256) * 256
        if size <= POISONED:
            ctypes.memset(address, 0xFF, size)  # not zeros: nobody may rely on them
        self.regions[address] = (size, raw)
        bisect.insort(self.starts, address)
        self.allocations += 1
        self.largest = max(self.largest, self.held)
        return address

    @property
    def held(self) -> int:
        return sum(size for size, _ in self.regions.values())

    def free(self, address: int) -> None:
        if address not in self.regions:
            raise Refusal(INVALID_VALUE)
        size, _ = self.regions.pop(address)
        self.starts.remove(address)
        if size <= POISONED:
            ctypes.memset(address, 0xEE, size)  # what still reads it shall see

    def holds(self, first: int, last: int) -> bool:
        """Whether the bytes from first to before last lie in one region."""
        place = bisect.bisect_right(self.starts, first) - 1
        if place < 0:
            return False
        start = self.starts[place]
        return last <= start + self.regions[start][0]

    def check(self, address: int, size: int) -> None:
        if not self.holds(address, address + size):
            raise Refusal(ILLEGAL_ADDRESS)


def number(value: Any) -> int:
    return int((value.value or 0) if hasattr(value, "value") else value)


def give(pointer: Any, value: Any) -> None:
    pointer._obj.value = value


class ExecutingCuda:
    """The library. `calls` counts what was called.

    Args:
        capability: The GPU's compute capability.
        version: The CUDA that the driver serves.
        size: Bytes of the GPU's memory.
    """

    def __init__(self, capability: int = 89, version: tuple[int, int] = (13, 0), size: int = 1 << 40) -> None:
        self.capability, self.version, self.size = capability, version, size
        self.device, self.host = Memory(), Memory()
        self.streams: dict[int, Stream] = {}
        self.graphs: dict[int, list[Op]] = {}
        self.kernels: dict[int, Kernel] = {}
        self.modules: dict[int, Kernel] = {}
        self.contexts: dict[int, int] = {}
        self.calls: Counter[str] = Counter()
        self.handles = iter(range(0x1000, 1 << 60, 16))
        self.refusals: dict[str, int] = {}

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("cu"):
            raise AttributeError(name)
        method = getattr(self, f"_{name}")

        def call(*arguments: Any) -> int:
            self.calls[name] += 1
            try:
                self._admit(name)
                method(*arguments)
            except Refusal as error:
                return error.code
            return 0

        setattr(self, name, call)
        return call

    def _admit(self, name: str) -> None:
        if name in self.refusals:
            raise Refusal(self.refusals[name])
        thread = threading.get_ident()
        if name not in WITHOUT_CONTEXT and self.contexts.get(thread) != CONTEXT:
            raise Refusal(NO_CONTEXT)
        if name in UNSAFE:
            for stream in self.streams.values():
                if stream.captured is not None and stream.thread == thread:
                    stream.broken = True
                    raise Refusal(CAPTURE_UNSUPPORTED)

    # The device and its contexts.

    def _cuInit(self, flags: Any) -> None:
        pass

    def _cuDriverGetVersion(self, pointer: Any) -> None:
        give(pointer, self.version[0] * 1000 + self.version[1] * 10)

    def _cuDeviceGetAttribute(self, pointer: Any, attribute: int, device: int) -> None:
        give(pointer, {75: self.capability // 10, 76: self.capability % 10}[attribute])

    def _cuDevicePrimaryCtxRetain(self, pointer: Any, device: int) -> None:
        give(pointer, CONTEXT)

    def _cuCtxSetCurrent(self, context: Any) -> None:
        self.contexts[threading.get_ident()] = number(context)

    def _cuGetErrorString(self, code: int, pointer: Any) -> None:
        give(pointer, NAMES.get(number(code), "unknown error").encode())

    # Memory.

    def _cuMemGetInfo_v2(self, free: Any, total: Any) -> None:
        give(free, self.size - self.device.held)
        give(total, self.size)

    def _cuMemAlloc_v2(self, pointer: Any, size: Any) -> None:
        if self.device.held + number(size) > self.size:
            raise Refusal(OUT_OF_MEMORY)
        give(pointer, self.device.allocate(number(size)))

    def _cuMemFree_v2(self, address: Any) -> None:
        self.drain()
        self.device.free(number(address))

    def _cuMemHostAlloc(self, pointer: Any, size: Any, flags: int) -> None:
        give(pointer, self.host.allocate(number(size)))

    def _cuMemFreeHost(self, address: Any) -> None:
        self.drain()
        self.host.free(number(address))

    def _cuMemcpyHtoDAsync_v2(self, target: Any, source: Any, size: Any, stream: Any) -> None:
        target, source, size = number(target), number(source), number(size)
        self.device.check(target, size)
        if self.host.holds(source, source + size):
            self.put(stream, lambda: ctypes.memmove(target, source, size))
            return
        self._no_pageable(stream)
        staged = ctypes.string_at(source, size)  # as the driver does it
        self.put(stream, lambda: ctypes.memmove(target, staged, size))

    def _cuMemcpyDtoHAsync_v2(self, target: Any, source: Any, size: Any, stream: Any) -> None:
        target, source, size = number(target), number(source), number(size)
        self.device.check(source, size)
        self.put(stream, lambda: ctypes.memmove(target, source, size))
        if not self.host.holds(target, target + size):
            self._no_pageable(stream)
            self.drain()

    def _no_pageable(self, stream: Any) -> None:
        if (found := self._stream(stream)).captured is not None:
            found.broken = True
            raise Refusal(CAPTURE_UNSUPPORTED)

    def _cuMemcpyDtoDAsync_v2(self, target: Any, source: Any, size: Any, stream: Any) -> None:
        target, source, size = number(target), number(source), number(size)
        self.device.check(source, size)
        self.device.check(target, size)
        self.put(stream, lambda: ctypes.memmove(target, source, size))

    def _cuMemsetD8Async(self, address: Any, value: int, size: Any, stream: Any) -> None:
        address, size = number(address), number(size)
        self.device.check(address, size)
        if size > POISONED and value == 0:
            return  # it is zeros already, and shall not become real
        self.put(stream, lambda: ctypes.memset(address, value, size))

    # Streams, events, graphs.

    def _stream(self, stream: Any) -> Stream:
        if number(stream) not in self.streams:
            raise Refusal(INVALID_HANDLE)
        return self.streams[number(stream)]

    def put(self, stream: Any, op: Op) -> None:
        """Puts work into a stream, or into what is captured of it."""
        found = self._stream(stream)
        if found.captured is not None:
            found.captured.append(op)
        else:
            found.waiting.append(op)

    def drain(self) -> None:
        """Runs what waits."""
        for stream in self.streams.values():
            work, stream.waiting = stream.waiting, []
            for op in work:
                op()

    def _cuStreamCreate(self, pointer: Any, flags: int) -> None:
        if flags != 1:  # a blocking stream works on a card, until somebody uses the legacy stream
            raise Refusal(INVALID_VALUE)
        handle = next(self.handles)
        self.streams[handle] = Stream()
        give(pointer, handle)

    def _cuStreamSynchronize(self, stream: Any) -> None:
        self._stream(stream)
        self.drain()

    def _cuStreamBeginCapture_v2(self, stream: Any, mode: int) -> None:
        found = self._stream(stream)
        if found.captured is not None:
            raise Refusal(INVALID_VALUE)
        found.captured, found.thread, found.broken = [], threading.get_ident(), False

    def _cuStreamEndCapture(self, stream: Any, pointer: Any) -> None:
        found = self._stream(stream)
        captured, found.captured = found.captured, None
        if captured is None:
            raise Refusal(INVALID_VALUE)
        if found.broken:
            raise Refusal(CAPTURE_INVALIDATED)
        self.graphs[handle := next(self.handles)] = captured
        give(pointer, handle)

    def _cuGraphInstantiateWithFlags(self, pointer: Any, graph: Any, flags: Any) -> None:
        self.graphs[handle := next(self.handles)] = list(self.graphs[number(graph)])
        give(pointer, handle)

    def _cuGraphDestroy(self, graph: Any) -> None:
        del self.graphs[number(graph)]

    def _cuGraphExecDestroy(self, graph: Any) -> None:
        del self.graphs[number(graph)]

    def _cuGraphLaunch(self, graph: Any, stream: Any) -> None:
        if number(graph) not in self.graphs:
            raise Refusal(INVALID_HANDLE)
        for op in self.graphs[number(graph)]:
            self.put(stream, op)

    def _cuEventCreate(self, pointer: Any, flags: int) -> None:
        give(pointer, next(self.handles))

    def _cuEventRecord(self, event: Any, stream: Any) -> None:
        self._stream(stream)

    def _cuEventSynchronize(self, event: Any) -> None:
        self.drain()

    def _cuEventDestroy_v2(self, event: Any) -> None:
        pass

    # Kernels.

    def _cuModuleLoadData(self, pointer: Any, image: bytes) -> None:
        try:
            kernel = read_image(image)
        except (ValueError, TypeError):
            raise Refusal(INVALID_IMAGE) from None
        self.modules[handle := next(self.handles)] = kernel
        give(pointer, handle)

    def _cuModuleGetFunction(self, pointer: Any, module: Any, name: bytes) -> None:
        kernel = self.modules[number(module)]
        if name.decode() != kernel.function:
            raise Refusal(NOT_FOUND)
        self.kernels[handle := next(self.handles)] = kernel
        give(pointer, handle)

    def _cuFuncSetAttribute(self, function: Any, attribute: int, value: int) -> None:
        pass

    def _cuLaunchKernel(self, function: Any, *rest: Any) -> None:
        *grid, threads, y, z, _, stream, pointers, extra = rest
        kernel = self.kernels[number(function)]
        if min(grid) < 1 or max(grid[1:]) >= 1 << 16 or (threads, y, z) != (kernel.warps * 32, 1, 1) or extra:
            raise Refusal(INVALID_VALUE)
        values = {}
        for place, (name, kind) in enumerate(kernel.signature.items()):
            values[name] = read_argument(pointers[place], kind)
            if kind.startswith("*"):
                if values[name] % 16:
                    raise Refusal(MISALIGNED)
                self.device.check(values[name], 1)
        self.put(stream, lambda: interpret(kernel, tuple(grid), values, self.device))


def read_argument(address: int, kind: str) -> Any:
    if kind.startswith("*"):
        return ctypes.c_uint64.from_address(address).value
    types = {"i32": ctypes.c_int32, "i64": ctypes.c_int64, "fp32": ctypes.c_float}
    return types[kind].from_address(address).value


def write_image(module: str, kernel: Kernel) -> bytes:
    """A kernel in place of a cubin: it says which Triton function it is, and its constants."""
    return json.dumps({"module": module, **asdict(kernel)}).encode()


def read_image(image: bytes) -> Kernel:
    found = json.loads(image)
    MODULES[found["name"]] = found.pop("module")
    return Kernel(**{**found, "aligned": tuple(found["aligned"])})


MODULES: dict[str, str] = {}
"""The module of each kernel's Triton function, by the kernel's name."""

TORCH = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "i8": "int8", "u8": "uint8", "i32": "int32"}
TORCH |= {"i64": "int64", "fp8e4nv": "float8_e4m3fn"}


class Pointer:
    """What the interpreter takes for a tensor: an address, and the type of what lies there."""

    def __init__(self, address: int, kind: str) -> None:
        import torch

        self.address, self.dtype = address, getattr(torch, TORCH[kind.removeprefix("*")])

    def data_ptr(self) -> int:
        return self.address


def interpret(kernel: Kernel, grid: tuple[int, ...], values: dict[str, Any], memory: Memory) -> None:
    """Runs a kernel in Triton's interpreter, over memory as it lies."""
    from triton.runtime.interpreter import GridExecutor

    class InPlace(GridExecutor):  # type: ignore[misc]
        def _init_args_hst(self, args: Any, kwargs: Any) -> Any:
            return args, kwargs

        def _restore_args_dev(self, *_: Any) -> None:
            pass

    function = getattr(import_module(MODULES[kernel.name]), kernel.function)
    given = {
        name: Pointer(value, kernel.signature[name]) if kernel.signature[name].startswith("*") else value
        for name, value in values.items()
    }
    CHECKED.append(memory)
    try:
        InPlace(function.rewrite(), function.arg_names, grid, [])(**given, **kernel.constants)
    finally:
        CHECKED.pop()


CHECKED: list[Memory] = []
"""The memory that the kernel which runs may touch."""


def watch_accesses() -> None:
    """Has the interpreter of this process check each load and store of a kernel against the GPU's memory."""
    from triton.runtime.interpreter import InterpreterBuilder

    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def check(pointers: Any, mask: Any) -> None:
        if not CHECKED:
            return
        places = np.broadcast_to(pointers.data, mask.data.shape)[mask.data]
        if places.size:
            size = max(pointers.get_element_ty().primitive_bitwidth // 8, 1)
            if not CHECKED[-1].holds(int(places.min()), int(places.max()) + size):
                raise Refusal(ILLEGAL_ADDRESS)

    def checked_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        check(pointers, mask)
        return load(self, pointers, mask, *rest)

    def checked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        check(pointers, mask)
        return store(self, pointers, value, mask, *rest)

    InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store = checked_load, checked_store
