"""Quantised linears: the canonical form, its lowering for the CPU, and what TensorRT makes of it."""

import re
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from custom_ops import in_panels, initializer, run_graph

from arriero.plugins.cpu import kernel_nodes as kernels
from arriero.plugins.linear import read_linear, write_input, write_linear
from arriero.plugins.nodes import OPSET, Nodes
from arriero.plugins.quantisation import LARGEST, fake_quantise, quantise

Array = np.ndarray[Any, Any]
KINDS = [("int8", True), ("int8", False), ("fp8", True), ("fp8", False), ("int4", False)]
TOKENS, INPUTS, OUTPUTS, BLOCK = 7, 64, 48, 32
FLOAT = ir.DataType.FLOAT


def arrays(kind: str, inputs: int = INPUTS, outputs: int = OUTPUTS) -> tuple[Array, Array, Array, Array]:
    """Activations, a stored weight [N, K], its scales [N, G], and the activations' static scale."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, TOKENS, inputs)).astype(np.float32)
    blocks = rng.standard_normal(
        (outputs, inputs // BLOCK if kind == "int4" else 1, BLOCK if kind == "int4" else inputs)
    )
    scale = (np.abs(blocks).max(2) / LARGEST[kind]).astype(np.float32)
    stored = quantise(blocks, scale[:, :, None], kind).reshape(outputs, inputs)
    return x, stored, scale, np.array(2.5 / 127 if kind == "int8" else 2.5 / 448, dtype=np.float32)


def expected(kind: str, static: bool) -> Array:
    x, stored, scale, x_scale = arrays(kind)
    wide = stored.astype(np.float64) * np.repeat(scale.astype(np.float64), INPUTS // scale.shape[1], axis=1)
    rows = fake_quantise(x.reshape(-1, INPUTS), float(x_scale) if static else None, kind)
    product: Array = (rows @ wide.T).reshape(2, TOKENS, OUTPUTS)
    return product


def canonical(kind: str, static: bool, dtype: ir.DataType, inputs: int = INPUTS, outputs: int = OUTPUTS) -> ir.Graph:
    _, stored, scale, x_scale = arrays(kind, inputs, outputs)
    x, y = ir.val("x", dtype, ["batch", "sequence", inputs]), ir.val("y", dtype, ["batch", "sequence", outputs])
    weight = initializer("weight", stored)
    weight_scale = initializer("weight_scale", scale.astype(dtype.numpy()) if kind == "int4" else scale[:, 0])
    given = [weight, weight_scale] + ([initializer("x_scale", x_scale)] if static else [])
    nodes, source, token_scale = Nodes("linear/"), x, None
    if kind != "int4":
        source, token_scale = write_input(nodes, x, given[2] if static else None, kind, dtype)
    write_linear(nodes, source, token_scale, weight, weight_scale, y, kind, dtype)
    return ir.Graph([x], [y], nodes=nodes.list, initializers=given, opset_imports={"": OPSET}, name="linear")


def run(graph: ir.Graph, x: Array) -> Array:
    model = ir.to_proto(ir.Model(graph, ir_version=11))
    options = ort.SessionOptions()
    options.add_session_config_entry("session.disable_quant_qdq", "1")  # E4M3 is fused wrongly otherwise
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    output: Array = session.run(None, {"x": x})[0]
    return output


def agree(found: Array, wanted: Array) -> bool:
    """Equal but for activations on the border of two steps, which fall to either side in float32."""
    error = np.abs(found - wanted)
    return bool(np.median(error) < 1e-5 and error.max() < 0.2)


@pytest.mark.parametrize(("kind", "static"), KINDS)
def test_the_canonical_form_means_what_the_ops_mean(kind: str, static: bool) -> None:
    graph = canonical(kind, static, FLOAT)
    onnx.checker.check_model(ir.to_proto(ir.Model(graph, ir_version=11)))
    assert agree(run(graph, arrays(kind)[0]), expected(kind, static))


@pytest.mark.parametrize(("kind", "static"), KINDS)
def test_the_cpus_product_means_the_same(kind: str, static: bool) -> None:
    x, stored, scale, x_scale = arrays(kind)
    value, y = ir.val("x", FLOAT, ["batch", "sequence", INPUTS]), ir.val("y", FLOAT, ["batch", "sequence", OUTPUTS])
    nodes = Nodes()
    if kind == "fp8":
        matrix = kernels.Fp8(
            weight=initializer("weight", stored),
            scale=initializer("scale", scale[:, 0]),
            input_scale=initializer("x_scale", x_scale) if static else None,
        )
        given = [each for each in (matrix.weight, matrix.scale, matrix.input_scale) if each is not None]
        kernels.multiply_fp8(nodes, value, matrix, y)
    else:
        bits, group = (4, BLOCK) if kind == "int4" else (8, 0)
        panels = in_panels(stored.astype(np.int8), scale, bits, group, x_scale=x_scale if static else None)
        given = [each for each in (panels.weight, panels.scale, panels.input_scale) if each is not None]
        kernels.multiply(nodes, value, panels, OUTPUTS, y)
    found, meant = run_graph([value], y, nodes, given, {"x": x}), expected(kind, static)
    if kind == "fp8" or static:
        assert agree(found, meant)
    else:  # the kernel rounds activations to int8, each 32 by their own scale
        assert np.sqrt(np.mean((found - meant) ** 2)) < 1e-2 * np.std(found)
        blocks = fake_quantise(x.reshape(-1, 32), None, "int8").reshape(x.shape)
        wide = stored.astype(np.float64) * np.repeat(scale.astype(np.float64), INPUTS // scale.shape[1], axis=1)
        assert agree(found, blocks @ wide.T)


def test_a_bound_saturates_what_lies_beyond_it() -> None:
    x, stored, scale, _ = arrays("fp8")
    value, y = ir.val("x", FLOAT, x.shape), ir.val("y", FLOAT, [*x.shape[:2], OUTPUTS])
    given = [initializer("weight", stored), initializer("weight_scale", scale[:, 0])]
    nodes = Nodes()
    source, own_scale = write_input(nodes, value, None, "fp8", FLOAT, bound=1.5)
    write_linear(nodes, source, own_scale, *given, y, "fp8", FLOAT)
    graph = ir.Graph([value], [y], nodes=nodes.list, initializers=given, opset_imports={"": OPSET}, name="linear")
    rows = fake_quantise(x.reshape(-1, INPUTS), None, "fp8", bound=1.5)
    assert np.isclose(np.abs(rows).max(), 1.5)
    wanted = rows @ (stored.astype(np.float64) * scale).T
    assert agree(run(graph, x), wanted.reshape(2, TOKENS, OUTPUTS))


@pytest.mark.parametrize(("kind", "static"), KINDS)
def test_a_written_linear_is_recognised(kind: str, static: bool) -> None:
    graph = canonical(kind, static, ir.DataType.BFLOAT16)
    found = [linear for node in graph if (linear := read_linear(node)) is not None]
    assert len(found) == 1
    assert found[0].kind == kind
    assert found[0].weight.name == "weight"
    assert (found[0].x_scale is None) == (kind == "int4")
    assert (found[0].own_scale is not None) == (kind != "int4" and not static)


@pytest.mark.parametrize("dtype", [ir.DataType.BFLOAT16, ir.DataType.FLOAT16])
@pytest.mark.parametrize(("kind", "static"), KINDS)
def test_tensorrt_makes_a_quantised_gemm_of_it(kind: str, static: bool, dtype: ir.DataType) -> None:
    log = tensorrt_log(canonical(kind, static, dtype, 256, 512))
    wanted = {"int8": r"LayerType: gemm, .*Int8.*Int8", "fp8": r"LayerType: gemm, .*FP8.*FP8"}
    assert re.search(wanted.get(kind, r"LayerType: \w*fusion, .*Int4"), log), log


def tensorrt_log(graph: ir.Graph) -> str:
    """Builds a strongly typed network for compute capability 8.9. Returns the lines on its fused layers."""
    trt = pytest.importorskip("tensorrt_rtx")

    class Log(trt.ILogger):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.lines: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            assert severity > trt.ILogger.ERROR, message
            self.lines += [line for line in message.splitlines() if "LayerType" in line]

    log = Log()
    builder = trt.Builder(log)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, log)
    assert parser.parse(ir.to_proto(ir.Model(graph, ir_version=11)).SerializeToString())
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM89, 0)
    profile = builder.create_optimization_profile()
    profile.set_shape("x", (1, 1, 256), (2, 64, 256), (4, 128, 256))
    config.add_optimization_profile(profile)
    assert builder.build_serialized_network(network, config) is not None
    return "\n".join(log.lines)
