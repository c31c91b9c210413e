"""Kernels run by Triton's interpreter over memory as it lies, each load and store checked against what is allocated.

Enter: regions of the host's memory that stand for a GPU's, and launches whose pointers are addresses in them. Leaves:
what the kernels wrote. To be used in a process whose Triton interprets; see `gpu_process`.
"""

import bisect
import ctypes
import json
import mmap
from dataclasses import asdict
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
POISONED = 64 << 20
"""Larger memory is not filled: it would be real."""


class Refusal(Exception):  # noqa: N818
    """A call that a card refuses, with CUDA's number for it."""

    def __init__(self, code: int) -> None:
        super().__init__(NAMES[code])
        self.code = code


NO_RESERVE = 0x4000  # Linux's MAP_NORESERVE


class Memory:
    """Regions of the host's memory, by where they begin."""

    def __init__(self) -> None:
        self.starts: list[int] = []
        self.regions: dict[int, tuple[int, Any]] = {}
        self.largest = self.allocations = 0

    def allocate(self, size: int) -> int:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE  # what is not touched is not there
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
    change = InterpreterBuilder.create_atomic_rmw

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

    def checked_change(self: Any, operation: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        check(pointers, mask)
        return change(self, operation, pointers, value, mask, *rest)

    InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store = checked_load, checked_store
    InterpreterBuilder.create_atomic_rmw = checked_change
