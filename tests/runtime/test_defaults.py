import json
import warnings
from pathlib import Path
from typing import Any

import pytest

from arriero.errors import ArrieroWarning, FolderError, SessionError
from arriero.runtime.defaults import Choice, Defaults, read_defaults


def written(folder: Path, **fields: Any) -> Defaults:
    (folder / "generation_config.json").write_text(json.dumps(fields))
    return read_defaults(folder, 100)


def chosen(defaults: Defaults, **settings: Any) -> Choice:
    return defaults.choose(settings, prompt=5, room=90, vocabulary=100)


def test_every_field_of_the_generation_config_is_a_default(tmp_path: Path) -> None:
    fields: dict[str, Any] = {"no_repeat_ngram_size": 3, "bad_words_ids": [[4, 5]], "suppress_tokens": [6]}
    fields |= {"begin_suppress_tokens": [7], "typical_p": 0.5, "min_new_tokens": 2, "repetition_penalty": 1.5}
    fields |= {"max_new_tokens": 9, "stop_strings": ["a", "b"], "eos_token_id": [1, 2], "top_k": 7, "top_p": 0.5}
    choice = chosen(written(tmp_path, **fields))
    sampling = choice.sampling
    assert (choice.count, choice.stop_strings, choice.ends) == (9, ("a", "b"), {1, 2})
    assert (sampling.no_repeat_ngram_size, sampling.bad_words_ids, sampling.suppress_tokens) == (3, ((4, 5),), (6,))
    assert (sampling.begin_suppress_tokens, sampling.typical_p, sampling.min_new_tokens) == ((7,), 0.5, 2)
    assert (sampling.repetition_penalty, sampling.top_k, sampling.top_p, sampling.temperature) == (1.5, 7, 0.5, 0.0)


def test_a_callers_settings_come_first(tmp_path: Path) -> None:
    defaults = written(tmp_path, max_new_tokens=9, stop_strings="a", suppress_tokens=[6], top_k=7, eos_token_id=1)
    choice = chosen(defaults, max_new_tokens=4, stop_strings=(), suppress_tokens=[], top_k=0, eos_token_id=[])
    assert (choice.count, choice.stop_strings, choice.ends) == (4, (), set())
    assert (choice.sampling.suppress_tokens, choice.sampling.top_k) == ((), 0)


def test_a_draw_keeps_fifty_where_nothing_is_said(tmp_path: Path) -> None:
    assert read_defaults(tmp_path).sampling.top_k == 50
    assert written(tmp_path, do_sample=True, top_k=None).sampling.top_k == 50
    assert written(tmp_path, do_sample=True, top_k=0).sampling.top_k == 0


def test_do_sample_is_as_in_transformers(tmp_path: Path) -> None:
    greedy = written(tmp_path, temperature=0.6)
    assert chosen(greedy).sampling.temperature == 0
    assert chosen(greedy, do_sample=True).sampling.temperature == 0.6
    assert chosen(greedy, temperature=0.3).sampling.temperature == 0.3
    assert chosen(Defaults(), do_sample=True).sampling.temperature == 1
    drawn = written(tmp_path, temperature=0.6, do_sample=True)
    assert chosen(drawn).sampling.temperature == 0.6
    assert chosen(drawn, do_sample=False).sampling.temperature == 0
    with pytest.warns(ArrieroWarning, match="temperature is overruled by do_sample=False of the caller"):
        assert chosen(drawn, do_sample=False, temperature=0.5).sampling.temperature == 0
    with pytest.raises(SessionError, match="temperature is 0 though do_sample is True"):
        chosen(drawn, do_sample=True, temperature=0)


def test_new_tokens_come_before_length(tmp_path: Path) -> None:
    assert chosen(written(tmp_path, max_length=20)).count == 15
    assert chosen(written(tmp_path, max_length=20), max_new_tokens=30).count == 30
    assert chosen(written(tmp_path, max_length=20), max_length=10).count == 5
    assert chosen(written(tmp_path)).count == 90
    with pytest.warns(ArrieroWarning, match="max_length is overruled by max_new_tokens of the generation config"):
        assert chosen(written(tmp_path, max_new_tokens=7), max_length=30).count == 7
    with pytest.raises(SessionError, match="the prompt has 5 tokens, max_length is 4: give max_new_tokens instead"):
        chosen(written(tmp_path, max_length=4))
    assert chosen(written(tmp_path, max_length=4), max_new_tokens=3).count == 3


def test_tokens_outside_the_vocabulary_change_nothing_and_are_named(tmp_path: Path) -> None:
    with pytest.warns(ArrieroWarning, match=r"generation_config\.json: eos_token_id -1 is outside the vocabulary"):
        assert written(tmp_path, eos_token_id=[-1, 3, 100]).eos_token_ids == (3,)
    with pytest.warns(ArrieroWarning, match="suppress_tokens 200 is outside"):
        assert written(tmp_path, suppress_tokens=[200]).sampling.suppress_tokens == ()
    with pytest.raises(FolderError, match="bad_words_ids: token id 100 is outside the vocabulary of 100"):
        written(tmp_path, bad_words_ids=[[100]])


@pytest.mark.parametrize("value", ["x", True, 1.5, {"a": 1}, [[1]], -1.5, [None], float("nan")])
@pytest.mark.parametrize(
    "name",
    [
        "eos_token_id",
        "suppress_tokens",
        "top_k",
        "max_new_tokens",
        "max_length",
        "no_repeat_ngram_size",
        "bad_words_ids",
    ],
)
def test_a_field_of_the_wrong_kind_is_named(tmp_path: Path, name: str, value: Any) -> None:
    if name == "bad_words_ids" and value == [[1]]:
        return
    with pytest.raises(FolderError, match=rf"generation_config\.json: {name} is .*, expected .*: correct it"):
        written(tmp_path, **{name: value})


def test_what_the_file_itself_does_not_use_may_be_anything(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert chosen(written(tmp_path, temperature="hot"), do_sample=True).sampling.temperature == 1
