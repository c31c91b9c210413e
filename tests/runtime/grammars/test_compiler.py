"""Grammars taken, and refused in one line."""

import builtins
import contextlib
import dataclasses
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from arriero.errors import SessionError
from arriero.runtime.grammars import compiler as compiler_module
from arriero.runtime.grammars.compiler import KEPT, GrammarCompiler
from arriero.runtime.kept_process import KeptProcess


@pytest.fixture(scope="module")
def compiler(tiny: Path) -> GrammarCompiler:
    return GrammarCompiler(Tokenizer.from_file(str(tiny / "tokenizer.json")), 2048)


def follows(compiler: GrammarCompiler, kind: str, source: Any, text: str) -> bool:
    """Whether a text follows a grammar to its end."""
    guide = compiler.compile(kind, source).open([3])
    for token in compiler.tokenizer.encode(text, add_special_tokens=False).ids:
        if guide.is_complete or not guide.allows(token):
            return False
        guide.advance(token)
    return guide.is_complete or guide.allows(3)


REFUSED: list[tuple[str, Any, str]] = [
    ("json_schema", {"not": {"type": "string"}}, 'Unimplemented keys: ["not"]'),
    ("json_schema", {"uniqueItems": True, "type": "array"}, "uniqueItems"),
    ("json_schema", {"$ref": "http://example.com/schema"}, "does not fetch"),
    ("json_schema", {"type": "string", "pattern": "^(a"}, "unclosed group"),
    ("json_schema", {"type": "strnig"}, "strnig"),
    ("json_schema", {"x-guidance": {"lenient": True}, "not": {}}, "not"),
    ("json_schema", False, "expected a JSON schema"),
    ("json_schema", [], "expected a JSON schema"),
    ("json_schema", "[1]", "expected a JSON schema"),
    ("json_schema", '{"type": ', "expected a JSON schema"),
    ("json_schema", "[" * 100_000, "expected a JSON schema"),
    ("json_schema", {"const": float("inf")}, "no JSON"),
    ("json_schema", {"const": {1, 2}}, "no JSON"),
    ("json_schema", 7, "expected a JSON schema"),
    ("regex", "(a", "unclosed group"),
    ("regex", r"(?=a)b", "look-around"),
    ("regex", r"(a)\1", "regex"),
    ("regex", 5, "expected a regular expression"),
    ("grammar", "", "Empty grammar"),
    ("grammar", "start: nowhere", "unknown name"),
    ("grammar", "start: <|no_such_token|>", "unknown special token"),
    ("grammar", {"a": 1}, "expected a grammar in Lark"),
    ("grammar", 'start: "a"' + " " * (1 << 19), "524298 characters, 524288 at most are taken: shorten it"),
]


@pytest.mark.parametrize(("kind", "source", "reason"), REFUSED)
def test_a_grammar_that_cannot_be_enforced_is_refused(
    compiler: GrammarCompiler, kind: str, source: Any, reason: str
) -> None:
    with pytest.raises(SessionError, match=kind) as error:
        compiler.compile(kind, source)
    assert reason.lower() in str(error.value).lower()
    assert len(str(error.value)) < 500
    assert "\n" not in str(error.value)


def test_a_schema_nested_without_end_is_refused(compiler: GrammarCompiler) -> None:
    schema: dict[str, Any] = {}
    for _ in range(100_000):
        schema = {"items": schema}
    with pytest.raises(SessionError, match="json_schema is"):
        compiler.compile("json_schema", schema)
    deep = '{"items":' * 900 + "{}" + "}" * 900
    with contextlib.suppress(SessionError):  # either is well, a crash is not
        compiler.compile("json_schema", deep)


@pytest.mark.parametrize("pattern", ["((a{1,99}){1,99}){1,99}", "(a?){3000}a{3000}", "a*" * 2000 + "b", "(.*a){50}"])
def test_a_costly_expression_is_taken_or_refused_in_time(compiler: GrammarCompiler, pattern: str) -> None:
    started = time.thread_time()
    with contextlib.suppress(SessionError):
        guide = compiler.compile("regex", pattern).open([3])
        a = compiler.tokenizer.token_to_id("a")
        for _ in range(20):
            if guide.allows(a):
                guide.advance(a)
    assert time.thread_time() - started < 5


def chained(count: int) -> str:
    """Rules of which each needs the next."""
    return "start: r0\n" + "".join(f"r{number}: r{number + 1}\n" for number in range(count)) + f'r{count}: "a"\n'


def referring(count: int) -> dict[str, Any]:
    """Definitions of which each refers to the next."""
    chain = {f"d{number}": {"$ref": f"#/$defs/d{number + 1}"} for number in range(count)}
    return {"$ref": "#/$defs/d0", "$defs": chain | {f"d{count}": {"type": "null"}}}


PATTERNS = {"type": "object", "patternProperties": {f"^p{number}x": {"type": "string"} for number in range(300)}}
DOUBLED = "start: T0\n" + "".join(f"T{number}: T{number + 1} T{number + 1}\n" for number in range(300)) + 'T300: "a"'


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> Iterator[KeptProcess]:
    """A process for trials that gives up soon."""
    process = KeptProcess(dataclasses.replace(compiler_module.PROGRAM, seconds=0.3))
    monkeypatch.setattr(compiler_module, "_kept", lambda: process)
    yield process
    process.close()


@pytest.mark.parametrize(
    ("kind", "source", "reason"),
    [
        ("grammar", chained(9000), "chained or nested deeper than 16 MB of stack hold"),
        ("json_schema", referring(9000), "chained or nested deeper than 16 MB of stack hold"),
        ("json_schema", PATTERNS, "it takes longer than 2 s or 512 MB to be made"),
        ("regex", "a?" * 100_000, "it takes longer than 2 s or 512 MB to be made"),
        ("grammar", DOUBLED, "it takes longer than 2 s or 512 MB to be made"),
    ],
    ids=["rules", "references", "patterns", "optional letters", "doubled terminals"],
)
def test_what_would_end_the_process_or_not_end_is_refused(
    compiler: GrammarCompiler, brief: KeptProcess, kind: str, source: Any, reason: str
) -> None:
    with pytest.raises(SessionError, match=f"^{kind} is refused ") as error:
        compiler.compile(kind, source)
    assert str(error.value).endswith(f"{reason}): make it smaller")
    assert follows(compiler, "regex", f"next|{kind}", "next")


def test_long_chains_are_followed(compiler: GrammarCompiler) -> None:
    assert follows(compiler, "grammar", chained(1000), "a")
    assert follows(compiler, "json_schema", referring(1000), "null")


def test_grammars_are_made_where_no_process_can_be_started(
    compiler: GrammarCompiler, brief: KeptProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(brief, "is_impossible", True)
    assert follows(compiler, "regex", "alone", "alone")
    assert compiler.compile("regex", "alone").size == 0


def test_large_grammars_are_not_kept_for_long(compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler_module, "KEPT_BYTES", 1 << 16)
    first = compiler.compile("grammar", chained(500))
    assert first.size > 1 << 16 or sys.platform != "linux"
    assert compiler.compile("grammar", chained(500)) is first
    compiler.compile("regex", "small")
    assert compiler.compile("grammar", chained(500)) is not first or sys.platform != "linux"


def test_white_space_between_tokens_of_json_is_bounded(compiler: GrammarCompiler) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    for text in ('{"a":1}', '{ "a" : 1 }', '{\n  "a": 1\n}', '{\n\t\t"a": 1\n}', '{"a": 1, "b": [1,\n 2]}'):
        assert follows(compiler, "json_schema", schema, text), text
    for text in ('{  "a":1}', '{\n\n"a":1}', "{\n" + " " * 21 + '"a":1}', '{"a":1}\n', ' {"a":1}', '{"a":\r1}', "{"):
        assert not follows(compiler, "json_schema", schema, text), text


def test_a_schemas_own_options_do_not_loosen_it(compiler: GrammarCompiler) -> None:
    schema = {"type": "array", "x-guidance": {"whitespace_pattern": "[ ]{0,99}", "item_separator": ";"}}
    assert follows(compiler, "json_schema", schema, "[1, 2]")
    assert not follows(compiler, "json_schema", schema, "[1;2]")
    assert not follows(compiler, "json_schema", schema, "[    1]")


def test_a_schema_is_a_dictionary_or_its_json(compiler: GrammarCompiler) -> None:
    assert compiler.compile("json_schema", {"type": "null"}) is compiler.compile("json_schema", ' {"type":"null"} ')
    assert follows(compiler, "json_schema", True, '["any", {"document": null}]')


def test_expressions_match_the_whole_text(compiler: GrammarCompiler) -> None:
    assert follows(compiler, "regex", "[0-9]{3}|x", "123")
    assert not follows(compiler, "regex", "[0-9]{3}|x", "12")
    assert not follows(compiler, "regex", "[0-9]{3}|x", "123x")
    assert follows(compiler, "regex", "", "")


def test_one_of_disjoint_choices_is_taken(compiler: GrammarCompiler) -> None:
    kinds = [{"type": "object", "properties": {"k": {"const": each}}, "required": ["k"]} for each in "ab"]
    assert follows(compiler, "json_schema", {"oneOf": kinds}, '{"k": "b"}')
    assert not follows(compiler, "json_schema", {"oneOf": kinds}, '{"k": "c"}')


@pytest.mark.parametrize(
    ("kind", "source"),
    [
        ("json_schema", {"type": "object", "properties": {"a": {"type": "string"}, "b": {"enum": [1, "é"]}}}),
        ("regex", r"(a|be|\d{2,4} )+[^a-z]*"),
        ("grammar", 'start: ("x" | "yes" start)+ /[a-c]/ <|eom|>?'),
        ("regex", r"\[time\(\), weather\(city=\"a\"\)\]"),
        ("json_schema", {"type": "object", "properties": {"k": {"enum": ["no change", "no"]}}, "required": ["k"]}),
    ],
)
def test_one_token_is_allowed_where_the_mask_has_it(
    compiler: GrammarCompiler, kind: str, source: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("arriero.runtime.grammars.guide.LONG", 1e9)  # seconds: no other thread computes masks
    rng = np.random.default_rng(0)
    for _ in range(4):
        guide, steps = compiler.compile(kind, source).open([3]), 0
        while not guide.is_complete and steps < 12:
            if steps:
                alone = [guide.allows(token) for token in range(2048) if token != 3]
                assert guide.is_due  # no mask was computed for them
            guide._wait()
            mask = np.unpackbits(guide.bytes, bitorder="little")[:2048].astype(bool)
            assert not steps or alone == np.delete(mask, 3).tolist()
            guide.advance(int(rng.choice(np.flatnonzero(mask))))
            steps += 1


def test_the_last_grammars_are_kept(compiler: GrammarCompiler) -> None:
    first = compiler.compile("regex", "first")
    for number in range(KEPT - 1):
        compiler.compile("regex", f"n{number}")
    assert compiler.compile("regex", "first") is first
    for number in range(KEPT):
        compiler.compile("regex", f"m{number}")
    assert compiler.compile("regex", "first") is not first
    assert len(compiler.kept) == KEPT


def test_a_missing_library_is_named_with_its_extra(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.startswith("llguidance"):
            raise ModuleNotFoundError(f"No module named '{name}'", name=name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    compiler = GrammarCompiler(Tokenizer.from_file(str(tiny / "tokenizer.json")), 2048)
    with pytest.raises(SessionError, match=r"need llguidance: pip install 'arriero\[grammar\]'"):
        compiler.compile("regex", "a")
