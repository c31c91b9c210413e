"""What holds for kernels of any op: compiled ahead of time, interpreted, launched."""

import ctypes.util
import sys

import pytest
import triton
import triton.language as tl

from arriero.errors import SessionError
from arriero.plugins import triton_compiler as kernels
from arriero.plugins.launch import Buffer, Driver, Kernel, placed, total_size

KERNEL = Kernel(
    name="add_fp32",
    function="add",
    signature={"x": "*fp32", "y": "*fp32", "count": "i32"},
    constants={"BLOCK": 64},
)


@triton.jit
def add(x, y, count, BLOCK: tl.constexpr):
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = places < count
    tl.store(y + places, tl.load(x + places, mask=inside) + tl.load(y + places, mask=inside), mask=inside)


@pytest.mark.parametrize("capability", kernels.CAPABILITIES)
def test_a_kernel_compiles_for_each_gpu_without_one(capability: int) -> None:
    compiled = kernels.compile_kernel(sys.modules[__name__], KERNEL, capability)
    assert compiled.binary.parameters == ("*fp32", "*fp32", "i32")
    assert compiled.binary.threads == 128
    assert compiled.cubin.startswith(b"\x7fELF")
    used = kernels.usage(compiled)
    assert used.spilled == 0
    assert 0 < used.registers < 64


def test_scratch_buffers_lie_apart_and_aligned() -> None:
    buffers = {"a": Buffer(dtype="i32", shape=(3,)), "b": Buffer(dtype="bf16", shape=(2, 100))}
    assert placed(buffers, 4096) == {"a": 4096, "b": 4352}
    assert total_size(buffers) == 768


@pytest.mark.skipif(ctypes.util.find_library("cuda") is not None, reason="there is a driver here")
def test_a_machine_without_a_driver_is_told_so() -> None:
    with pytest.raises(SessionError, match="no NVIDIA driver here"):
        Driver()
