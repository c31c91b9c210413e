"""A GPU's memory, stream and graphs, and the host's pinned memory, through CUDA's driver API.

Invariants: memory and graphs are freed with the objects that own them, but never while the stream is captured, which
the driver would refuse: then they wait for its end. Context and stream live as long as the process. A thread calls
`enter` before its first call of anything else: the driver's context is the thread's.
"""

import contextlib
import ctypes
import gc
import weakref
from collections.abc import Callable
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from ...errors import SessionError
from ...plugins.launch import Driver

CAPTURE_THREAD_LOCAL = 1  # CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING: nothing that uses the legacy stream breaks a capture
NO_TIMING = 2  # CU_EVENT_DISABLE_TIMING
PIECE = 64 << 20
"""Bytes of a weight that are sent to the GPU at a time."""


class Device:
    """A GPU, with its primary context, and one stream; the first one, where nothing is said."""

    def __init__(self, driver: Driver, number: int = 0) -> None:
        self.driver, self.number = driver, number
        self.context, stream = ctypes.c_void_p(), ctypes.c_void_p()
        self.capturing = False
        self.released: list[tuple[str, Any]] = []
        driver.call("cuDevicePrimaryCtxRetain", ctypes.byref(self.context), number)
        self.enter()
        driver.call("cuStreamCreate", ctypes.byref(stream), NON_BLOCKING)
        self.stream: int = stream.value or 0
        self._stream = stream
        self.pending: list[NDArray[Any]] = []

    @classmethod
    def open(cls, number: int = 0) -> Self:
        """Opens a GPU, by its number among those that the process sees.

        Raises:
            SessionError: There is no driver, or no such GPU.
        """
        driver = Driver()
        if number and (present := driver.devices()) <= number:
            raise SessionError(f"rank {number} needs a GPU of its own, and there are {present}: run fewer ranks")
        return cls(driver, number)

    def enter(self) -> None:
        """Makes the GPU's context the calling thread's."""
        self.driver.call("cuCtxSetCurrent", self.context)

    def free_memory(self) -> int:
        """Bytes of the GPU's memory that nobody has."""
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self.driver.call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        return free.value

    def upload(self, address: int, array: NDArray[Any]) -> None:
        """Copies an array to the device, behind what the stream holds; it may not change until `synchronise`."""
        source = np.ascontiguousarray(array)
        self.pending.append(source)
        self.send(address, source.ctypes.data, source.nbytes)

    def send(self, address: int, source: int, size: int) -> None:
        """Copies bytes of the host to the device, behind what the stream holds; they may not change until then."""
        self.driver.call(
            "cuMemcpyHtoDAsync_v2",
            ctypes.c_uint64(address),
            ctypes.c_void_p(source),
            ctypes.c_size_t(size),
            self._stream,
        )

    def download(self, address: int, array: NDArray[Any]) -> None:
        """Fills an array from the device, and waits for it."""
        self.fetch(address, array)
        self.synchronise()

    def fetch(self, address: int, array: NDArray[Any]) -> None:
        """Fills an array from the device, behind what the stream holds; it may not be read until `synchronise`."""
        self.receive(address, array.ctypes.data, array.nbytes)

    def receive(self, address: int, target: int, size: int) -> None:
        """Copies bytes of the device to the host, behind what the stream holds."""
        self.driver.call(
            "cuMemcpyDtoHAsync_v2",
            ctypes.c_void_p(target),
            ctypes.c_uint64(address),
            ctypes.c_size_t(size),
            self._stream,
        )

    def copy(self, source: int, target: int, size: int) -> None:
        """Copies bytes on the device, behind what the stream holds."""
        self.driver.call(
            "cuMemcpyDtoDAsync_v2",
            ctypes.c_uint64(target),
            ctypes.c_uint64(source),
            ctypes.c_size_t(size),
            self._stream,
        )

    def synchronise(self) -> None:
        """Waits for all that the stream holds."""
        self.driver.call("cuStreamSynchronize", self._stream)
        self.pending.clear()

    def capture(self, work: Callable[[], None]) -> "DeviceGraph":
        """Records the calls that `work` puts into the stream, without running them.

        Raises:
            SessionError: Something in it cannot be recorded; the stream is as before.
        """
        graph, collecting = ctypes.c_void_p(), gc.isenabled()
        gc.disable()  # what it would free is freed by calls that end a capture
        self.capturing = True
        try:
            self.driver.call("cuStreamBeginCapture_v2", self._stream, CAPTURE_THREAD_LOCAL)
            try:
                work()
            except BaseException:
                with contextlib.suppress(SessionError):  # the reason is the first error, not that the capture is broken
                    self.driver.call("cuStreamEndCapture", self._stream, ctypes.byref(graph))
                if graph:
                    self.driver.call("cuGraphDestroy", graph)
                raise
            self.driver.call("cuStreamEndCapture", self._stream, ctypes.byref(graph))
            return DeviceGraph(self, graph)
        finally:
            self.capturing = False
            if collecting:
                gc.enable()
            self._free_released()

    def own(self, owner: object, function: str, handle: Any) -> None:
        """Has the driver free a handle when its owner goes; at the end of the process the driver frees all itself."""
        weakref.finalize(owner, self.release, function, handle).atexit = False

    def release(self, function: str, handle: Any) -> None:
        """Frees a handle, or has it freed when the stream is no longer captured."""
        self.released.append((function, handle))
        if not self.capturing:
            self._free_released()

    def _free_released(self) -> None:
        while self.released:
            function, handle = self.released.pop()
            with contextlib.suppress(SessionError):  # the process ends, and the driver with it
                self.enter()
                self.driver.call(function, handle)


class DeviceMemory:
    """Device memory of a fixed size; `address` is where it begins, a multiple of 256 as the driver gives it."""

    def __init__(self, device: Device, size: int) -> None:
        self.device, self.size = device, size
        pointer = ctypes.c_uint64()
        device.driver.call("cuMemAlloc_v2", ctypes.byref(pointer), ctypes.c_size_t(max(size, 1)))
        self.address: int = pointer.value
        device.own(self, "cuMemFree_v2", pointer)

    def zero(self) -> None:
        """Fills the memory with zeros, behind what the stream holds."""
        stream, size = ctypes.c_void_p(self.device.stream), ctypes.c_size_t(self.size)
        self.device.driver.call("cuMemsetD8Async", ctypes.c_uint64(self.address), 0, size, stream)


class PinnedMemory:
    """Memory of the host that the GPU copies from and to by itself; `bytes` are all of it."""

    def __init__(self, device: Device, size: int) -> None:
        self.device, self.size = device, size
        pointer = ctypes.c_void_p()
        device.driver.call("cuMemHostAlloc", ctypes.byref(pointer), ctypes.c_size_t(max(size, 1)), 0)
        self.address: int = pointer.value or 0
        self.bytes: NDArray[np.uint8] = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(self.address))
        device.own(self, "cuMemFreeHost", pointer)


class Uploads:
    """Two pinned buffers that weights pass through: one is filled from a file while the other is copied."""

    def __init__(self, device: Device, size: int = PIECE) -> None:
        self.device = device
        self.buffers = [PinnedMemory(device, size) for _ in range(2)]
        self.events: list[ctypes.c_void_p] = []
        for _ in self.buffers:
            event = ctypes.c_void_p()
            device.driver.call("cuEventCreate", ctypes.byref(event), NO_TIMING)
            device.own(self, "cuEventDestroy_v2", event)
            self.events.append(event)
        self.used = 0

    def send(self, address: int, source: NDArray[np.uint8]) -> None:
        """Sends bytes to the device; they are read when this returns. `Device.synchronise` waits for the last ones."""
        for start in range(0, len(source), self.buffers[0].size):
            buffer, event = self.buffers[self.used % 2], self.events[self.used % 2]
            if self.used >= 2:
                self.device.driver.call("cuEventSynchronize", event)
            piece = source[start : start + buffer.size]
            buffer.bytes[: len(piece)] = piece
            self.device.send(address + start, buffer.address, len(piece))
            self.device.driver.call("cuEventRecord", event, ctypes.c_void_p(self.device.stream))
            self.used += 1


class DeviceGraph:
    """Work that was recorded once and is launched as a whole."""

    def __init__(self, device: Device, graph: ctypes.c_void_p) -> None:
        self.device, self.executable = device, ctypes.c_void_p()
        try:
            device.driver.call("cuGraphInstantiateWithFlags", ctypes.byref(self.executable), graph, ctypes.c_uint64(0))
        finally:
            device.driver.call("cuGraphDestroy", graph)
        device.own(self, "cuGraphExecDestroy", self.executable)

    def launch(self) -> None:
        """Puts the work into the stream."""
        self.device.driver.call("cuGraphLaunch", self.executable, ctypes.c_void_p(self.device.stream))
