"""Texts whose characters are parts of tokens, or tokens parts of characters: deltas, stops and bytes are the text's."""

import json
import re
from typing import Any

import httpx
import pytest
from openai import OpenAI

TEXTS = ("naïve Ω 日本語 中文字 😀 👩‍👩‍👧‍👦 🇵🇪 é e\u0301 end", "😀😀😀", "\U0010ffff\u200d\ufeffx\u00a0ß")
"""Written by the model because a regular expression leaves it nothing else; its tokens are bytes of most of these."""

ASKED: list[Any] = [{"role": "user", "content": "Write."}]


def write(client: OpenAI, text: str, **settings: Any) -> Any:
    asked = {"model": "tiny", "messages": ASKED, "max_tokens": 200, "temperature": 0, **settings}
    return client.chat.completions.create(**asked, extra_body={"regex": re.escape(text)})


@pytest.mark.parametrize("text", TEXTS)
def test_deltas_are_whole_characters_and_make_the_text(client: OpenAI, text: str) -> None:
    whole = write(client, text)
    assert whole.choices[0].message.content == text
    assert whole.usage.completion_tokens > len(text)  # tokens are parts of characters
    parts = [chunk.choices[0] for chunk in write(client, text, stream=True)]
    deltas = [part.delta.content for part in parts if part.delta.content]
    assert "".join(deltas) == text
    assert not any("\ufffd" in delta for delta in deltas)
    assert parts[-1].finish_reason == whole.choices[0].finish_reason == "stop"


@pytest.mark.parametrize("text", TEXTS)
def test_a_stop_of_any_characters_ends_the_text_before_it(client: OpenAI, text: str) -> None:
    for start in range(len(text)):
        stop = text[start : start + 1 + start % 3]
        expected = text.partition(stop)[0]
        found = write(client, text, stop=[stop, "never", text + "!"]).choices[0]
        assert (found.message.content, found.finish_reason) == (expected, "stop"), stop
    chunks = [chunk.choices[0] for chunk in write(client, text, stop=text[-2:], stream=True)]
    assert "".join(chunk.delta.content or "" for chunk in chunks) == text[: text.index(text[-2:])]


def test_half_characters_are_refused_or_given_back(http: httpx.Client) -> None:
    half = {"description": "\ud800"}
    for asked in (
        {"metadata": {"a": "\ud800"}, "user": "\udfff"},
        {"text": {"format": {"type": "json_schema", "name": "a", "schema": {"type": "object"}, **half}}},
        {"tools": [{"type": "function", "name": "f", "parameters": {"type": "object", **half}}], "tool_choice": "none"},
    ):
        body: Any = {"input": "a", "max_output_tokens": 2, **asked}
        content = json.dumps(body).encode()
        found = http.post("/v1/responses", content=content, headers={"content-type": "application/json"})
        assert found.status_code == 200
        assert "\\ud" in found.text
    body = {"messages": [{"role": "user", "content": "\ud800"}]}
    refused = http.post(
        "/v1/chat/completions", content=json.dumps(body).encode(), headers={"content-type": "application/json"}
    )
    assert refused.status_code == 400


@pytest.mark.parametrize("text", TEXTS)
def test_the_bytes_of_log_probabilities_are_the_text_s(client: OpenAI, text: str) -> None:
    whole = write(client, text, logprobs=True, top_logprobs=2).choices[0]
    streamed: list[Any] = []
    for chunk in write(client, text, logprobs=True, top_logprobs=2, stream=True):
        streamed += chunk.choices[0].logprobs.content if chunk.choices[0].logprobs else []
    for content in (whole.logprobs.content, streamed):
        assert b"".join(bytes(each.bytes) for each in content).decode() == text
        for each in (*content, *(other for token in content for other in token.top_logprobs)):
            assert each.token == bytes(each.bytes).decode("utf-8", "replace")
    completion: Any = client.completions.create(
        model="tiny", prompt="Write.", max_tokens=200, temperature=0, logprobs=1, extra_body={"regex": re.escape(text)}
    )
    assert completion.choices[0].text == text
    assert len(completion.choices[0].logprobs.tokens) == completion.usage.completion_tokens
