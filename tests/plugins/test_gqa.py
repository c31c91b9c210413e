"""Every implementation of grouped-query attention against its meaning, over the op's table of cases."""

import ctypes
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch

from arriero.plugins import schemas
from arriero.plugins.cpu.library import DOMAIN, library
from arriero.plugins.gqa import cpu_nodes as cpu
from arriero.plugins.gqa import native, op
from arriero.plugins.gqa.body import body
from arriero.plugins.gqa.cases import CASES, QUANTISED_CASES, Case
from arriero.plugins.gqa.meaning import grouped_query_attention
from arriero.plugins.gqa.torch_op import attend_whole
from arriero.plugins.nodes import OPSET, Nodes, function, ints, number
from arriero.spec.stored_weights import slot_bytes

Outputs = list[np.ndarray[Any, Any]]


def graph_of(case: Case, write: Callable[[list[ir.Value], list[ir.Value]], list[ir.Node]]) -> ir.Graph:
    arrays = case.inputs()
    heads = case.attributes.kv_heads
    cache = ["batch", heads, "slots", case.head_dim]
    inputs = [
        ir.val(name, ir.DataType.from_numpy(array.dtype), cache if "cache" in name else [None] * array.ndim)
        for name, array in arrays.items()
        if array is not None
    ]
    outputs = [ir.val("output", ir.DataType.FLOAT, [None] * 3)]
    dtype = ir.DataType.from_numpy(arrays["key_cache"].dtype)
    outputs += [ir.val(name, dtype, cache) for name in op.OUTPUTS[1:]]
    imports = {"": OPSET, op.DOMAIN: op.VERSION, DOMAIN: 1}
    return ir.Graph(inputs, outputs, nodes=write(inputs, outputs), opset_imports=imports, name="case")


def run(model: ir.Model, case: Case) -> Outputs:
    proto = ir.to_proto(model)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.register_custom_ops_library(str(library()))
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    values = {name: ort_value(array) for name, array in case.inputs().items() if array is not None}
    for name, value in values.items():
        binding.bind_ortvalue_input(name, value)
    binding.bind_output("output", "cpu")
    for present, past in zip(op.OUTPUTS[1:], ("key_cache", "value_cache"), strict=True):
        binding.bind_ortvalue_output(present, values[past])  # in place, as a session binds them
    session.run_with_iobinding(binding)
    return [
        binding.get_outputs()[0].numpy().copy(),
        *(number_of(values[name]) for name in ("key_cache", "value_cache")),
    ]


def ort_value(array: np.ndarray[Any, Any]) -> ort.OrtValue:
    if array.dtype == ml_dtypes.float8_e4m3fn:
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array.view(np.uint8), ir.DataType.FLOAT8E4M3FN)
    return ort.OrtValue.ortvalue_from_numpy(array)


def number_of(value: ort.OrtValue) -> np.ndarray[Any, Any]:
    if value.data_type() != "tensor(float8e4m3fn)":
        return value.numpy().copy()  # a view otherwise, of memory that goes with the value
    size = int(np.prod(value.shape()))
    stored = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(value.data_ptr()))
    return stored.view(ml_dtypes.float8_e4m3fn).astype(np.float32).reshape(value.shape())


def by_function(case: Case) -> Outputs:
    def call(inputs: list[ir.Value], outputs: list[ir.Value]) -> list[ir.Node]:
        attributes = ir.convenience.convert_attributes(dataclasses.asdict(case.attributes))
        named = {value.name: value for value in inputs}
        names = op.INPUTS + op.CACHE_SCALES if case.cache != "none" else op.INPUTS if case.rope else op.INPUTS[:-1]
        used = [named.get(name) for name in names]
        return [ir.Node(op.DOMAIN, op.NAME, used, attributes, overload="case", outputs=outputs)]

    schemas.register()
    cache = None if case.cache == "none" else ir.DataType.from_numpy(case.inputs()["key_cache"].dtype)
    function = body(case.attributes, case.head_dim, case.rope, ir.DataType.FLOAT, "case", cache)
    model = ir.Model(graph_of(case, call), ir_version=11, functions=[function])
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    return run(model, case)


def by_cpu_lowering(case: Case) -> Outputs:
    def lower(inputs: list[ir.Value], outputs: list[ir.Value]) -> list[ir.Node]:
        nodes = Nodes()
        named = {value.name: value for value in inputs}
        given = [named.get(name) for name in op.INPUTS + op.CACHE_SCALES]
        cpu.lower(nodes, given, outputs, case.attributes, getattr(case, "bits", 0))
        return nodes.list

    return run(ir.Model(graph_of(case, lower), ir_version=11), case)


def by_native_layers(case: Case) -> Outputs:
    def lower(inputs: list[ir.Value], outputs: list[ir.Value]) -> list[ir.Node]:
        nodes = Nodes()
        native.lower(nodes, inputs, outputs, case.attributes, case.head_dim, ir.DataType.FLOAT)
        return nodes.list

    graph = graph_of(case, lower)
    graph.opset_imports[native.DOMAIN] = 1
    return run(ir.Model(graph, ir_version=11, functions=[kv_cache_update(), attention()]), case)


def kv_cache_update() -> ir.Function:
    """What TensorRT documents of its layer: writes `update` from each row's index on."""

    def write(nodes: Nodes, inputs: Sequence[ir.Value], outputs: Sequence[ir.Value]) -> None:
        cache, update, write_indices = inputs
        where = {"axis": 2, "mode": "linear"}
        indices = nodes.Cast(write_indices, to=ir.DataType.INT64)
        nodes.node("TensorScatter", [cache, update, indices], outputs=outputs, attributes=where)

    return function(native.DOMAIN, "TRT_KVCacheUpdate", "", ("cache", "update", "write_indices"), ("output",), write)


def attention() -> ir.Function:
    """What TensorRT documents of its layer: unscaled scores, causal from the lower right of each row's length."""
    names = ("query", "key", "value", "mask", "query_lengths", "key_value_lengths")

    def write(nodes: Nodes, inputs: Sequence[ir.Value], outputs: Sequence[ir.Value]) -> None:
        query, key, value, _, _, lengths_B = inputs
        length, capacity = (nodes.Squeeze(nodes.Shape(x, start=2, end=3)) for x in (query, key))
        zero, one = number(0, np.int64), number(1, np.int64)
        steps_S, slots_C = nodes.Range(zero, length, one), nodes.Range(zero, capacity, one)
        first_B = nodes.Sub(nodes.Cast(lengths_B, to=ir.DataType.INT64), length)
        last_BS1 = nodes.Unsqueeze(nodes.Add(nodes.Unsqueeze(first_B, ints(1)), steps_S), ints(1, 3))
        seen = nodes.LessOrEqual(slots_C, last_BS1)
        nodes.node("Attention", [query, key, value, seen], outputs=outputs, attributes={"scale": 1.0})

    return function(native.DOMAIN, "TRT_Attention", "", names, ("output",), write)


def by_torch(case: Case) -> Outputs:
    tensors = [None if array is None else torch.from_numpy(array) for array in case.inputs().values()]
    outputs = torch.ops.arriero.grouped_query_attention(*tensors, *dataclasses.astuple(case.attributes))
    return [output.numpy() for output in outputs]


def meaning_of(case: Case) -> Outputs:
    return list(grouped_query_attention(**case.inputs(), attributes=case.attributes))  # type: ignore[arg-type]


def worst_difference(found: Outputs, expected: Outputs) -> float:
    return max(float(np.abs(a - b).max()) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize(
    "implementation", [by_torch, by_function, by_cpu_lowering, by_native_layers], ids=lambda each: each.__name__
)
def test_an_implementation_equals_the_meaning(implementation: Callable[[Case], Outputs], case: Case) -> None:
    far = 5e-2 if max(case.past) > 100_000 else 0  # float32 holds an angle of 10⁶ radians to 0.06
    assert worst_difference(implementation(case), meaning_of(case)) < 3e-6 + far


@pytest.mark.parametrize("case", QUANTISED_CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("implementation", [by_function, by_cpu_lowering], ids=lambda each: each.__name__)
def test_an_implementation_over_quantised_caches_equals_the_meaning(
    implementation: Callable[[Case], Outputs], case: Case
) -> None:
    output, *caches = implementation(case)
    expected, *expected_caches = meaning_of(case)
    for cache, expected_cache in zip(caches, expected_caches, strict=True):
        assert np.mean(cache != expected_cache) < 2e-3  # a value on the border of two steps falls to either side
    assert np.abs(output - expected).max() < 2e-2


class NarrowCaches:
    """A case whose caches are float16."""

    def __init__(self, case: Case) -> None:
        self.attributes, self.head_dim, self.rope = case.attributes, case.head_dim, case.rope
        self.arrays = {
            name: array.astype(np.float16) if array is not None and "cache" in name else array
            for name, array in case.inputs().items()
        }

    def inputs(self) -> dict[str, Any]:
        return self.arrays


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_caches_of_16_bits_round_what_they_hold(case: Case) -> None:
    output, *caches = by_cpu_lowering(NarrowCaches(case))  # type: ignore[arg-type]
    expected, *expected_caches = meaning_of(case)
    far = 5e-2 if max(case.past) > 100_000 else 0
    for cache, expected_cache in zip(caches, expected_caches, strict=True):
        assert cache.dtype == np.float16
        assert np.abs(cache - expected_cache).max() < 2e-3 * np.abs(expected_cache).max() + far
    assert np.abs(output - expected).max() < 5e-3 + far


class GroupedCaches:
    """A case whose caches hold integers, each group of a token's dims by a scale of its own."""

    def __init__(self, case: Case, bits: int) -> None:
        self.attributes, self.rope, self.bits, self.exact = case.attributes, case.rope, bits, case.inputs()
        self.head_dim = slot_bytes(case.head_dim, bits)
        self.arrays = {
            name: in_groups(array, bits) if array is not None and "cache" in name else array
            for name, array in self.exact.items()
        }

    def inputs(self) -> dict[str, Any]:
        return self.arrays

    def rounded(self) -> dict[str, Any]:
        """The case's inputs with what its caches have become."""
        return {
            name: of_groups(array, self.bits, self.exact[name].shape[3]) if "cache" in name else self.exact[name]
            for name, array in self.arrays.items()
        }


def in_groups(x: np.ndarray[Any, Any], bits: int) -> np.ndarray[Any, Any]:
    """Heads [.., D] as a cache of groups holds them, [.., bytes]."""
    groups = np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % 32)]).reshape(*x.shape[:-1], -1, 32)
    least, most = groups.min(-1, keepdims=True), groups.max(-1, keepdims=True)
    base = to_bfloat16(least, least < 0) if bits == 4 else np.zeros_like(least)
    span = (most - base) / 15 if bits == 4 else np.maximum(most, -least) / 127
    scale = to_bfloat16(span.astype(np.float32), np.ones_like(least, bool))
    inverse = np.divide(1, scale, out=np.zeros_like(scale), where=scale > 0)
    values = np.rint((groups - base) * inverse).astype(np.int8).view(np.uint8)
    scales = np.concatenate([scale, base], -1) if bits == 4 else scale
    if bits == 4:
        values = values[..., :16] | values[..., 16:] << 4
    halves = (scales.view(np.uint32) >> 16).astype(np.uint16)
    parts = [part.reshape(*x.shape[:-1], -1).view(np.uint8) for part in (values, halves)]
    return np.concatenate(parts, -1)


def of_groups(stored: np.ndarray[Any, Any], bits: int, head_dim: int) -> np.ndarray[Any, Any]:
    """What a cache of groups stands for."""
    count = -(-head_dim // 32)
    values, halves = np.split(stored, [count * 4 * bits], axis=-1)
    scales = (np.ascontiguousarray(halves).view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    scales = scales.reshape(*stored.shape[:-1], count, -1)
    values = values.reshape(*stored.shape[:-1], count, -1)
    if bits == 4:
        wide = np.concatenate([values & 15, values >> 4], -1) * scales[..., :1] + scales[..., 1:]
    else:
        wide = values.view(np.int8) * scales
    return wide.reshape(*stored.shape[:-1], -1)[..., :head_dim].astype(np.float32)


def to_bfloat16(x: np.ndarray[Any, Any], away: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The next bfloat16 on the side of zero, or away from it."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + np.where(away, 0xFFFF, 0).astype(np.uint32)) & np.uint32(0xFFFF0000)).view(np.float32)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("bits", [8, 4])
def test_caches_of_groups_round_what_they_hold(bits: int, case: Case) -> None:
    if max(case.past) > 100_000:
        pytest.skip("float32 holds an angle of 10⁶ radians to 0.06 only")
    grouped = GroupedCaches(case, bits)
    output, *caches = by_cpu_lowering(grouped)  # type: ignore[arg-type]
    expected, *expected_caches = grouped_query_attention(**grouped.rounded(), attributes=case.attributes)
    for cache, exact in zip(caches, expected_caches, strict=True):
        wanted = in_groups(exact.astype(np.float32), bits)
        written = np.abs(of_groups(cache, bits, case.head_dim) - exact) > 0
        assert np.mean((cache != wanted) & np.any(written, -1, keepdims=True)) < 0.01  # ties fall to either side
        spread = np.ptp(np.pad(exact, [(0, 0)] * 3 + [(0, 1)]), axis=-1, keepdims=True)
        assert np.all(np.abs(of_groups(cache, bits, case.head_dim) - exact) <= spread * (0.006 if bits == 8 else 0.037))
    assert np.abs(output - expected).max() < (0.03 if bits == 8 else 0.4)


@pytest.mark.parametrize("bits", [0, 8, 4])
def test_a_value_that_is_no_number_stays_none(bits: int) -> None:
    case = next(case for case in CASES if case.name == "later piece, chunked")
    exact = case.inputs()
    given: Any = GroupedCaches(case, bits) if bits else NarrowCaches(case)
    bad = exact["key"].copy()
    bad[0, -1, 3] = np.nan
    given.arrays["key"] = bad
    output = by_cpu_lowering(given)[0]
    assert np.isnan(output[0, -1]).any()
    assert np.isfinite(output[1:]).all()


def test_the_cache_keeps_what_the_piece_does_not_write() -> None:
    case = next(case for case in CASES if case.name == "later piece, chunked")
    before = case.inputs()["key_cache"]
    assert before is not None
    _, after, _ = by_torch(case)
    assert np.array_equal(after[:, :, :5], before[:, :, :5])
    assert np.array_equal(after[:, :, 11:], before[:, :, 11:])
    assert not np.array_equal(after[:, :, 5:11], before[:, :, 5:11])


@pytest.mark.parametrize("chunk", [0, 8])
def test_whole_sequences_equal_pieces_over_a_cache(chunk: int) -> None:
    attributes = op.Attributes(heads=4, kv_heads=2, scale=0.3, chunk=chunk, qk_norm_eps=1e-5)
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 21, heads * 8, generator=generator) for heads in (4, 2, 2))
    inv_freq = 1 / 100 ** (torch.arange(4) / 4)
    whole = attend_whole(query, key, value, inv_freq, attributes)
    key_cache = value_cache = torch.zeros(1, 2, chunk or 21, 8)
    pieces = []
    for start, end in ((0, 5), (5, 8), (8, 16), (16, 17), (17, 21)):
        part = slice(start, end)
        output, key_cache, value_cache = torch.ops.arriero.grouped_query_attention(
            query[:, part], key[:, part], value[:, part], key_cache, value_cache,
            torch.tensor([start], dtype=torch.int32), inv_freq, *dataclasses.astuple(attributes),
        )  # fmt: skip
        pieces.append(output)
    assert torch.allclose(torch.cat(pieces, 1), whole, atol=1e-6)


def test_the_op_passes_torchs_own_checks() -> None:
    case = CASES[2]
    tensors = [None if array is None else torch.from_numpy(array) for array in case.inputs().values()]
    arguments = (*tensors, *dataclasses.astuple(case.attributes))
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.arriero.grouped_query_attention.default, arguments, test_utils=checks)
