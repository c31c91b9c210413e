"""Calls read from whole texts; whatever else a text is, it is none, and costs little."""

import json
import time
from typing import Any

import pytest

from arriero.serving.calls import Call, depth_of, read_calls

NAMES = ("f", "get_weather", "weather.get", "get-weather", "import", "g")

CALLS: list[tuple[str, list[tuple[str, Any]]]] = [
    ('[f(a=1), g(b="x")]', [("f", {"a": 1}), ("g", {"b": "x"})]),
    ("[f()]", [("f", {})]),
    (" [ f ( a = -1.5 , ) , ] \n", [("f", {"a": -1.5})]),
    ("[f(a='it\\'s', b=\"[f(a=1)]\", c='''x\ny''')]", [("f", {"a": "it's", "b": "[f(a=1)]", "c": "x\ny"})]),
    ("[f(a=[1, (2, 3)], b={'k': {'l': None}}, c=True, d=false, e=null)]",
     [("f", {"a": [1, [2, 3]], "b": {"k": {"l": None}}, "c": True, "d": False, "e": None})]),
    ("[weather.get(city='Ñandú 🦙 日本')]", [("weather.get", {"city": "Ñandú 🦙 日本"})]),
    ("[get-weather(from='a', class=2, city=\"from=\")]", [("get-weather", {"from": "a", "class": 2, "city": "from="})]),
    ("[import(a=1), f(lambda_=2)]", [("import", {"a": 1}), ("f", {"lambda_": 2})]),
    ('[f(a="\\U0001f999é", b="\\ud800")]', [("f", {"a": "🦙é", "b": "\ud800"})]),
    ("[f(a=" + "[" * 40 + "]" * 40 + ")]", [("f", {"a": json.loads("[" * 40 + "]" * 40)})]),
    ('{"name": "f", "parameters": {"a": [1, {"b": "}"}]}}', [("f", {"a": [1, {"b": "}"}]})]),
    ('{"type": "function", "name": "f", "arguments": {}}', [("f", {})]),
    ('{"name": "f", "parameters": {}}; {"name": "g", "parameters": {"a": "é"}}', [("f", {}), ("g", {"a": "é"})]),
    ('{"name": "f", "parameters": {}}\n{"name": "g", "parameters": {}}', [("f", {}), ("g", {})]),
    ('[{"name": "f", "parameters": {"a": null}}, {"name": "g", "parameters": {}}]', [("f", {"a": None}), ("g", {})]),
]  # fmt: skip

NO_CALLS = [
    "", "[]", "{}", "f(a=1)", "[f]", "[f(1)]", "[f(*a)]", "[f(**{'a': 1})]", "[f(a=b)]", "[f(a=g())]",
    "[unknown(a=1)]", "[f(a=1), 2]", "[f(a=1) for x in y]", "[f(a=1)] and more", "see [f(a=1)]",
    "[f(a=1), unknown()]", "[f(a=1, a=2)]", "[f(a=__import__('os').system('true'))]", "[f(a=lambda: 1)]",
    "[f(a=f'{1}')]", "[f(a=b'x')]", "[f(a=1+1)]", "[f(a=1j)]", "[f(a=...)]", "[f(a={1})]", "[f(a={1: 2})]",
    "[f(a={**b})]", "[f(a=--1)]", "[f(a=1e999)]", "[f(a=(b:=1))]", "[f(a=" + "9" * 5000 + ")]", "[f(a=1)", "f(a=1)]",
    "[f(a='x)]", "[f(a=1)()]", "[f.g(a=1)]", "[f(a=not 1)]", "(f(a=1),)", "{f(a=1)}", "[f(a=1)][0]",
    "[f(a=1)] # comment", "[f(a=1)];", "[f\\\n(a=1)]", "[f(a=-'x')]", "[f(a=-True)]",
    '{"name": "unknown", "parameters": {}}', '{"name": "f"}', '{"name": "f", "parameters": []}',
    '{"name": "f", "x": {}}', '{"name": "f", "parameters": {}, "arguments": {}}',
    '{"name": "f", "parameters": {"a": NaN}}', '{"name": ["f"], "parameters": {}}',
    '{"name": "f", "parameters": {}} x', '{"name": "f", "parameters": {}',
    '{"name": "f", "parameters": {"a": 1e999}}', '[[{"name": "f", "parameters": {}}]]',
    '{"name": "f", "parameters": {}}, {"name": "g", "parameters": {}}', "[f(a=1)\x00]",
]  # fmt: skip


@pytest.mark.parametrize(("text", "expected"), CALLS)
def test_calls_are_read(text: str, expected: list[tuple[str, Any]]) -> None:
    found = read_calls(text, NAMES)
    assert found is not None
    assert [(call.name, json.loads(call.arguments)) for call in found] == expected
    for call in found:
        call.arguments.encode()  # can be sent


@pytest.mark.parametrize("text", NO_CALLS)
def test_what_merely_looks_like_a_call_is_none(text: str) -> None:
    assert read_calls(text, NAMES) is None


HOSTILE = [
    "[f(a=" + "[" * 60_000,
    "[f(a=" + "[" * 60 + "]" * 60 + ")]",
    "[f(a=" + "{1:(" * 24,
    "[f(a=" + "f(" * 24 + ")" * 24 + ")]",
    "[f(a=" + "-" * 60_000 + "1)]",
    "[f(a=" + "not " * 20_000 + "1)]",
    "[f(a=" + "a." * 50_000 + "a)]",
    "[f(a=" + "1-" * 20_000 + "1)]",
    "[f(a=" + "1 if " * 20_000 + "1)]",
    "[f(a=" + "lambda:" * 20_000 + "1)]",
    "[f(a=" + "[0]" * 20_000 + ")]",
    "[f(" + "a=1," * 20_000 + ")]",
    '[f(a="' + "\\" * 59_999 + '")]',
    "[f(a=" + '"' * 60_000 + ")]",
    '{"name": "f", "parameters": ' + '{"a":' * 60_000,
    '{"name": "f", "parameters": {}};' * 3_000,
    "[" + "f()," * 20_000 + "x]",
    "[f(a='" + "x" * (1 << 18) + "')]",
]


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_text_costs_little(text: str) -> None:
    started = time.thread_time()
    read_calls(text, NAMES)
    assert time.thread_time() - started < 4


def test_nothing_is_evaluated(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("eval", "exec", "compile"):
        real = getattr(__import__("builtins"), name)
        kept = real if name == "compile" else None  # which `ast.parse` calls, for a tree alone

        def watch(source: Any, *rest: Any, kept: Any = kept, **named: Any) -> Any:
            assert kept is not None
            assert 0x400 & (rest[2] if len(rest) > 2 else named.get("flags", 0))  # ast.PyCF_ONLY_AST
            return kept(source, *rest, **named)

        monkeypatch.setattr("builtins." + name, watch)
    assert read_calls("[f(a=print)]", NAMES) is None
    assert read_calls("[f(a=1)]", NAMES) == [Call("f", '{"a": 1}')]


def test_depth_counts_brackets_outside_of_strings() -> None:
    assert depth_of('[f(a="[[[[", b=[{}])]') == 4
