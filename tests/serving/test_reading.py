"""Requests are read as their schemas say: jsonschema is the oracle."""

import asyncio
import copy
import random
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import jsonschema
import pytest

from arriero.serving.conversation import image_fields
from arriero.serving.doors import OPEN
from arriero.serving.errors import RequestError
from arriero.serving.protocol.chat import ChatRequest
from arriero.serving.protocol.completions import CompletionRequest
from arriero.serving.protocol.openapi import document
from arriero.serving.protocol.reading import read, schema
from arriero.serving.protocol.responses import ResponseRequest
from arriero.serving.service import Caller, Limits, Service


@dataclass(frozen=True, kw_only=True, slots=True)
class Chat(ChatRequest):
    """Without the checks between fields, which a schema does not have."""

    def __post_init__(self) -> None:
        pass


@dataclass(frozen=True, kw_only=True, slots=True)
class Completion(CompletionRequest):
    """The same."""

    def __post_init__(self) -> None:
        pass


@dataclass(frozen=True, kw_only=True, slots=True)
class Response(ResponseRequest):
    """The same."""

    def __post_init__(self) -> None:
        pass


CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
VALID: list[tuple[type, dict[str, Any]]] = [
    (
        Chat,
        {
            "messages": [
                {"role": "system", "content": "a", "name": "b"},
                {"role": "user", "content": [{"type": "text", "text": "a"}]},
                {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,a", "detail": "auto"}}]},
                {"role": "assistant", "content": None, "tool_calls": [CALL]},
                {"role": "tool", "content": "a", "tool_call_id": "c"},
            ],
            "n": 2,
            "temperature": 0.5,
            "logit_bias": {"12": -3.5},
            "stop": ["a", "b"],
            "stream": True,
            "stream_options": {"include_usage": True},
            "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {}}},
            "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
            "tool_choice": {"type": "function", "function": {"name": "f"}},
            "metadata": {"a": "b"},
            "seed": -5,
        },
    ),
    (Completion, {"prompt": [[1, 2], [3]], "logprobs": 2, "echo": False, "user": "a"}),
    (Completion, {"prompt": ["a"], "best_of": 1, "suffix": "", "max_tokens": 0}),
    (
        Response,
        {
            "input": [
                {"role": "user", "content": [{"type": "input_text", "text": "a"}]},
                {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
                {"type": "function_call_output", "call_id": "c", "output": "a"},
            ],
            "text": {"format": {"type": "json_schema", "name": "a", "schema": {}}},
            "tools": [{"type": "function", "name": "f"}],
            "tool_choice": "required",
            "include": ["message.output_text.logprobs"],
        },
    ),
]
STRANGE: list[Any] = [
    None,
    True,
    0,
    -1,
    1.5,
    2.0,
    1e300,
    10**30,
    "",
    "a",
    "text",
    "function",
    [],
    ["a"],
    [1],
    {},
    {"a": 1},
]


def places(value: Any, way: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The ways to all that a value holds."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [way, *(place for key, each in inner for place in places(each, (*way, key)))]


def changed(value: Any, rng: random.Random) -> Any:
    """A value with one or two changes: something else in a place, a field more, or one less."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 2))):
        *way, last = rng.choice([place for place in places(value) if place])
        holder = value
        for key in way:
            holder = holder[key]
        kind = rng.randrange(4)
        if kind == 0 and isinstance(holder, dict):
            del holder[last]
        elif kind == 1 and isinstance(holder, dict):
            holder[rng.choice(("extra", "name", "type", "content", "detail", "strict"))] = rng.choice(STRANGE)
        else:
            holder[last] = copy.deepcopy(rng.choice(STRANGE))
    return value


@pytest.mark.parametrize(("cls", "valid"), VALID)
def test_what_a_schema_allows_is_read_and_the_rest_refused(cls: type, valid: dict[str, Any]) -> None:
    components: dict[str, Any] = {}
    root = schema(cls, components)
    validator = jsonschema.Draft202012Validator({**root, "components": {"schemas": components}})
    rng, verdicts = random.Random(0), {True: 0, False: 0}
    for number in range(400):
        value = valid if not number else changed(valid, rng)
        try:
            read(cls, value)
            is_read = True
        except RequestError as refused:
            is_read, error = False, refused
        assert is_read or (error.status == 400 and len(error.message) < 400)
        assert is_read == validator.is_valid(value), value
        verdicts[is_read] += 1
    assert min(verdicts.values()) > 20


def test_the_document_is_one_of_openapi_and_describes_every_field() -> None:
    found = document("tiny", OPEN)
    for component in found["components"]["schemas"].values():
        jsonschema.Draft202012Validator.check_schema(component)
    asked = found["components"]["schemas"]["ChatRequest"]["properties"]
    assert all("description" in field for field in asked.values())
    assert set(found["paths"]) >= {"/v1/chat/completions", "/v1/completions", "/v1/responses", "/metrics"}


def test_the_images_of_a_conversation_are_known_by_their_fields() -> None:
    text, image = {"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "data:,a"}}
    for content, expected in (("a", []), ([text], []), ([text, image], ["messages[1].content[1]"])):
        messages = [{"role": "user", "content": each} for each in ("a", content)]
        assert list(image_fields(read(ChatRequest, {"messages": messages, "model": "m"}).messages)) == expected


@pytest.mark.parametrize(("length", "is_quick", "is_brief"), [(9, True, True), (9, False, False), (2000, True, False)])
def test_a_brief_prompt_is_made_ready_at_once_where_its_tokenizer_cannot_take_long(
    monkeypatch: pytest.MonkeyPatch, length: int, is_quick: bool, is_brief: bool
) -> None:
    seen = []

    async def board(self: Service, *_: Any, brief: bool = False) -> None:
        seen.append(brief)

    monkeypatch.setattr(Service, "_board", board)
    service = Service("tiny", Limits(), shares_prefixes=False, report=print)
    monkeypatch.setattr(Service, "session", SimpleNamespace(text=SimpleNamespace(is_quick=is_quick)))
    asyncio.run(service.complete(read(CompletionRequest, {"prompt": "a" * length}), Caller()))
    assert seen == [is_brief]
