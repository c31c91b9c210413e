"""The Triton kernels of mixture-of-experts dispatch: what they compute, what they compile to, and on a GPU both."""

import dataclasses
import inspect
import itertools
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from moe_calls import TYPES, WAYS, inputs_of, interpret, packed, plan_of, ways_of
from tables import sampled
from triton_interpreter import Interpreter

from arriero.errors import BuildError
from arriero.plugins import triton_compiler as kernels
from arriero.plugins.launch import COUNTERS, Driver, Kernels
from arriero.plugins.moe import kernel
from arriero.plugins.moe.cases import CASES, QUANTISED_CASES, Case, quantised
from arriero.plugins.moe.kernel_geometry import Geometry
from arriero.plugins.moe.meaning import moe_dispatch
from arriero.plugins.moe.op import Attributes
from arriero.plugins.moe.plan import Plan

Array = np.ndarray[Any, Any]


def distance(found: Array, expected: Array) -> float:
    error, size = np.linalg.norm(found - expected), np.linalg.norm(expected)
    return float(error / size) if size else float(error)  # no expert held may be a token's: all zeros


def cases_and_ways(cases: tuple[Case, ...]) -> list[Any]:
    return [pytest.param(case, way, id=f"{case.name}-{way}") for case in cases for way in ways_of(case)]


@pytest.mark.parametrize(("case", "way"), cases_and_ways(CASES))
def test_the_kernels_equal_the_meaning(interpreter: Interpreter, case: Case, way: str) -> None:
    inputs = inputs_of(case, np.float32)
    found = interpret(interpreter, plan_of(case, way), inputs)
    assert np.abs(found - moe_dispatch(**inputs, attributes=case.attributes)).max() < 3e-6


@pytest.mark.parametrize(("case", "way"), cases_and_ways(QUANTISED_CASES))
def test_the_kernels_of_quantised_experts_equal_the_meaning(interpreter: Interpreter, case: Case, way: str) -> None:
    if case.attributes.quantisation == "int4":  # whose integers become fp16 or bf16 by their bits
        inputs = inputs_of(case, np.float16)
        found = interpret(interpreter, plan_of(case, way, "fp16"), inputs)
        assert distance(found, moe_dispatch(**inputs, attributes=case.attributes)) < 1e-3
        return
    inputs = inputs_of(case, np.float32)
    found = interpret(interpreter, plan_of(case, way), inputs)
    error = np.abs(found - moe_dispatch(**inputs, attributes=case.attributes))
    assert np.median(error) < 1e-6
    assert error.max() < 3e-2  # what lies on the border of two steps may fall to either side in float32


@pytest.mark.parametrize("name", ["int4, one token", "int4, groups of 8", "int4, groups of 64"])
def test_scales_of_groups_may_have_the_tokens_type(interpreter: Interpreter, name: str) -> None:
    case = next(case for case in QUANTISED_CASES if case.name == name)
    inputs = inputs_of(case, np.float16)
    for name in ("gate_up_scale", "down_scale"):
        inputs[name] = inputs[name].astype(np.float16).astype(np.float32)
    turned = {name: inputs[name].astype(np.float16).swapaxes(1, 2).copy() for name in ("gate_up_scale", "down_scale")}
    expected = moe_dispatch(**inputs, attributes=case.attributes)
    for way in ways_of(case):
        plan = plan_of(case, way, "fp16", scale="fp16")
        assert {kernel.signature.get("weight_scale") for kernel in plan.kernels} <= {"*fp16", None}
        assert distance(interpret(interpreter, plan, inputs | turned), expected) < 1e-3


@pytest.mark.parametrize(("dtype", "most"), [("bf16", 1e-2), ("fp16", 1e-3)])
@pytest.mark.parametrize(
    "name", ["few tokens", "two experts a token", "int4, one token", "int4, groups of 64", "fp8, static"]
)
def test_half_precision_costs_its_rounding_only(interpreter: Interpreter, name: str, dtype: str, most: float) -> None:
    case = next(case for case in (*CASES, *QUANTISED_CASES) if case.name == name)
    inputs = inputs_of(case, TYPES[dtype])
    found = interpret(interpreter, plan_of(case, ways_of(case)[0], dtype), inputs)
    # quantised activations that the rounding moves over a border move by a whole step
    most = most if case.attributes.quantisation in ("none", "int4") else 3e-2
    assert distance(found, moe_dispatch(**inputs, attributes=case.attributes)) < most


@pytest.mark.parametrize("way", WAYS)
def test_of_equal_logits_the_lower_expert_is_taken(interpreter: Interpreter, way: str) -> None:
    case = Case(name="ties", attributes=Attributes(top_k=2), tokens=8, experts=5)
    inputs = inputs_of(case, np.float32)
    inputs["router_logits"] = np.round(inputs["router_logits"]).clip(-1, 0)
    ordered = np.sort(inputs["router_logits"])
    assert (ordered[:, -2] == ordered[:, -3]).any(), "the case has no ties to decide"
    found = interpret(interpreter, plan_of(case, way), inputs)
    assert np.abs(found - moe_dispatch(**inputs, attributes=case.attributes)).max() < 3e-6


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("top_k", [1, 2])
def test_experts_on_two_gpus_add_up(interpreter: Interpreter, top_k: int, way: str) -> None:
    attributes = Attributes(top_k=top_k, quantisation="int8")
    case = Case(name="two GPUs", attributes=attributes, tokens=8, experts=6, static=True)
    inputs = inputs_of(case, np.float32)
    total = np.zeros_like(inputs["hidden"], dtype=np.float64)
    for first, count in ((0, 4), (4, 2)):
        local = {
            name: array if name in ("hidden", "router_logits") else array[first : first + count]
            for name, array in inputs.items()
        }
        total += interpret(interpreter, plan_of(case, way, first_expert=first, local_experts=count), local)
    error = np.abs(total - moe_dispatch(**inputs, attributes=attributes))
    assert np.median(error) < 1e-6
    assert error.max() < 3e-2


@pytest.mark.parametrize("name", ["int8, two experts a token", "int4, one token"])
def test_it_does_not_matter_which_program_is_the_last(interpreter: Interpreter, name: str) -> None:
    case = next(case for case in (*CASES, *QUANTISED_CASES) if case.name == name)
    case = dataclasses.replace(case, tokens=min(case.tokens, 3), hidden=2048)  # whose depth is cut
    inputs, plan = inputs_of(case, np.float16), plan_of(case, "few", "fp16")
    assert max(plan.parts.values()) > 1
    found = [interpret(interpreter, plan, inputs, order) for order in (None, 1, 2)]
    assert len({each.tobytes() for each in found}) == 1
    assert distance(found[0], moe_dispatch(**inputs, attributes=case.attributes)) < 3e-2


def llama4(kind: str = "none", experts: int = 16) -> Geometry:
    """Scout's experts, or Maverick's."""
    return Geometry(
        hidden=5120,
        expert_size=8192,
        experts=experts,
        attributes=Attributes(top_k=1, quantisation=kind),  # type: ignore[arg-type]
        group=128 if kind == "int4" else 0,
    )


def compiled_parts(moe: Plan, capability: int, *parts: str) -> dict[str, kernels.Usage]:
    """Compiles those parts of a plan; asserts that nothing spills, and that shared memory suffices."""
    used = {}
    for part in parts:
        name = f"{moe.geometry.name}_{part}"
        compiled = kernels.compile_kernel(kernel, next(each for each in moe.kernels if each.name == name), capability)
        used[part] = kernels.usage(compiled)
        assert used[part].spilled == 0, name
    return used


def matrix_instruction(kind: str, capability: int) -> str:
    """The best that the compiler has."""
    stored = {"int8": "s8", "fp8": "e4m3"}.get(kind, "bf16")
    if capability == 90:
        return rf"wgmma\.mma_async\S*\.{stored}\.{stored}"
    if capability == 100 and kind != "int8":
        return rf"tcgen05\.mma\S*kind::{'f8f6f4' if kind == 'fp8' else 'f16'}"
    return rf"mma\.sync\S*\.{stored}\.{stored}\."


EXPERTS_OF_GPUS = [
    *itertools.product(["none", "int8"], [80, 90, 100]),
    *itertools.product(["fp8"], [89, 90, 100, 120]),
    *itertools.product(["int4"], [89, 90, 100]),
]


@pytest.mark.parametrize(
    ("kind", "capability"),
    sampled(EXPERTS_OF_GPUS, [("int8", 80), ("int4", 89), ("fp8", 90), ("int8", 90), ("none", 100), ("fp8", 120)]),
)
def test_prefill_uses_the_best_matrix_instructions_and_spills_nothing(kind: str, capability: int) -> None:
    """Each type of expert and each kind of GPU; each of one with each of the other is `make tables`."""
    used = compiled_parts(Plan(llama4(kind), capability), capability, "gate_and_up_many", "down_many")
    for usage in used.values():
        assert len(usage.matrix_instructions) > 0
        for found in usage.matrix_instructions:
            assert re.match(matrix_instruction(kind, capability), found), found


@pytest.mark.parametrize(("kind", "capability"), [("int8", 90), ("fp8", 120), ("int4", 100)])
def test_decode_and_what_lies_around_the_products_spill_nothing(kind: str, capability: int) -> None:
    moe = Plan(llama4(kind, experts=128), capability)
    prefix = len(moe.geometry.name) + 1
    parts = [each.name[prefix:] for each in moe.kernels if "many" not in each.name]
    used = compiled_parts(moe, capability, *parts)
    assert used["gate_up_few"].matrix_instructions
    assert used["down_some"].matrix_instructions


def test_a_launch_gives_a_kernel_its_parameters_in_order() -> None:
    for kind, static, top_k in itertools.product(("none", "int8", "int4"), (False, True), (1, 2)):
        if static and kind != "int8":
            continue
        attributes = Attributes(top_k=top_k, quantisation=kind)  # type: ignore[arg-type]
        moe = Plan(Geometry(hidden=64, expert_size=32, experts=4, attributes=attributes, static=static), 90)
        for each in moe.kernels:
            parameters = list(inspect.signature(getattr(kernel, each.function).fn).parameters)
            assert [name for name in parameters if name in each.signature] == list(each.signature), each.name
            assert set(parameters) == each.signature.keys() | each.constants.keys(), each.name
        names = {name: name for name in moe.geometry.types}
        by_name = {each.name: each for each in moe.kernels}
        for launch in itertools.chain.from_iterable(moe.launches(names, tokens) for tokens in (1, 40, 4000)):
            for kind_of, given in zip(by_name[launch.kernel].signature.values(), launch.arguments, strict=True):
                assert (kind_of == "i32") == isinstance(given, int)
                assert kind_of == "i32" or kind_of == f"*{moe.geometry.types[given]}"


def test_a_call_has_launches_that_follow_from_its_tokens_only() -> None:
    moe = Plan(llama4("int8"), 90)
    names = {name: name for name in moe.geometry.types}

    def functions(tokens: int) -> list[str]:
        return [launch.kernel.removeprefix(f"{moe.geometry.name}_") for launch in moe.launches(names, tokens)]

    assert functions(0) == []
    assert functions(16) == ["route", "gate_up_few", "down_few"]
    assert functions(17) == ["route", "arrange_some", "gate_and_up_some", "quantise_rows", "down_some"]
    assert functions(257) == ["route", "arrange_many", "gate_and_up_many", "quantise_rows", "down_many"]
    assert moe.launches(names, 300) == moe.launches(names, 300)
    wide = Plan(llama4("int4"), 90)
    launches = wide.launches({name: name for name in wide.geometry.types}, 1)
    assert [launch.kernel.rpartition("k1_")[2] for launch in launches] == ["gate_up_few", "down_few"]
    early = {each.name.rpartition("k1_")[2] for each in (*moe.kernels, *wide.kernels) if each.dependent}
    assert early == {"gate_up_few", "down_few"}
    assert not [each for each in Plan(llama4("int8"), 89).kernels if each.dependent]  # which has no such launches


def test_scratch_memory_for_more_tokens_serves_fewer() -> None:
    for geometry in (llama4(), llama4("int8"), llama4(experts=128)):
        moe = Plan(geometry, 90)
        before = moe.workspace(1)
        for tokens in (2, 15, 16, 17, 255, 256, 257, 300, 2048, 8192):
            now = moe.workspace(tokens)
            assert now.keys() == before.keys()
            assert all(now[name].size >= before[name].size for name in now)
            before = now


def test_an_expert_that_32_bits_cannot_count_is_refused() -> None:
    with pytest.raises(BuildError, match=r"one expert has 2147483648 elements, .* fewer than 2147483648: split"):
        dataclasses.replace(llama4(), hidden=1 << 15, expert_size=1 << 15)
    assert dataclasses.replace(llama4(), hidden=1 << 15, expert_size=(1 << 15) - 1).experts == 16


def test_the_plan_needs_the_standard_library_only() -> None:
    code = (
        "import sys, arriero.plugins.moe.plan, arriero.plugins.moe.op\n"
        "print({'triton', 'torch', 'numpy', 'ml_dtypes', 'onnx'} & set(sys.modules))"
    )
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert output.strip() == "set()"


class Gpu:
    """A plan's kernels compiled for the GPU that is here, and loaded."""

    def __init__(self, moe: Plan, folder: Path) -> None:
        torch.cuda.init()
        torch.zeros(1, device="cuda")  # makes torch's context the current one
        compiled = [kernels.compile_kernel(kernel, each, capability_here()) for each in moe.kernels]
        for each in compiled:
            (folder / each.binary.file).write_bytes(each.cubin)
        self.moe = moe
        self.kernels = Kernels(Driver(), folder, [each.binary for each in compiled])

    def __call__(self, inputs: Mapping[str, Array], *, captured: bool = False) -> Array:
        """The output, computed at once or by a CUDA graph."""
        tokens, hidden = inputs["hidden"].shape
        arrays = {name: packed(array) for name, array in inputs.items()}
        tensors = {name: on_gpu(array) for name, array in arrays.items()}
        for name, buffer in self.moe.workspace(tokens).items():
            tensors[name] = torch.full((buffer.size,), 0x7F, dtype=torch.uint8, device="cuda")
        tensors["counters"] = torch.zeros(COUNTERS, dtype=torch.int32, device="cuda")
        tensors["output"] = on_gpu(np.full((tokens, hidden), np.nan, inputs["hidden"].dtype))
        launches = self.moe.launches({name: tensor.data_ptr() for name, tensor in tensors.items()}, tokens)

        def launch_all() -> None:
            for launch in launches:
                self.kernels.launch(launch, torch.cuda.current_stream().cuda_stream)

        if captured:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                launch_all()
            graph.replay()
        else:
            launch_all()
        torch.cuda.synchronize()
        return tensors["output"].double().cpu().numpy()


def capability_here() -> int:
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def on_gpu(array: Array) -> torch.Tensor:
    """An array's bytes on the GPU, bfloat16 and float16 with their types, others as bytes."""
    flat = torch.from_numpy(np.ascontiguousarray(array).view(np.uint8)).cuda()
    halves = {"bfloat16": torch.bfloat16, "float16": torch.float16}
    return flat.view(halves[array.dtype.name]) if array.dtype.name in halves else flat


def needs(kind: str) -> None:
    if capability_here() not in kernels.CAPABILITIES:
        pytest.skip(f"kernels are not compiled for compute capability {capability_here()}")
    if kind == "fp8" and capability_here() < 89:
        pytest.skip("this GPU has no E4M3")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("case", [*CASES, *QUANTISED_CASES], ids=lambda case: case.name)
def test_the_kernels_equal_the_meaning_on_a_gpu(case: Case, dtype: str, tmp_path: Path) -> None:
    kind = case.attributes.quantisation
    needs(kind)
    inputs = inputs_of(case, TYPES[dtype])
    expected = moe_dispatch(**inputs, attributes=case.attributes)
    most = {"bf16": 1e-2, "fp16": 1e-3}[dtype] if kind in ("none", "int4") else 3e-2
    for way in WAYS if case.tokens * case.attributes.top_k <= 16 else ("some", "many"):
        gpu = Gpu(plan_of(case, way, dtype, capability_here()), tmp_path)
        found = gpu(inputs)
        assert distance(found, expected) < most
        assert np.array_equal(found, gpu(inputs)), "the same call gave other bits"
        assert np.array_equal(found, gpu(inputs, captured=True))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["none", "int8", "fp8", "int4"])
def test_the_kernels_equal_the_meaning_at_full_width(kind: str, tmp_path: Path) -> None:
    needs(kind)
    geometry = dataclasses.replace(llama4(kind, experts=8), expert_size=2048)
    gpu = Gpu(Plan(geometry, capability_here()), tmp_path)
    rng = np.random.default_rng(0)
    weights: dict[str, Array] = {}
    for name, (depth, width) in geometry.weight_sizes.items():
        wide = (rng.standard_normal((geometry.experts, depth, width), np.float32) / np.sqrt(depth)).astype(np.float32)
        if kind == "none":
            weights[name] = wide.astype(ml_dtypes.bfloat16)
        else:
            wide_ENK = np.ascontiguousarray(wide.swapaxes(1, 2))
            weights[name], weights[f"{name}_scale"] = quantised(wide_ENK, kind, geometry.group)
    for tokens in (1, 16, 100, 2000):
        inputs = {
            "hidden": rng.standard_normal((tokens, geometry.hidden), np.float32).astype(ml_dtypes.bfloat16),
            "router_logits": rng.standard_normal((tokens, geometry.experts), np.float32).astype(ml_dtypes.bfloat16),
            **weights,
        }
        found = gpu(inputs)
        sample = np.unique([0, tokens // 2, tokens - 1])  # the meaning takes a token at a time, and its time
        inputs |= {name: inputs[name][sample] for name in ("hidden", "router_logits")}
        expected = moe_dispatch(**inputs, attributes=geometry.attributes)
        # Rounded to bf16 before it is quantised, an activation can move by a step: up to 5.2e-2 a row in E4M3 at this
        # width, where the same is done in float64.
        assert distance(found[sample], expected) < {"none": 1e-2, "int4": 1e-2, "int8": 3e-2, "fp8": 6e-2}[kind]
