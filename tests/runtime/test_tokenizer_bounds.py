"""Tokenizers whose rules make too much of a text, or search it without end, are refused in a line."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

from arriero.errors import ArrieroError, FolderError, SessionError
from arriero.runtime import tokenizing
from arriero.runtime.text import Text
from arriero.runtime.tokenizer_bounds import growth_of

TIMES = 40
DOUBLED = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
BY_EXPRESSION = {"type": "Replace", "pattern": {"Regex": "[a-z]"}, "content": "b" * 5000}
LETTERS = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
THREE_STARS = {
    **{"type": "Split", "pattern": {"Regex": "(.*.*.*)(?=[a-z ])(?![a-z ])"}},
    **{"behavior": "Isolated", "invert": False},
}
BEGINNING, ITSELF = {"SpecialToken": {"id": "b", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}


def around(pieces: list[Any], ids: int) -> dict[str, Any]:
    """A post-processor that writes pieces, of which one is some tokens."""
    tokens = {"b": {"id": "b", "ids": [1] * ids, "tokens": ["b"] * ids}}
    return {"type": "TemplateProcessing", "single": pieces, "pair": [ITSELF], "special_tokens": tokens}


HOSTILE: list[tuple[str, dict[str, Any], str]] = [
    (
        "doubled forty times",
        {"normalizer": {"type": "Sequence", "normalizers": [DOUBLED] * TIMES}},
        "its normalizer has 40 steps, expected at most 32",
    ),
    (
        "doubled thirty times",
        {"normalizer": {"type": "Sequence", "normalizers": [DOUBLED] * 30}},
        "its normalizer may make 1073741824 characters of one, expected at most 1024",
    ),
    (
        "sequences within sequences",
        {"normalizer": {"type": "Sequence", "normalizers": [{"type": "Sequence", "normalizers": [DOUBLED] * 6}] * 5}},
        "its normalizer may make 1073741824 characters of one",
    ),
    ("a long replacement", {"normalizer": BY_EXPRESSION}, "may make 5001 characters of one"),
    ("a long beginning", {"normalizer": {"type": "Prepend", "prepend": "b" * 9999}}, "may make 10000 characters"),
    (
        "letters of letters",
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [LETTERS] * 12}},
        "its pre-tokenizer may make 16777216 characters of one",
    ),
    (
        "a decoder that doubles",
        {"decoder": {"type": "Sequence", "decoders": [DOUBLED] * 20}},
        "its decoder may make 1048576 characters of one",
    ),
    (
        "an expression in a decoder",
        {"decoder": {"type": "Replace", "pattern": {"Regex": "(.*.*)x"}, "content": ""}},
        "a decoder with a regular expression, which is not read",
    ),
    (
        "a replacement of nothing",
        {"normalizer": {"type": "Replace", "pattern": {"String": ""}, "content": "a"}},
        "a replacement of the empty text",
    ),
    ("pieces of nothing", {"pre_tokenizer": {"type": "FixedLength", "length": 0}}, "pieces of no characters"),
    (
        "a table of characters",
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "////////////////"}},
        "a normalizer of type Precompiled, which is not read",
    ),
    ("many tokens around a text", {"post_processor": around([BEGINNING, ITSELF], 1000)}, "adds 1000 tokens to a text"),
    ("many pieces around a text", {"post_processor": around([*[BEGINNING] * 999, ITSELF], 1)}, "adds 999 tokens to a"),
    ("a text again and again", {"post_processor": around([ITSELF] * 9999, 1)}, "its post-processor repeats a text"),
    (
        "words without end",
        {
            "model": {
                **{"type": "WordPiece", "unk_token": "u", "continuing_subword_prefix": "##", "vocab": {"u": 0}},
                **{"max_input_chars_per_word": 2**63},
            }
        },
        "words of 9223372036854775808 characters, expected at most 1000",
    ),
]


def changed(tiny: Path, folder: Path, changes: dict[str, Any]) -> str:
    """The tiny model's tokenizer with some parts others."""
    text = json.dumps(json.loads((tiny / "tokenizer.json").read_text()) | changes)
    (folder / "tokenizer.json").write_text(text)
    return text


@pytest.mark.parametrize(("changes", "said"), [case[1:] for case in HOSTILE], ids=[case[0] for case in HOSTILE])
def test_a_tokenizer_that_makes_too_much_of_a_text_is_refused(
    tiny: Path, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    changed(tiny, tmp_path, changes)
    with pytest.raises(FolderError) as caught:
        Text(tmp_path)
    line = str(caught.value)
    assert said in line
    assert line.endswith(": export again from an intact checkpoint")
    assert "\n" not in line
    assert len(line) < 500


def test_a_type_that_is_written_in_numbers_is_seen(tiny: Path, tmp_path: Path) -> None:
    text = changed(tiny, tmp_path, {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "////////"}})
    (tmp_path / "tokenizer.json").write_text(text.replace("Precompiled", r"\u0050r\u0065compiled"))
    with pytest.raises(FolderError, match="a normalizer of type Precompiled"):
        Text(tmp_path)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ({"type": "Unigram", "unk_id": None, "vocab": [], "byte_fallback": False}, "`unk_id` is missing"),
        ({"type": "WordLevel", "unk_token": "nope", "vocab": {"a": 0}}, r"Missing \[UNK\] token"),
    ],
)
def test_a_tokenizer_that_knows_no_token_for_a_text_is_refused(
    tiny: Path, tmp_path: Path, model: dict[str, Any], said: str
) -> None:
    changed(tiny, tmp_path, {"model": model})
    text = Text(tmp_path)
    with pytest.raises(ArrieroError, match=said):
        text.encode("bcd")


def test_an_expression_that_searches_without_end_is_given_up(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizing, "SECONDS", 0.5)
    monkeypatch.setattr(tokenizing, "BUSY", 0.2)
    changed(tiny, tmp_path, {"pre_tokenizer": THREE_STARS})
    text = Text(tmp_path)
    assert text.encode("hello")
    for call in (text.encode, lambda said: tokenizing.encode_ordinary(text._tokenizer(), said)):
        with pytest.raises(SessionError, match=r"expressions of .* take longer than 0.5 s for"):
            call("hello world " * 22)


def in_turns(tokenizer: Tokenizer) -> None:
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\p{N}{2}"), "isolated"), pre_tokenizers.ByteLevel()]
    )


def normalised(tokenizer: Tokenizer) -> None:
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex("x+"), "y")])


@pytest.mark.parametrize("change", [in_turns, normalised])
def test_other_expressions_give_the_librarys_tokens(tiny: Path, change: Callable[[Tokenizer], None]) -> None:
    tokenizer = Tokenizer.from_file(str(tiny / "tokenizer.json"))
    change(tokenizer)
    assert growth_of(tokenizer) <= 4 * 18 * 2
    said = "In 1999 ﬁne axxxb <|eot|> été"
    found = tokenizing.encode(tokenizer, said, special_tokens=True)
    expected = tokenizer.encode(said)
    assert (found.ids, found.offsets) == (expected.ids, expected.offsets)
    ordinary = tokenizing.encode_ordinary(tokenizer, "In 1999 ﬁne axxxb été")
    assert ordinary == tokenizer.encode("In 1999 ﬁne axxxb été", add_special_tokens=False).ids


def test_the_expression_of_llama_4_is_followed_at_once() -> None:
    tokenizer = Tokenizer(models.BPE())
    expression = (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
        r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
        r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(expression), "isolated"), pre_tokenizers.ByteLevel(use_regex=False)]
    )
    assert tokenizing.is_quick(tokenizer)
    for run in ("A" * 200_000, " " * 200_000, "'" * 200_000, "ʰ" * 100_000, "aA" * 100_000, "\n \n" * 60_000):
        started = time.thread_time()
        tokenizer.pre_tokenizer.pre_tokenize_str(run)
        assert time.thread_time() - started < 5
