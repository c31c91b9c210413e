"""The vision tower as a TensorRT engine, built with no GPU: what the layer log says, what a bundle holds."""

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from multimodal import VOCABULARY, write_multimodal
from pictures import drawn

from arriero.calibration import calibrate_model, fp8, int4, int8
from arriero.cli.tables import parts, show_summary
from arriero.engine import Options, build_bundle
from arriero.engine.polygraphy import Scripts
from arriero.engine.profiles import decoder_profiles, decoder_shapes, tower_shapes
from arriero.engine.tensorrt_lowering import Placement, lower_tower_for_tensorrt
from arriero.errors import BuildError, FolderError
from arriero.export import export_checkpoint
from arriero.files.folders import find_files, read_spec
from arriero.measuring.summary import summarise
from arriero.spec.built_engine import CacheInput, TowerEngine
from arriero.spec.recipe import Recipe

TARGET = "tensorrt-rtx:sm89"
SMALL = Options(max_batch=2, max_seq=64, max_prefill=8, max_tiles=3)
TOWER = {"hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 256}
"""Heads of 32, the narrowest here for which there are fused kernels."""

LAYERS = 3
PLAIN: dict[str, Any] = {"smoothing": "none", "rounding": "nearest", "weight_clip": "absmax"}
"""The quickest methods of a recipe: types are what is looked at here."""

NAMES = {"bfloat16": "BFloat16", "float16": "Half", "float32": "Float"}


@pytest.fixture(scope="module")
def models(make_multimodal: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A random multimodal model in a type; its decoder's attention is as wide as our kernels take."""
    folder = tmp_path_factory.mktemp("models")
    make_multimodal(vision=TOWER, num_hidden_layers=2).save_pretrained(folder / "checkpoint")

    def make(dtype: str) -> Path:
        if not (folder / dtype).exists():
            export_checkpoint(folder / "checkpoint", folder / dtype, dtype=dtype)  # type: ignore[arg-type]
        return folder / dtype

    return make


@pytest.fixture(scope="module")
def seeing(make_multimodal: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model of one layer each with a tokenizer, and conversations about pictures to calibrate it on."""
    folder = tmp_path_factory.mktemp("seeing")
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    reference = make_multimodal(vocab_size=VOCABULARY, vision={**TOWER, "num_hidden_layers": 1}, **sizes)
    model = export_checkpoint(write_multimodal(reference, folder / "checkpoint"), folder / "model", dtype="bfloat16")
    said = [{"role": "user", "content": "What is this?"}, {"role": "assistant", "content": "A photo."}]
    for index in range(8):
        drawn(30 + 9 * index, 50 - 3 * index).save(folder / f"{index}.png")
    lines = (json.dumps({"messages": said, "images": [f"{index}.png"]}) for index in range(8))
    (folder / "talks.jsonl").write_text("\n".join(lines))
    return model, folder / "talks.jsonl"


@pytest.fixture(scope="module")
def bundles(models: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A bundle of it, built once a type."""
    folder = tmp_path_factory.mktemp("bundles")

    def make(dtype: str) -> Path:
        if not (folder / dtype).exists():
            build_bundle(models(dtype), folder / dtype, target=TARGET, options=SMALL)
        return folder / dtype

    return make


def layers_of(bundle: Path, file: str = "vision_layers.json") -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((bundle / file).read_text())
    return found


def engine_of(bundle: Path) -> TowerEngine:
    vision = read_spec(bundle).vision
    assert vision is not None
    assert vision.engine is not None
    return vision.engine


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_attention_between_patches_is_fused(dtype: str, bundles: Callable[[str], Path]) -> None:
    layers = layers_of(bundles(dtype))
    attention = [layer for layer in layers if "_mha" in layer["tactic"]]
    assert len(attention) == LAYERS
    for layer in attention:
        assert {each["dtype"] for each in (*layer["inputs"], *layer["outputs"])} == {NAMES[dtype]}
    products = [layer for layer in layers if any("/MatMul" in node for node in layer["nodes"])]
    assert {each["dtype"] for layer in products for each in layer["outputs"]} == {NAMES[dtype]}
    joined = [layer for layer in products if sum("self_attn" in node for node in layer["nodes"]) >= 3]
    assert len(joined) == LAYERS  # query, key and value in one product: their weights are inside


def test_float32_builds_in_tensorrts_own_layers(bundles: Callable[[str], Path]) -> None:
    layers = layers_of(bundles("float32"))
    attention = [layer for layer in layers if any("/Attention" in node for node in layer["nodes"])]
    assert attention
    assert {each["dtype"] for layer in attention for each in layer["outputs"]} == {"Float"}


def test_a_bundle_holds_both_engines_as_it_says(bundles: Callable[[str], Path]) -> None:
    bundle = bundles("bfloat16")
    spec, engine = read_spec(bundle), engine_of(bundle)
    assert spec.vision is not None
    assert (spec.vision.graph, spec.vision.weights) == ("", ())
    assert hashlib.sha256((bundle / engine.file).read_bytes()).hexdigest() == engine.sha256
    assert (engine.file, engine.max_tiles) == ("vision.engine", 3)
    assert engine.activations > 0
    pixels = next(each for layer in layers_of(bundle) for each in layer["inputs"] if each["dims"] == [-1, 3, 28, 28])
    assert pixels["dtype"] == "Float"
    last = next(layer for layer in layers_of(bundle) if any("MatMul_17" in node for node in layer["nodes"]))
    assert [each["dims"] for each in last["outputs"]] == [[-1, 32]]
    plugins = [layer for layer in layers_of(bundle, "layers.json") if "PluginV3" in layer["kind"]]
    assert plugins  # the decoder's


def test_the_decoder_takes_as_many_features_as_a_piece_has_tokens(bundles: Callable[[str], Path]) -> None:
    spec = read_spec(bundles("bfloat16"))
    caches = (CacheInput(name="0.key", shape=(2, 64, 16), dtype="bfloat16"),)
    decode, prefill = (decoder_shapes(spec, each, caches) for each in decoder_profiles(caches, 4, 48))
    assert decode["image_features"] == ((1, 32), (1, 32), (1, 32))
    assert prefill["image_features"] == ((1, 32), (24, 32), (4 * 48, 32))
    assert prefill["past.0.key"] == ((1, 2, 64, 16), (1, 2, 64, 16), (4, 2, 64, 16))
    assert spec.vision is not None
    sides = (3, 28, 28)
    assert tower_shapes(spec.vision.spec, 17)["pixels"] == ((1, *sides), (5, *sides), (17, *sides))
    assert tower_shapes(spec.vision.spec, 3)["pixels"] == ((1, *sides), (3, *sides), (3, *sides))


def test_the_towers_weights_are_inside_but_for_outside(make_multimodal: Callable[..., Any], tmp_path: Path) -> None:
    tower = {"hidden_size": 192, "num_hidden_layers": 1, "intermediate_size": 768}
    make_multimodal(vision=tower, num_hidden_layers=1).save_pretrained(tmp_path / "checkpoint")
    model = export_checkpoint(tmp_path / "checkpoint", tmp_path / "model")
    spec = read_spec(model)
    assert spec.vision is not None
    placements: tuple[Placement, ...] = ("inside", "experts", "outside")
    inside, experts, outside = (
        lower_tower_for_tensorrt(model, spec, spec.vision, placement).weights for placement in placements
    )
    assert inside == experts == ()
    assert {"fc1.weight", "fc2.weight", "q_proj.weight"} <= {".".join(each.name.split(".")[-2:]) for each in outside}
    options = dataclasses.replace(SMALL, weights="outside")
    record = read_spec(build_bundle(model, tmp_path / "bundle", target=TARGET, options=options))
    assert record.vision is not None
    assert record.vision.weights == outside
    assert {weight.file for weight in outside} <= {file.name for file in record.weight_files}


def test_the_lowered_tower_computes_what_the_canonical_one_does(models: Callable[[str], Path]) -> None:
    model = models("float32")
    spec = read_spec(model)
    assert spec.vision is not None
    lowered = lower_tower_for_tensorrt(model, spec, spec.vision, "inside")
    graph = ir.from_proto(onnx.load_from_string(lowered.graph))
    for node in graph.graph:
        node.attributes.pop("TRT_decomposable", None)  # ONNX Runtime knows it not
    pixels = np.random.default_rng(0).standard_normal((2, 3, 28, 28)).astype(np.float32)
    graphs = (ir.to_proto(graph).SerializeToString(), (model / "vision.onnx").read_bytes())
    found, expected = (open_graph(each, model).run(None, {"pixels": pixels})[0] for each in graphs)
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()


def open_graph(graph: bytes, model: Path) -> ort.InferenceSession:
    """A graph on ONNX Runtime as it is, its weights where the model's are."""
    (weights,) = find_files(model, read_spec(model).weight_files).values()
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(weights.parent))
    return ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


def test_attention_that_export_did_not_write_is_named(models: Callable[[str], Path], tmp_path: Path) -> None:
    model = shutil.copytree(models("float32"), tmp_path / "model")
    graph = ir.load(model / "vision.onnx")
    node = next(node for node in graph.graph if node.op_type == "Attention")
    node.replace_input_with(0, node.inputs[2])
    ir.save(graph, model / "vision.onnx")
    spec = read_spec(model)
    assert spec.vision is not None
    with pytest.raises(BuildError, match=r"layers\.0/Attention: its query is not one that export rotates"):
        lower_tower_for_tensorrt(model, spec, spec.vision, "inside")


def test_polygraphys_inputs_hold_image_features(models: Callable[[str], Path]) -> None:
    model = models("float32")
    session = open_graph((model / "decoder.onnx").read_bytes(), model)
    prefill, decode = Scripts(model).load_data()
    assert (prefill["input_ids"] == 96).sum() == len(prefill["image_features"]) == 8
    assert len(decode["image_features"]) == 1
    blind = prefill | {"image_features": np.zeros_like(prefill["image_features"])}
    seen, unseen = (session.run(["logits"], each)[0] for each in (prefill, blind))
    assert np.abs(seen[:, 1:] - unseen[:, 1:]).min(axis=-1).max() > 1e-3
    assert np.array_equal(seen[:, 0], unseen[:, 0])  # before the first image token


def test_the_summary_tells_the_towers_engine(
    bundles: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = bundles("bfloat16")
    found = summarise(bundle, every_layer=True)
    vision, engine = found["vision"], engine_of(bundle)
    assert vision["engine"]["tiles_bytes"] == 3 * (3 * 28 * 28 * 4 + 4 * 32 * 2)
    held = ("weights_inside", "weights_outside", "activations", "tiles")
    assert vision["engine"]["total_bytes"] == sum(vision["engine"][f"{part}_bytes"] for part in held)
    assert vision["engine"]["bytes"] == (bundle / engine.file).stat().st_size
    assert sum(layer["count"] for layer in vision["fused_layers"]) == len(vision["every_layer"])
    show_summary(found)
    shown = " ".join(capsys.readouterr().out.split())
    assert "3 layers, hidden 64, 2 heads; a tile of 28 × 28 pixels is 4 tokens" in shown
    assert "for 1–3 tiles" in shown
    assert "layers.2: Attention" in {parts(layer) for layer in vision["every_layer"]}
    (bundle / "vision_layers.json").rename(bundle / "gone.json")
    with pytest.raises(FolderError, match=r"vision_layers\.json: cannot be read"):
        summarise(bundle)
    (bundle / "gone.json").rename(bundle / "vision_layers.json")


def test_too_few_tiles_are_named() -> None:
    with pytest.raises(BuildError, match="max_tiles is 0, expected a whole number from 1 up"):
        Options(max_tiles=0)


@pytest.mark.parametrize(
    ("recipe", "name"),
    [
        (int8(**PLAIN, activations="static"), "Int8"),
        (int8(**PLAIN, activations="dynamic"), "Int8"),
        (fp8(**PLAIN), "FP8"),
        (int4(**PLAIN, group_size=32), "Int4"),
    ],
    ids=["int8", "dynamic int8", "fp8", "int4"],
)
def test_a_quantised_towers_products_have_the_recipes_type(
    recipe: Recipe, name: str, seeing: tuple[Path, Path], tmp_path: Path
) -> None:
    model, data = seeing
    quantised = calibrate_model(model, tmp_path / "model", recipe=recipe, data=[data], samples=4, window=64, floor=0)
    layers = layers_of(build_bundle(quantised, tmp_path / "bundle", target=TARGET, options=SMALL))
    products = [
        layer
        for layer in layers
        if name in {each["dtype"] for each in layer["inputs"] if len(each["dims"]) > 1}
        and layer["kind"] in ("gemm", "runtime_fusion")
    ]
    fused = {node for layer in products for node in layer["nodes"] if "layers." in node and "/MatMul" in node}
    assert len(fused) == 6  # the linears of one layer
    if name != "Int4":  # both operands are quantised
        assert all({each["dtype"] for each in layer["inputs"] if len(each["dims"]) > 1} == {name} for layer in products)
    assert sum("_mha" in layer["tactic"] for layer in layers) == 1
