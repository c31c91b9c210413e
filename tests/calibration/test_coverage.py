"""Experts that saw too few tokens: all are named, nothing is lost, and each way on goes on from what is kept."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import arriero
from arriero.calibration import calibrate_model, int8
from arriero.calibration.reached import Reached, kept, write_progress
from arriero.calibration.report import LayerReport
from arriero.cli.calibrate import keeping_shown
from arriero.cli.terminal import Terminal
from arriero.errors import CalibrationError, StarvedError
from arriero.export import export_checkpoint
from arriero.files.folders import read_spec
from arriero.files.output import resumable

IDS = np.random.default_rng(0).integers(3, 97, (6, 48))
MORE = np.random.default_rng(1).integers(3, 97, (24, 48))


@pytest.fixture(scope="module")
def model(make_llama4: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three layers, the first dense."""
    folder = tmp_path_factory.mktemp("starved")
    sizes = {"num_hidden_layers": 3, "hidden_size": 32, "intermediate_size": 32, "moe_layers": [1, 2]}
    make_llama4(**sizes, dtype=torch.bfloat16).save_pretrained(folder / "checkpoint")
    return export_checkpoint(folder / "checkpoint", folder / "model")


def tokens_of(folder: Path) -> list[list[int]]:
    return [layer["expert_tokens"] for layer in json.loads((folder / "report.json").read_text())["layers"]]


@pytest.fixture(scope="module")
def counts(model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[list[int]]:
    """The tokens of each expert by layer."""
    return tokens_of(calibrate_model(model, tmp_path_factory.mktemp("c") / "out", recipe="int8", data=IDS, floor=0))


@pytest.fixture
def floor(counts: list[list[int]]) -> int:
    """A floor that some experts of both layers miss."""
    return max(min(layer) for layer in counts[1:]) + 1


def starve(model: Path, out: Path, floor: int) -> tuple[StarvedError, list[str]]:
    said: list[str] = []
    with pytest.raises(StarvedError) as caught:
        calibrate_model(model, out, recipe="int8", data=IDS, floor=floor, notice=said.append)
    return caught.value, said


def same_weights(first: Path, second: Path) -> bool:
    names = sorted(path.name for path in first.glob("*.safetensors"))
    return all((first / name).read_bytes() == (second / name).read_bytes() for name in names)


def test_all_starved_experts_are_named_and_all_layers_are_kept(
    model: Path, counts: list[list[int]], floor: int, tmp_path: Path
) -> None:
    error, said = starve(model, tmp_path / "out", floor)
    assert all(option in str(error) for option in ("--floor", "--all-experts", "--data", "--floor-action fallback"))
    for index in (1, 2):
        few = [f"{expert} ({tokens})" for expert, tokens in enumerate(counts[index]) if tokens < floor]
        assert f"Layer {index}, experts that saw too few tokens: {', '.join(few)}" in said
    assert not (tmp_path / "out").exists()
    assert "3 layers are kept" in kept(tmp_path / "out")
    assert str(resumable(tmp_path / "out")) in kept(tmp_path / "out")


def test_a_lower_floor_takes_the_finished_layers(model: Path, floor: int, tmp_path: Path) -> None:
    error, _ = starve(model, tmp_path / "out", floor)
    fewest = int(str(error).partition(" takes all")[0].rpartition("(")[2])
    phases: list[str] = []
    said: list[str] = []
    out = calibrate_model(
        model,
        tmp_path / "out",
        recipe="int8",
        data=IDS,
        floor=fewest,
        progress=lambda phase, done, total: phases.append(phase),
        notice=said.append,
    )
    assert said == ["Going on: all 3 layers are done and kept."]
    assert not phases
    assert same_weights(out, calibrate_model(model, tmp_path / "whole", recipe="int8", data=IDS, floor=fewest))
    assert not resumable(out).exists()


def test_all_experts_measures_the_starved_layers_again(model: Path, counts: list[list[int]], tmp_path: Path) -> None:
    floor = min(counts[2]) + 1 if min(counts[1]) > min(counts[2]) else min(counts[1]) + 1
    layer = 2 if min(counts[2]) < floor and min(counts[1]) >= floor else 1
    starve(model, tmp_path / "out", floor)
    said: list[str] = []
    options = {"recipe": "int8", "data": IDS, "floor": floor, "all_experts": True}
    out = calibrate_model(model, tmp_path / "out", notice=said.append, **options)  # type: ignore[arg-type]
    assert f"Measuring layer {layer} again; the other 2 are kept." in said
    whole = calibrate_model(model, tmp_path / "whole", **options)  # type: ignore[arg-type]
    name = f"layer-0000{layer}.safetensors"
    assert (out / name).read_bytes() == (whole / name).read_bytes()
    assert np.isfinite(arriero.load(out).logits(IDS[:1])).all()


def test_more_data_measures_the_starved_layers_alone(model: Path, floor: int, tmp_path: Path) -> None:
    starve(model, tmp_path / "out", floor)
    kept_first = (resumable(tmp_path / "out") / "folder" / "layer-00000.safetensors").read_bytes()
    out = calibrate_model(model, tmp_path / "out", recipe="int8", data=MORE, floor=floor)
    assert (out / "layer-00000.safetensors").read_bytes() == kept_first
    whole = calibrate_model(model, tmp_path / "whole", recipe="int8", data=MORE, floor=0)
    for index in (1, 2):  # their inputs are the unquantised model's
        assert (out / f"layer-0000{index}.safetensors").read_bytes() == (
            whole / f"layer-0000{index}.safetensors"
        ).read_bytes()
    assert json.loads((out / "report.json").read_text())["other_data"]
    assert "Several texts" in (out / "report.html").read_text()


def test_other_data_in_the_middle_of_a_run_begins_anew(model: Path, tmp_path: Path) -> None:
    def stop(phase: str, done: int, total: int) -> None:
        if phase == "layer 1":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate_model(model, tmp_path / "out", recipe="int8", data=IDS, floor=0, progress=stop)
    said: list[str] = []
    out = calibrate_model(model, tmp_path / "out", recipe="int8", data=MORE, floor=0, notice=said.append)
    assert "beginning anew" in said[0]
    assert same_weights(out, calibrate_model(model, tmp_path / "whole", recipe="int8", data=MORE, floor=0))


@pytest.mark.parametrize("activations", ["dynamic", "static"])
def test_with_fallback_starved_experts_are_rounded_to_nearest(
    model: Path, counts: list[list[int]], floor: int, tmp_path: Path, activations: str
) -> None:
    recipe = int8(activations=activations, smoothing="none")
    out = calibrate_model(model, tmp_path / "out", recipe=recipe, data=IDS, floor=floor, floor_action="fallback")
    names = {
        f"layers.{index}.feed_forward.experts[{expert}]"
        for index in (1, 2)
        for expert, tokens in enumerate(counts[index])
        if tokens < floor
    }
    assert set(read_spec(out).unmeasured) == names
    report = json.loads((out / "report.json").read_text())
    assert set(report["unmeasured"]) == names
    for name in names:
        assert name in (out / "report.html").read_text().replace("<wbr>", "")
    records = [record for layer in report["layers"] for record in layer["records"]]
    assert {record["name"].replace(".gate_up_proj", "") for record in records if not record["measured"]} >= names
    expert, index = int(min(names)[-2]), int(min(names)[7])
    tensors = load_file(out / f"layer-0000{index}.safetensors")
    prefix = f"model.layers.{index}.feed_forward.experts"
    weight_HN = load_file(next((model.parent / "checkpoint").glob("*.safetensors")))[f"{prefix}.gate_up_proj"][expert]
    scale_N = weight_HN.float().abs().amax(0) / 127
    exact = (weight_HN.float() / scale_N).round().clamp(-128, 127)
    assert torch.equal(tensors[f"{prefix}.gate_up_proj"][expert].float(), exact.T)
    if activations == "static":
        scales_E = tensors[f"{prefix}.hidden_scale"]
        others = [scales_E[each] for each, tokens in enumerate(counts[index]) if tokens >= floor]
        assert not others or scales_E[expert] == max(others)
    assert np.isfinite(arriero.load(out).logits(IDS[:1])).all()


def test_ctrl_c_says_what_is_kept_and_where(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scratch = resumable(tmp_path / "out") / "scratch"
    scratch.mkdir(parents=True)
    done = LayerReport(records=(), expert_tokens=())
    write_progress(scratch, Reached(layers=[done, done]))
    with pytest.raises(KeyboardInterrupt), keeping_shown(tmp_path / "out", Terminal()):
        raise KeyboardInterrupt
    said = capsys.readouterr().err
    assert said == (
        f"Interrupted: 2 layers are kept in {scratch.parent}: run the same command again to go on, "
        "or remove the folder.\n"
    )


def test_demands_out_of_range_are_refused(model: Path, tmp_path: Path) -> None:
    for options, said in (
        ({"floor": -1}, "floor is -1, expected a number of tokens from 0 up"),
        ({"floor_action": "ignore"}, "floor-action is 'ignore', expected one of fail, fallback"),
    ):
        with pytest.raises(CalibrationError, match=said):
            calibrate_model(model, tmp_path / "out", recipe="int8", data=IDS, **options)  # type: ignore[arg-type]
