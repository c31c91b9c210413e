"""Checks over conversations with images: each side's own vision tower, and only what a model writes is judged."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from pictures import drawn
from planted_faults import changed_tensors
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from arriero.accuracy import check, record_golden
from arriero.accuracy.recorded import beginnings
from arriero.cli.app import app
from arriero.errors import AccuracyError, DataError
from arriero.export import export_checkpoint
from arriero.files.folders import read_spec


@pytest.fixture(scope="module")
def talks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Conversations about drawn pictures of one and of several tiles, and some without."""
    folder = tmp_path_factory.mktemp("talks")
    lines = []
    for number in range(24):
        images = [f"{number}.png"] if number % 4 else []
        drawn(20 + 5 * number, 28).save(folder / f"{number}.png")
        said = [
            {"role": "user", "content": f"What is number {number}?"},
            {"role": "assistant", "content": "A drawing."},
        ]
        lines.append(json.dumps({"messages": said, "images": images}))
    (folder / "talks.jsonl").write_text("\n".join(lines))
    return folder / "talks.jsonl"


def test_an_export_equals_its_checkpoint_with_images(
    multimodal_checkpoint: Path, multimodal_model: Path, talks: Path
) -> None:
    verdict = check(multimodal_model, multimodal_checkpoint, data=[talks], window=120, locate_fault=True)
    assert verdict.outcome == "pass"
    assert verdict.metrics["kl"].value < 1e-6
    assert abs(verdict.metrics["perplexity_ratio"].value - 1) < 1e-6
    golden = verdict.comparison.golden
    assert golden.tiles_W is not None
    assert 0 < golden.judged_WN.mean() < 1
    assert verdict.location is not None
    assert verdict.location.blame is None


def test_a_golden_file_holds_the_images(multimodal_model: Path, talks: Path, tmp_path: Path) -> None:
    golden = record_golden(multimodal_model, tmp_path / "golden.safetensors", data=[talks], window=100)
    live = check(multimodal_model, multimodal_model, data=[talks], window=100)
    later = check(multimodal_model, golden)
    assert later.metrics == live.metrics
    assert later.metrics["greedy"].value == 32


def test_no_beginning_that_is_continued_ends_within_an_image() -> None:
    is_image_WS = np.zeros((4, 200), bool)
    assert beginnings(is_image_WS) == (64, [0, 1, 2, 3])
    is_image_WS[:3, 10:90] = True
    is_image_WS[1, 85:120] = True
    assert beginnings(is_image_WS) == (120, [0, 1, 2, 3])
    is_image_WS[1] = True
    assert beginnings(is_image_WS) == (90, [0, 2, 3])
    is_image_WS[:] = True
    assert beginnings(is_image_WS)[1] == []


def test_images_without_a_preprocessor_are_refused(
    multimodal_checkpoint: Path, multimodal_model: Path, talks: Path, tmp_path: Path
) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(multimodal_checkpoint, bare)
    for name in ("preprocessor_config.json", "processor_config.json"):
        (bare / name).unlink()
    with pytest.raises(DataError, match=r"bare has no processor_config.json or .*, by which images are cut"):
        check(multimodal_model, bare, data=[talks], window=100)


def test_another_tower_is_refused(
    multimodal_model: Path, multimodal_checkpoint: Path, talks: Path, tmp_path: Path
) -> None:
    spec = json.loads((multimodal_model / "spec.json").read_text())
    spec["vision"]["spec"]["layers"] = 2
    other = tmp_path / "other"
    shutil.copytree(multimodal_model, other)
    (other / "spec.json").write_text(json.dumps(spec))
    with pytest.raises(AccuracyError, match=r"vision tower, .* has another: give text"):
        check(other, multimodal_checkpoint, data=[talks], window=100)


def test_text_is_judged_as_ever_by_a_model_that_sees(
    multimodal_model: Path, multimodal_checkpoint: Path, texts: tuple[Path, Path]
) -> None:
    verdict = check(multimodal_model, multimodal_checkpoint, data=[texts[0]], samples=2, window=128, locate_fault=True)
    assert abs(verdict.metrics["kl"].value) < 1e-6
    golden = verdict.comparison.golden
    assert golden.vision is None
    assert golden.judged_WN.all()
    assert verdict.location is not None
    assert {reading.part for reading in verdict.location.readings} == {"decoder"}


def test_a_fault_in_the_tower_is_told_in_words(
    multimodal_checkpoint: Path, multimodal_model: Path, talks: Path, tmp_path: Path
) -> None:
    name = "vision_model.model.layers.1.mlp.fc1.weight"
    bad = changed_tensors(multimodal_checkpoint, tmp_path / "bad", {name: lambda weight: weight * 4})
    run = ["check", bad, "--against", multimodal_model, "--data", talks, "--window", 120, "--locate"]
    result = CliRunner().invoke(app, [*map(str, run), "-o", str(tmp_path / "report")])
    assert "First out of line: vision 1, " in result.output.replace("\n", " ")
    found = json.loads((tmp_path / "report" / "verdict.json").read_text())["location"]
    assert (found["part"], found["place"], found["blame"]["name"]) == ("vision", "vision 1", name)
    assert f"First out of line: vision 1, {name}" in (tmp_path / "report" / "report.html").read_text()
    assert f"vision 1: {name}: it is 4 times" in (tmp_path / "report" / "junit.xml").read_text()


def test_a_fault_in_the_tower_shows(
    multimodal_checkpoint: Path, multimodal_model: Path, talks: Path, tmp_path: Path
) -> None:
    faulty = tmp_path / "checkpoint"
    shutil.copytree(multimodal_checkpoint, faulty)
    name = "multi_modal_projector.linear_1.weight"
    index = json.loads((faulty / "model.safetensors.index.json").read_text())
    shard = faulty / index["weight_map"][name]
    tensors = load_file(shard)
    tensors[name] = -4 * tensors[name]
    save_file(tensors, shard, {"format": "pt"})
    model = export_checkpoint(faulty, tmp_path / "model")
    images = check(model, multimodal_model, data=[talks], window=120)
    assert images.metrics["kl"].value > 1e-3
    assert np.isfinite(images.metrics["perplexity"].value)


def test_images_need_a_tower_on_both_sides(
    multimodal_model: Path, multimodal_checkpoint: Path, talks: Path, tmp_path: Path
) -> None:
    spec = json.loads((multimodal_model / "spec.json").read_text())
    plain = tmp_path / "plain"
    shutil.copytree(multimodal_model, plain)
    (plain / "spec.json").write_text(json.dumps({**spec, "vision": None}))
    assert read_spec(plain).vision is None
    with pytest.raises(AccuracyError, match=r"vision tower, .* has none: give text"):
        check(plain, multimodal_checkpoint, data=[talks], window=100)
    with pytest.raises(DataError, match="has an image, the model takes text only"):
        check(multimodal_model, plain, data=[talks], window=100)
