"""Planted faults are found at their layer and named; clean pairs raise no alarm."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from planted_faults import (
    changed_config,
    changed_graph,
    changed_tensors,
    rope_over_halves,
    rows_over_halves,
    score_on_output,
    swapped_experts,
    without_shared_expert,
    without_temperature,
)
from tables import sampled
from transformers import Llama4ForCausalLM

from arriero.accuracy.locate.first_fault import locate
from arriero.accuracy.locate.location import Location
from arriero.accuracy.sides import open_side
from arriero.calibration import calibrate_model, fp8, int4, int8
from arriero.engine import build_bundle
from arriero.errors import AccuracyError
from arriero.export import export_checkpoint
from arriero.spec.recipe import Override, Recipe
from arriero.walk.windows import Windows

ATTENTION, FEED = "model.layers.{}.self_attn", "model.layers.{}.feed_forward"
IDS = np.random.default_rng(0).integers(3, 2048, (2, 300))


def found(candidate: Path, reference: Path, ids: np.ndarray = IDS) -> Location:
    return locate(open_side(candidate), open_side(reference), Windows(ids_WS=ids), lambda phase, done, total: None)


def times(why: str) -> float:
    match = re.search(r"it is (\S+) times what it should be$", why)
    assert match, why
    return float(match[1])


@pytest.fixture(scope="module")
def bundle(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_bundle(tiny_model, tmp_path_factory.mktemp("bundle") / "cpu", target="cpu")


def test_a_transposed_weight_is_named(tiny: Path, tmp_path: Path) -> None:
    name = f"{ATTENTION.format(4)}.o_proj.weight"
    location = found(changed_tensors(tiny, tmp_path / "bad", {name: lambda weight: weight.T}), tiny)
    assert location.blame is not None
    assert (location.layer, location.blame.name, location.blame.why) == (4, name, "it is transposed")


@pytest.mark.parametrize("part", ["gate_up_proj", "down_proj"])
def test_swapped_experts_are_named(tiny: Path, tmp_path: Path, part: str) -> None:
    name = f"{FEED.format(5)}.experts.{part}"
    location = found(changed_tensors(tiny, tmp_path / "bad", {name: swapped_experts(2, 6)}), tiny)
    assert location.blame is not None
    assert (location.layer, location.blame.name) == (5, name)
    assert location.blame.why == "expert 2 has the weights of expert 6"


@pytest.mark.parametrize(
    ("recipe", "unit"),
    [
        (int8(), "self_attn.v_proj"),
        (int8(), "self_attn.o_proj"),
        (int8(), "feed_forward.up_proj"),
        (int8(), "feed_forward.down_proj"),
        (fp8(), "self_attn.q_proj"),
        (int4(), "self_attn.o_proj"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.format,
)
def test_a_scale_four_times_too_large_is_named(
    quantised_tiny: Callable[[Recipe], Path], tiny_model: Path, tmp_path: Path, recipe: Recipe, unit: str
) -> None:
    name = f"model.layers.4.{unit}.weight"
    bad = changed_tensors(quantised_tiny(recipe), tmp_path / "bad", {f"{name}_scale": lambda scale: scale * 4})
    location = found(bad, tiny_model)
    assert location.blame is not None
    assert (location.layer, location.blame.name) == (4, name)
    assert times(location.blame.why) == pytest.approx(4, rel=0.02)


def test_one_channels_scale_is_named(
    quantised_tiny: Callable[[Recipe], Path], tiny_model: Path, tmp_path: Path
) -> None:
    def change(scale: torch.Tensor) -> torch.Tensor:
        scale = scale.clone()
        scale[17] *= 4
        return scale

    name = "model.layers.3.feed_forward.shared_expert.gate_proj.weight"
    location = found(changed_tensors(quantised_tiny(int8()), tmp_path / "bad", {f"{name}_scale": change}), tiny_model)
    assert location.blame is not None
    assert (location.layer, location.blame.name) == (3, name)
    assert location.blame.why.startswith("1 of its")


def test_an_experts_scale_is_named(quantised_tiny: Callable[[Recipe], Path], tiny_model: Path, tmp_path: Path) -> None:
    def change(scale: torch.Tensor) -> torch.Tensor:
        scale = scale.clone()
        scale[3] *= 4
        return scale

    name = f"{FEED.format(3)}.experts.gate_up_proj"
    location = found(changed_tensors(quantised_tiny(fp8()), tmp_path / "bad", {f"{name}_scale": change}), tiny_model)
    assert location.blame is not None
    assert (location.layer, location.blame.name) == (3, name)
    assert location.blame.why.startswith("of expert 3: ")
    assert times(location.blame.why) == pytest.approx(4, rel=0.02)


def test_q_scales_permuted_against_q_weights_are_named(
    quantised_tiny: Callable[[Recipe], Path], tiny_model: Path, tmp_path: Path
) -> None:
    name = f"{ATTENTION.format(2)}.q_proj.weight"
    turned = torch.arange(32).view(-1, 2).T.flatten()
    change = {f"{name}_scale": lambda scale: scale.view(-1, 32)[:, turned].flatten()}
    location = found(changed_tensors(quantised_tiny(int8()), tmp_path / "bad", change), tiny_model)
    assert location.blame is not None
    assert (location.layer, location.blame.name) == (2, name)
    assert location.blame.why == "its scales stand in another order than its rows"


@pytest.mark.usefixtures("unheld_graphs")
def test_an_inputs_scale_is_found(quantised_tiny: Callable[[Recipe], Path], tiny_model: Path, tmp_path: Path) -> None:
    """The scale lies in the graph too, where it is not changed: the weights are right, the product is not."""
    recipe = int8(activations="static", smoothing="none")

    def change(graph: Any) -> int:
        from onnx import numpy_helper

        name = f"{ATTENTION.format(6)}.o_proj.input_scale"
        scale = next(each for each in graph.initializer if each.name == name)
        scale.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(scale) * np.float32(0.1), name))
        return 1

    location = found(changed_graph(quantised_tiny(recipe), tmp_path / "bad", change), tiny_model)
    assert location.blame is not None
    assert (location.layer, location.blame.name) == (6, f"{ATTENTION.format(6)}.o_proj")
    assert "the scale of its input" in location.blame.why


@pytest.mark.usefixtures("unheld_graphs")
def test_the_router_score_on_the_output_is_named(bundle: Path, tiny: Path, tmp_path: Path) -> None:
    location = found(changed_graph(bundle, tmp_path / "bad", score_on_output(3)), tiny)
    assert location.blame is not None
    assert (location.layer, location.blame.op, location.blame.name) == (3, "MoeDispatch", f"{FEED.format(3)}.experts")
    assert location.blame.attribute == "router score"
    assert location.blame.why == "it multiplies the experts' output, not their input"


@pytest.mark.usefixtures("unheld_graphs")
def test_a_dropped_shared_expert_is_named(bundle: Path, tiny: Path, tmp_path: Path) -> None:
    location = found(changed_graph(bundle, tmp_path / "bad", without_shared_expert(5)), tiny)
    assert location.blame is not None
    assert (location.layer, location.blame.name) == (5, f"{FEED.format(5)}.shared_expert")
    assert location.blame.why.startswith("it is dropped")


@pytest.mark.parametrize("chunk", [127, 129])
def test_a_chunk_boundary_off_by_one_shows_in_long_contexts_only(tiny: Path, tmp_path: Path, chunk: int) -> None:
    bad = export_checkpoint(changed_config(tiny, tmp_path / "bad", attention_chunk_size=chunk), tmp_path / "model")
    location = found(bad, tiny)
    assert location.blame is not None
    assert (location.layer, location.blame.name) == (0, ATTENTION.format(0))
    assert (location.blame.attribute, location.blame.why) == ("chunk", f"it is {chunk}, in the reference 128")
    assert found(bad, tiny, IDS[:, :120]).blame is None


@pytest.mark.usefixtures("unheld_graphs")
def test_missing_temperature_tuning_is_named(tiny_model: Path, tiny: Path, tmp_path: Path) -> None:
    location = found(changed_graph(tiny_model, tmp_path / "bad", without_temperature(7)), tiny)
    assert location.blame is not None
    assert (location.layer, location.blame.name, location.blame.attribute) == (7, ATTENTION.format(7), "temperature")


@pytest.mark.usefixtures("unheld_graphs")
def test_a_rope_of_the_wrong_layout_is_named(bundle: Path, tiny: Path, tmp_path: Path) -> None:
    location = found(changed_graph(bundle, tmp_path / "bad", rope_over_halves(2)), tiny)
    assert location.blame is not None
    assert (location.layer, location.blame.name, location.blame.attribute) == (2, ATTENTION.format(2), "rope layout")


def test_weights_for_a_rope_of_the_wrong_layout_are_named(tiny: Path, tmp_path: Path) -> None:
    names = [f"{ATTENTION.format(4)}.{part}_proj.weight" for part in "qk"]
    location = found(changed_tensors(tiny, tmp_path / "bad", dict.fromkeys(names, rows_over_halves(32))), tiny)
    assert location.blame is not None
    assert (location.layer, location.blame.attribute) == (4, "rope layout")


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"])
def test_faults_at_the_ends_are_named(tiny: Path, tmp_path: Path, name: str) -> None:
    location = found(changed_tensors(tiny, tmp_path / "bad", {name: lambda weight: weight * 1.5}), tiny)
    assert location.blame is not None
    assert location.blame.name == name
    assert location.blame.why == "it is 1.5 times what it should be"


@pytest.mark.parametrize(
    "recipe",
    [int8(), fp8(), int4(), int8(kv_cache="int8", overrides=(Override(pattern="lm_head", format="int8"),))],
    ids=["int8", "fp8", "int4", "with cache and head"],
)
def test_rounding_raises_no_alarm(quantised_tiny: Callable[[Recipe], Path], tiny_model: Path, recipe: Recipe) -> None:
    location = found(quantised_tiny(recipe), tiny_model)
    assert location.blame is None, location.blame


@pytest.mark.parametrize("seed", sampled(range(10), [0, 3, 4, 5]))
def test_clean_pairs_raise_no_alarm(
    make_llama4: Callable[..., Llama4ForCausalLM],
    draw_overrides: Callable[[int], dict[str, Any]],
    tmp_path: Path,
    seed: int,
) -> None:
    """Geometries drawn at random, with dense layers and without, of one and of two experts a token; both recipes."""
    make_llama4(seed, **draw_overrides(seed)).save_pretrained(tmp_path / "checkpoint")
    model = export_checkpoint(tmp_path / "checkpoint", tmp_path / "model")
    ids = np.random.default_rng(seed).integers(0, 97, (2, 70))
    location = found(model, tmp_path / "checkpoint", ids)
    assert location.blame is None, location.blame
    assert not any(location.router_flips.values())
    recipe = (int8(), fp8())[seed % 2]
    quantised = calibrate_model(model, tmp_path / "quantised", recipe=recipe, data=ids, floor=0)
    location = found(quantised, model, ids)
    assert location.blame is None, (location.blame, location.error, location.explained)


def test_an_engine_is_refused(tiny_engine: Path, tiny_model: Path) -> None:
    with pytest.raises(AccuracyError, match="whose layers are fused: give --locate the model"):
        found(tiny_engine, tiny_model)
