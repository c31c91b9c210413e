"""Faults planted in vision towers are found at their layer and named; clean towers raise no alarm."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from multimodal import VOCABULARY, write_multimodal
from planted_faults import (
    approximate_gelu,
    changed_graph,
    changed_tensors,
    exchanged_inputs,
    other_order,
    rope_over_halves,
    rows_over_halves,
    without_bias,
    without_gelu,
    without_residual,
)
from tables import sampled

from arriero.accuracy.locate.first_fault import locate
from arriero.accuracy.locate.location import Location
from arriero.accuracy.plots import plot_profile
from arriero.accuracy.sides import open_side
from arriero.calibration import calibrate_model, fp8, int4, int8
from arriero.engine import build_bundle
from arriero.errors import AccuracyError
from arriero.export import export_checkpoint
from arriero.export.checkpoint import open_checkpoint
from arriero.spec.recipe import Recipe
from arriero.walk.numbers import Weights
from arriero.walk.windows import Windows

LAYER = "vision_model.model.layers.{}.{}"
ADAPTER, PROJECTOR = "vision_model.vision_adapter", "multi_modal_projector.linear_1"
TEXT = {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 64}


def seeing(checkpoint: Path, tiles: int = 3) -> Windows:
    """Two windows of so many random tiles each, in random text."""
    opened, rng = open_checkpoint(checkpoint), np.random.default_rng(0)
    vision = opened.vision
    assert vision is not None
    image = np.full((2, tiles * vision.features), vision.image_token)
    ids_WS = np.concatenate([rng.integers(0, 90, (2, 5)), image, rng.integers(0, 90, (2, 9))], axis=1)
    shape = (2 * tiles, 3, vision.image_size, vision.image_size)
    return Windows(
        ids_WS=ids_WS,
        is_image_WS=ids_WS == vision.image_token,
        tiles_W=np.full(2, tiles),
        pixels_N3PP=rng.normal(0, 0.6, shape).astype(np.float16),
        vision=vision,
    )


@pytest.fixture(scope="module")
def checkpoint(make_multimodal: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tower of three layers before a decoder of one."""
    reference = make_multimodal(vocab_size=VOCABULARY, **TEXT)
    return write_multimodal(reference, tmp_path_factory.mktemp("seeing") / "checkpoint")


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> Path:
    return export_checkpoint(checkpoint, checkpoint.parent / "model")


@pytest.fixture(scope="module")
def windows(checkpoint: Path) -> Windows:
    return seeing(checkpoint)


@pytest.fixture(scope="module")
def quantised(model: Path, windows: Windows) -> Callable[[Recipe], Path]:
    made: dict[str, Path] = {}

    def make(recipe: Recipe) -> Path:
        if repr(recipe) not in made:
            out = model.parent / f"quantised-{len(made)}"
            made[repr(recipe)] = calibrate_model(model, out, recipe=recipe, data=windows, floor=0)
        return made[repr(recipe)]

    return make


def found(candidate: Path, reference: Path, windows: Windows) -> Location:
    return locate(open_side(candidate), open_side(reference), windows, lambda phase, done, total: None)


def named(location: Location) -> tuple[str | None, str, str]:
    """Where, which, and why."""
    assert location.blame is not None
    assert location.part == "vision"
    return location.place, location.blame.name, location.blame.why


def turned(weight: torch.Tensor) -> torch.Tensor:
    return weight.T


def times(factor: float) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda tensor: tensor * factor


TENSORS = {
    "a transposed weight": (LAYER.format(1, "self_attn.o_proj.weight"), turned, "vision 1", "it is transposed"),
    "a bias of nothing": (LAYER.format(2, "mlp.fc1.bias"), times(0), "vision 2", "it is zero"),
    "a value's bias": (
        LAYER.format(1, "self_attn.v_proj.bias"),
        times(4),
        "vision 1",
        "it is 4 times what it should be",
    ),
    "an output's bias": (LAYER.format(0, "mlp.fc2.bias"), times(4), "vision 0", "it is 4 times what it should be"),
    "a norm": (LAYER.format(2, "input_layernorm.weight"), times(1.5), "vision 2", "it is 1.5 times what it should be"),
    "a norm's bias": (LAYER.format(0, "post_attention_layernorm.bias"), times(0), "vision 0", "it is zero"),
    "the patches' weight": (
        "vision_model.patch_embedding.linear.weight",
        lambda weight: weight.flip(0),
        "vision stem",
        "its rows stand in another order",
    ),
    "the places": (
        "vision_model.positional_embedding_vlm",
        lambda places: places.roll(1, 0),
        "vision stem",
        "its rows stand in another order",
    ),
    "the adapter": (f"{ADAPTER}.mlp.fc2.weight", turned, "vision head", "it is transposed"),
    "the last norm": (
        "vision_model.layernorm_post.weight",
        times(1.5),
        "vision head",
        "it is 1.5 times what it should be",
    ),
    "the projector": (f"{PROJECTOR}.weight", times(4), "vision head", "it is 4 times what it should be"),
}


@pytest.mark.parametrize("fault", TENSORS)
def test_a_wrong_tensor_is_named(checkpoint: Path, windows: Windows, tmp_path: Path, fault: str) -> None:
    name, change, place, why = TENSORS[fault]
    bad = changed_tensors(checkpoint, tmp_path / "bad", {name: change})
    assert named(found(bad, checkpoint, windows)) == (place, name, why)


def test_exchanged_weights_are_named(checkpoint: Path, windows: Windows, tmp_path: Path) -> None:
    weights = Weights({path.name: path for path in checkpoint.glob("*.safetensors")})
    changes = {}
    for part in ("weight", "bias"):
        query, key = (LAYER.format(1, f"self_attn.{unit}_proj.{part}") for unit in "qk")
        theirs = {query: weights.wide(key).clone(), key: weights.wide(query).clone()}
        changes |= {name: lambda _, tensor=tensor: tensor for name, tensor in theirs.items()}
    location = found(changed_tensors(checkpoint, tmp_path / "bad", changes), checkpoint, windows)
    name = LAYER.format(1, "self_attn.q_proj.weight")
    assert named(location) == ("vision 1", name, "it has the weights of self_attn.k_proj")


def test_weights_for_a_rope_of_the_wrong_layout_are_named(checkpoint: Path, windows: Windows, tmp_path: Path) -> None:
    names = [LAYER.format(1, f"self_attn.{part}_proj.weight") for part in "qk"]
    bad = changed_tensors(checkpoint, tmp_path / "bad", dict.fromkeys(names, rows_over_halves(8)))
    location = found(bad, checkpoint, windows)
    assert location.blame is not None
    assert (location.place, location.blame.attribute) == ("vision 1", "rope layout")


GRAPHS = {
    "patches": (
        other_order("stem", [0, 4, 2, 1, 3, 5]),
        ("vision stem", "vision_model.patch_embedding", "patches stand column by column, not row by row"),
    ),
    "colours": (
        other_order("stem", [0, 2, 4, 3, 5, 1]),
        ("vision stem", "vision_model.patch_embedding", "colours come last in a patch, not first"),
    ),
    "pixel shuffle": (
        other_order("head", [0, 1, 3, 4, 2, 5]),
        ("vision head", ADAPTER, "a square's patches stand column by column, not row by row"),
    ),
    "queries and keys": (
        exchanged_inputs(2),
        ("vision 2", LAYER.format(2, "self_attn"), "queries and keys are exchanged"),
    ),
    "rope": (
        rope_over_halves(1),
        ("vision 1", LAYER.format(1, "self_attn"), "RoPE turns halves of a head, not neighbouring pairs"),
    ),
    "a layer's GELU": (
        approximate_gelu("layers.2"),
        ("vision 2", LAYER.format(2, "mlp"), "it is GELU's approximation by a tanh"),
    ),
    "the adapter's GELU": (without_gelu("head"), ("vision head", f"{ADAPTER}.mlp", "it is left out")),
    "a bias": (
        without_bias(LAYER.format(1, "mlp.fc1.bias")),
        ("vision 1", LAYER.format(1, "mlp.fc1.bias"), "it is left out"),
    ),
    "a residual": (
        without_residual(1, "post_attention_layernorm"),
        ("vision 1", LAYER.format(1, "self_attn"), "what enters it is not added to what it computes"),
    ),
}


@pytest.mark.usefixtures("unheld_graphs")
@pytest.mark.parametrize("fault", GRAPHS)
def test_a_mistake_in_what_is_computed_is_named(
    model: Path, checkpoint: Path, windows: Windows, tmp_path: Path, fault: str
) -> None:
    change, expected = GRAPHS[fault]
    bad = changed_graph(model, tmp_path / "bad", change, "vision.onnx")
    assert named(found(bad, checkpoint, windows)) == expected


@pytest.mark.usefixtures("unheld_graphs")
def test_a_bias_that_a_bundle_does_not_add_is_named(
    model: Path, checkpoint: Path, windows: Windows, tmp_path: Path
) -> None:
    bundle = build_bundle(model, tmp_path / "bundle", target="cpu")
    name = LAYER.format(1, "self_attn.o_proj.bias")
    bad = changed_graph(bundle, tmp_path / "bad", without_bias(name), "vision.onnx")
    assert named(found(bad, checkpoint, windows)) == ("vision 1", name, "it is not added")
    assert found(bundle, checkpoint, windows).blame is None


@pytest.mark.parametrize(
    ("recipe", "unit"),
    [
        (int8(), "self_attn.v_proj"),
        (int8(), "self_attn.o_proj"),
        (int8(), "mlp.fc1"),
        (fp8(), "self_attn.q_proj"),
        (fp8(), "mlp.fc2"),
        (int4(group_size=32), "mlp.fc2"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.format,
)
def test_a_scale_four_times_too_large_is_named(
    quantised: Callable[[Recipe], Path], model: Path, windows: Windows, tmp_path: Path, recipe: Recipe, unit: str
) -> None:
    good, name = quantised(recipe), LAYER.format(1, f"{unit}.weight")
    location = found(good, model, windows)
    assert location.blame is None, (location.place, location.unit, location.error, location.explained)
    bad = changed_tensors(good, tmp_path / "bad", {f"{name}_scale": times(4)})
    place, tensor, why = named(found(bad, model, windows))
    assert (place, tensor) == ("vision 1", name)
    assert float(why.removeprefix("it is ").partition(" times")[0]) == pytest.approx(4, rel=0.02)


def test_a_wrong_scale_is_named_in_a_bundle_too(
    quantised: Callable[[Recipe], Path], model: Path, windows: Windows, tmp_path: Path
) -> None:
    name = LAYER.format(1, "self_attn.v_proj.weight")
    bad = changed_tensors(quantised(int8()), tmp_path / "bad", {f"{name}_scale": times(4)})
    place, tensor, why = named(found(build_bundle(bad, tmp_path / "bundle"), model, windows))
    assert (place, tensor) == ("vision 1", name)
    assert float(why.removeprefix("it is ").partition(" times")[0]) == pytest.approx(4, rel=0.02)


@pytest.mark.parametrize("seed", sampled(range(5), [0, 1, 2]))
def test_clean_pairs_raise_no_alarm(
    make_multimodal: Callable[..., Any], draw_vision: Callable[[int], dict[str, Any]], tmp_path: Path, seed: int
) -> None:
    """Geometries drawn at random, in each recipe and type."""
    dtype = (torch.float32, torch.bfloat16)[seed % 2]
    reference = make_multimodal(seed, dtype, draw_vision(seed), vocab_size=VOCABULARY, **TEXT)
    checkpoint = write_multimodal(reference, tmp_path / "checkpoint")
    model, windows = export_checkpoint(checkpoint, tmp_path / "model"), seeing(checkpoint)
    location = found(model, checkpoint, windows)
    assert location.blame is None, (location.place, location.unit, location.error, location.explained)
    recipe = (int8(), fp8(), int8(activations="static", smoothing="none"))[seed % 3]
    quantised = calibrate_model(model, tmp_path / "quantised", recipe=recipe, data=windows, floor=0)
    location = found(quantised, model, windows)
    assert location.blame is None, (location.place, location.unit, location.error, location.explained)


def test_the_towers_layers_are_in_what_is_reported(model: Path, checkpoint: Path, windows: Windows) -> None:
    location = found(model, checkpoint, windows)
    fields = json.loads(json.dumps(location.as_fields()))
    read = [reading for reading in fields["readings"] if reading["part"] == "vision"]
    assert {reading["layer"] for reading in read} == {-1, 0, 1, 2, 3}
    assert len(read) == 2 + 3 * 9 + 3
    assert all(reading["error"] < 1e-5 for reading in read)
    places = [reading.place for reading in location.readings if reading.part == "vision"]
    assert list(dict.fromkeys(places)) == ["vision stem", "vision 0", "vision 1", "vision 2", "vision head"]
    assert len(plot_profile(location)) > 1000


def test_an_engine_is_refused(tiny_engine: Path, checkpoint: Path, windows: Windows) -> None:
    with pytest.raises(AccuracyError, match="whose layers are fused: give --locate the model"):
        found(tiny_engine, checkpoint, windows)
