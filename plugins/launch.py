"""Compiled kernels and their launches, by CUDA's driver API and ctypes: no Triton, no torch.

An op's `plan` says which kernels it needs (`Kernel`) and, for a call of given shapes, what to launch in which order
(`Launch`). Pointers pass through a plan untouched: they are device addresses on a GPU, tensors in Triton's
interpreter. Invariant: nothing here waits for the GPU or allocates while launching, so a CUDA graph can capture it.
"""

import ctypes
import hashlib
import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ..errors import SessionError
from ..files.reading import read_bytes
from ..spec.built_engine import Binary

BYTES = {"bf16": 2, "fp16": 2, "fp32": 4, "i8": 1, "u8": 1, "fp8e4nv": 1, "i32": 4, "i64": 8}
"""Sizes of the types that signatures name, in Triton's words."""


COUNTERS = 1 << 16
"""Counters, zeros between launches, by which the programs of a launch tell who is last; a session keeps them."""

DEPENDENT_FROM = 90
"""The compute capability from which a kernel may be launched while the one before it runs."""

ALIGNMENT = 256
"""Addresses that TensorRT takes are multiples of this."""


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
        dependent: Whether it may be launched while the kernel before it runs, for whose end it waits by itself.
    """

    name: str
    function: str
    signature: dict[str, str]
    constants: dict[str, Any]
    aligned: tuple[str, ...] = ()
    warps: int = 4
    stages: int = 3
    dependent: bool = False


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
        return round_up(math.prod(self.shape) * BYTES[self.dtype], ALIGNMENT)


SHARED_WITHOUT_ASKING = 48 * 1024
CAPABILITY_MAJOR, CAPABILITY_MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*
MAX_DYNAMIC_SHARED_SIZE = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
FORMATS = {"i32": "<i4x", "i64": "<q", "fp32": "<f4x"}
"""Layouts of the numbers among a launch's arguments, eight bytes each."""


class Attribute(ctypes.Structure):
    """CUlaunchAttribute, of which one is used: that a kernel may start while the one before it in the stream runs."""

    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_char * 4), ("value", ctypes.c_int), ("rest", ctypes.c_char * 60))


EARLY = Attribute(id=6, value=1)  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION


class LaunchConfig(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(Attribute)),
        ("count", ctypes.c_uint),
    )


class Driver:
    """CUDA's driver library, with errors raised.

    Args:
        library: The library; None loads the machine's.

    Raises:
        SessionError: There is no driver on this machine, or a call fails.
    """

    def __init__(self, library: Any = None) -> None:
        try:
            self.library = library or ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            raise SessionError("no NVIDIA driver here (libcuda.so.1 is missing): run this bundle on a GPU") from error
        self.call("cuInit", 0)

    def call(self, function: str, *arguments: Any) -> None:
        """Calls a function of the driver."""
        code = getattr(self.library, function)(*arguments)
        if code:
            self.fail(function, code)

    def fail(self, function: str, code: int) -> None:
        """Raises what a function's code means, which is not 0."""
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

    def version(self) -> tuple[int, int]:
        """The newest CUDA that the driver serves, as in 13.0."""
        found = ctypes.c_int()
        self.call("cuDriverGetVersion", ctypes.byref(found))
        return found.value // 1000, found.value % 1000 // 10


class Memory(Protocol):
    """Memory on the GPU."""

    address: int


class Kernels:
    """The kernels of a bundle, loaded into the current CUDA context.

    Args:
        driver: The driver.
        folder: Where the cubins lie.
        binaries: The kernels of this GPU's compute capability.
        counters: Memory of COUNTERS zeros, int32, that the calls in one stream share; None where none is launched that
            counts.

    Raises:
        SessionError: A cubin is missing or the driver refuses it.
    """

    def __init__(
        self, driver: Driver, folder: Path, binaries: Iterable[Binary], counters: Memory | None = None
    ) -> None:
        self.driver, self.memory = driver, counters  # kept as long as the kernels are
        self.counters = 0 if counters is None else counters.address
        self.binaries = {binary.kernel: binary for binary in binaries}
        self.capability = max((binary.capability for binary in self.binaries.values()), default=0)
        self.functions = {name: self._load(folder / binary.file, binary) for name, binary in self.binaries.items()}

    def _load(self, path: Path, binary: Binary) -> ctypes.c_void_p:
        try:
            image = read_bytes(path, SessionError, "build the bundle again", folder=path.parent)
        except FileNotFoundError as error:
            raise SessionError(f"{path}: {error.strerror}: build the bundle again") from error
        if hashlib.sha256(image).hexdigest() != binary.sha256:
            raise SessionError(f"{path} is not what was built (truncated or changed): build the bundle again")
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        self.driver.call("cuModuleLoadData", ctypes.byref(module), image)
        self.driver.call("cuModuleGetFunction", ctypes.byref(function), module, binary.entry.encode())
        if binary.shared > SHARED_WITHOUT_ASKING:
            self.driver.call("cuFuncSetAttribute", function, MAX_DYNAMIC_SHARED_SIZE, binary.shared)
        return function

    def launch(self, launch: Launch, stream: int) -> None:
        """Puts one launch into a stream. Its pointers are device addresses."""
        Packed(self, [launch]).enqueue([], stream)


class Packed:
    """Launches whose arguments are packed once; what changes from call to call is a table of addresses.

    Args:
        kernels: Loaded.
        launches: Pointers that are texts name addresses that `enqueue` is given; others stay as they are.
        names: Names of these addresses, in their order.

    Raises:
        SessionError: A kernel is not among those loaded.
    """

    def __init__(self, kernels: Kernels, launches: Sequence[Launch], names: Sequence[str] = ()) -> None:
        self.driver, self.stream = kernels.driver, 0
        self.launch = kernels.driver.library.cuLaunchKernelEx
        self.table = (ctypes.c_uint64 * len(names))()
        first = ctypes.addressof(self.table)
        self.places = {name: first + 8 * index for index, name in enumerate(names)}
        self.slots: list[Any] = []  # kept: the driver is given their addresses
        self.configs: list[LaunchConfig] = []
        self.calls = [self._pack(kernels, launch) for launch in launches]

    def _pack(self, kernels: Kernels, launch: Launch) -> tuple[Any, ...]:
        """The arguments of `cuLaunchKernelEx` for a launch: four, where `cuLaunchKernel` has eleven to convert."""
        binary = kernels.binaries.get(launch.kernel)
        if binary is None:
            raise SessionError(f"the bundle has no kernel {launch.kernel} for this GPU: build it again")
        if len(launch.arguments) != len(binary.parameters):
            raise SessionError(f"the bundle's kernel {launch.kernel} is another version's: build it again")
        slots = (ctypes.c_uint64 * (len(launch.arguments) + 2))()  # behind them Triton's scratch pointers, unused
        self.slots.append(slots)
        first = ctypes.addressof(slots)
        pointers = (ctypes.c_void_p * len(slots))(*range(first, first + 8 * len(slots), 8))
        for index, (kind, argument) in enumerate(zip(binary.parameters, launch.arguments, strict=True)):
            if isinstance(argument, str):
                pointers[index] = self.places[argument]
            else:
                slots[index] = int.from_bytes(struct.pack(FORMATS.get(kind, "<Q"), argument), "little")
        config = LaunchConfig(grid=launch.grid, block=(binary.threads, 1, 1), shared=binary.shared)
        if binary.dependent:
            config.attributes, config.count = ctypes.pointer(EARLY), 1
        self.configs.append(config)
        return ctypes.byref(config), kernels.functions[launch.kernel], pointers, None

    def enqueue(self, addresses: Sequence[int], stream: int) -> None:
        """Puts the launches into a stream, in order; the driver has read their arguments when it returns."""
        self.table[:] = [*addresses]
        if self.stream != stream:
            self.stream = stream
            for config in self.configs:
                config.stream = stream
        launch = self.launch
        for each in self.calls:
            if code := launch(*each):
                self.driver.fail("cuLaunchKernelEx", code)


def ceil_divide(count: int, size: int) -> int:
    """Blocks of a size that hold a count."""
    return -(-count // size)


def round_up(count: int, size: int) -> int:
    """The least multiple of a size that is not below."""
    return ceil_divide(count, size) * size


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
