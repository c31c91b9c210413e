"""Answers that must be calls, JSON or of a form, through OpenAI's client."""

import json
import re
from typing import Any

import jsonschema
import openai
import pytest
from openai import OpenAI

from arriero.runtime import Session

ASKED: list[Any] = [{"role": "user", "content": "The weather of Lima, please."}]
WEATHER: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"enum": ["Lima", "Cusco"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TIME: dict[str, Any] = {
    "type": "object",
    "properties": {"zone": {"enum": ["UTC", "PET"]}},
    "additionalProperties": False,
}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "weather", "description": "A forecast.", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "time", "parameters": TIME}},
]
CHOICES: dict[str, Any] = {
    "required": "required",
    "named": {"type": "function", "function": {"name": "time"}},
}


def chat(client: OpenAI, **settings: Any) -> Any:
    return client.chat.completions.create(model="tiny", messages=ASKED, **{"max_tokens": 200, **settings})


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("stream", [False, True])
def test_a_demanded_call_fits_its_schema(client: OpenAI, choice: str, stream: bool) -> None:
    for seed in range(3):
        asked = {"tools": TOOLS, "tool_choice": CHOICES[choice], "parallel_tool_calls": False, "stream": stream}
        found = chat(client, **asked, temperature=1, seed=seed)
        if stream:
            parts = [chunk.choices[0] for chunk in found]
            calls = [call for part in parts for call in part.delta.tool_calls or ()]
            name, arguments = calls[0].function.name, "".join(call.function.arguments or "" for call in calls)
            assert {call.index for call in calls} == {0}
            finish = parts[-1].finish_reason
        else:
            (call,) = found.choices[0].message.tool_calls
            name, arguments, finish = call.function.name, call.function.arguments, found.choices[0].finish_reason
            assert found.choices[0].message.content is None
        assert finish == "tool_calls"
        jsonschema.validate(json.loads(arguments), WEATHER if name == "weather" else TIME)
        assert choice == "required" or name == "time"


def test_responses_demand_calls_too_and_take_their_results(client: OpenAI) -> None:
    tools: Any = [{"type": "function", "strict": True, **TOOLS[0]["function"]}]
    asked: dict[str, Any] = {"model": "tiny", "tools": tools, "temperature": 0, "parallel_tool_calls": False}
    found = client.responses.create(input=ASKED, tool_choice="required", **asked)
    call: Any = next(item for item in found.output if item.type == "function_call")
    jsonschema.validate(json.loads(call.arguments), WEATHER)
    with client.responses.stream(input=ASKED, tool_choice="required", **asked) as stream:
        events = list(stream)
    done: Any = next(event for event in events if event.type == "response.function_call_arguments.done")
    assert done.arguments == call.arguments
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
    items: Any = [*ASKED, call.model_dump(exclude_none=True), result]
    assert client.responses.create(input=items, max_output_tokens=5, **asked).usage


MIXED = "<|python_start|>[time(), time()]<|python_end|>So."


@pytest.mark.parametrize("written", [None, "[time()]", "Hm. [time()]", MIXED])
def test_the_events_of_calls_and_log_probabilities_are_those_of_the_answer(client: OpenAI, written: str | None) -> None:
    tools: Any = [{"type": "function", **tool["function"]} for tool in TOOLS]
    asked: dict[str, Any] = {"tools": tools, "include": ["message.output_text.logprobs"], "temperature": 0}
    if written is None:
        asked["tool_choice"] = "required"
    else:
        asked["extra_body"] = {"regex": re.escape(written)}
    whole: Any = client.responses.create(model="tiny", input=ASKED, **asked)
    with client.responses.stream(model="tiny", input=ASKED, **asked) as stream:
        events: list[Any] = list(stream)
    output = events[-1].response.output
    assert [item.type for item in output] == [item.type for item in whole.output]
    kinds = {"Hm. [time()]": ["message"], MIXED: ["function_call", "function_call", "message"]}
    assert written is None or [item.type for item in output] == kinds.get(written, ["function_call"])
    for kind in ("added", "done"):
        ends = [event for event in events if event.type == f"response.output_item.{kind}"]
        assert [(event.output_index, event.item.id) for event in ends] == [
            (n, item.id) for n, item in enumerate(output)
        ]
    deltas = [event for event in events if event.type == "response.output_text.delta"]
    tokens = [each.token for event in deltas for each in event.logprobs]
    assert tokens == [each.token for item in output if item.type == "message" for each in item.content[0].logprobs]


def test_a_conversation_with_calls_is_continued_as_the_session_does(client: OpenAI, session: Session) -> None:
    calls = [
        {
            "id": "call_1",
            "type": "function",
            "function": {"name": "weather", "arguments": '{"city": "Lima", "days": 2}'},
        }
    ]
    answer: Any = {"role": "assistant", "tool_calls": calls}
    result: Any = {"role": "tool", "tool_call_id": "call_1", "content": "sunny"}
    found = client.chat.completions.create(
        model="tiny", messages=[*ASKED, answer, result], max_tokens=12, temperature=0
    )
    written = [
        *ASKED,
        {"role": "assistant", "content": "[weather(city='Lima', days=2)]"},
        {"role": "ipython", "content": "sunny"},
    ]
    assert found.choices[0].message.content == session.generate(written, 12, do_sample=False).text
    named = {**result, "name": "weather"}  # as OpenAI's own examples have it
    again = client.chat.completions.create(model="tiny", messages=[*ASKED, answer, named], max_tokens=12, temperature=0)
    assert again.choices[0].message.content == found.choices[0].message.content


def test_json_of_a_schema_and_json_of_none(client: OpenAI) -> None:
    named = {"type": "json_schema", "json_schema": {"name": "weather", "schema": WEATHER, "strict": True}}
    for seed in range(3):
        found = chat(client, response_format=named, temperature=1, seed=seed)
        jsonschema.validate(json.loads(found.choices[0].message.content), WEATHER)
        assert found.choices[0].finish_reason == "stop"
    text: Any = {"format": {"type": "json_schema", "name": "weather", "schema": WEATHER}}
    answer = client.responses.create(model="tiny", input=ASKED, text=text, max_output_tokens=200)
    jsonschema.validate(json.loads(answer.output_text), WEATHER)
    free = chat(client, response_format={"type": "json_object"}, temperature=0, max_tokens=400)
    if free.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(free.choices[0].message.content), dict)
    assert free.choices[0].message.content.lstrip().startswith("{")


def test_schemas_as_libraries_write_them_bind_answers_and_calls(client: OpenAI) -> None:
    key = {"$defs": {"Key": {"enum": ["x", "y"], "title": "Key", "type": "string"}}}
    schema = {
        **key,
        "$schema": "http://json-schema.org/draft-07/schema#",
        "type": "object",
        "propertyNames": {"$ref": "#/$defs/Key"},
        "additionalProperties": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2, "uniqueItems": False},
        "required": ["x"],
    }
    named: Any = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema, "strict": True}}
    tool: Any = {"type": "function", "function": {"name": "f", "parameters": schema, "strict": True}}
    for seed in range(2):
        found = chat(client, response_format=named, temperature=1, seed=seed).choices[0].message
        jsonschema.validate(json.loads(found.content), schema)
        found = chat(client, tools=[tool], tool_choice="required", parallel_tool_calls=False, seed=seed)
        jsonschema.validate(json.loads(found.choices[0].message.tool_calls[0].function.arguments), schema)


def test_regular_expressions_and_grammars_are_heeded(client: OpenAI) -> None:
    found = chat(client, extra_body={"regex": "[0-9]{3}-(cat|dog)"}, temperature=1, seed=1)
    head, _, tail = found.choices[0].message.content.partition("-")
    assert head.isdigit()
    assert tail in ("cat", "dog")
    lark = 'start: "yes" | "no"'
    assert chat(client, extra_body={"grammar": lark}).choices[0].message.content in ("yes", "no")


CHAINED = {"$ref": "#/$defs/0", "$defs": {f"{number}": {"$ref": f"#/$defs/{number + 1}"} for number in range(9000)}}
"""A schema that ends the process that takes it apart."""


@pytest.mark.parametrize(
    ("settings", "param"),
    [
        ({"extra_body": {"regex": "("}}, "regex"),
        ({"extra_body": {"grammar": "start: ("}}, "grammar"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"not": {}}}}},
            "response_format",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": CHAINED}}},
            "response_format",
        ),
        (
            {
                "tools": [{"type": "function", "function": {"name": "f", "parameters": {"not": {}}}}],
                "tool_choice": "required",
            },
            "tools",
        ),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice"),
        ({"tools": [TOOLS[0], TOOLS[0]]}, "tools"),
        ({"tools": TOOLS, "tool_choice": "required", "response_format": {"type": "json_object"}}, "tool_choice"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_enforced_is_refused_with_its_reason(client: OpenAI, settings: Any, param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        chat(client, **settings)
    assert caught.value.param == param
