"""Inspect: whatever lies at a path, in numbers, and what is documented of it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from json_keys import documented
from transformers import Llama4ForCausalLM
from typer.testing import CliRunner

from arriero.accuracy import record_golden
from arriero.calibration import calibrate_model
from arriero.cli.app import app
from arriero.engine import build_bundle
from arriero.errors import FolderError
from arriero.export.checkpoint import open_checkpoint
from arriero.files.contents_hash import contents_hash
from arriero.files.packing import pack_bundle
from arriero.measuring.contents import describe
from arriero.spec.parameters import count_parameters


def inspected(path: Path) -> tuple[dict[str, object], str]:
    as_json, shown = (CliRunner().invoke(app, ["inspect", str(path), *more]) for more in (["--json"], []))
    assert as_json.exit_code == shown.exit_code == 0, as_json.stderr
    return json.loads(as_json.stdout), shown.stdout


def test_parameters_are_those_of_transformers(
    make_llama4: Callable[..., Llama4ForCausalLM], multimodal_checkpoint: Path, tmp_path: Path
) -> None:
    model = make_llama4(num_hidden_layers=3, moe_layers=[1], num_experts_per_tok=2)
    model.save_pretrained(tmp_path)
    total, active = count_parameters(open_checkpoint(tmp_path).spec)
    assert total == model.num_parameters()
    experts = model.model.layers[1].feed_forward.experts
    idle = sum(each.numel() for each in experts.parameters()) * (4 - 2) // 4
    assert active == total - idle
    opened = open_checkpoint(multimodal_checkpoint)
    stored = [tensor.region.shape for tensor in opened.tensors.values()]
    sizes = [int.__mul__(*shape) if len(shape) == 2 else shape for shape in stored]
    counted = sum(size if isinstance(size, int) else _product(size) for size in sizes)
    assert count_parameters(opened.spec, opened.vision)[0] == counted


def _product(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def test_a_quantised_folder_tells_its_recipe_and_its_files(tiny_model: Path, tmp_path: Path) -> None:
    ids = np.random.default_rng(0).integers(3, 2000, (1, 64))
    quantised = calibrate_model(tiny_model, tmp_path / "int8", recipe="int8", data=ids, floor=0)
    bundle = build_bundle(quantised, tmp_path / "bundle", kv_cache="int8")
    found, shown = inspected(bundle)
    assert set(found) | {"vision", "engine", "draft", "layers", "every_layer"} == documented("model, bundle")
    assert found["quantised"]["format"] == "int8"  # type: ignore[index]
    assert found["quantised"]["kv_cache"] == "int8"  # type: ignore[index]
    assert {file["state"] for file in found["files"]} == {"there"}  # type: ignore[attr-defined]
    assert "INT8 weights" in shown
    assert "keys and values in INT8" in " ".join(shown.split())
    copy = shutil.copytree(bundle, tmp_path / "copy")
    assert contents_hash(copy) == contents_hash(bundle)


def test_a_missing_weight_file_is_said_and_no_error(tiny: Path, tmp_path: Path) -> None:
    from arriero.export import export_checkpoint

    checkpoint = shutil.copytree(tiny, tmp_path / "checkpoint")
    model = export_checkpoint(checkpoint, tmp_path / "model")
    (checkpoint / "model-00001-of-00003.safetensors").unlink()
    found, shown = inspected(model)
    states = {file["name"]: file["state"] for file in found["files"]}  # type: ignore[attr-defined]
    assert states.pop("model-00001-of-00003.safetensors") == "missing"
    assert set(states.values()) == {"there"}
    assert "model-00001-of-00003.safetensors is missing" in " ".join(shown.split())


def test_a_checkpoint_says_what_export_will_miss(multimodal_checkpoint: Path, tmp_path: Path) -> None:
    found, _ = inspected(multimodal_checkpoint)
    assert set(found) == documented("checkpoint")
    assert found["sees"]
    assert found["has_tokenizer"]
    copy = shutil.copytree(multimodal_checkpoint, tmp_path / "copy")
    for path in [copy / "tokenizer.json", *copy.glob("*processor_config.json")]:
        path.unlink()
    assert "missing: export with --tokenizer DIR" in inspected(copy)[1]
    assert "its preprocessor_config.json is missing" in inspected(copy)[1]


def test_a_golden_file_and_results_are_told(tiny_model: Path, texts: tuple[Path, Path], tmp_path: Path) -> None:
    golden = record_golden(tiny_model, tmp_path / "g", data=[texts[0]], samples=2)
    found, shown = inspected(golden)
    assert set(found) == documented("golden")
    assert found["tokens"] == 2 * 512
    assert "1,024 tokens in 2 windows of 512" in shown
    check = ["check", str(tiny_model), "--against", str(golden), "-o", str(tmp_path / "report")]
    assert CliRunner().invoke(app, check).exit_code == 3
    result, table = inspected(tmp_path / "report")
    assert result["kind"] == "verdict"
    assert "record the golden file over more than its 2 windows" in " ".join(table.split())


def test_anything_else_says_what_can_be_given(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(FolderError, match=r"holds no spec.json, config.json, verdict.json or bench.json: give"):
        describe(tmp_path)
    packed = pack_bundle(build_bundle(tiny_model, tmp_path / "bundle"), tmp_path / "packed.arriero")
    with pytest.raises(FolderError, match="is a packed bundle: unpack it with"):
        describe(packed)
    (tmp_path / "x").write_text("x")
    with pytest.raises(FolderError, match=r"no golden file, or damaged .*: give a checkpoint, a model"):
        describe(tmp_path / "x")
    with pytest.raises(FolderError, match=f"give the folder that it is a part of, {tiny_model}$"):
        describe(tiny_model / "decoder.onnx")


def test_options_that_show_nothing_more_say_so(tiny_model: Path) -> None:
    ran = CliRunner().invoke(app, ["inspect", str(tiny_model), "--layers", "--batch", "2"])
    assert ran.exit_code == 0
    assert "No memory is estimated" in ran.stderr
    assert "No fused layers are listed" in ran.stderr


VERDICT = {
    **{"schema": 1, "candidate": "int8", "reference": "g", "outcome": "pass", "windows": 2, "tokens": 9, "notes": []},
    **{"metrics": {"kl": {"value": 0.1, "low": 0.0, "high": None}}, "location": None, "remedy": None},
    "limits": [{"metric": "kl", "side": "max", "limit": 0.2, "outcome": "pass"}],
}
CASE = {"prefill": 1, "batch": 1, "ttft_seconds": 0.1, "prefill_tokens_per_second": 1.0, "itl_seconds": 0.1}
BENCH = {
    **{"folder": "b", "target": "cpu", "threads": 1, "ranks": 1, "runs": 1, "decode_tokens": 1, "load_seconds": 0.1},
    **{"peak_rss_bytes": 1, "machine": {"processor": "x"}, "stream": None},
    "cases": [CASE | {"decode_tokens_per_second": 1.0}],
}


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("verdict", {"metrics": {"kl": 3}}, "metrics.kl is 3, expected an object"),
        ("verdict", {"metrics": {"kl": {"value": 1e300}}}, "metrics.kl.value is 1e[+]300, expected a finite number"),
        (
            "verdict",
            {"limits": [{**VERDICT["limits"][0], "outcome": "odd"}]},
            "outcome is 'odd', expected one of pass,",
        ),  # type: ignore[index]
        ("verdict", {"location": {"blame": {"name": 1}}}, "location.blame.name is 1, expected a text"),
        ("bench", {"cases": [4]}, r"cases\[0\] is 4, expected an object"),
        ("bench", {"machine": []}, r"machine is \[\], expected an object"),
        ("bench", {"stream": {"bytes_per_second": 1, "buffer_bytes": 1}}, r"cases\[0\].step_bytes is missing"),
    ],
)
def test_results_with_fields_of_another_type_are_refused_by_name(
    name: str, changes: dict[str, object], said: str, tmp_path: Path
) -> None:
    path, good = tmp_path / f"{name}.json", {"verdict": VERDICT, "bench": BENCH}[name]
    path.write_text(json.dumps(good))
    inspected(path)
    path.write_text(json.dumps(good | changes))
    with pytest.raises(FolderError, match=f"{path} is damaged .{said}.*: write it again"):
        describe(path)
