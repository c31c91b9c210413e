"""A multimodal model quantised over conversations with pictures: its vision tower, and its decoder behind it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from multimodal import VOCABULARY, write_multimodal
from numpy.typing import NDArray
from pictures import drawn, noise
from safetensors.torch import save_file

import arriero
from arriero.calibration import calibrate_model, fp8, int4, int8, linears
from arriero.calibration.moved_weight import MovedWeight
from arriero.calibration.product import Product, ProductInput
from arriero.calibration.rounding import Rounded
from arriero.calibration.tower import quantise_tower_layer
from arriero.engine import build_bundle
from arriero.errors import CalibrationError, DataError
from arriero.export import export_checkpoint
from arriero.export.llama4 import rms_norm
from arriero.files.folders import read_spec
from arriero.files.safetensors import open_shard
from arriero.loading import open_tower
from arriero.spec.choice import Choice
from arriero.spec.recipe import Override, Recipe
from arriero.walk.decoder import embed
from arriero.walk.numbers import Weights
from arriero.walk.tower import TowerLayerWalk, embed_tiles, encode_tiles
from arriero.walk.windows import Windows, read_windows

KEEP_DECODER = Override(pattern="layers.*", format="none")
SHAPES = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}


@pytest.fixture(scope="module")
def model(make_multimodal: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tower of two layers before a decoder of one, in float32."""
    folder = tmp_path_factory.mktemp("seeing")
    reference = make_multimodal(vocab_size=VOCABULARY, vision={"num_hidden_layers": 2}, **SHAPES)
    return export_checkpoint(write_multimodal(reference, folder / "checkpoint"), folder / "model")


@pytest.fixture(scope="module")
def talks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight conversations about a picture each."""
    folder = tmp_path_factory.mktemp("talks")
    lines = []
    for at in range(8):
        (drawn if at % 2 else noise)(30 + 9 * at, 50 - 3 * at).save(folder / f"{at}.png")
        said = [{"role": "user", "content": f"What is {at}?"}, {"role": "assistant", "content": "A photo."}]
        lines.append(json.dumps({"messages": said, "images": [f"{at}.png"]}))
    (folder / "talks.jsonl").write_text("\n".join(lines))
    return folder / "talks.jsonl"


@pytest.fixture(scope="module")
def windows(model: Path, talks: Path) -> Windows:
    spec = read_spec(model)
    assert spec.vision is not None
    return read_windows(model, [talks], spec.model, 6, 64, spec.vision.spec)


@pytest.fixture(scope="module")
def pixels(windows: Windows) -> NDArray[np.float32]:
    return windows.pixels_N3PP[::4].astype(np.float32)


def files_of(folder: Path) -> dict[str, Path]:
    """A model's weight files, whatever became of them."""
    return {file.name: Path(file.path or folder / file.name) for file in read_spec(folder).weight_files}


def features_of(folder: Path, pixels: NDArray[np.float32]) -> NDArray[np.float32]:
    """The image features of tiles, as the CPU computes them."""
    spec = read_spec(folder)
    assert spec.vision is not None
    return open_tower(folder, spec, spec.vision, files_of(folder), 2).backend.encode(pixels)


def emulated(folder: Path, pixels: NDArray[np.float32]) -> NDArray[np.float32]:
    """The features of the canonical graph as it is written: every product in float32, of values that were quantised."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(str(folder / "vision.onnx"), options)
    return np.asarray(session.run(None, {"pixels": pixels})[0])


def sqnr(exact: NDArray[np.float32], found: NDArray[np.float32]) -> float:
    """Signal to noise, dB."""
    return float(10 * np.log10(np.sum(exact.astype(float) ** 2) / np.sum((found.astype(float) - exact) ** 2)))


def scale_up(folder: Path, factor: float) -> None:
    """Makes the stored scales of one of the tower's linears wrong, in place."""
    path = folder / "vision-00001.safetensors"
    region = open_shard(path).tensors["vision_model.model.layers.1.mlp.fc2.weight_scale"]
    scale = np.memmap(path, np.float32, "r+", region.offset, region.shape)
    scale *= factor
    scale.flush()


RECIPES = {
    "int8": (int8(), 38),
    "int8 static": (int8(activations="static"), 37),
    "fp8": (fp8(), 29),
    "fp8 dynamic": (fp8(activations="dynamic", rounding="nearest"), 26),
    "int4": (int4(group_size=32, overrides=(KEEP_DECODER,)), 29),
}
"""Each with the SQNR, dB, that its features have at least: three less than was measured."""

SAME = 42
"""SQNR, dB, of one computation in two orders of sums, where a value on the other side of a tie is a step off, and of
activations rounded by 32 where the emulation rounds by tokens."""


@pytest.mark.parametrize("name", RECIPES)
def test_a_quantised_towers_features_are_near_the_original_ones(
    model: Path, windows: Windows, pixels: NDArray[np.float32], tmp_path: Path, name: str
) -> None:
    recipe, close = RECIPES[name]
    quantised = calibrate_model(model, tmp_path / "quantised", recipe=recipe, data=windows, floor=0)
    onnx.checker.check_model(str(quantised / "vision.onnx"))
    assert read_spec(quantised).recipe == recipe
    exact, found = features_of(model, pixels), features_of(quantised, pixels)
    near, nearer = sqnr(exact, found), sqnr(emulated(quantised, pixels), found)
    assert close < near < 60
    assert nearer > SAME
    scale_up(quantised, 1.5)
    wrong = sqnr(exact, features_of(quantised, pixels))
    print(f"{name}: {near:.1f} dB, {nearer:.1f} dB from its emulation, with a wrong scale {wrong:.1f} dB")
    assert wrong < near - 8


def test_text_and_conversations_together_make_a_model_that_sees(
    make_multimodal: Callable[..., Any], texts: tuple[Path, Path], talks: Path, tmp_path: Path
) -> None:
    reference = make_multimodal(vocab_size=VOCABULARY, vision={"num_hidden_layers": 1}, dtype=torch.bfloat16, **SHAPES)
    model = export_checkpoint(write_multimodal(reference, tmp_path / "checkpoint"), tmp_path / "model")
    quantised = calibrate_model(
        model, tmp_path / "int4", recipe=int4(group_size=32), data=[texts[0], talks], samples=8, window=64, floor=0
    )
    bundle = build_bundle(quantised, tmp_path / "bundle")
    asked = [{"role": "user", "content": [{"type": "image", "path": str(talks.parent / "3.png")}]}]
    said = [arriero.load(folder, max_seq=256).generate(asked, max_new_tokens=4).ids for folder in (quantised, bundle)]
    assert said[0] == said[1]
    report = json.loads((quantised / "report.json").read_text())
    assert report["tiles"] > 0
    names = [record["name"] for layer in report["tower"] for record in layer["records"]]
    assert len(names) == len(set(names)) == 6
    assert all(name.startswith("vision_model.model.layers.0.") for name in names)
    kept = ("patch_embedding.linear", "vision_adapter.mlp.fc1", "vision_adapter.mlp.fc2")
    assert {f"vision_model.{name}" for name in kept} | {"multi_modal_projector.linear_1"} <= set(report["kept"])
    page = (quantised / "report.html").read_text()
    assert page.count("<figure") == 3 + 2
    assert "Vision tower: errors" in page


def test_the_decoder_is_calibrated_with_the_unquantised_towers_features(
    model: Path, windows: Windows, tmp_path: Path
) -> None:
    recipe = int8(smoothing="none", overrides=(Override(pattern="layers.0.feed_forward.*", format="none"),))
    quantised = calibrate_model(model, tmp_path / "quantised", recipe=recipe, data=windows, floor=0)
    report = json.loads((quantised / "report.json").read_text())
    assert windows.vision is not None
    weights, spec = Weights(files_of(model)), read_spec(model).model
    features = windows.features_in_order(encode_tiles(windows.vision, weights, windows.pixels_N3PP))
    hidden = np.empty((*windows.ids_WS.shape, spec.hidden_size), np.float32)
    embed(weights, windows.ids_WS, hidden, windows.image_token, features)
    normed = rms_norm(torch.from_numpy(hidden), weights.wide("layers.0.input_layernorm.weight"), spec.norm_eps)
    assert report["layers"][0]["records"][0]["largest"] == pytest.approx(float(normed.abs().max()), rel=1e-5)


@pytest.mark.parametrize("recipe", [int8(strength=0.5), int4(strength=0.5)], ids=["SmoothQuant", "AWQ"])
def test_smoothing_leaves_what_a_layer_computes(
    model: Path, windows: Windows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: Recipe
) -> None:
    def unrounded(
        name: str, weight: MovedWeight, source: ProductInput, choice: Choice, dtype: torch.dtype
    ) -> tuple[Product, None]:
        moved_NK = weight.rows(slice(None))
        return Product(Rounded(moved_NK, torch.ones(len(moved_NK), 1)), None), None

    monkeypatch.setattr(linears, "quantise_product", unrounded)
    monkeypatch.setattr(linears, "laid_out", lambda product, choice: product.weight.values_NK)
    vision, before = windows.vision, Weights(files_of(model))
    assert vision is not None
    x, attended, exact, found = np.empty((4, len(windows.pixels_N3PP), vision.positions, vision.hidden_size), "f4")
    embed_tiles(vision, before, windows.pixels_N3PP, x)
    tensors = quantise_tower_layer(vision, 0, before, recipe, x, attended, exact).tensors
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "layer.safetensors")
    after = Weights({"layer": tmp_path / "layer.safetensors"})
    TowerLayerWalk(vision, 0, after, attended, found).run(x)
    assert np.abs(found - exact).max() <= 1e-5 * np.abs(exact).max()
    for name in ("input_layernorm.bias", "post_attention_layernorm.bias", "self_attn.v_proj.bias"):
        full = f"vision_model.model.layers.0.{name}"
        assert not torch.equal(before.stored(full), after.stored(full)), name


def test_a_run_stopped_in_the_tower_or_behind_it_goes_on_where_it_was(
    model: Path, windows: Windows, tmp_path: Path
) -> None:
    out, said = tmp_path / "out" / "model", list[str]()

    def run(stop: str) -> None:
        def progress(phase: str, done: int, total: int) -> None:
            if phase == stop:
                raise KeyboardInterrupt  # which nobody catches, as nobody catches a kill

        calibrate_model(model, out, recipe="fp8", data=windows.first(3), floor=0, progress=progress, notice=said.append)

    for stop in ("vision layer 0", "layer 0"):
        with pytest.raises(KeyboardInterrupt):
            run(stop)
    (work,) = out.parent.iterdir()
    left = ["0.f32", "1.f32", "attended.f32", "features.f32", "progress.json"]
    assert sorted(path.name for path in (work / "scratch").iterdir()) == left
    run("nowhere")
    assert said == [
        "Going on: at layer 1 of 2 of the vision tower; the 1 before it is kept.",
        "Going on: at layer 0 of 1; the vision tower is kept.",
    ]
    whole = calibrate_model(model, tmp_path / "whole", recipe="fp8", data=windows.first(3), floor=0)
    for path in whole.iterdir():
        if path.name not in ("spec.json", "report.html", "report.json"):  # which have times in them
            assert path.read_bytes() == (out / path.name).read_bytes(), path.name


def test_without_images_the_tower_is_left_as_it_is(
    model: Path, pixels: NDArray[np.float32], texts: tuple[Path, Path], tmp_path: Path
) -> None:
    said: list[str] = []
    quantised = calibrate_model(
        model, tmp_path / "text", recipe=int8(), data=[texts[0]], samples=2, window=64, floor=0, notice=said.append
    )
    assert said == [
        "The data holds no image, so nothing was measured in the vision tower, which stays in float32: "
        "give conversations with images (a .jsonl file) to quantise it too."
    ]
    assert np.array_equal(features_of(model, pixels), features_of(quantised, pixels))
    report = json.loads((quantised / "report.json").read_text())
    assert not report["tower"]
    assert set(report["kept"]) == {"embed_tokens", "norms", "lm_head", "layers.0.feed_forward.router", "vision tower"}


def test_overrides_leave_the_tower_or_quantise_what_lies_around_its_layers(
    model: Path, windows: Windows, pixels: NDArray[np.float32], tmp_path: Path
) -> None:
    left = int8(overrides=(KEEP_DECODER, Override(pattern="vision_model.*", format="none")))
    quantised = calibrate_model(model, tmp_path / "left", recipe=left, data=windows, floor=0)
    exact = features_of(model, pixels)
    assert np.array_equal(exact, features_of(quantised, pixels))
    around = int8(
        overrides=tuple(
            Override(pattern=pattern, format="none" if "layers" in pattern else "int8")
            for pattern in ("vision_model.*", "multi_modal_projector.*", "*layers.*")
        )
    )
    quantised = calibrate_model(model, tmp_path / "around", recipe=around, data=windows, floor=0)
    report = json.loads((quantised / "report.json").read_text())
    assert [record["name"] for layer in report["tower"] for record in layer["records"]] == [
        "vision_model.patch_embedding.linear",
        "vision_model.vision_adapter.mlp.fc1",
        "vision_model.vision_adapter.mlp.fc2",
        "multi_modal_projector.linear_1",
    ]
    assert 30 < sqnr(exact, features_of(quantised, pixels)) < 60


def test_a_recipe_that_does_not_fit_the_tower_is_refused(model: Path, tiny_model: Path, tmp_path: Path) -> None:
    ids = np.zeros((1, 8), np.int64)
    for pattern in ("vision_model.*", "multi_modal_projector.*"):
        recipe = int8(overrides=(Override(pattern=pattern, format="none"),))
        with pytest.raises(CalibrationError, match="matches no weight"):
            calibrate_model(tiny_model, tmp_path / "out", recipe=recipe, data=ids)
    recipe = int4(group_size=32, overrides=(Override(pattern="*_projector.*", format="int4"),))
    with pytest.raises(
        CalibrationError, match=r"multi_modal_projector\.linear_1: group size 32 does not divide its 40"
    ):
        calibrate_model(model, tmp_path / "out", recipe=recipe, data=ids)


def test_a_text_only_model_takes_no_images(tiny_model: Path, talks: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="line 1 has an image, the model takes text only"):
        calibrate_model(tiny_model, tmp_path / "out", recipe="int8", data=[talks])
