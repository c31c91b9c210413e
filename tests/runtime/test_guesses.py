"""Guesses in a step whose logits are no numbers: the tokens before it stand, as without guesses."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import arriero
from arriero.errors import SessionError
from arriero.runtime import Session
from arriero.runtime.guesses import Guessing
from arriero.runtime.lookup import Lookup
from arriero.runtime.speculation import ride_alone

PROMPT = [5, 6, 7, 8]


@pytest.fixture(scope="module")
def session(tiny_model: Path) -> Session:
    return arriero.load(tiny_model, max_seq=64)


class Oracle(Lookup):
    """Guesses the tokens that are known to come, the last of them wrong where asked for."""

    def __init__(self, ids: list[int], count: int) -> None:
        super().__init__(count)
        self.known, self.count = ids, count

    def draft(self, ids: Any, room: int) -> list[int]:
        return self.known[len(ids) :][: min(room, self.count)]

    def judge(self, drafted: int, accepted: int) -> None:
        pass


def taken(pieces: Iterator[Any]) -> tuple[list[int], str]:
    """The tokens that came, and the error that ended them."""
    ids: list[int] = []
    try:
        for piece in pieces:
            ids += piece.ids
    except SessionError as error:
        return ids, str(error)
    return ids, ""


@pytest.mark.parametrize("bad", range(1, 7))
@pytest.mark.parametrize("guessed", [0, 1, 2, 5])
def test_the_tokens_before_logits_that_are_no_numbers_come_first(
    session: Session, monkeypatch: pytest.MonkeyPatch, bad: int, guessed: int
) -> None:
    expected = session.generate(PROMPT, max_new_tokens=10, eos_token_id=[]).ids
    binding = type(session.start(1, 64).binding(slice(0, 1)))
    step = binding.step

    def spoilt(self: Any, ids_BS: Any, past_B: Any, positions_BR: Any, features_MH: Any = None) -> Any:
        logits_BRV = step(self, ids_BS, past_B, positions_BR, features_MH)
        logits_BRV[past_B[:, None] + positions_BR >= len(PROMPT) - 1 + bad, 3] = np.nan
        return logits_BRV

    monkeypatch.setattr(binding, "step", spoilt)
    request = session.request(PROMPT, 10, eos_token_id=[])
    monkeypatch.setattr("arriero.runtime.guesses.Lookup", lambda limit: Oracle(PROMPT + expected, limit))
    ids, said = taken(ride_alone(session, request, Guessing(lookup=guessed)))
    assert ids == expected[:bad]
    assert "1 of the model's 2048 logits are no finite numbers" in said
