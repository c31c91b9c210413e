"""Calls that the model decides to make, of strict functions: free text, until a call has begun."""

import json
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from openai import BadRequestError, OpenAI
from tokenizers import Tokenizer

from arriero.runtime.grammars.compiler import GrammarCompiler
from arriero.serving.bound_calls import beginnings, bound_grammar
from arriero.serving.tools import ToolCallReader

PARAMETERS: dict[str, Any] = {
    "type": "object",
    "properties": {
        "days": {"type": "integer", "minimum": 1, "maximum": 7},
        "place": {"$ref": "#/$defs/Place"},
        "warm": {"type": ["boolean", "null"]},
        "class": {"enum": ['a "quoted" ü', 3]},
    },
    "required": ["days", "warm"],
    "additionalProperties": False,
    "$defs": {"Place": {"enum": ["Lima", "Cusco"]}},
}
CHOSEN = {"type": "object", "anyOf": [{"required": ["a"]}, {"required": ["b"]}], "properties": {"a": {"const": 1}}}
STRICT: dict[str, Any] = {"type": "function", "function": {"name": "f", "strict": True, "parameters": PARAMETERS}}
LOOSE: dict[str, Any] = {"type": "function", "function": {"name": "g.h-i", "parameters": PARAMETERS}}
ODD: dict[str, Any] = {"type": "function", "function": {"name": "odd", "strict": True, "parameters": CHOSEN}}
TOOLS = [STRICT, LOOSE, ODD]
END = 3
"""Token that ends an answer: the tiny Llama 4's `<|eot|>`."""


@pytest.fixture(scope="module")
def compiler(tiny: Path) -> GrammarCompiler:
    tokenizer = Tokenizer.from_file(str(tiny / "tokenizer.json"))
    return GrammarCompiler(tokenizer, 2048)


def followed(compiler: GrammarCompiler, grammar: str, text: str) -> str | None:
    """The beginning of a text as far as it follows a grammar; None where it does to its end."""
    guide = compiler.compile("grammar", grammar).open([END])
    ids = compiler.tokenizer.encode(text, add_special_tokens=False).ids
    for place, token in enumerate(ids):
        if not guide.allows(token):
            return compiler.tokenizer.decode(ids[:place])
        guide.advance(token)
    return None if guide.allows(END) else text


FREE = [
    "",
    "Hello [x] { and [f(a=3",
    "[1, 2]",
    "[link](https://a.example)",
    "[f",
    "[fo(a=1)]",
    '{"name": "f", "age": 3}',
    '{"name": "Bob", "parameters": 3}',
    "[odd(a=2)]",
]
BOUND = [
    "[f(days=1, warm=True)]",
    '[f(days=7, place="Lima", warm=null)]',
    " [ f (days=2 , warm = None, class=3 ) , g.h-i(x=1, y=False)] ",
    "[g.h-i(), f(days=3, warm=false)]",
    '{"name": "f", "parameters": {"days": 1, "warm": null}}',
    '{"type": "function", "name": "f", "arguments": {"days": 1, "warm": true}}; {"name": "g.h-i", "parameters": {}}',
    '[{"name": "f", "parameters": {"days": 1, "warm": null}}, {"name": "odd", "parameters": {"a": 1}}]',
]
REFUSED = {
    "[f(warm=": "[f(",
    "[f(days=9": "[f(days=",
    "[f(days=1)]": "[f(days=1",
    '[f(days=1, place="Puno"': '[f(days=1, place="',
    '[g.h-i(), f(days="1"': "[g.h-i(), f(days=",
    '{"name": "f", "parameters": {"days": 8': '{"name": "f", "parameters": {"days":',
    '{"name": "odd", "parameters": {}}': '{"name": "odd", "parameters": {',
    "[f(days=1, warm=True)] and so on": "[f(days=1, warm=True)] ",
}


@pytest.mark.parametrize("parallel", [True, False])
def test_text_is_free_until_a_call_has_begun(compiler: GrammarCompiler, parallel: bool) -> None:
    grammar = bound_grammar(TOOLS, parallel=parallel, marked=False)
    for text in FREE + (BOUND if parallel else BOUND[:2]):
        assert followed(compiler, grammar, text) is None, text
    for text, until in REFUSED.items():
        found = followed(compiler, grammar, text)
        assert found is not None, text
        assert text.startswith(found)
        assert len(found) <= len(until) + 1 or not parallel, (text, found)
    if not parallel:
        assert followed(compiler, grammar, BOUND[3]) is not None


def test_what_is_read_as_a_call_of_a_strict_function_is_of_its_schema(compiler: GrammarCompiler) -> None:
    grammar = bound_grammar(TOOLS, parallel=True, marked=False)
    count = 0
    for seed in range(24):
        begun = ("[f(", '{"name": "f", "parameters": ', '[{"name": "odd", "parameters": ', "[g.h-i(")[seed % 4]
        guide = compiler.compile("grammar", grammar).open([END])
        ids = compiler.tokenizer.encode(begun, add_special_tokens=False).ids
        for token in ids:
            assert guide.allows(token)
            guide.advance(token)
        rng = np.random.default_rng(seed)
        while not guide.is_complete and len(ids) < 300:
            logits_V = rng.normal(size=2048).astype(np.float32)
            logits_V[END] += 9
            for sign in '"}])':
                logits_V[compiler.tokenizer.encode(sign, add_special_tokens=False).ids[0]] += 4
            ids.append(int(guide.restrict(logits_V).argmax()))
            guide.advance(ids[-1])
        reader = ToolCallReader(TOOLS, begins=beginnings(TOOLS))
        parts = [reader.feed(compiler.tokenizer.decode(ids)), reader.end()]
        calls = [call["function"] for _, deltas in parts for call in deltas]
        schemas = {"f": PARAMETERS, "odd": CHOSEN, "g.h-i": {"type": "object"}}
        for call in calls:
            jsonschema.validate(json.loads(call["arguments"]), schemas[call["name"]])
            count += 1
    assert count > 8


@pytest.mark.parametrize(
    "text",
    [
        '{"parameters": {"days": 99}, "name": "f"}',
        '{"name": "f", "type": "function", "parameters": {"days": 99}}',
        '{"name": "\\u0066", "parameters": {"days": 99}}',
        "\u00a0[f(days=99)]",
        "[\x0cf(days=99)]",
        "[odd(a=2)]",
    ],
)
def test_a_call_that_nothing_has_bound_is_content(compiler: GrammarCompiler, text: str) -> None:
    assert followed(compiler, bound_grammar(TOOLS, parallel=True, marked=False), text) is None
    reader = ToolCallReader(TOOLS, begins=beginnings(TOOLS))
    assert [reader.feed(text), reader.end()][-1][1] == []
    loose = [{**tool, "function": {**tool["function"], "strict": None}} for tool in TOOLS]
    usual = ToolCallReader(loose)
    usual.feed(text)
    assert usual.end()[1]


def test_marks_stand_around_calls(tiny: Path) -> None:
    tokenizer = Tokenizer.from_file(str(tiny / "tokenizer.json"))
    tokenizer.add_special_tokens(["<|python_start|>", "<|python_end|>"])
    compiler = GrammarCompiler(tokenizer, 2050)
    grammar = bound_grammar(TOOLS, parallel=True, marked=True)
    call = "<|python_start|>[f(days=1, warm=True)]<|python_end|>"
    for text in (call, f"Well. {call}So.", f"{call}{call}", "Hm.", BOUND[0], "<|python_start|>1 + 1<|python_end|>"):
        assert followed(compiler, grammar, text) is None, text
    assert followed(compiler, grammar, "Well. <|python_start|>[f(days=8") is not None
    answer = bound_grammar(TOOLS, parallel=True, marked=True, answer=PARAMETERS)
    for text in (call, '{"days": 1, "place": "Lima", "warm": null}', BOUND[0], BOUND[4]):
        assert followed(compiler, answer, text) is None, text
    for text in ("Hm.", '{"days": 1, "place": "Puno"', '{"name": "f", "parameters": {"days": 8'):
        assert followed(compiler, answer, text) is not None, text


def test_strict_functions_change_no_text_without_a_call(client: OpenAI) -> None:
    asked: list[Any] = [{"role": "user", "content": "Explain list.append."}]
    texts = []
    for strict in (True, False):
        tool: Any = {"type": "function", "function": {**STRICT["function"], "strict": strict}}
        found = client.chat.completions.create(model="tiny", messages=asked, tools=[tool], max_tokens=40, temperature=0)
        texts.append(found.choices[0].message.content)
    assert texts[0] == texts[1]


def test_an_answer_of_a_schema_may_be_a_call_instead(client: OpenAI) -> None:
    asked: list[Any] = [{"role": "user", "content": "The weather of Lima"}]
    form: Any = {"type": "json_schema", "json_schema": {"name": "a", "schema": PARAMETERS, "strict": True}}
    tools: Any = [STRICT]
    for seed in range(4):
        found = client.chat.completions.create(
            model="tiny", messages=asked, tools=tools, response_format=form, max_tokens=300, temperature=1, seed=seed
        ).choices[0]
        if found.finish_reason == "length":
            continue
        calls: Any = found.message.tool_calls
        text = calls[0].function.arguments if calls else found.message.content
        jsonschema.validate(json.loads(text), PARAMETERS)
    refused: Any = {"type": "function", "function": {"name": "f", "strict": True, "parameters": {"not": {}}}}
    unbound: Any = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"not": {}}}}
    wrong: dict[str, dict[str, Any]] = {
        "tools": {"tools": [refused]},
        "regex": {"tools": tools, "extra_body": {"regex": "a"}},
        "response_format": {"tools": tools, "response_format": unbound},
    }
    for param, settings in wrong.items():
        with pytest.raises(BadRequestError) as caught:
            client.chat.completions.create(model="tiny", messages=asked, **settings)
        assert caught.value.param == param
