"""Whatever a setting is, it is taken or refused in one line."""

import math
import random
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from arriero.errors import SessionError
from arriero.runtime import checks
from arriero.runtime.continuation import Settings
from arriero.runtime.defaults import Defaults


class Rude:
    """An object that cannot even be shown."""

    def __repr__(self) -> str:
        raise RuntimeError("no")


def refusal(name: str, value: Any) -> str:
    """The error that a setting's value meets; empty where it is taken."""
    try:
        choice = Defaults().choose({name: value}, prompt=5, room=90, vocabulary=100)
    except SessionError as error:
        return str(error)
    assert 0 <= choice.count <= 90
    assert all(0 <= token < 100 for token in choice.ends)
    return ""


PLAIN: list[Any] = [
    *(None, True, False, 0, 1, 5, 99, 100, -1, 1 << 64, 10**400, 10**5000, -(10**5000)),
    *(0.5, 2.5, 3.7, 50.0, -0.0, 1e308, math.nan, math.inf, -math.inf, 1j, Fraction(1, 3)),
    *("0.7", "1", "", "x" * 10**6, "a\nb", b"x", object(), Rude(), int, len, range(3), {1, 2}),
    *(np.float32(0.5), np.float64("nan"), np.int8(3), np.bool_(True), np.array(3), np.array([1, 2])),
    *(np.zeros((2, 2)), np.array("x"), np.array(["a"])),
]
KEYS: list[Any] = [1, "1", "x", 100, -1, 2.5, True, 10**5000, (1,), "1" * 30]


def junk(rng: random.Random, depth: int = 0) -> Any:
    """Any value, nested or plain."""
    kind = rng.random()
    if depth > 2 or kind < 0.5:
        return rng.choice(PLAIN)
    inner = [junk(rng, depth + 1) for _ in range(rng.randrange(4))]
    if kind < 0.8:
        return inner if kind < 0.7 else tuple(inner)
    return {rng.choice(KEYS): each for each in inner}


@pytest.mark.parametrize("name", [*Settings.__annotations__, "max_new_tokens"])
@pytest.mark.filterwarnings("ignore::arriero.ArrieroWarning")
def test_any_value_is_taken_or_refused_in_one_line(name: str) -> None:
    rng = random.Random(name)
    for value in (*PLAIN, *(junk(rng) for _ in range(200))):
        said = refusal(name, value)
        assert len(said) < 300
        assert "\n" not in said
        assert not said or name in said


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("top_k", 2.5, "top_k is 2.5, expected a whole number from 0 up"),
        ("top_k", "5", "top_k is '5', expected a whole number"),
        ("top_k", True, "top_k is True, expected"),
        ("max_new_tokens", 3.7, "max_new_tokens is 3.7, expected a whole number"),
        ("temperature", "0.7", "temperature is '0.7', expected a number from 0 up"),
        ("temperature", math.nan, "temperature is nan"),
        ("temperature", 10**400, "temperature is 1000000"),
        ("top_p", 1.5, "top_p is 1.5, expected a number from 0 to 1"),
        ("typical_p", 0, "typical_p is 0, expected a number above 0 and at most 1"),
        ("frequency_penalty", 3, "frequency_penalty is 3, expected a number from -2 to 2"),
        ("seed", -1, "seed is -1, expected"),
        ("eos_token_id", 100, "eos_token_id: token id 100 is outside the vocabulary of 100"),
        ("eos_token_id", [[1]], r"eos_token_id is \[\[1\]\], expected one token id or a list of them"),
        ("eos_token_id", 1.5, "eos_token_id is 1.5"),
        ("eos_token_id", "x", "eos_token_id is 'x'"),
        ("suppress_tokens", [100], "suppress_tokens: token id 100"),
        ("bad_words_ids", [1, 2], r"bad_words_ids is \[1, 2\], expected a list of lists of token ids"),
        ("bad_words_ids", [[100]], "bad_words_ids: token id 100"),
        ("logit_bias", {1: 101}, "logit_bias is 101, expected numbers from -100 to 100"),
        ("logit_bias", {100: 1}, "logit_bias: token id 100"),
        ("logit_bias", [1], r"logit_bias is \[1\], expected numbers"),
        ("stop_strings", 5, "stop_strings is 5, expected a text or a list of texts"),
        ("stop_strings", [b"x"], "stop_strings is"),
        ("top_logprobs", 21, "top_logprobs is 21, expected a whole number from 0 to 20"),
        ("top_logprobs", 2, "top_logprobs is 2, but logprobs is not set: give logprobs=True as well"),
        ("logprobs", 1, "logprobs is 1, expected True or False"),
        ("do_sample", "yes", "do_sample is 'yes', expected True or False"),
        ("max_length", 5, "the prompt has 5 tokens, max_length is 5: give max_new_tokens instead"),
    ],
)
def test_a_value_that_cannot_be_is_named_with_what_was_expected(name: str, value: Any, said: str) -> None:
    with pytest.raises(SessionError, match=said):
        Defaults().choose({name: value}, prompt=5, room=90, vocabulary=100)


def test_numbers_of_every_kind_are_taken() -> None:
    assert checks.whole("x", np.int64(5)) == checks.whole("x", 5.0) == checks.whole("x", np.array(5)) == 5
    assert checks.number("x", np.float32(0.5), "", 0) == checks.number("x", Fraction(1, 2), "", 0) == 0.5
    assert checks.token_ids("x", np.array([4, 5, 4])) == checks.token_ids("x", range(4, 6)) == (4, 5)
    assert checks.token_ids("x", []) == checks.token_lists("x", [[]]) == checks.texts("x", ["", ""]) == ()
    assert checks.whole("x", 10**30) == 10**30


def test_a_large_value_is_not_printed() -> None:
    with pytest.raises(SessionError) as caught:
        checks.texts("stop_strings", [list(range(10_000))] * 1000)
    assert len(str(caught.value)) < 300
