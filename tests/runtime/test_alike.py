"""A session computes a token alike whatever stands beside it: bit by bit, so text by text."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import arriero
from arriero.calibration import int4, int8
from arriero.export import export_checkpoint
from arriero.runtime import Session
from arriero.spec.recipe import Recipe

RECIPES: dict[str, Recipe | None] = {
    "bf16": None,
    "float32": None,
    "int8": int8(),
    "int8 static": int8(activations="static"),
    "int8, int8 caches": int8(kv_cache="int8"),
    "int4": int4(group_size=32),
    "fp8": Recipe(format="fp8", activations="dynamic"),
}
IDS = np.random.default_rng(0).integers(3, 2000, (3, 200))
FREE: dict[str, Any] = {"eos_token_id": [], "temperature": 0, "max_new_tokens": 60}
PROMPTS = ["The list type", "A for statement is", "Return the number of items in the list. Return the number of", "x"]


@pytest.fixture(scope="module", params=RECIPES)
def session(
    request: pytest.FixtureRequest,
    tiny: Path,
    tiny_model: Path,
    quantised_tiny: Callable[[Recipe], Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> Session:
    recipe = RECIPES[request.param]
    if request.param == "float32":
        folder = tmp_path_factory.mktemp("wide") / "model"
        return arriero.load(export_checkpoint(tiny, folder, dtype="float32"), max_seq=400)
    return arriero.load(tiny_model if recipe is None else quantised_tiny(recipe), max_seq=400)


def test_a_row_of_a_batch_is_the_row_alone(session: Session) -> None:
    together = session.logits(IDS)
    assert np.array_equal(together, np.concatenate([session.logits(row[None]) for row in IDS]))


def test_a_token_after_another_is_a_token_of_a_piece(session: Session) -> None:
    row = IDS[0].tolist()
    whole, state = session.logits(IDS[:1])[0], session.start(1, len(row))
    session.prefill(state, [row[:1]])
    for position in range(1, 150):  # past the first chunk's end
        assert np.array_equal(session.decode(state, row[position : position + 1])[0], whole[position])


def test_text_is_the_same_in_flight_and_with_guesses(session: Session) -> None:
    alone = [session.generate(prompt, **FREE).ids for prompt in PROMPTS]
    assert [each.ids for each in session.generate_many(PROMPTS, **FREE)] == alone
    for budget in (1, 40):
        found = session.generate_many([*PROMPTS, "Return the number " * 30], slots=2, prefill_budget=budget, **FREE)
        assert [each.ids for each in found] == [*alone, session.generate("Return the number " * 30, **FREE).ids]
    guessed = [session.generate(prompt, prompt_lookup_num_tokens=4, **FREE) for prompt in PROMPTS]
    assert [each.ids for each in guessed] == alone
    assert any(each.drafted for each in guessed)


def test_a_known_beginning_changes_nothing(session: Session) -> None:
    text = "The list type is a mutable sequence. " * 12
    prompts = [text, text + "Note that", text + "Return"]
    alone = [session.generate(prompt, **FREE).ids for prompt in prompts]
    knowing = Session(session.decoder, session.text, session.defaults, session.limits, prefix_bytes=1 << 26)
    found = [knowing.generate(prompt, **FREE) for prompt in prompts]
    assert [each.ids for each in found] == alone
    assert found[1].reused > 0
