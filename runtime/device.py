"""A GPU's memory, stream and graphs, through CUDA's driver API.

Invariant: what is allocated here is freed here, when the object that owns it goes.
"""

import ctypes
from collections.abc import Callable
from typing import Any, Self

import numpy as np

from ..plugins.launch import Driver

CAPTURE_THREAD_LOCAL = 1  # CU_STREAM_CAPTURE_MODE_THREAD_LOCAL


class Memory:
    """Device memory of a fixed size; `address` is where it begins."""

    def __init__(self, device: "Device", size: int) -> None:
        self.device, self.size = device, size
        pointer = ctypes.c_uint64()
        device.driver.call("cuMemAlloc_v2", ctypes.byref(pointer), ctypes.c_size_t(max(size, 1)))
        self.address: int = pointer.value

    def __del__(self) -> None:
        if getattr(self, "address", 0):
            self.device.driver.call("cuMemFree_v2", ctypes.c_uint64(self.address))


class Device:
    """The first GPU, with its primary context current, and one stream."""

    def __init__(self, driver: Driver) -> None:
        self.driver = driver
        context, stream = ctypes.c_void_p(), ctypes.c_void_p()
        driver.call("cuDevicePrimaryCtxRetain", ctypes.byref(context), 0)
        driver.call("cuCtxSetCurrent", context)
        driver.call("cuStreamCreate", ctypes.byref(stream), 0)
        self.stream: int = stream.value or 0

    @classmethod
    def open(cls) -> Self:
        """Opens the first GPU.

        Raises:
            SessionError: There is no driver, or no GPU.
        """
        return cls(Driver())

    def upload(self, address: int, array: np.ndarray[Any, Any]) -> None:
        """Copies an array to the device, behind what the stream holds.

        The array may change afterwards: the driver reads pageable memory before the call returns.
        """
        source = np.ascontiguousarray(array)
        self.driver.call(
            "cuMemcpyHtoDAsync_v2",
            ctypes.c_uint64(address),
            ctypes.c_void_p(source.ctypes.data),
            ctypes.c_size_t(source.nbytes),
            ctypes.c_void_p(self.stream),
        )

    def download(self, address: int, array: np.ndarray[Any, Any]) -> None:
        """Fills an array from the device, and waits for it."""
        self.driver.call(
            "cuMemcpyDtoHAsync_v2",
            ctypes.c_void_p(array.ctypes.data),
            ctypes.c_uint64(address),
            ctypes.c_size_t(array.nbytes),
            ctypes.c_void_p(self.stream),
        )
        self.synchronise()

    def synchronise(self) -> None:
        """Waits for all that the stream holds."""
        self.driver.call("cuStreamSynchronize", ctypes.c_void_p(self.stream))

    def zero(self, memory: Memory) -> None:
        """Fills memory with zeros."""
        self.driver.call(
            "cuMemsetD8Async",
            ctypes.c_uint64(memory.address),
            0,
            ctypes.c_size_t(memory.size),
            ctypes.c_void_p(self.stream),
        )

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """Records what `work` puts into the stream as a CUDA graph. Returns what replays it."""
        graph, executable = ctypes.c_void_p(), ctypes.c_void_p()
        self.driver.call("cuStreamBeginCapture_v2", ctypes.c_void_p(self.stream), CAPTURE_THREAD_LOCAL)
        try:
            work()
        finally:
            self.driver.call("cuStreamEndCapture", ctypes.c_void_p(self.stream), ctypes.byref(graph))
        self.driver.call("cuGraphInstantiateWithFlags", ctypes.byref(executable), graph, ctypes.c_uint64(0))
        self.driver.call("cuGraphDestroy", graph)
        return lambda: self.driver.call("cuGraphLaunch", executable, ctypes.c_void_p(self.stream))
