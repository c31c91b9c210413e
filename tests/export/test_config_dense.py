"""Dense Llama 4, as Llama Guard 4 is: no experts, no chunks. Text and multimodal, through every verb."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from config_mutations import DENSE, SCOUT
from multimodal import VOCABULARY, write_multimodal
from planted_faults import changed_tensors
from transformers import Llama4ForCausalLM, Llama4ForConditionalGeneration

import arriero
from arriero.accuracy import check
from arriero.accuracy.report import write_report
from arriero.calibration import calibrate_model
from arriero.cli.tables import show_summary
from arriero.engine import build_bundle
from arriero.export import export_checkpoint
from arriero.export.config import model_spec
from arriero.export.split import split_model
from arriero.files.folders import read_spec
from arriero.measuring.summary import summarise
from arriero.spec.geometry import ModelSpec
from arriero.spec.recipe import Recipe

AS_PUBLISHED = {name: DENSE[name] for name in ("interleave_moe_layer_step", "moe_layers", "num_local_experts")} | {
    "num_experts_per_tok": 0,
    "attention_chunk_size": None,
    "no_rope_layers": [1, 1, 1, 1],
    "use_qk_norm": False,
}
LENGTH = 40


def unchunked(checkpoint: Path, kind: Any) -> Any:
    """The model of `transformers`, which runs no chunk of null: with one longer than the text."""
    model = kind.from_pretrained(checkpoint, dtype=torch.float32).eval()
    model.config.get_text_config().attention_chunk_size = 10**6
    return model


@pytest.fixture(scope="module", params=["text", "multimodal"])
def checkpoint(
    request: pytest.FixtureRequest,
    make_llama4: Callable[..., Llama4ForCausalLM],
    make_multimodal: Callable[..., Llama4ForConditionalGeneration],
    tiny: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    folder = tmp_path_factory.mktemp(request.param) / "checkpoint"
    geometry = {"vocab_size": VOCABULARY, "hidden_size": 64, **AS_PUBLISHED}
    if request.param == "multimodal":
        return write_multimodal(make_multimodal(**geometry), folder)
    make_llama4(**geometry).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny / name, folder)
    return folder


def test_it_goes_through_every_verb(checkpoint: Path, texts: tuple[Path, Path], tmp_path: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    text = config.get("text_config", config)
    assert text["attention_chunk_size"] is None
    assert text["moe_layers"] == []
    model = export_checkpoint(checkpoint, tmp_path / "model")
    spec = read_spec(model).model
    assert (spec.experts, spec.experts_per_token, spec.chunk) == (0, 0, 0)
    bundle = build_bundle(model, tmp_path / "bundle")
    kind = Llama4ForConditionalGeneration if "text_config" in config else Llama4ForCausalLM
    ids = np.arange(LENGTH)[None] * 31 % VOCABULARY
    with torch.no_grad():
        expected = unchunked(checkpoint, kind)(torch.from_numpy(ids), use_cache=False).logits.numpy()
    for folder in (model, bundle):
        session = arriero.load(folder)
        assert np.abs(session.logits(ids) - expected).max() <= 1e-4 * np.abs(expected).max()
        assert len(session.generate([5, 6, 7], max_new_tokens=4).ids) <= 4
    quantised = calibrate_model(model, tmp_path / "int8", recipe=Recipe(format="int8"), data=[texts[1]], samples=2)
    built = build_bundle(quantised, tmp_path / "int8-bundle")
    windows = np.arange(256).reshape(2, 128) * 7 % VOCABULARY
    assert check(built, model, data=windows).metrics["kl"].value < 0.05
    verdict = check(bundle, checkpoint, data=windows, locate_fault=True)
    assert verdict.metrics["kl"].value < 1e-6
    assert verdict.location is not None
    assert verdict.location.blame is None
    assert (write_report(verdict, tmp_path / "report") / "report.html").read_text("utf-8")
    name = "language_model." * ("text_config" in config) + "model.layers.2.feed_forward.up_proj.weight"
    other = changed_tensors(checkpoint, tmp_path / "other", {name: lambda weight: weight * 1.5})
    located = check(bundle, other, data=windows, locate_fault=True).location
    assert located is not None
    assert located.blame is not None
    assert located.blame.name == name
    if "text_config" in config:
        picture = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
        answers = [arriero.load(folder).generate("What is it?", 4, picture).ids for folder in (model, bundle)]
        assert answers[0] == answers[1]
        assert answers[0] != arriero.load(bundle).generate("What is it?", 4, 255 - picture).ids


def test_its_summary_names_no_experts(
    make_llama4: Callable[..., Llama4ForCausalLM], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_llama4(**AS_PUBLISHED).save_pretrained(tmp_path / "checkpoint")
    model = export_checkpoint(tmp_path / "checkpoint", tmp_path / "model", tp=1)
    found = summarise(model)
    show_summary(found)
    shown = capsys.readouterr().out
    assert "none with experts" in shown
    assert "none chunked" in shown
    bundle = build_bundle(model, tmp_path / "bundle")
    assert summarise(bundle)["memory"]
    assert split_model(read_spec(model).model, 2, None).ranks == 2


def test_a_spec_has_experts_where_a_layer_has() -> None:
    spec = model_spec(SCOUT)
    with pytest.raises(ValueError, match="experts_per_token is 0 of 0 experts"):
        dataclasses.replace(spec, experts=0, experts_per_token=0)
    dense = model_spec({**SCOUT, "moe_layers": []})
    assert (dense.experts, dense.experts_per_token) == (0, 0)
    assert ModelSpec.from_fields(json.loads(json.dumps(dataclasses.asdict(dense)))) == dense
