"""Bounds of what a tokenizer makes of a text, seen in its parts before it is used.

Enters: a `tokenizer.json`, then the tokenizer that the library made of it. Leaves: the most characters that it makes of
one, or a `ValueError` that names the part without bound. Invariant: what is taken writes at most `MOST_GROWTH`
characters for one, and adds at most `MOST_ADDED` tokens to a text; how long its expressions search is another matter.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from tokenizers import Tokenizer

from ..errors import shortened
from ..spec.json_text import parse_json

MOST_GROWTH = 1024
"""Characters that may be made of one: NFKC, lower case and bytes make 144 at most."""

MOST_ADDED = 64
"""Tokens of their own that a tokenizer may put around a text; Llama 4's puts one."""

MOST_STEPS = 32
"""Steps of a tokenizer's part one behind another."""

MOST_WORD = 1000
"""Characters of a word that WordPiece looks up, each beginning of each rest; its own number is 100."""

PRECOMPILED = b"recompiled"
ESCAPED_LETTER = re.compile(rb"\\u00[4-7][0-9a-fA-F]")
"""A letter written as its number, which hides a word from a search."""

COMPOSED = {"NFC": 3, "NFD": 4, "NFKC": 18, "NFKD": 18, "BertNormalizer": 8, "Lowercase": 2, "Nmt": 1, "Strip": 1}
OTHERS = {"StripAccents": 1, "ByteLevel": 4, "Fuse": 1, "ByteFallback": 1, "WordPiece": 2, "BPEDecoder": 1}
PLAIN = (
    *("Whitespace", "WhitespaceSplit", "BertPreTokenizer", "CharDelimiterSplit", "Punctuation", "Digits"),
    *("UnicodeScripts", "Split"),
)
GROWTH: Mapping[str, int] = {**COMPOSED, **OTHERS, **dict.fromkeys(PLAIN, 1)}
"""Characters that a step makes of one at most, by the step's type, where its own settings do not matter."""

Part = dict[str, Any]


def check_text(content: bytes) -> None:
    """Refuses a `tokenizer.json` with a part that must not reach the library.

    A precompiled table of characters is a program's memory, which the library takes as it comes.

    Raises:
        ValueError: It has such a table, or is not JSON.
    """
    if PRECOMPILED not in content and not ESCAPED_LETTER.search(content):
        return
    whole = parse_json(content.decode("utf-8"))
    for step in _steps(whole.get("normalizer") if isinstance(whole, dict) else None):
        if step.get("type") == "Precompiled":
            raise ValueError("a normalizer of type Precompiled, which is not read")


def growth_of(tokenizer: Tokenizer) -> int:
    """Characters that a tokenizer makes of one at most, on the way to its tokens or from them.

    Raises:
        ValueError: A part of it has no bound, or too high a one.
    """
    most = 1
    parts = {"normalizer": tokenizer.normalizer, "pre-tokenizer": tokenizer.pre_tokenizer}
    for name, part in parts.items():
        most *= _growth(name, part)
        _check_growth(name, most)
    _check_growth("decoder", _growth("decoder", tokenizer.decoder))
    _check_added(tokenizer.post_processor)
    word = getattr(tokenizer.model, "max_input_chars_per_word", 0)
    if word > MOST_WORD:
        raise ValueError(f"words of {word} characters, expected at most {MOST_WORD}")
    return most


def expressions_of(tokenizer: Tokenizer) -> frozenset[str]:
    """The regular expressions that a tokenizer searches a text for, but for those that the library knows itself."""
    states = (part.__getstate__() for part in (tokenizer.normalizer, tokenizer.pre_tokenizer) if part is not None)
    return frozenset(
        pattern["Regex"]
        for state in states
        if b'"Regex"' in state
        for step in _steps(json.loads(state))
        if isinstance(pattern := step.get("pattern"), dict) and "Regex" in pattern
    )


def _check_growth(name: str, most: int) -> None:
    if most > MOST_GROWTH:
        raise ValueError(f"its {name} may make {shortened(most)} characters of one, expected at most {MOST_GROWTH}")


def _growth(name: str, part: Any) -> int:
    steps = list(_steps(None if part is None else json.loads(part.__getstate__())))
    if len(steps) > MOST_STEPS:
        raise ValueError(f"its {name} has {len(steps)} steps, expected at most {MOST_STEPS}")
    most = 1
    for step in steps:
        kind = step["type"]
        if kind in OF_SETTINGS:
            most *= OF_SETTINGS[kind](step)
        elif kind in GROWTH:
            most *= GROWTH[kind]
        else:
            raise ValueError(f"a {name} of type {shortened(kind)}, which is not read")
        if name == "decoder" and "Regex" in (step.get("pattern") or {}):
            raise ValueError("a decoder with a regular expression, which is not read")
    return most


def _steps(part: Any) -> Iterator[Part]:
    """The steps of a part in their order, those of sequences within sequences as well."""
    pending = [part]
    while pending:
        step = pending.pop()
        if not isinstance(step, dict):
            continue
        inner = next((step[key] for key in INNER if isinstance(step.get(key), list)), None)
        if step.get("type") == "Sequence" and inner is not None:
            pending += reversed(inner)
        else:
            yield step


INNER = ("normalizers", "pretokenizers", "processors", "decoders")


def _of_replacing(step: Part) -> int:
    """A replaced text grows by its replacement's length over its own; an expression may match nothing at all."""
    text = step["pattern"].get("String")
    if text == "":
        raise ValueError("a replacement of the empty text")
    return len(step["content"]) + 1 if text is None else max(1, -(-len(step["content"]) // len(text)))


def _of_pieces(step: Part) -> int:
    if not step["length"]:
        raise ValueError("pieces of no characters")
    return 1


OF_SETTINGS: Mapping[str, Callable[[Part], int]] = {
    "Replace": _of_replacing,
    "Prepend": lambda step: len(step["prepend"]) + 1,
    "Metaspace": lambda step: 2,
    "CTC": lambda step: 2,
    "FixedLength": _of_pieces,
}
"""Characters that a step makes of one, where its settings say."""


def _check_added(processor: Any) -> None:
    """Refuses what repeats a text, or puts too many tokens around it."""
    added = 0
    for step in _steps(None if processor is None else json.loads(processor.__getstate__())):
        pieces = step.get("single", ())
        if sum("Sequence" in piece for piece in pieces) > 1:
            raise ValueError("its post-processor repeats a text")
        ids = {name: len(token["ids"]) for name, token in (step.get("special_tokens") or {}).items()}
        added += sum(ids.get(piece["SpecialToken"]["id"], 1) for piece in pieces if "SpecialToken" in piece)
    if added > MOST_ADDED:
        raise ValueError(f"its post-processor adds {added} tokens to a text, expected at most {MOST_ADDED}")
