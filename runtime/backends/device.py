"""A GPU's memory, stream and graphs, through CUDA's driver API.

Invariant: memory and graphs are freed with the objects that own them; context and stream live as long as the process.
A thread calls `enter` before its first call of anything else: the driver's context is the thread's.
"""

import contextlib
import ctypes
from collections.abc import Callable
from typing import Any, Self

import numpy as np

from ...errors import SessionError
from ...plugins.launch import Driver

CAPTURE_THREAD_LOCAL = 1  # CU_STREAM_CAPTURE_MODE_THREAD_LOCAL


class Device:
    """A GPU, with its primary context, and one stream; the first one, where nothing is said."""

    def __init__(self, driver: Driver, number: int = 0) -> None:
        self.driver, self.number = driver, number
        self.context, stream = ctypes.c_void_p(), ctypes.c_void_p()
        driver.call("cuDevicePrimaryCtxRetain", ctypes.byref(self.context), number)
        self.enter()
        driver.call("cuStreamCreate", ctypes.byref(stream), 0)
        self.stream: int = stream.value or 0
        self.pending: list[np.ndarray[Any, Any]] = []

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

    def upload(self, address: int, array: np.ndarray[Any, Any]) -> None:
        """Copies an array to the device, behind what the stream holds; it may not change until `synchronise`."""
        source = np.ascontiguousarray(array)
        self.pending.append(source)
        self.driver.call(
            "cuMemcpyHtoDAsync_v2",
            ctypes.c_uint64(address),
            ctypes.c_void_p(source.ctypes.data),
            ctypes.c_size_t(source.nbytes),
            ctypes.c_void_p(self.stream),
        )

    def download(self, address: int, array: np.ndarray[Any, Any]) -> None:
        """Fills an array from the device, and waits for it."""
        self.fetch(address, array)
        self.synchronise()

    def fetch(self, address: int, array: np.ndarray[Any, Any]) -> None:
        """Fills an array from the device, behind what the stream holds; it may not be read until `synchronise`."""
        self.driver.call(
            "cuMemcpyDtoHAsync_v2",
            ctypes.c_void_p(array.ctypes.data),
            ctypes.c_uint64(address),
            ctypes.c_size_t(array.nbytes),
            ctypes.c_void_p(self.stream),
        )

    def copy(self, source: int, target: int, size: int) -> None:
        """Copies bytes on the device, behind what the stream holds."""
        self.driver.call(
            "cuMemcpyDtoDAsync_v2",
            ctypes.c_uint64(target),
            ctypes.c_uint64(source),
            ctypes.c_size_t(size),
            ctypes.c_void_p(self.stream),
        )

    def synchronise(self) -> None:
        """Waits for all that the stream holds."""
        self.driver.call("cuStreamSynchronize", ctypes.c_void_p(self.stream))
        self.pending.clear()

    def capture(self, work: Callable[[], None]) -> "DeviceGraph":
        """Records the calls that `work` puts into the stream, without running them."""
        graph = ctypes.c_void_p()
        self.driver.call("cuStreamBeginCapture_v2", ctypes.c_void_p(self.stream), CAPTURE_THREAD_LOCAL)
        try:
            work()
        finally:
            self.driver.call("cuStreamEndCapture", ctypes.c_void_p(self.stream), ctypes.byref(graph))
        return DeviceGraph(self, graph)


class DeviceMemory:
    """Device memory of a fixed size; `address` is where it begins."""

    def __init__(self, device: Device, size: int) -> None:
        self.device, self.size = device, size
        pointer = ctypes.c_uint64()
        device.driver.call("cuMemAlloc_v2", ctypes.byref(pointer), ctypes.c_size_t(max(size, 1)))
        self.address: int = pointer.value

    def zero(self) -> None:
        """Fills the memory with zeros, behind what the stream holds."""
        stream, size = ctypes.c_void_p(self.device.stream), ctypes.c_size_t(self.size)
        self.device.driver.call("cuMemsetD8Async", ctypes.c_uint64(self.address), 0, size, stream)

    def __del__(self) -> None:
        if getattr(self, "address", 0):
            with contextlib.suppress(SessionError):  # the process ends, and the driver with it
                self.device.enter()
                self.device.driver.call("cuMemFree_v2", ctypes.c_uint64(self.address))


class DeviceGraph:
    """Work that was recorded once and is launched as a whole."""

    def __init__(self, device: Device, graph: ctypes.c_void_p) -> None:
        self.device, self.executable = device, ctypes.c_void_p()
        try:
            device.driver.call("cuGraphInstantiateWithFlags", ctypes.byref(self.executable), graph, ctypes.c_uint64(0))
        finally:
            device.driver.call("cuGraphDestroy", graph)

    def launch(self) -> None:
        """Puts the work into the stream."""
        self.device.driver.call("cuGraphLaunch", self.executable, ctypes.c_void_p(self.device.stream))

    def __del__(self) -> None:
        if getattr(self, "executable", None):
            with contextlib.suppress(SessionError):
                self.device.enter()
                self.device.driver.call("cuGraphExecDestroy", self.executable)
