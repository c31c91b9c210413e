"""Whatever a setting is, it is taken or refused in one line."""

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arriero.errors import SessionError
from arriero.runtime import checks
from arriero.runtime.continuation import Settings
from arriero.runtime.defaults import Defaults


class Rude:
    """An object that cannot even be shown."""

    def __repr__(self) -> str:
        raise RuntimeError("no")


PLAIN = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.binary(max_size=4),
    st.sampled_from(
        [
            "0.7",
            "1",
            "",
            10**400,
            -(10**5000),
            2.5,
            3.7,
            -1,
            1 << 64,
            math.nan,
            math.inf,
            Rude(),
            object(),
            1j,
            Fraction(1, 3),
        ]
    ),
    st.sampled_from(
        [np.float32(0.5), np.int8(3), np.bool_(True), np.array(3), np.array([1, 2]), np.zeros((2, 2)), range(3)]
    ),
)
JUNK = st.recursive(
    PLAIN,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.tuples(inner),
        st.dictionaries(st.one_of(st.integers(), st.text(max_size=3)), inner, max_size=2),
        st.frozensets(st.integers(), max_size=2),
    ),
    max_leaves=6,
)


@pytest.mark.parametrize("name", [*Settings.__annotations__, "max_new_tokens"])
@settings(max_examples=120, deadline=None)
@given(value=JUNK)
@pytest.mark.filterwarnings("ignore::arriero.ArrieroWarning")
def test_any_value_is_taken_or_refused_in_one_line(name: str, value: Any) -> None:
    try:
        choice = Defaults().choose({name: value}, prompt=5, room=90, vocabulary=100)
    except SessionError as error:
        assert len(str(error)) < 300 and "\n" not in str(error)
        assert str(error).startswith(name) or name in ("max_length", "logprobs", "top_logprobs", "do_sample")
    else:
        assert 0 <= choice.count <= 90
        assert all(0 <= token < 100 for token in choice.ends)


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
