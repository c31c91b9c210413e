"""What holds for kernels of any op: compiled ahead of time, interpreted, launched."""

import ctypes.util
import sys

import pytest
import triton
import triton.language as tl

from arriero.engine.target import CAPABILITIES
from arriero.errors import BuildError, SessionError
from arriero.plugins import triton_compiler as kernels
from arriero.plugins.gqa import kernel as gqa_kernel
from arriero.plugins.gqa.op import Attributes as GqaAttributes
from arriero.plugins.gqa.plan import Geometry as GqaGeometry
from arriero.plugins.gqa.plan import Plan as GqaPlan
from arriero.plugins.launch import Buffer, Driver, Kernel, placed, total_size
from arriero.plugins.moe import kernel as moe_kernel
from arriero.plugins.moe.kernel_geometry import Geometry as MoeGeometry
from arriero.plugins.moe.op import Attributes as MoeAttributes
from arriero.plugins.moe.plan import Plan as MoePlan

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


def test_kernels_fit_every_gpu_that_engines_are_built_for() -> None:
    assert {each for known in CAPABILITIES.values() for each in known} == set(kernels.CAPABILITIES)
    assert set(kernels.SHARED) == set(kernels.CAPABILITIES)


@pytest.mark.parametrize("capability", [86, 103, 121])  # the ops' own tests compile all kernels for the others
def test_the_largest_tiles_fit_the_other_gpus(capability: int) -> None:
    heads = GqaAttributes(heads=40, kv_heads=8, scale=0.1)
    attention = GqaPlan(GqaGeometry(attributes=heads, head_dim=128, rope=False, dtype="bf16"), capability)
    sizes = MoeGeometry(hidden=5120, expert_size=8192, experts=16, attributes=MoeAttributes(top_k=1))
    experts = MoePlan(sizes, capability)
    for module, kernel in ((gqa_kernel, attention.kernels), (moe_kernel, experts.kernels)):
        for each in kernel:
            if each.name.endswith(("_many", "attend_many_bf16_40x8x128")) and "arrange" not in each.name:
                assert kernels.usage(kernels.compile_kernel(module, each, capability)).spilled == 0


def test_a_kernel_too_large_for_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(kernels.SHARED, 89, -1)
    with pytest.raises(BuildError, match="add_fp32 wants 0 bytes of shared memory, sm89 has -1024: build for an"):
        kernels.compile_kernel(sys.modules[__name__], KERNEL, 89)


def test_scratch_buffers_lie_apart_and_aligned() -> None:
    buffers = {"a": Buffer(dtype="i32", shape=(3,)), "b": Buffer(dtype="bf16", shape=(2, 100))}
    assert placed(buffers, 4096) == {"a": 4096, "b": 4352}
    assert total_size(buffers) == 768


@pytest.mark.skipif(ctypes.util.find_library("cuda") is not None, reason="there is a driver here")
def test_a_machine_without_a_driver_is_told_so() -> None:
    with pytest.raises(SessionError, match="no NVIDIA driver here"):
        Driver()
