"""Calls in a stream of text, cut wherever it may be cut, and calls that are demanded."""

import dataclasses
import itertools
import json
import random
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from tokenizers import Tokenizer

import arriero
from arriero.errors import SessionError
from arriero.runtime.continuation import Continuation
from arriero.runtime.grammars.compiler import GrammarCompiler
from arriero.serving.choices import Choice
from arriero.serving.tools import ToolCallReader, tool_grammar

PARAMETERS: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 9},
        "days": {"type": "integer", "minimum": 1, "maximum": 7},
        "from": {"enum": ['quoted "x"', "ü", None]},
    },
    "required": ["city", "from"],
    "additionalProperties": False,
}
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "get-weather.now", "parameters": PARAMETERS}},
    {"type": "function", "function": {"name": "f", "description": "f", "parameters": {"properties": {}}}},
    {"type": "function", "function": {"name": "fg"}},
]
Read = tuple[str, list[tuple[str, Any]]]


def read(parts: list[str], **settings: Any) -> Read:
    """The content, and the names and arguments of the calls, of a text that comes in parts."""
    reader = ToolCallReader(TOOLS, **settings)
    content, deltas = "", []
    for shown, more in [*(reader.feed(part) for part in parts), reader.end()]:
        content, deltas = content + shown, deltas + more
    calls: list[dict[str, Any]] = []
    for delta in deltas:
        if delta["index"] == len(calls):
            assert delta["type"] == "function"
            assert delta["id"].startswith("call_")
            calls.append({"name": delta["function"]["name"], "arguments": ""})
        calls[delta["index"]]["arguments"] += delta["function"]["arguments"]
    return content, [(call["name"], json.loads(call["arguments"])) for call in calls]


F, G = ("f", {"a": 1}), ("fg", {"b": 'x], "y'})
TEXTS: list[tuple[str, Read]] = [
    ("[f(a=1)]", ("", [F])),
    ('[f(a=1), fg(b="x], \\"y")]', ("", [F, G])),
    ("\n [f(a=1), fg(b='x], \"y')]\n", ("", [F, G])),
    ("<|python_start|>[f(a=1)]<|python_end|>", ("", [F])),
    ("Let me see. <|python_start|>[f(a=1)]<|python_end|>", ("Let me see. ", [F])),
    ("<|python_start|>[f(a=1)]<|python_end|> then <|python_start|>[f(a=1)]", (" then ", [F, F])),
    ("<|python_start|>[f(a=1)]<|python_end|>\n<|python_start|>[f(a=1)]<|python_end|>\n", ("", [F, F])),
    ('{"name": "f", "parameters": {"a": 1}}', ("", [F])),
    ('{"name": "f", "parameters": {"a": 1}}; {"name": "f", "parameters": {"a": 1}}', ("", [F, F])),
    ('[{"name": "f", "parameters": {"a": 1}}, {"name": "f", "arguments": {"a": 1}}]', ("", [F, F])),
    ('<|python_start|>{"name": "f", "parameters": {"a": 1}}<|python_end|>', ("", [F])),
    ("[get-weather.now(from=None, city='é🦙')]", ("", [("get-weather.now", {"from": None, "city": "é🦙"})])),
    ('[f(a="""x"]""")]', ("", [("f", {"a": 'x"]'})])),
    ("[f(a='')]", ("", [("f", {"a": ""})])),
]
CONTENT = [
    "", " ", "Hello.", "[1] is a reference", "[f] is no call", "[f(a=1)] is a call", "[f(a=1)", "[fgh(a=1)]", "f(a=1)",
    "so [f(a=1)]", "{", "{}", '{"name": "unknown", "parameters": {}}', '{"key": 1}', '{"name": "f", "parameters": {}',
    "[[f(a=1)]]", "<|python_start|>", "<|python_start|>print(1)<|python_end|>", "<|python_end|>",
    "<|python_", "<|py [f(a=1)]",
    "<|python_start|>[f(a=1)] no<|python_end|>", "[f(a=b)]", "[f(a=" + "[" * 99 + "1" + "]" * 99 + ")]",
    "[f(a=1)] [f(a=1)]",
    '[f(a="]', "[f(a=1]", ") [f(a=1)]", '{"name": "f", "parameters": {}} and {', "\n\n[ x", '["f(a=1)"]', "[f(a=1)]]",
]  # fmt: skip


@pytest.mark.parametrize(("text", "expected"), [*TEXTS, *((text, (text, [])) for text in CONTENT)])
def test_a_text_is_read_alike_however_it_is_cut(text: str, expected: Read) -> None:
    assert read([text]) == expected
    assert read(list(text)) == expected
    for cut in range(1, len(text)):
        assert read([text[:cut], text[cut:]]) == expected, text[:cut]
    rng = random.Random(text)
    for _ in range(5):
        cuts = sorted(rng.sample(range(len(text) + 1), min(3, len(text))))
        assert read([text[a:b] for a, b in itertools.pairwise([0, *cuts, len(text)])]) == expected


def test_random_texts_lose_nothing() -> None:
    pieces = ["[f(", "a=1", ")]", "[", "]", '{"name": "f"', ', "parameters": {}}', "<|python_start|>", "<|python_end|>"]
    pieces += ["'", '"', "\\", " ", "x", ";", "<|", "fg()", "\n"]
    rng = random.Random(0)
    for _ in range(1500):
        parts = [rng.choice(pieces) for _ in range(rng.randrange(9))]
        content, calls = read(parts)
        assert read(["".join(parts)]) == (content, calls), parts
        assert calls or content == "".join(parts), parts


def test_content_is_given_as_soon_as_it_is_no_call() -> None:
    reader = ToolCallReader(TOOLS)
    assert [reader.feed(part)[0] for part in ("  ", "He", "llo <", "|pyth", "on", "ic", " [f(a=1)]")] == [
        "", "  He", "llo ", "", "", "<|pythonic", " [f(a=1)]"
    ]  # fmt: skip
    assert ToolCallReader(TOOLS).feed("[1")[0] == "[1"
    assert ToolCallReader(TOOLS).feed('{"x')[0] == '{"x'
    assert ToolCallReader(TOOLS).feed("[g")[0] == ""
    assert ToolCallReader(TOOLS).feed("[gone")[0] == "[gone"


def test_one_call_is_given_where_there_may_be_one() -> None:
    assert read(["[f(a=1), fg()]"], parallel=False) == ("", [F])
    marked = "<|python_start|>[f(a=1)]<|python_end|>"
    assert read([marked * 2], parallel=False) == ("", [F])


def test_calls_have_names_of_their_own() -> None:
    _, deltas = ToolCallReader(TOOLS).feed("<|python_start|>[f(), f(), fg()]<|python_end|>")
    assert len({delta["id"] for delta in deltas}) == 3
    assert [delta["index"] for delta in deltas] == [0, 1, 2]


def compiler(tiny: Path) -> GrammarCompiler:
    return GrammarCompiler(Tokenizer.from_file(str(tiny / "tokenizer.json")), 2048)


@pytest.mark.parametrize("parallel", [True, False])
def test_demanded_calls_are_valid_and_given_while_they_are_written(tiny_model: Path, parallel: bool) -> None:
    session = arriero.load(tiny_model, max_seq=600)
    schemas = {tool["function"]["name"]: tool["function"].get("parameters", {}) for tool in TOOLS}
    settings: dict[str, Any] = {"temperature": 1.5, "top_k": 0, "max_new_tokens": 500}
    named = {"type": "function", "function": {"name": "get-weather.now"}}
    for seed, choice in enumerate(["required", named]):
        grammar = tool_grammar(TOOLS, choice, parallel)
        assert grammar is not None
        pieces = list(session.stream("Call: ", grammar=grammar, seed=seed, **settings))
        assert pieces[-1].finish in ("stop", "eos")
        content, calls = read([piece.text for piece in pieces], demanded=True)
        assert content == ""
        assert len(calls) == 1 if choice is named or not parallel else calls
        for name, arguments in calls:
            assert name == "get-weather.now" or choice == "required"
            jsonschema.validate(arguments, schemas[name])
        assert read(["".join(piece.text for piece in pieces)]) == ("", calls)  # as when nothing were demanded


def test_pieces_of_demanded_calls_come_with_their_text() -> None:
    text = '{"name": "f", "parameters": {"a": "}\\"{", "b": ["x"]}}; {"name": "fg", "parameters": {}}'
    reader = ToolCallReader(TOOLS, demanded=True)
    deltas = [delta for sign in text for delta in reader.feed(sign)[1]]
    assert (
        "".join(delta["function"]["arguments"] for delta in deltas if delta["index"] == 0)
        == '{"a": "}\\"{", "b": ["x"]}'
    )
    assert len(deltas) > 20
    for cut in range(len(text)):
        calls = [("f", {"a": '}"{', "b": ["x"]}), ("fg", {})]
        assert read([text[:cut], text[cut:]], demanded=True) == ("", calls)
    half = ToolCallReader(TOOLS, demanded=True)
    half.feed(text[:40])
    assert half.end() == ("", [])


def test_a_grammar_is_made_where_calls_are_demanded(tiny: Path) -> None:
    named = {"type": "function", "function": {"name": "f"}}
    assert tool_grammar(TOOLS, named, True) == tool_grammar(TOOLS, named, False)  # a named function is called once
    assert tool_grammar(TOOLS, "required", True) != tool_grammar(TOOLS, "required", False)
    assert tool_grammar(TOOLS, "auto") is None
    assert tool_grammar(TOOLS, "none") is None
    with pytest.raises(SessionError, match="tool_choice is 'x' and the tools are"):
        tool_grammar(TOOLS, "x")
    with pytest.raises(SessionError, match="name one of them"):
        tool_grammar([], "required")
    wrong = [{"type": "function", "function": {"name": "f", "parameters": {"type": "array"}}}]
    with pytest.raises(SessionError, match="expected an object's JSON schema"):
        tool_grammar(wrong, "required")
    refused: list[dict[str, Any]] = [{"name": "f", "parameters": {"properties": {"a": {"not": {"type": "null"}}}}}]
    grammar = tool_grammar(refused, "required")
    with pytest.raises(SessionError, match="Unimplemented keys"):
        compiler(tiny).compile("grammar", grammar)
    nested = {
        "name": "f",
        "parameters": {"$defs": {"a": {"enum": ['"\\\n}']}}, "properties": {"a": {"$ref": "#/$defs/a"}}},
    }
    assert compiler(tiny).compile("grammar", tool_grammar([nested], "required"))


@pytest.mark.parametrize("stop", [None, "\n\n", "n\n<|", "<|python_start|>[x", "\n]"])
def test_marks_stand_in_the_text_where_they_were_written(tiny_model: Path, stop: str | None) -> None:
    """Text that may turn out to be a stop comes later than its tokens, and so does a mark behind it."""
    session = arriero.load(tiny_model, max_seq=200)
    written = "Seen\n<|header_start|>[fg()]\n<|header_end|>"  # special tokens of the tiny model
    ids = session.text.encode(written, special_tokens=False)
    tokens = {f"<|python_{end}|>": session.text.encode(f"<|header_{end}|>")[-1] for end in ("start", "end")}
    request = session.request([5], 100, stop_strings=None if stop is None else [stop])
    continuation = Continuation(dataclasses.replace(request, shown={token: mark for mark, token in tokens.items()}))
    choice = Choice(0, ToolCallReader(TOOLS))
    for token in [*ids, min(session.defaults.eos_token_ids)]:
        logits_V = np.zeros(session.spec.vocab_size, np.float32)
        logits_V[token] = 1
        piece = continuation.take(logits_V)
        choice.take(piece)
        if piece.finish is not None:
            break
    if stop == "n\n<|":
        assert (choice.text, choice.calls, choice.finish) == ("See", [], "stop")
    else:
        assert choice.text == "Seen\n"
        assert [call["function"]["name"] for call in choice.calls] == ["fg"]
