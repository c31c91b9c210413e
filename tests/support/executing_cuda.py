"""CUDA's driver library without a GPU: memory of the host, kernels in Triton's interpreter, streams that run late.

Enter: the calls that `plugins.launch.Driver` makes. Leaves: what a card would have computed, or the error it would have
given: for an allocation, a free or a wait while a stream is captured, for misaligned or freed addresses, for a thread
without a context, for a stream of another context. Work in a stream runs when somebody waits for it, so that what is
read or changed too early is seen. To be used in a process whose Triton interprets; see `gpu_process`.
"""

import ctypes
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from executed_kernels import (
    CAPTURE_INVALIDATED,
    CAPTURE_UNSUPPORTED,
    INVALID_HANDLE,
    INVALID_IMAGE,
    INVALID_VALUE,
    MISALIGNED,
    NAMES,
    NO_CONTEXT,
    NOT_FOUND,
    OUT_OF_MEMORY,
    POISONED,
    Memory,
    Refusal,
    interpret,
    read_argument,
    read_image,
)

from arriero.plugins.launch import Kernel

UNSAFE = frozenset({
    "cuMemAlloc_v2", "cuMemFree_v2", "cuMemHostAlloc", "cuMemFreeHost", "cuStreamSynchronize", "cuEventSynchronize",
    "cuModuleLoadData", "cuGraphExecDestroy", "cuStreamCreate", "cuMemGetInfo_v2",
})  # fmt: skip
"""Calls that end a capture of the same thread."""
WITHOUT_CONTEXT = frozenset({
    "cuInit", "cuDriverGetVersion", "cuDeviceGetCount", "cuDeviceGetAttribute", "cuDevicePrimaryCtxRetain",
    "cuCtxSetCurrent", "cuGetErrorString",
})  # fmt: skip
CONTEXT = 0xC0DE

Op = Callable[[], None]


@dataclass
class Stream:
    """Work that waits, and the work that is being captured."""

    waiting: list[Op] = field(default_factory=list)
    captured: list[Op] | None = None
    thread: int = 0
    broken: bool = False


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

    def _cuDeviceGetCount(self, pointer: Any) -> None:
        give(pointer, 1)

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

    def watch(self, stream: Any, version: Callable[[], int]) -> None:
        """Has what is captured refuse to run when its context has changed since."""
        if self._stream(stream).captured is not None:
            before = version()

            def check() -> None:
                assert version() == before, "a graph runs whose context has been changed since it was captured"

            self.put(stream, check)

    def drain(self) -> None:
        """Runs what waits."""
        for stream in self.streams.values():
            work, stream.waiting = stream.waiting, []
            for op in work:
                op()

    def forget(self) -> None:
        """Drops what waits: in place of `drain` where nothing shall be computed."""
        for stream in self.streams.values():
            stream.waiting.clear()

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

    def _cuLaunchKernelEx(self, pointer: Any, function: Any, pointers: Any, extra: Any) -> None:
        config = pointer._obj
        for attribute in config.attributes[: config.count]:
            self.calls["early"] += 1
            early = (attribute.id, attribute.value) == (6, 1) and self.kernels[number(function)].dependent
            if not early or self.capability < 90:
                raise Refusal(INVALID_VALUE)
        self._launch(function, (*config.grid, *config.block), config.stream, pointers, extra)

    def _launch(self, function: Any, shape: Any, stream: Any, pointers: Any, extra: Any) -> None:
        *grid, threads, y, z = shape
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
