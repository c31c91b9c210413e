"""The Triton kernels of grouped-query attention: interpreted, compiled ahead of time, and on a GPU if there is one."""

import dataclasses
import functools
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from gqa_calls import FORMS, ONE, Arrays, forms_of, geometry_of, inputs_of, interpret, meaning_of, shapes_of
from tables import sampled
from triton_interpreter import Interpreter, to_numpy, to_torch

from arriero.errors import BuildError
from arriero.plugins import triton_compiler as kernels
from arriero.plugins.gqa import kernel
from arriero.plugins.gqa.cases import CASES, QUANTISED_CASES, Case
from arriero.plugins.gqa.op import Attributes
from arriero.plugins.gqa.plan import Geometry, Plan, Schedule
from arriero.plugins.launch import COUNTERS, Driver, Kernel, Kernels
from arriero.plugins.quantisation import quantise

FEW, SOME, MANY = FORMS
CHUNKED = Attributes(heads=40, kv_heads=8, scale=128**-0.5, chunk=8192, qk_norm_eps=1e-5)
FULL = Attributes(heads=40, kv_heads=8, scale=128**-0.5, temperature_scale=0.1, temperature_floor=8192.0)
UNIT = {"bf16": 2.0**-8, "fp16": 2.0**-11}
"""The largest relative error of rounding once."""

LONG_CASES = tuple(
    Case(
        name=f"{name}, {cache} cache",
        attributes=Attributes(heads=2, kv_heads=1, scale=0.25, **other),
        past=past,
        length=length,
        capacity=256,
        head_dim=16,
        rope="chunk" in other,
        cache=cache,  # type: ignore[arg-type]
    )
    for cache in ("none", "int8", "fp8")
    for name, past, length, other in (
        ("tiles over many blocks", (512 + 150, 256), 70, {"chunk": 256, "qk_norm_eps": 1e-5}),
        ("splits over many blocks", (255, 130, 20), 1, {"temperature_scale": 0.1, "temperature_floor": 64.0}),
    )
)
"""Cases with more slots than a step of `attend` takes: those of the op's table fit one or two."""


def named(name: str) -> Case:
    return next(case for case in CASES + QUANTISED_CASES if case.name == name)


def calls(*cases: Case) -> list[Any]:
    """Each case split and not split, but for those that are slow to interpret."""
    return [
        pytest.param(case, schedule, id=f"{case.name}, {schedule.form}")
        for case in cases
        for schedule in (ONE, FEW, MANY)
        if schedule is MANY or case.length < (20 if schedule is FEW else 2)
    ]


def plan_of(attributes: Attributes = CHUNKED, cache: Any = "none", capability: int = 90, **other: Any) -> Plan:
    given = {"head_dim": 128, "rope": attributes.chunk > 0, "dtype": "bf16", **other}
    return Plan(Geometry(attributes=attributes, cache=cache, **given), capability)


def worst_differences(found: Arrays, expected: Arrays) -> dict[str, float]:
    return {name: float(np.abs(found[name] - expected[name]).max()) for name in expected}


def share_that_differs(found: Arrays, expected: Arrays) -> float:
    return max(float(np.mean(found[name] != expected[name])) for name in ("key_cache", "value_cache"))


def assert_close(found: Arrays, expected: Arrays, case: Case, dtype: str) -> None:
    """That results are the meaning's, but for the rounding of their type."""
    unit = UNIT[dtype]
    if case.cache == "none":
        assert np.array_equal(found["value_cache"], expected["value_cache"])
        key, expected_key = found["key_cache"], expected["key_cache"]
        assert np.all(np.abs(key - expected_key) <= 2 * unit * np.maximum(np.abs(expected_key), 1))
    differing = 0.0 if case.cache == "none" else share_that_differs(found, expected)
    assert differing < 2e-3  # a value on the border of two steps falls to either side
    assert worst_differences(found, expected)["output"] < (5e-2 if differing else 6 * unit)


@pytest.mark.parametrize(("case", "schedule"), calls(*CASES, *LONG_CASES[:2]))
def test_the_kernels_equal_the_meaning(interpreter: Interpreter, case: Case, schedule: Schedule) -> None:
    inputs = inputs_of(case, "fp32")
    found = interpret(interpreter, case, inputs, "fp32", schedule)
    assert max(worst_differences(found, meaning_of(case, inputs)).values()) < 3e-6


@pytest.mark.parametrize(("case", "schedule"), calls(*QUANTISED_CASES, *LONG_CASES[2:]))
def test_the_kernels_over_quantised_caches_equal_the_meaning(
    interpreter: Interpreter, case: Case, schedule: Schedule
) -> None:
    inputs = inputs_of(case, "fp32")
    found, expected = interpret(interpreter, case, inputs, "fp32", schedule), meaning_of(case, inputs)
    differing = share_that_differs(found, expected)
    assert differing < 2e-3  # a value on the border of two steps falls to either side
    assert worst_differences(found, expected)["output"] < (2e-2 if differing else 3e-6)


@pytest.mark.parametrize("dtype", UNIT)
@pytest.mark.parametrize(
    "name",
    [
        "later piece, chunked",
        "piece that fills its chunk",
        "ragged pieces, full",
        "wide heads, far position",
        "int8 cache, later piece, chunked",
        "int8 cache, ragged pieces with slack for pads",
        "fp8 cache, first piece of a whole chunk",
    ],
)
def test_the_kernels_differ_from_the_meaning_by_rounding_alone(interpreter: Interpreter, name: str, dtype: str) -> None:
    case = named(name)
    inputs = inputs_of(case, dtype)
    schedule = ONE if case.length == 1 else SOME
    found, expected = interpret(interpreter, case, inputs, dtype, schedule), meaning_of(case, inputs)
    assert_close(found, expected, case, dtype)
    error, size = (np.sqrt(np.mean(each**2)) for each in (found["output"] - expected["output"], expected["output"]))
    assert error < UNIT[dtype] * size  # 0.77 of it in the worst case; `logit_bounds` has this number


def test_angles_are_exact_at_the_last_position_of_scout(interpreter: Interpreter) -> None:
    for length, schedule in ((3, FEW), (1, ONE)):
        far = dataclasses.replace(named("wide heads, far position"), past=(10_485_760 - length,), length=length)
        inputs = inputs_of(far, "fp32")
        found = interpret(interpreter, far, inputs, "fp32", schedule)
        assert max(worst_differences(found, meaning_of(far, inputs)).values()) < 3e-6


@pytest.mark.parametrize("name", ["later piece, chunked", "decode, full, ragged"])
def test_a_projection_of_all_three_gives_the_same_bits(interpreter: Interpreter, name: str) -> None:
    case = named(name)
    inputs, schedule = inputs_of(case, "bf16"), ONE if case.length == 1 else MANY
    apart, fused = (interpret(interpreter, case, inputs, "bf16", schedule, fused=each) for each in (False, True))
    assert all(np.array_equal(apart[each], fused[each]) for each in apart)


@pytest.mark.parametrize("splits", [1, 7])
@pytest.mark.parametrize("case", [LONG_CASES[1], LONG_CASES[5]], ids=lambda case: case.name)
def test_it_does_not_matter_which_split_is_the_last(interpreter: Interpreter, case: Case, splits: int) -> None:
    inputs, schedule = inputs_of(case, "fp16"), Schedule(form="one", splits=splits)
    found = [interpret(interpreter, case, inputs, "fp16", schedule, order) for order in (None, 1, 2)]
    assert_close(found[0], meaning_of(case, inputs), case, "fp16")
    for other in found[1:]:
        assert all(np.array_equal(found[0][name], other[name]) for name in other)


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_ties_round_to_even_and_what_is_too_large_saturates(interpreter: Interpreter, kind: Any) -> None:
    if kind == "int8":
        values = np.arange(-140, 140, 0.5)
    else:
        held = np.arange(127, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)
        halves = np.concatenate([held, (held[1:] + held[:-1]) / 2, [449, 464, 470, 1e4]])
        values = np.concatenate([halves, -halves])
    values = np.resize(values, (1, -(-values.size // 8), 8)).astype(np.float32)
    length = values.shape[1]
    attributes = Attributes(heads=1, kv_heads=1, scale=1.0)
    case = Case(name=kind, attributes=attributes, past=(0,), length=length, capacity=length, rope=False, cache=kind)
    inputs = {**inputs_of(case, "fp32"), "value": values, "value_scale": np.ones((1, 8), dtype=np.float32)}
    found = interpret(interpreter, case, inputs, "fp32")["value_cache"]
    assert np.array_equal(found[0], quantise(values, 1.0, kind).astype(np.float64))


def test_the_plan_fills_a_gpu_whatever_the_shapes() -> None:
    plan = plan_of()
    assert plan.schedule(1, 1, 8192) == Schedule(form="one", splits=32)
    assert plan.schedule(4, 1, 8192) == Schedule(form="one", splits=8)
    assert plan.schedule(100, 1, 8192) == Schedule(form="one", splits=1)
    assert plan.schedule(1, 2, 8192) == Schedule(form="few", splits=32)
    assert plan.schedule(1, 64, 8192) == Schedule(form="some", splits=6)
    assert plan.schedule(1, 8192, 8192) == Schedule(form="many")
    assert plan.schedule(1, 7, 128) == Schedule(form="many")
    alone = plan_of(Attributes(heads=5, kv_heads=1, scale=1.0))
    assert alone.schedule(1, 1, 1 << 20) == Schedule(form="one", splits=256)
    assert plan_of(Attributes(heads=40, kv_heads=2, scale=1.0)).schedule(1, 1, 8192).form == "some"


@pytest.mark.parametrize(("batch", "length"), [(1, 1), (32, 1), (1, 4), (1, 64), (1, 200), (2, 300), (1, 8192)])
def test_partial_outputs_take_a_few_megabytes(batch: int, length: int) -> None:
    partial = plan_of().workspace(batch, length, 1 << 20).get("partial")
    assert partial is None or partial.size <= 8 << 20


def test_kernels_of_one_name_are_one_kernel() -> None:
    by_name: dict[str, Kernel] = {}
    for attributes in (CHUNKED, FULL, dataclasses.replace(CHUNKED, chunk=4096, scale=0.1, qk_norm_eps=1e-6)):
        for cache in ("none", "int8", "fp8"):
            for each in plan_of(attributes, cache).kernels:
                assert by_name.setdefault(each.name, each) == each
    assert len(by_name) == 2 * 2 * 3 + 3 * 3 + 1  # prepare and decode for two kinds of layer; attend; combine


def test_the_plan_refuses_what_it_has_no_kernels_for() -> None:
    with pytest.raises(BuildError, match="needs compute capability 89, found 80: calibrate an int8 cache"):
        plan_of(cache="fp8", capability=80)
    with pytest.raises(BuildError, match="heads of 256 dimensions"):
        plan_of(head_dim=256)


def test_the_plan_needs_no_library() -> None:
    code = "import sys, arriero.plugins.gqa.plan\nprint({'triton', 'torch', 'onnx', 'numpy'} & set(sys.modules))"
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert output.strip() == "set()"


CACHES_OF_GPUS = [
    (capability, cache)
    for capability in (80, 89, 90, 100, 120)
    for cache in ("none", "int8", "fp8")
    if cache != "fp8" or capability >= 89  # others are refused, as another test sees
]


@pytest.mark.parametrize(
    ("capability", "cache"),
    sampled(CACHES_OF_GPUS, [(80, "int8"), (89, "fp8"), (90, "none"), (100, "fp8"), (120, "int8")]),
)
def test_llama_4s_kernels_compile_without_spills(capability: int, cache: str) -> None:
    """Each GPU and each type of cache; each of one with each of the other is `make tables`."""
    matrix = {90: "wgmma", 100: "tcgen05"}.get(capability, "mma.sync")
    layers = (CHUNKED, FULL) if cache == "none" else (CHUNKED,)
    compiled = {each.name: each for layer in layers for each in plan_of(layer, cache, capability).kernels}
    for name, each in compiled.items():
        built = kernels.compile_kernel(kernel, each, capability)
        used = kernels.usage(built)
        assert used.spilled == 0, name
        if "some" in name or "many" in name:
            assert used.matrix_instructions, name
            assert all(matrix in instruction for instruction in used.matrix_instructions), name
        elif "few" in name or "decode" in name:
            assert all("mma.sync" in instruction for instruction in used.matrix_instructions), name


LARGE_CHUNKED = dataclasses.replace(CHUNKED, heads=10, kv_heads=2)
LARGE_FULL = dataclasses.replace(FULL, heads=10, kv_heads=2)
LARGE_CASES = [
    Case(name=f"{name}, {cache}", attributes=attributes, head_dim=128, cache=cache, **shapes)  # type: ignore[arg-type]
    for cache in ("none", "int8", "fp8")
    for name, attributes, shapes in (
        ("decode in chunks", LARGE_CHUNKED, {"past": (0, 4000, 32_767), "length": 1, "capacity": 8192}),
        ("first piece", LARGE_CHUNKED, {"past": (0,), "length": 700, "capacity": 8192}),
        ("later pieces", LARGE_CHUNKED, {"past": (3000, 8192), "length": 130, "capacity": 8192}),
        ("decode, full", LARGE_FULL, {"past": (60_000, 17), "length": 1, "capacity": 65_536, "rope": False}),
    )
]


@functools.cache
def built_for_this_gpu(case_geometry: Geometry, capability: int, folder: Path) -> tuple[Plan, Kernels]:
    """The plan of a geometry with its kernels compiled and loaded."""
    plan = Plan(case_geometry, capability)
    torch.zeros(1, device="cuda")  # makes torch's context the current one
    binaries = []
    for each in plan.kernels:
        compiled = kernels.compile_kernel(kernel, each, capability)
        (folder / compiled.binary.file).write_bytes(compiled.cubin)
        binaries.append(compiled.binary)
    return plan, Kernels(Driver(), folder, binaries)


class Call:
    """One call on the GPU: its tensors, and what launches it."""

    def __init__(self, case: Case, inputs: Arrays, dtype: str, folder: Path, schedule: Schedule | None = None) -> None:
        major, minor = torch.cuda.get_device_capability()
        if case.cache == "fp8" and major * 10 + minor < 89:
            pytest.skip("this GPU has no E4M3")
        plan, self.kernels = built_for_this_gpu(geometry_of(case, dtype), major * 10 + minor, folder)
        self.stored = {name: inputs[name].dtype for name in ("key_cache", "value_cache")}
        self.tensors = {name: to_torch(array).cuda() for name, array in inputs.items()}
        self.tensors["output"] = torch.full_like(self.tensors["query"], torch.nan)
        types = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
        for name, buffer in plan.workspace(*shapes_of(case), schedule).items():
            self.tensors[name] = torch.full(buffer.shape, torch.nan, dtype=types[buffer.dtype], device="cuda")
        self.tensors["counters"] = torch.zeros(COUNTERS, dtype=torch.int32, device="cuda")
        pointers = {name: tensor.data_ptr() for name, tensor in self.tensors.items()}
        self.launches = plan.launches(pointers, *shapes_of(case), schedule)

    def launch(self) -> None:
        for launch in self.launches:
            self.kernels.launch(launch, torch.cuda.current_stream().cuda_stream)

    def results(self) -> Arrays:
        torch.cuda.synchronize()
        caches = {name: to_numpy(self.tensors[name].cpu(), dtype) for name, dtype in self.stored.items()}
        output = self.tensors["output"].double().cpu().numpy()
        return {"output": output, **{name: cache.astype(np.float64) for name, cache in caches.items()}}


@pytest.fixture(scope="module")
def cubins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cubins")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", UNIT)
@pytest.mark.parametrize("case", [*CASES, *QUANTISED_CASES, *LONG_CASES, *LARGE_CASES], ids=lambda case: case.name)
def test_a_gpu_computes_what_the_op_means(case: Case, dtype: str, cubins: Path) -> None:
    inputs = inputs_of(case, dtype)
    expected = meaning_of(case, inputs)
    for schedule in (None, *forms_of(case)):
        call = Call(case, inputs, dtype, cubins, schedule)
        call.launch()
        assert_close(call.results(), expected, case, dtype)


@pytest.mark.gpu
def test_a_captured_graph_serves_rows_of_any_length(cubins: Path) -> None:
    case = named("decode, full, ragged")
    call = Call(case, inputs_of(case, "bf16"), "bf16", cubins)
    call.launch()  # loads what the driver loads lazily
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call.launch()
    other = dataclasses.replace(case, past=(47, 0, 9, 30, 2))
    inputs = inputs_of(other, "bf16")
    for name, array in inputs.items():
        call.tensors[name].copy_(to_torch(array))
    graph.replay()
    assert_close(call.results(), meaning_of(other, inputs), other, "bf16")
