"""A model's draft is quantised and built with the model, and the text stays that without it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from eagle_reference import Reference, head_config, write_head

import arriero
from arriero.calibration import calibrate_model, int4, int8
from arriero.engine import build_bundle
from arriero.errors import BuildError
from arriero.export import export_checkpoint
from arriero.files.folders import read_spec
from arriero.measuring.summary import summarise
from arriero.spec.recipe import Recipe

GREEDY: dict[str, Any] = {"temperature": 0, "eos_token_id": []}
PROMPTS = [[5, 9, 8, 12], [4] * 20, [7]]


@pytest.fixture(scope="module")
def drafted(make_llama4: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("drafted")
    make_llama4(seed=1, vocab_size=24, hidden_size=64, intermediate_size=64).save_pretrained(folder / "checkpoint")
    torch.manual_seed(0)
    reference = Reference(head_config(24, hidden_size=64), 64, 3, 20)
    head = write_head(reference, folder / "head", [1, 2, 4], tokens=list(range(4, 24)), has_embedding=False)
    return export_checkpoint(folder / "checkpoint", folder / "model", draft=head)


@pytest.mark.parametrize(
    ("recipe", "caches"),
    [(int8(), None), (int4(), "int8"), (int8(group_size=32), None)],
    ids=["int8", "int4", "int8 in groups"],
)
def test_a_quantised_model_has_its_draft_quantised(
    recipe: Recipe, caches: Any, drafted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("arriero.runtime.speculation.LEAST_TRUST", 0.0)
    ids_WS = np.random.default_rng(0).integers(3, 24, (4, 32))
    model = calibrate_model(drafted, tmp_path / "model", recipe=recipe, data=ids_WS, floor=0)
    bundle = build_bundle(model, tmp_path / "bundle", target="cpu", kv_cache=caches)
    part = read_spec(bundle).draft
    assert part is not None
    assert part.format == recipe.format
    layouts = {weight.name.partition(":")[0]: (weight.layout, weight.convert) for weight in part.weights}
    assert {convert for layout, convert in layouts.values() if layout == "panels"} == {f"u{recipe.format}"}
    has_groups = recipe.format == "int4" or recipe.group_size == 32  # which do not divide this one's inputs
    assert layouts["layers.0.mlp.down_proj.weight"][0] == ("rows" if has_groups else "panels")
    session = arriero.load(bundle, max_seq=100)
    plain = session.generate_many(PROMPTS, 60, draft_tokens=0, **GREEDY)
    found = session.generate_many(PROMPTS, 60, draft_tokens=3, **GREEDY)
    assert found == plain
    assert [session.generate(prompt, 60, draft_tokens=4, **GREEDY) for prompt in PROMPTS] == plain
    assert sum(each.drafted for each in found) > 0
    assert summarise(bundle)["memory"]["draft"] > 0


def test_engines_take_no_draft(drafted: Path, tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=r"has a draft, which engines do not run: export the model .* without --draft"):
        build_bundle(drafted, tmp_path / "bundle", target="tensorrt-rtx:sm89")
