"""Compiled kernels and their launches, by CUDA's driver API and ctypes: no Triton, no torch.

An op's `plan` says which kernels it needs (`Kernel`) and, for a call of given shapes, what to launch in which order
(`Launch`). Pointers pass through a plan untouched: they are device addresses on a GPU, tensors in Triton's
interpreter. Invariant: nothing here waits for the GPU or allocates while launching, so a CUDA graph can capture it.
"""

import ctypes
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import SessionError
from ..spec.built_engine import Binary

BYTES = {"bf16": 2, "fp16": 2, "fp32": 4, "i8": 1, "u8": 1, "fp8e4nv": 1, "i32": 4, "i64": 8}
"""Sizes of the types that signatures name, in Triton's words."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Kernel:
    """One specialisation of a Triton kernel.

    Attributes:
        name: Unique among the kernels of a bundle; says op, part and specialisation.
        function: Name of the Triton function.
        signature: Type of each run-time parameter, in order: `*bf16`, `i32`, `fp32`, ….
        constants: The compile-time parameters.
        aligned: Integer parameters that are multiples of 16 in every call. Pointers always are.
        warps: Warps a program.
        stages: Depth of the software pipeline.
    """

    name: str
    function: str
    signature: dict[str, str]
    constants: dict[str, Any]
    aligned: tuple[str, ...] = ()
    warps: int = 4
    stages: int = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Launch:
    """One kernel launch: a kernel's name, its grid, and its run-time arguments in the signature's order."""

    kernel: str
    grid: tuple[int, int, int]
    arguments: tuple[Any, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Buffer:
    """Scratch memory that a plan asks for: a type of `BYTES` and a shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes, rounded up so that the next buffer is aligned too."""
        return ceil_divide(math.prod(self.shape) * BYTES[self.dtype], 256) * 256


SHARED_WITHOUT_ASKING = 48 * 1024
CAPABILITY_MAJOR, CAPABILITY_MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*
MAX_DYNAMIC_SHARED_SIZE = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
CTYPES: dict[str, Any] = {"i32": ctypes.c_int32, "i64": ctypes.c_int64, "fp32": ctypes.c_float}


class Driver:
    """CUDA's driver library, with errors raised.

    Raises:
        SessionError: There is no driver on this machine, or a call fails.
    """

    def __init__(self) -> None:
        try:
            self.library = ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            raise SessionError("no NVIDIA driver here (libcuda.so.1 is missing): run this bundle on a GPU") from error
        self.call("cuInit", 0)

    def call(self, function: str, *arguments: Any) -> None:
        """Calls a function of the driver."""
        code = getattr(self.library, function)(*arguments)
        if code:
            text = ctypes.c_char_p()
            self.library.cuGetErrorString(code, ctypes.byref(text))
            raise SessionError(f"{function} failed: {(text.value or b'unknown error').decode()} ({code})")

    def devices(self) -> int:
        """The number of GPUs."""
        count = ctypes.c_int()
        self.call("cuDeviceGetCount", ctypes.byref(count))
        return count.value

    def capability(self, number: int = 0) -> int:
        """The compute capability of a GPU, as in 89."""
        major, minor = ctypes.c_int(), ctypes.c_int()
        self.call("cuDeviceGetAttribute", ctypes.byref(major), CAPABILITY_MAJOR, number)
        self.call("cuDeviceGetAttribute", ctypes.byref(minor), CAPABILITY_MINOR, number)
        return major.value * 10 + minor.value


class Kernels:
    """The kernels of a bundle, loaded into the current CUDA context.

    Args:
        driver: The driver.
        folder: Where the cubins lie.
        binaries: The kernels of this GPU's compute capability.

    Raises:
        SessionError: A cubin is missing or the driver refuses it.
    """

    def __init__(self, driver: Driver, folder: Path, binaries: Iterable[Binary]) -> None:
        self.driver = driver
        self.binaries = {binary.kernel: binary for binary in binaries}
        self.capability = max((binary.capability for binary in self.binaries.values()), default=0)
        self.functions = {name: self._load(folder / binary.file, binary) for name, binary in self.binaries.items()}

    def _load(self, path: Path, binary: Binary) -> ctypes.c_void_p:
        try:
            image = path.read_bytes()
        except OSError as error:
            raise SessionError(f"{path}: {error.strerror}: build the bundle again") from error
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        self.driver.call("cuModuleLoadData", ctypes.byref(module), image)
        self.driver.call("cuModuleGetFunction", ctypes.byref(function), module, binary.entry.encode())
        if binary.shared > SHARED_WITHOUT_ASKING:
            self.driver.call("cuFuncSetAttribute", function, MAX_DYNAMIC_SHARED_SIZE, binary.shared)
        return function

    def launch(self, launch: Launch, stream: int) -> None:
        """Puts one launch into a stream. Its pointers are device addresses."""
        binary = self.binaries[launch.kernel]
        assert len(launch.arguments) == len(binary.parameters)
        values = [
            ctypes.c_uint64(argument) if kind.startswith("*") else CTYPES[kind](argument)
            for kind, argument in zip(binary.parameters, launch.arguments, strict=True)
        ]
        values += [ctypes.c_uint64(0), ctypes.c_uint64(0)]  # Triton's scratch pointers, unused
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        self.driver.call(
            "cuLaunchKernel",
            self.functions[launch.kernel],
            *launch.grid,
            *(binary.threads, 1, 1),
            binary.shared,
            ctypes.c_void_p(stream),
            pointers,
            None,
        )


def ceil_divide(count: int, size: int) -> int:
    """Blocks of a size that hold a count."""
    return -(-count // size)


def power_of_two(count: int) -> int:
    """The least power of two that is not below."""
    return 1 << (count - 1).bit_length()


def placed(buffers: Mapping[str, Buffer], start: int) -> dict[str, int]:
    """Addresses of scratch buffers that lie one behind another from `start`."""
    addresses = {}
    for name, buffer in buffers.items():
        addresses[name] = start
        start += buffer.size
    return addresses


def total_size(buffers: Mapping[str, Buffer]) -> int:
    """Bytes that the buffers take together."""
    return sum(buffer.size for buffer in buffers.values())
