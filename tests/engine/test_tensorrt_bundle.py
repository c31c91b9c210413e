"""TensorRT-RTX engines built with no GPU: what the layer log says, what is refused, what a bundle holds."""

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

from arriero.engine import Options, build_bundle, builder, tensorrt_bundle
from arriero.engine.target import Target, check_dtypes, parse_target
from arriero.engine.tensorrt_library import make_log, open_library
from arriero.engine.tensorrt_lowering import Choices, lower_for_tensorrt
from arriero.errors import BuildError
from arriero.export import export_checkpoint
from arriero.files.folders import read_spec
from arriero.spec.built_engine import EngineSpec
from arriero.spec.fused_layers import Layer, LayerTensor, read_layers

TARGET = "tensorrt-rtx:sm89,sm120"
SMALL = Options(max_batch=4, max_seq=512, max_prefill=64)


def layers_of(bundle: Path) -> list[dict[str, object]]:
    found: list[dict[str, object]] = json.loads((bundle / "layers.json").read_text())
    return found


def engine_of(bundle: Path) -> EngineSpec:
    engine = read_spec(bundle).engine
    assert engine is not None
    return engine


@pytest.fixture(scope="module")
def half_model(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_checkpoint(tiny, tmp_path_factory.mktemp("half") / "model", dtype="float16")


@pytest.fixture(scope="module")
def plugin_bundle(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_bundle(tiny_model, tmp_path_factory.mktemp("plugin") / "bundle", target=TARGET, options=SMALL)


def test_both_ops_become_plugins(plugin_bundle: Path) -> None:
    engine, layers = engine_of(plugin_bundle), layers_of(plugin_bundle)
    assert (engine.attention, engine.experts, engine.placement) == ("plugin", "plugin", "experts")
    for op, count in (("GroupedQueryAttention", 8), ("MoeDispatch", 4)):
        plugins = [layer for layer in layers if any(f"/{op}_" in node for node in layer["nodes"])]  # type: ignore[attr-defined]
        assert len(plugins) == 2 * count  # a layer of each profile
        assert {layer["kind"] for layer in plugins} <= {"PluginV3", "custom_layer"}
        assert {layer["outputs"][0]["dtype"] for layer in plugins} == {"BFloat16"}  # type: ignore[index]
    # The kernels write the past's memory: a copy that TensorRT made of it would be lost.
    assert not [layer for layer in layers if layer["kind"] in ("copy", "Reformat") and "past." in str(layer)]
    experts = next(layer for layer in layers if "MoeDispatch" in str(layer["nodes"]))
    assert [each["dims"] for each in experts["inputs"]][2:] == [[8, 192, 256], [8, 128, 192]]  # type: ignore[attr-defined]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_native_attention_is_fused(dtype: str, tiny_model: Path, half_model: Path, tmp_path: Path) -> None:
    model, name = (tiny_model, "BFloat16") if dtype == "bfloat16" else (half_model, "Half")
    bundle = build_bundle(
        model, tmp_path / "bundle", target="tensorrt-rtx:sm89", options=dataclasses.replace(SMALL, gqa="native")
    )
    layers = layers_of(bundle)
    assert engine_of(bundle).attention == "native"
    decode = [layer for layer in layers if str(layer["tactic"]).startswith("_gemv_mha")]
    prefill = [layer for layer in layers if str(layer["tactic"]).startswith("_gemm_mha")]
    assert (len(decode), len(prefill)) == (8, 8)
    for layer in decode + prefill:
        assert [each["dtype"] for each in layer["outputs"]] == [name]  # type: ignore[attr-defined]
        assert "past" not in str(layer["outputs"])


def test_float16_goes_through_the_plugins_too(half_model: Path, tmp_path: Path) -> None:
    bundle = build_bundle(half_model, tmp_path / "bundle", target="tensorrt-rtx:sm89", options=SMALL)
    engine = engine_of(bundle)
    assert (engine.attention, engine.experts) == ("plugin", "plugin")
    assert all("fp16" in kernel.kernel for kernel in engine.kernels if "shortlist" not in kernel.kernel)
    gemms = [layer for layer in layers_of(bundle) if layer["kind"] == "gemm"]
    assert {each["dtype"] for layer in gemms for each in layer["outputs"]} == {"Half"}  # type: ignore[attr-defined]


def test_attention_takes_the_fused_projection_so_that_no_layer_copies_its_parts(plugin_bundle: Path) -> None:
    layers = layers_of(plugin_bundle)
    fused = [layer for layer in layers if "GroupedQueryAttention/MatMul" in str(layer["nodes"])]
    assert [(layer["kind"], layer["inputs"][1]["dims"]) for layer in fused] == [("gemm", [192, 320])] * 2 * 8  # type: ignore[index]
    assert not [layer for layer in layers if str(layer["tactic"]).startswith("__myl_Resh_")]  # nor the residual


def test_the_residual_takes_attentions_projection_in_float32_which_gives_the_same_bits(tiny_model: Path) -> None:
    choices = Choices(gqa=None, placement="experts", max_seq=512)
    graph = onnx.load_from_string(lower_for_tensorrt(tiny_model, read_spec(tiny_model), choices).graph).graph
    made = {name: node for node in graph.node for name in node.output}
    sums = [node for node in graph.node if node.op_type == "Add" and made[node.input[1]].op_type == "Cast"]
    assert len(sums) == 8
    for node in sums:
        product = made[made[node.input[1]].input[0]]
        assert product.op_type == "MatMul"
        assert made[product.input[0]].op_type == "GroupedQueryAttention"
    pairs = np.random.default_rng(0).standard_normal((2, 1 << 20)).astype(ml_dtypes.bfloat16)
    pairs[0] *= np.float32(2.0) ** np.arange(-20, 20, dtype=np.float32).repeat(1 << 15)[: 1 << 20]
    wide = pairs.astype(np.float64).sum(axis=0)  # exact for these exponents: one rounding
    assert (pairs.astype(np.float32).sum(axis=0).astype(ml_dtypes.bfloat16) == wide.astype(ml_dtypes.bfloat16)).all()


def test_projections_outside_lie_behind_one_another_in_one_input(tiny_model: Path) -> None:
    choices = Choices(gqa=None, placement="outside", max_seq=512)
    network = lower_for_tensorrt(tiny_model, read_spec(tiny_model), choices)
    graph = onnx.load_from_string(network.graph).graph
    shapes = {each.name: [dim.dim_value for dim in each.type.tensor_type.shape.dim] for each in graph.input}
    attention = [node for node in graph.node if "GroupedQuery" in node.op_type]
    assert all(len(set(node.input[:3])) == 1 for node in attention)
    assert {each.i for node in attention for each in node.attribute if each.name == "width"} == {192}
    for layer in range(8):
        name = f"layers.{layer}/GroupedQueryAttention/weight"
        parts = [weight for weight in network.weights if weight.part_of == name]
        assert [weight.name.split(".")[-2] for weight in parts] == ["q_proj", "k_proj", "v_proj"]
        assert shapes[name] == [sum(weight.shape[0] for weight in parts), parts[0].shape[1]]
        assert not {weight.name for weight in parts} & shapes.keys()


def test_with_all_weights_outside_no_layer_copies_either(tiny_model: Path, tmp_path: Path) -> None:
    options = Options(weights="outside", max_seq=512)
    bundle = build_bundle(tiny_model, tmp_path / "bundle", target="tensorrt-rtx:sm89", options=options)
    layers = layers_of(bundle)
    assert len([layer for layer in layers if "GroupedQueryAttention/MatMul" in str(layer["nodes"])]) == 2 * 8
    assert not [layer for layer in layers if str(layer["tactic"]).startswith("__myl_Resh_")]


def test_a_bundle_holds_what_it_says(plugin_bundle: Path) -> None:
    spec, engine = read_spec(plugin_bundle), engine_of(plugin_bundle)
    assert spec.target == TARGET
    assert hashlib.sha256((plugin_bundle / engine.file).read_bytes()).hexdigest() == engine.sha256
    assert {kernel.capability for kernel in engine.kernels} == {89, 120}
    for kernel in engine.kernels:
        data = (plugin_bundle / "kernels" / kernel.file).read_bytes()
        assert data.startswith(b"\x7fELF")
        assert hashlib.sha256(data).hexdigest() == kernel.sha256
    assert {profile.name: (profile.max_batch, profile.max_length) for profile in engine.profiles} == {
        "decode": (4, 1),
        "prefill": (4, 64),
    }
    assert all(profile.activations > 0 for profile in engine.profiles)
    shapes = {cache.name: cache.shape for cache in engine.caches}
    assert shapes["0.key"] == (2, 128, 32)  # a chunk
    assert shapes["3.value"] == (2, 512, 32)  # max_seq
    assert {weight.name.rpartition(".")[2] for weight in spec.weights} == {"gate_up_proj", "down_proj"}


@pytest.mark.parametrize(("placement", "inside"), [("inside", 0), ("experts", 8), ("outside", 16)])
def test_weights_go_where_they_are_told(placement: str, inside: int, tiny_model: Path) -> None:
    choices = Choices(gqa=None, placement=placement, max_seq=512)  # type: ignore[arg-type]
    network = lower_for_tensorrt(tiny_model, read_spec(tiny_model), choices)
    graph = ir.from_proto(onnx.load_from_string(network.graph)).graph
    inputs = {value.name for value in graph.inputs}
    assert {weight.part_of or weight.name for weight in network.weights} <= inputs
    assert len(network.weights) >= inside
    assert not inputs & set(graph.initializers)
    if placement == "inside":
        assert not network.weights


def test_no_piece_is_longer_than_a_chunk(tiny_model: Path, tmp_path: Path) -> None:
    bundle = build_bundle(
        tiny_model, tmp_path / "bundle", target="tensorrt-rtx:sm89", options=Options(max_prefill=4000, gqa="native")
    )
    assert engine_of(bundle).profiles[1].max_length == 128


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("tpu", "target 'tpu' is unknown: choose cpu, tensorrt-rtx:smNN"),
        ("tensorrt-rtx", "give their compute capabilities, as in tensorrt-rtx:sm89,sm120"),
        ("tensorrt-rtx:sm90", "tensorrt-rtx builds for sm80, .* not for 'sm90': choose among these"),
        ("tensorrt-rtx:89", "not for '89'"),
        ("cpu:sm89", "target 'cpu:sm89' is unknown"),
    ],
)
def test_a_wrong_target_is_named(target: str, message: str) -> None:
    with pytest.raises(BuildError, match=message):
        parse_target(target)


def test_a_type_that_a_gpu_lacks_is_refused_before_any_work(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=r"tensorrt-rtx builds for sm80, .* not for 'sm75': choose among these"):
        build_bundle(tiny_model, tmp_path / "bundle", target="tensorrt-rtx:sm75,sm89", options=SMALL)
    assert not (tmp_path / "bundle").exists()
    old = Target(flavour="tensorrt-rtx", capabilities=(86,))
    with pytest.raises(BuildError, match=r"FP8 needs sm89 or later; .* target sm86: calibrate with --recipe int8"):
        check_dtypes(old, {"fp8"})


def test_options_out_of_range_are_named(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="max_batch is 0, expected a whole number from 1 up"):
        Options(max_batch=0)
    with pytest.raises(BuildError, match="gqa is 'flash', expected one of plugin, native"):
        Options(gqa="flash")  # type: ignore[arg-type]
    with pytest.raises(BuildError, match="max_seq is 9999, the model's context holds 4096"):
        build_bundle(tiny_model, tmp_path / "bundle", target=TARGET, options=Options(max_seq=9999))
    with pytest.raises(BuildError, match="leave the engine's options out"):
        build_bundle(tiny_model, tmp_path / "bundle", target="cpu", options=SMALL)
    with pytest.raises(BuildError, match="leave --timing-cache out"):
        build_bundle(tiny_model, tmp_path / "bundle", target=TARGET, options=Options(timing_cache=tmp_path / "t"))


def test_too_small_a_workspace_is_named(tiny_model: Path, tmp_path: Path) -> None:
    options = dataclasses.replace(SMALL, workspace=1 << 16)
    with pytest.raises(
        BuildError, match=r"a layer needs more scratch memory than the 0\.1 MB .* give a larger --workspace"
    ):
        build_bundle(tiny_model, tmp_path / "bundle", target="tensorrt-rtx:sm89", options=options)
    assert not (tmp_path / "bundle").exists()


def test_what_a_plugin_refuses_is_the_builds_error(make_llama4: Callable[..., Any], tmp_path: Path) -> None:
    make_llama4(num_hidden_layers=1, head_dim=256).to(torch.bfloat16).save_pretrained(tmp_path / "checkpoint")
    model = export_checkpoint(tmp_path / "checkpoint", tmp_path / "model", dtype="bfloat16")
    with pytest.raises(BuildError, match=r"heads of 256 dimensions: .* build with --gqa native"):
        build_bundle(model, tmp_path / "bundle", target="tensorrt-rtx:sm89", options=Options(max_seq=64))
    native = Options(max_seq=64, gqa="native")
    assert build_bundle(model, tmp_path / "bundle", target="tensorrt-rtx:sm89", options=native).is_dir()


def test_an_interrupted_build_leaves_nothing(tiny_model: Path, tmp_path: Path) -> None:
    def interrupt(phase: str, done: int, total: int) -> None:
        if phase.startswith("Building"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_bundle(tiny_model, tmp_path / "bundle", target=TARGET, options=SMALL, progress=interrupt)
    assert not list(tmp_path.iterdir())


def test_an_op_without_a_lowering_is_named(tiny_model: Path, tmp_path: Path) -> None:
    model = shutil.copytree(tiny_model, tmp_path / "model")
    graph = ir.load(model / "decoder.onnx")
    node = next(node for node in graph.graph if node.op_type == "Sigmoid" or node.op_type == "Mul")
    node.op_type, node.domain = "Fancy", "elsewhere"
    ir.save(graph, model / "decoder.onnx")
    with pytest.raises(BuildError, match=r"elsewhere\.Fancy has no lowering for TensorRT"):
        build_bundle(model, tmp_path / "bundle", target=TARGET, options=SMALL)


def test_a_standard_op_that_tensorrt_lacks_is_named(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensorrt_bundle, "check_model", lambda source, spec, files: None)  # refuses it before
    model = shutil.copytree(tiny_model, tmp_path / "model")
    graph = ir.load(model / "decoder.onnx")
    node = next(node for node in graph.graph if node.op_type == "Mul")
    node.op_type = "StringConcat"
    ir.save(graph, model / "decoder.onnx")
    with pytest.raises(BuildError, match=r"TensorRT does not take the graph: .*StringConcat"):
        build_bundle(model, tmp_path / "bundle", target=TARGET, options=SMALL)


def test_every_logged_error_is_a_failure() -> None:
    trt = open_library("tensorrt-rtx")
    log = make_log(trt)
    log.log(trt.ILogger.WARNING, "mind this")
    log.check("to do nothing")
    log.log(trt.ILogger.ERROR, "Error Code 3:\n causal and mask")
    with pytest.raises(BuildError, match="TensorRT failed to build it: Error Code 3: causal and mask"):
        log.check("to build it")


def test_a_copy_of_caches_that_are_updated_in_place_fails_the_build() -> None:
    trt = open_library("tensorrt-rtx")
    log = make_log(trt)
    log.log(trt.ILogger.WARNING, "the timing cache is empty")
    builder._check_build(log, (), None, is_done=True)
    log.log(trt.ILogger.WARNING, "layer attention: the aliased I/O tensor is copied, which costs time")
    with pytest.raises(BuildError, match="would copy caches that are updated in place: layer attention"):
        builder._check_build(log, (), None, is_done=True)


def test_layers_are_read_from_the_log() -> None:
    line = (
        "Name: a+b_myl1_2, LayerType: gemm, Inputs: [ { Name: x, Dimensions: [-1,192], Strides: [192,1], "
        "StrideOrder: [1,0], Datatype: Int8, Format: (Linear) Row major }], Constants: [ { Name: w, Dimensions: "
        "[192,320], Strides: [320,1], StrideOrder: [1,0], Datatype: Int8, Format: (Linear) Row major }, { Name: alpha, "
        "Dimensions: [1], Strides: [1], StrideOrder: [0], Datatype: Float, Format: (Linear) Row major }], Outputs: [ "
        "{ Name: y, Location: Device, Dimensions: [-1,320], Datatype: Half, Format: none }], TacticName: fast, "
        "StreamId: 0, Metadata: [ONNX Layer: layers.0/a][ONNX Layer: layers.0/b]"
    )
    assert read_layers([line, "After reformat layers: 3"]) == (
        Layer(
            name="a+b_myl1_2",
            kind="gemm",
            inputs=(
                LayerTensor(name="x", dims=(-1, 192), dtype="Int8"),
                LayerTensor(name="w", dims=(192, 320), dtype="Int8"),
            ),
            outputs=(LayerTensor(name="y", dims=(-1, 320), dtype="Half"),),
            nodes=("layers.0/a", "layers.0/b"),
            tactic="fast",
        ),
    )
