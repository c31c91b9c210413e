"""Every implementation of mixture-of-experts dispatch against its meaning, over the op's table of cases."""

import dataclasses
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from custom_ops import in_panels, initializer, run_graph

from arriero.plugins import schemas
from arriero.plugins.cpu import kernel_nodes as kernels
from arriero.plugins.moe import op
from arriero.plugins.moe.body import body
from arriero.plugins.moe.cases import CASES, QUANTISED_CASES, Case
from arriero.plugins.moe.meaning import moe_dispatch
from arriero.plugins.moe.torch_op import moe_dispatch as torch_moe_dispatch
from arriero.plugins.nodes import OPSET, Nodes
from arriero.plugins.quantisation import dequantise, fake_quantise

Array = np.ndarray[Any, Any]


def run(graph: ir.Graph, case: Case, functions: list[ir.Function]) -> Array:
    model = ir.to_proto(ir.Model(graph, ir_version=11, functions=functions))
    onnx.checker.check_model(model)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    arrays = case.inputs()
    feeds = {value.name: ort_value(arrays[value.name], value.dtype) for value in graph.inputs}
    output: Array = session.run_with_ort_values(None, feeds)[0].numpy()
    return output


def ort_value(array: Array, dtype: ir.DataType) -> ort.OrtValue:
    if dtype == ir.DataType.FLOAT8E4M3FN:
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array.view(np.uint8), dtype)
    return ort.OrtValue.ortvalue_from_numpy(array)


def graph_of(inputs: list[ir.Value], output: ir.Value, nodes: list[ir.Node], **initializers: Any) -> ir.Graph:
    imports = {"": OPSET, op.DOMAIN: op.VERSION, "com.microsoft": 1}
    return ir.Graph(inputs, [output], nodes=nodes, opset_imports=imports, name="case", **initializers)


def by_function(case: Case) -> Array:
    schemas.register()
    values = [
        # ONNX Runtime's Python interface has no int4 arrays
        initializer(name, array) if array.dtype == ml_dtypes.int4 else ir.val(name, dtype_of(array), array.shape)
        for name, array in case.inputs().items()
    ]
    output = ir.val("output", ir.DataType.FLOAT, [None, None])
    attributes = ir.convenience.convert_attributes(dataclasses.asdict(case.attributes))
    node = ir.Node(op.DOMAIN, op.NAME, values, attributes, outputs=[output])
    weights = [value for value in values if value.const_value is not None]
    inputs = [value for value in values if value not in weights]
    graph = graph_of(inputs, output, [node], initializers=weights)
    return run(
        graph, case, [body(case.attributes, ir.DataType.FLOAT, static=case.static, in_part=case.held is not None)]
    )


def by_cpu_kernels(case: Case) -> Array:
    arrays = case.inputs()
    inputs = [ir.val(name, ir.DataType.FLOAT, arrays[name].shape) for name in ("hidden", "router_logits")]
    output = ir.val("output", ir.DataType.FLOAT, [None, None])
    feeds = {name: arrays[name] for name in ("hidden", "router_logits")}
    nodes = Nodes()
    if case.attributes.quantisation == "none":
        weights = [initializer(name, arrays[name]) for name in ("gate_up", "down")]
        kernels.dispatch_plain(nodes, *inputs, *weights, output, case.attributes)
        return run_graph(inputs, output, nodes, weights, feeds)
    if case.attributes.quantisation == "fp8":
        pair = [matrix(case, arrays, name) for name in ("gate_up", "down")]
        kernels.dispatch_fp8(nodes, *inputs, pair[0], pair[1], output, case.attributes)
        given = [value for part in pair for value in (part.weight, part.scale, part.input_scale) if value is not None]
        return run_graph(inputs, output, nodes, given, feeds)
    bits = 4 if case.attributes.quantisation == "int4" else 8
    parts = []
    for name, scale in (("gate_up", "hidden_scale"), ("down", "activated_scale")):
        stored, scales = arrays[name].astype(np.int8), arrays[f"{name}_scale"]
        group = stored.shape[2] // scales.shape[2] if scales.shape[2] > 1 else 0
        statics = arrays[scale] if case.static else None
        parts.append(in_panels(stored, scales, bits, group, gated=name == "gate_up", x_scale=statics, name=f"{name}."))
    sizes = {"experts": case.weights, "width": case.expert_size}
    kernels.dispatch(nodes, *inputs, parts[0], parts[1], output, case.attributes, **sizes)
    given = [value for part in parts for value in (part.weight, part.scale, part.input_scale) if value is not None]
    return run_graph(inputs, output, nodes, given, feeds)


def matrix(case: Case, arrays: dict[str, Array], name: str) -> kernels.Fp8:
    """All experts' matrices of one kind as the CPU's kernel takes them."""
    x = "hidden_scale" if name == "gate_up" else "activated_scale"
    return kernels.Fp8(
        weight=initializer(name, arrays[name]),
        scale=initializer(f"{name}_scale", arrays[f"{name}_scale"]),
        input_scale=initializer(x, arrays[x]) if case.static else None,
        bound=case.attributes.activation_bound,
    )


def dtype_of(array: Array) -> ir.DataType:
    return ir.DataType.from_numpy(array.dtype)


def by_torch(case: Case) -> Array:
    tensors = [torch.from_numpy(array) for array in case.inputs().values()]
    a = case.attributes
    output: Array = torch_moe_dispatch(*tensors, a.top_k, a.activation, a.first_expert).numpy()
    return output


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("implementation", [by_torch, by_function, by_cpu_kernels], ids=lambda each: each.__name__)
def test_an_implementation_equals_the_meaning(implementation: Callable[[Case], Array], case: Case) -> None:
    expected = moe_dispatch(**case.inputs(), attributes=case.attributes)
    assert np.abs(implementation(case) - expected).max() < 3e-6


INTEGER_CASES = [case for case in QUANTISED_CASES if case.attributes.quantisation in ("int8", "int4")]
FP8_CASES = [case for case in QUANTISED_CASES if case.attributes.quantisation == "fp8"]


@pytest.mark.parametrize(
    ("implementation", "case"),
    [(by_function, case) for case in QUANTISED_CASES] + [(by_cpu_kernels, case) for case in FP8_CASES],
    ids=lambda each: each.__name__ if callable(each) else each.name,
)
def test_an_implementation_of_quantised_experts_equals_the_meaning(
    implementation: Callable[[Case], Array], case: Case
) -> None:
    expected = moe_dispatch(**case.inputs(), attributes=case.attributes)
    assert agrees(implementation(case), expected)


@pytest.mark.parametrize("case", INTEGER_CASES, ids=lambda case: case.name)
def test_the_cpus_kernels_for_experts_equal_the_meaning(case: Case) -> None:
    found, exact = by_cpu_kernels(case), moe_dispatch(**case.inputs(), attributes=case.attributes)
    if case.static:
        assert agrees(found, exact)
        return
    assert agrees(found, with_blockwise_activations(case, min(32, case.group or 32)))
    assert np.sqrt(np.mean((found - exact) ** 2)) < 2e-2 * np.sqrt(np.mean(exact**2))


@pytest.mark.parametrize("case", [case for case in CASES if case.experts == 8], ids=lambda case: case.name)
def test_the_parts_of_the_experts_add_up_to_the_whole(case: Case) -> None:
    whole = dataclasses.replace(case, attributes=dataclasses.replace(case.attributes, first_expert=0), held=None)
    inputs = whole.inputs()
    parts = []
    for first, end in ((0, 3), (3, 4), (4, 8)):
        held = {name: array[first:end] if array.ndim == 3 else array for name, array in inputs.items()}
        parts.append(moe_dispatch(**held, attributes=dataclasses.replace(case.attributes, first_expert=first)))
    assert np.allclose(sum(parts), moe_dispatch(**inputs, attributes=whole.attributes), atol=1e-12)


def with_blockwise_activations(case: Case, block: int) -> Array:
    """The meaning of one expert a token whose products round their activations to int8, each block by its own scale."""
    arrays = case.inputs()
    weights = [dequantise(arrays[name], arrays[f"{name}_scale"]) for name in ("gate_up", "down")]
    output = np.zeros((case.tokens, case.hidden))
    for token, logits in enumerate(arrays["router_logits"].astype(np.float64)):
        for expert in np.argsort(-logits)[: case.attributes.top_k] - case.attributes.first_expert:
            if not 0 <= expert < case.weights:
                continue
            x = arrays["hidden"][token] / (1 + np.exp(-logits[expert + case.attributes.first_expert]))
            gate, up = np.split(weights[0][expert] @ rounded(x, block), 2)
            output[token] += weights[1][expert] @ rounded(up * gate / (1 + np.exp(-gate)), block)
    return output


def rounded(x: Array, block: int) -> Array:
    """Activations [K] in int8, each block of them by its own absolute maximum."""
    padded = np.pad(x, (0, -len(x) % block))
    return fake_quantise(padded.reshape(-1, block), None, "int8").reshape(-1)[: len(x)]


def agrees(found: Array, expected: Array) -> bool:
    """Equal but for values that lie on the border of two steps and fall to either side in float32."""
    error = np.abs(found - expected)
    return bool(np.median(error) < 1e-6 and error.max() < 3e-2)


def test_a_tokens_experts_are_added_without_a_race() -> None:
    case = next(case for case in CASES if case.name == "two experts, many wide tokens")
    case = dataclasses.replace(case, attributes=dataclasses.replace(case.attributes, quantisation="fp8"))
    first = by_cpu_kernels(case)
    for _ in range(5):
        assert np.array_equal(by_cpu_kernels(case), first)


def test_the_score_scales_the_expert_input_and_not_its_output() -> None:
    case = next(case for case in CASES if case.name == "few tokens")
    arrays = case.inputs()
    token, expert = 0, int(arrays["router_logits"][0].argmax())
    score = 1 / (1 + np.exp(-arrays["router_logits"][token, expert]))
    found = by_torch(case)[token]

    def swiglu(x: Array) -> Array:
        gate, up = np.split(x @ arrays["gate_up"][expert], 2)
        return (up * gate / (1 + np.exp(-gate))) @ arrays["down"][expert]

    assert np.allclose(found, swiglu(arrays["hidden"][token] * score), atol=1e-5)
    assert not np.allclose(found, swiglu(arrays["hidden"][token]) * score, atol=1e-2)


def test_bf16_adds_a_tokens_experts_as_transformers_does() -> None:
    case = next(case for case in CASES if case.name == "two experts a token")
    hidden, logits, gate_up, down = (torch.from_numpy(array).bfloat16() for array in case.inputs().values())
    values, chosen = logits.topk(2, dim=1)
    scores = torch.full_like(logits, float("-inf")).scatter_(1, chosen, values).float().sigmoid().bfloat16()
    gate, up = torch.bmm(hidden * scores.T[:, :, None], gate_up).chunk(2, -1)
    dense = torch.bmm(up * torch.nn.functional.silu(gate), down).sum(0)
    assert torch.equal(torch_moe_dispatch(hidden, logits, gate_up, down, 2, "silu"), dense)


def test_the_op_passes_torchs_own_checks() -> None:
    tensors = [torch.from_numpy(array) for array in CASES[1].inputs().values()]
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.arriero.moe_dispatch.default, (*tensors, 1, "silu"), test_utils=checks)
