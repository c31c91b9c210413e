"""The tiny Llama 4 with the head that was trained for it, over prose that neither has seen."""

import json
from pathlib import Path

import pytest
from free_drafts import FreeDrafts

import arriero
from arriero.engine import build_bundle
from arriero.export import export_checkpoint
from arriero.runtime import Session

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
TINY, HEAD = EXAMPLES / "tiny-llama4", EXAMPLES / "tiny-llama4-draft"


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Session:
    folder = tmp_path_factory.mktemp("drafted")
    model = export_checkpoint(TINY, folder / "model", draft=HEAD)
    session = arriero.load(build_bundle(model, folder / "bundle"), max_seq=256)
    session.costs = FreeDrafts()
    return session


def test_the_head_is_right_about_prose_that_it_never_saw(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("arriero.runtime.speculation.LEAST_TRUST", 0.0)  # every guess is verified
    text = (TINY / "unseen.txt").read_text("utf-8")
    accepted = steps = 0
    for start in range(0, 8000, 2000):
        plain = session.generate(text[start : start + 250], 60, temperature=0, draft_tokens=0)
        found = session.generate(text[start : start + 250], 60, temperature=0)
        assert found == plain
        accepted, steps = accepted + found.accepted, steps + len(found.ids) - 1 - found.accepted
    assert (accepted + steps) / steps > 1.5


def test_the_head_is_small_and_says_how_it_was_made() -> None:
    record = json.loads((HEAD / "training.json").read_text())
    assert (HEAD / "model.safetensors").stat().st_size <= 2_000_000
    assert record["chains_right_up_to_each_step_on_rows_kept_apart"][0] > 0.5
