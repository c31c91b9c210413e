"""Checks of the trained tiny Llama 4: verdicts, golden files, reports, and what cannot be compared."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from json_keys import documented
from planted_faults import changed_tensors
from transformers import Llama4ForCausalLM
from typer.testing import CliRunner

import arriero
from arriero.accuracy import check, record_golden
from arriero.accuracy.golden import read_golden
from arriero.accuracy.metrics import routing_matrix
from arriero.accuracy.report import page, write_report
from arriero.calibration import fp8, int4, int8
from arriero.cli.app import app
from arriero.engine import build_bundle
from arriero.errors import AccuracyError, DataError, FolderError
from arriero.export import export_checkpoint
from arriero.files.circumstances import machine_text
from arriero.spec.recipe import Recipe

SAMPLES = 10


@pytest.fixture(scope="module")
def text(texts: tuple[Path, Path]) -> Path:
    return texts[0]


@pytest.fixture(scope="module")
def golden(tiny_model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return record_golden(tiny_model, tmp_path_factory.mktemp("golden") / "g.safetensors", data=[text], samples=SAMPLES)


def test_an_export_passes_at_rounding_level(tiny: Path, tiny_model: Path, text: Path) -> None:
    verdict = check(tiny_model, tiny, data=[text], samples=SAMPLES, locate_fault=True)
    assert verdict.outcome == "pass"
    assert abs(verdict.metrics["perplexity_ratio"].value - 1) < 1e-6
    assert abs(verdict.metrics["kl"].value) < 1e-6
    assert verdict.metrics["top1"].value == 1
    assert verdict.metrics["router_flips"].value == 0
    assert verdict.location is not None
    assert verdict.location.blame is None
    back = check(tiny, tiny_model, data=[text], samples=SAMPLES)
    assert back.outcome == "pass"
    assert back.metrics["greedy"].value == 32


def test_the_perplexity_is_that_of_transformers(tiny: Path, tiny_model: Path, text: Path) -> None:
    verdict = check(tiny_model, tiny, data=[text], samples=3)
    model = Llama4ForCausalLM.from_pretrained(tiny, dtype=torch.float32, attn_implementation="eager").eval()
    losses = []
    for ids in verdict.comparison.golden.ids_WS.astype(np.int64):
        with torch.no_grad():
            logits = model(torch.from_numpy(ids)[None], use_cache=False).logits[0, :-1]
        losses.append(torch.nn.functional.cross_entropy(logits, torch.from_numpy(ids[1:])).item())
    for name in ("perplexity", "reference_perplexity"):
        assert verdict.metrics[name].value == pytest.approx(np.exp(np.mean(losses)), rel=1e-5)


@pytest.mark.parametrize("recipe", [int8(), fp8(), int4()], ids=["int8", "fp8", "int4"])
def test_a_recipe_passes_and_its_sabotage_fails(
    quantised_tiny: Callable[[Recipe], Path], golden: Path, tmp_path: Path, recipe: Recipe
) -> None:
    good = quantised_tiny(recipe)
    verdict = check(good, golden)
    assert verdict.outcome == "pass", verdict.judgements
    assert 0 < verdict.metrics["router_flips"].value < 0.1
    name = "model.layers.3.self_attn.o_proj.weight_scale"
    bad = changed_tensors(good, tmp_path / "bad", {name: lambda scale: scale * 4})
    assert check(bad, golden).outcome == "regressed"


def test_a_golden_file_gives_the_live_verdict(
    quantised_tiny: Callable[[Recipe], Path], tiny_model: Path, text: Path, tmp_path: Path
) -> None:
    candidate = quantised_tiny(int4())
    some: Any = {"data": [text], "samples": 3}
    golden = record_golden(tiny_model, tmp_path / "g.safetensors", **some)
    live, recorded = check(candidate, tiny_model, **some), check(candidate, golden)
    assert live.metrics == recorded.metrics
    assert live.judgements == recorded.judgements
    assert golden.stat().st_size < 600 * live.tokens  # bytes a token: no whole vocabulary


def test_a_cpu_bundle_is_as_its_model(tiny_model: Path, golden: Path, tmp_path: Path) -> None:
    bundle = build_bundle(tiny_model, tmp_path / "bundle", target="cpu")
    assert abs(check(bundle, golden).metrics["kl"].value) < 1e-7


def test_an_engines_choice_of_experts_is_not_told(
    tiny_engine: Path, tiny_model: Path, golden: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine itself needs a GPU: the model's session stands in for its."""
    monkeypatch.setattr("arriero.accuracy.sides.folder_side.load", lambda path, **settings: arriero.load(tiny_model))
    verdict = check(tiny_engine, golden, limits={"router_flips": 0.5})
    assert "router_flips" not in verdict.metrics
    assert any("cannot be seen inside an engine" in note for note in verdict.notes)
    assert {each.metric: each.outcome for each in verdict.judgements}["router_flips"] == verdict.outcome == "undecided"


def test_flipped_experts_are_counted_apart(tiny: Path, tiny_model: Path, golden: Path, tmp_path: Path) -> None:
    """A router whose two experts change places sends each other's tokens there, in the layers behind it too."""

    def exchange(weight: torch.Tensor) -> torch.Tensor:
        return weight[[1, 0, *range(2, len(weight))]]

    bad = changed_tensors(tiny, tmp_path / "bad", {"model.layers.7.feed_forward.router.weight": exchange})
    verdict = check(bad, golden)
    flipped = verdict.comparison.flipped_LWS
    assert flipped is not None
    reference = verdict.comparison.golden.experts_LWSK
    assert reference is not None
    np.testing.assert_array_equal(flipped[:3], False)
    np.testing.assert_array_equal(flipped[3], (reference[3] < 2).any(-1))
    matrix = routing_matrix(verdict.comparison)
    assert matrix is not None
    assert matrix[0, 1] == (reference[3] == 0).sum()
    assert matrix.sum() == reference.size


def test_reports_are_written_whole(tiny_model: Path, golden: Path, tmp_path: Path) -> None:
    verdict = check(tiny_model, golden)
    folder = write_report(verdict, tmp_path / "report")
    found = json.loads((folder / "verdict.json").read_text())
    assert found["outcome"] == "pass"
    assert found["metrics"]["kl"]["value"] == verdict.metrics["kl"].value
    suite = ElementTree.parse(folder / "junit.xml").getroot()
    assert (suite.get("tests"), suite.get("failures"), suite.get("errors")) == ("3", "0", "0")
    page = (folder / "report.html").read_text()
    assert page.count("<figure") == 2
    assert found["schema"] == 1
    assert set(found) == documented("check")
    for side in ("candidate", "reference"):
        assert len(found["contents"][side]["hash"]) == 64
        assert found["contents"][side]["weights"]
    about = {each.get("name"): each.get("value") for each in suite.findall("properties/property")}
    assert about["machine"] == machine_text(found["machine"])
    assert (about["date"], about["version"]) == (found["date"], found["version"])
    assert about["candidate_hash"] == found["contents"]["candidate"]["hash"]
    case = suite.findall("testcase")[0]
    assert float(case.get("time", "")) > 0
    values = {each.get("name"): each.get("value") for each in case.iter("property")}
    assert {"value", "low", "high", "limit", "limit_origin"} <= set(values)
    assert "http" not in page
    with pytest.raises(FolderError, match="--force to replace it"):
        write_report(verdict, folder)
    write_report(verdict, folder, force=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("not ours")
    with pytest.raises(FolderError, match="no folder of Arriero's"):
        write_report(verdict, tmp_path / "other", force=True)


def test_exit_codes_tell_the_verdict(
    tiny_model: Path, quantised_tiny: Callable[[Recipe], Path], golden: Path, tmp_path: Path
) -> None:
    def run(*arguments: str | Path) -> tuple[int, str]:
        result = CliRunner().invoke(app, ["check", *map(str, arguments)])
        return result.exit_code, result.output

    assert run(tiny_model, "--against", golden, "-o", tmp_path / "report")[0] == 0
    assert (tmp_path / "report" / "report.html").is_file()
    code, output = run(quantised_tiny(int4()), "--against", golden, "--max-kl", "0", "--json")
    assert code == 1
    assert json.loads(output.splitlines()[-1])["outcome"] == "regressed"
    for option, value in (("--samples", 3), ("--window", 64)):
        code, output = run(tiny_model, "--against", golden, option, value)
        assert code == 2
        assert f"has its own text, 10 windows of 512 tokens: leave {option} out" in output
    limits = tmp_path / "limits.toml"
    limits.write_text("[none]\ntop1 = 1.0\n[int8]\nkl = 0.0\n")
    code, output = run(tiny_model, "--against", golden, "--limits", limits, "--json")
    held = {each["metric"]: (each["limit"], each["origin"]) for each in json.loads(output.splitlines()[-1])["limits"]}
    assert held["top1"] == (1.0, "file")
    assert held["kl"] == (0.002, "default")
    code, output = run(tiny_model, "--against", golden, "--locate")
    assert code == 2
    assert "holds no layers to walk" in output


def test_too_little_text_is_a_verdict(tiny: Path, tiny_model: Path, text: Path) -> None:
    verdict = check(tiny_model, tiny, data=[text], samples=2)
    assert verdict.outcome == "undecided"
    said = "There are too few windows for intervals. To decide what is open, give more --samples than 2."
    assert said in page(verdict)


def test_bad_input_is_named(
    make_llama4: Callable[..., Llama4ForCausalLM],
    tiny: Path,
    tiny_model: Path,
    golden: Path,
    text: Path,
    tmp_path: Path,
) -> None:
    def refused(match: str, kind: type[Exception] = AccuracyError, **arguments: Any) -> None:
        with pytest.raises(kind, match=match):
            check(**({"candidate": tiny_model, "reference": tiny, "data": [text]} | arguments))

    empty = tmp_path / "empty.txt"
    empty.write_text(" \n")
    refused("holds no text", DataError, data=[empty])
    refused("there is no text", data=None)
    refused("has its own text", reference=golden)
    refused("limit 'bleu' is unknown", limits={"bleu": 1.0})
    refused("is no golden file", reference=tiny / "config.json")
    refused("is a file: give a checkpoint", candidate=golden)
    for gone in ("gone.golden", "nightly/gone.golden"):
        refused(f"^{gone}: no such file or folder: give a golden file, a checkpoint, a model or a", reference=gone)
    (pointer := tmp_path / "lfs.golden").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n")
    refused("lfs.golden is a git-lfs pointer, not the file itself: run `git lfs pull`", reference=pointer)

    other = tmp_path / "other"
    make_llama4(num_hidden_layers=2, vocab_size=97).save_pretrained(other)
    refused("has layers 2, .* has 8: they are not one model", candidate=other)
    refused("has layers 2, .* has 8: they are not one model", candidate=other, reference=golden, data=None)

    relabelled = changed_tensors(tiny, tmp_path / "relabelled", {})
    tokenizer = json.loads((tiny / "tokenizer.json").read_text())
    tokenizer["added_tokens"].pop()
    (relabelled / "tokenizer.json").write_text(json.dumps(tokenizer))
    refused("different tokenizers", candidate=export_checkpoint(relabelled, tmp_path / "relabelled-model"))

    nan = {"model.norm.weight": lambda weight: weight * float("nan")}
    broken = export_checkpoint(changed_tensors(tiny, tmp_path / "nan", nan), tmp_path / "nan-model")
    refused("model.norm.weight' holds NaN or infinity", candidate=broken, reference=golden, data=None)


def test_a_damaged_golden_file_is_refused(golden: Path, tiny_model: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(golden.read_bytes()[:-100])
    with pytest.raises(AccuracyError, match="is no golden file"):
        check(tiny_model, cut)
    with pytest.raises(AccuracyError, match="--force"):
        record_golden(tiny_model, golden, data=[])
    other = tmp_path / "weights.safetensors"
    other.write_bytes(b"something else")
    with pytest.raises(AccuracyError, match="is no golden file"):
        record_golden(tiny_model, other, data=[], force=True)
    assert read_golden(golden).format == "none"
