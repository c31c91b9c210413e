"""OpenAI's own client against a server's process."""

import json
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from endless import ENDLESS
from openai import OpenAI

from arriero.runtime import Session
from arriero.runtime.logprobs import read_logprobs

ASKED: list[Any] = [{"role": "user", "content": "Explain list.append."}]
GREEDY: dict[str, Any] = {"model": "tiny", "temperature": 0}


def chat(client: OpenAI, messages: Any = ASKED, **settings: Any) -> Any:
    return client.chat.completions.create(messages=messages, **{**GREEDY, "max_tokens": 24, **settings})


def expected(session: Session, prompt: Any, count: int, **settings: Any) -> str:
    return session.generate(prompt, count, do_sample=False, **settings).text


def test_a_whole_answer_is_the_session_s(client: OpenAI, session: Session) -> None:
    found = chat(client)
    assert found.choices[0].message.content == expected(session, ASKED, 24)
    assert found.choices[0].finish_reason == "length"
    assert found.object == "chat.completion"
    assert (found.usage.prompt_tokens, found.usage.completion_tokens, found.usage.total_tokens) == (23, 24, 47)


def test_an_answer_follows_an_earlier_one(client: OpenAI, http: httpx.Client, session: Session) -> None:
    messages = [*ASKED, {"role": "assistant", "content": "It appends."}]
    ids = session.text.encode_chat(messages, add_generation_prompt=True)  # not as if it were to write its own header
    assert chat(client, messages).choices[0].message.content == expected(session, ids, 24)
    assert http.post("/tokenize", json={"messages": messages}).json()["tokens"] == ids


NULLS = {
    "/v1/chat/completions": (
        {"messages": ASKED, "max_tokens": 1},
        "functions function_call audio prediction reasoning_effort verbosity web_search_options prompt_cache_retention",
    ),
    "/v1/responses": (
        {"input": "a", "max_output_tokens": 1},
        "conversation prompt reasoning max_tool_calls context_management prompt_cache_retention",
    ),
}
"""Fields of OpenAI's that are not heeded, which many clients write where they mean nothing."""


@pytest.mark.parametrize("path", NULLS)
def test_a_field_that_is_null_asks_for_nothing(http: httpx.Client, path: str) -> None:
    body, names = NULLS[path]
    assert http.post(path, json={**body, **dict.fromkeys(names.split())}).status_code == 200
    for name in names.split():
        refused = http.post(path, json={**body, name: {"a": 1}})
        assert refused.json()["error"]["param"] == name


def test_a_stream_is_the_whole_answer_in_pieces(client: OpenAI) -> None:
    whole = chat(client)
    chunks = list(chat(client, stream=True, stream_options={"include_usage": True}))
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert not chunks[-1].choices
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    parts = [chunk.choices[0] for chunk in chunks[:-1]]
    assert "".join(part.delta.content or "" for part in parts) == whole.choices[0].message.content
    assert [part.finish_reason for part in parts if part.finish_reason] == ["length"]
    assert parts[-1].finish_reason == "length"


def test_a_stream_without_usage_ends_with_a_finish_and_done(http: httpx.Client) -> None:
    body = {"messages": ASKED, "max_tokens": 3, "stream": True}
    answer = http.post("/v1/chat/completions", json=body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = [line for line in answer.text.split("\n\n") if line]
    assert events[-1] == "data: [DONE]"
    assert all("usage" not in json.loads(event[6:]) for event in events[:-1])


def test_greedy_texts_are_the_same_among_others_that_join_and_leave(client: OpenAI, session: Session) -> None:
    prompts = [
        [{"role": "user", "content": f"Explain {name}. " * size}]
        for name, size in (("list.append", 1), ("the with statement", 3), ("dict", 9), ("a generator", 20))
    ]
    alone = [expected(session, prompt, 30) for prompt in prompts]

    def disturb(number: int) -> None:
        words = [{"role": "user", "content": f"Disturb {number}. " * (number + 1)}]
        stream = client.chat.completions.create(
            model="tiny", messages=words, max_tokens=5 + 3 * number, seed=number, temperature=1, stream=True
        )
        for place, _ in enumerate(stream):
            if number % 3 == 0 and place == 4:
                stream.close()
                break

    with ThreadPoolExecutor(20) as pool:
        others = [pool.submit(disturb, number) for number in range(16)]
        found = list(pool.map(lambda prompt: chat(client, prompt, max_tokens=30), prompts))
        for other in others:
            other.result()
    assert [each.choices[0].message.content for each in found] == alone


def test_choices_share_their_prompt_and_have_seeds_in_a_row(client: OpenAI, session: Session) -> None:
    found = chat(client, n=3, seed=7, temperature=1, max_tokens=8)
    texts = [session.generate(ASKED, 8, do_sample=True, temperature=1.0, seed=seed).text for seed in (7, 8, 9)]
    assert [each.message.content for each in found.choices] == texts
    assert found.usage.prompt_tokens == 23
    assert found.usage.completion_tokens == 24


def test_more_choices_than_rows_all_come(client: OpenAI) -> None:
    found = chat(client, n=11, max_tokens=3)
    assert len({each.message.content for each in found.choices}) == 1
    assert [each.index for each in found.choices] == list(range(11))


def test_a_stop_string_ends_the_text_before_it(client: OpenAI) -> None:
    whole = chat(client).choices[0].message.content
    stop = whole[10:14]
    for stream in (False, True):
        answer = chat(client, stop=[stop, "never"], stream=stream)
        if stream:
            parts = [chunk.choices[0] for chunk in answer]
            text, finish = "".join(part.delta.content or "" for part in parts), parts[-1].finish_reason
        else:
            text, finish = answer.choices[0].message.content, answer.choices[0].finish_reason
        assert text == whole[: whole.index(stop)]
        assert finish == "stop"


def test_logprobs_are_the_session_s_and_their_bytes_the_text_s(client: OpenAI, session: Session) -> None:
    found = chat(client, logprobs=True, top_logprobs=3, max_tokens=6)
    content = found.choices[0].logprobs.content
    asked = session.generate(ASKED, 6, do_sample=False, logprobs=True, top_logprobs=3).logprobs
    assert [each.logprob for each in content] == pytest.approx([each.logprob for each in asked])
    assert all(len(each.top_logprobs) == 3 and each.token == each.top_logprobs[0].token for each in content)
    assert b"".join(bytes(each.bytes) for each in content).decode() == found.choices[0].message.content
    chunks = list(chat(client, logprobs=True, top_logprobs=1, max_tokens=6, stream=True))
    streamed = [each for chunk in chunks if chunk.choices[0].logprobs for each in chunk.choices[0].logprobs.content]
    assert [each.token for each in streamed] == [each.token for each in content]


def test_completions_take_texts_ids_and_several(client: OpenAI, session: Session) -> None:
    prompt = "The list type"
    ids = session.text.encode(prompt)
    text = expected(session, prompt, 12)
    for asked in (prompt, ids):
        found: Any = client.completions.create(prompt=asked, max_tokens=12, logprobs=2, **GREEDY)
        assert found.choices[0].text == text
        assert "".join(found.choices[0].logprobs.tokens) == text
        assert len(found.choices[0].logprobs.top_logprobs[0]) == 2
    several: Any = client.completions.create(prompt=[prompt, "import"], n=2, max_tokens=12, **GREEDY)
    assert [each.text for each in several.choices] == [text] * 2 + [expected(session, "import", 12)] * 2
    echoed: Any = client.completions.create(prompt=prompt, echo=True, **GREEDY)
    assert echoed.choices[0].text == prompt + expected(session, prompt, 16)
    special = f"<|header_start|>user<|header_end|>\n\n{prompt}"
    echoed = client.completions.create(prompt=[special, prompt], n=2, max_tokens=1, echo=True, **GREEDY)
    chunks: Any = client.completions.create(prompt=[special], max_tokens=1, echo=True, stream=True, **GREEDY)
    for index, choice in enumerate(echoed.choices):
        given = (special, prompt)[index // 2]
        assert choice.text == given + expected(session, given, 1)
    assert next(chunks).choices[0].text == special
    drawn: Any = client.completions.create(
        prompt=prompt, max_tokens=40, logprobs=0, model="tiny", temperature=2, seed=1, extra_body={"top_k": 0}
    )
    logprobs = drawn.choices[0].logprobs  # the chosen token is among them, however many are asked for
    columns = zip(logprobs.tokens, logprobs.token_logprobs, strict=True)
    assert logprobs.top_logprobs == [{token: value} for token, value in columns]
    streamed: Any = client.completions.create(prompt=prompt, max_tokens=12, stream=True, **GREEDY)
    assert "".join(chunk.choices[0].text for chunk in streamed) == text


def test_responses_are_answered_whole_and_as_events(client: OpenAI, session: Session) -> None:
    messages = [{"role": "system", "content": "Be short."}, *ASKED]
    text = expected(session, messages, 16)
    asked: dict[str, Any] = {"input": ASKED, "instructions": "Be short.", "max_output_tokens": 16, **GREEDY}
    found = client.responses.create(**asked)
    assert found.output_text == text
    assert found.status == "incomplete"
    events: list[Any] = list(client.responses.create(**asked, stream=True))
    kinds = [event.type for event in events]
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == text
    assert events[-1].response.output_text == text
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert kinds[0] == "response.created"
    assert kinds[-1] == "response.incomplete"


def test_known_beginnings_are_counted(client: OpenAI) -> None:
    long = [{"role": "user", "content": "The quick brown fox jumps over the lazy dog. " * 12}]
    first, second = (chat(client, long, max_tokens=2).usage for _ in range(2))
    assert second.prompt_tokens_details.cached_tokens > first.prompt_tokens_details.cached_tokens
    assert second.prompt_tokens_details.cached_tokens >= second.prompt_tokens - 40


PIXEL = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mP8z8BQDwAEhQGAhKmMIQAAAABJRU5ErkJg"
    "gg=="
)
"""An image of one pixel."""


def image_message(url: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]}


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"temperature": 3}, "temperature"),
    ({"top_p": -0.1}, "top_p"),
    ({"n": 0}, "n"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 4, "max_completion_tokens": 5}, "max_tokens"),
    ({"logit_bias": {"99999": 1}}, "logit_bias"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
    ({"stop": [""]}, "stop[0]"),
    ({"stop": ["x"] * 17}, "stop"),
    ({"response_format": {"type": "xml"}}, "response_format.type"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"extra_body": {"reasoning_effort": "high"}}, "reasoning_effort"),
    ({"extra_body": {"regex": "a", "grammar": 'start: "a"'}}, "regex"),
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "cat", "content": "miaow"}]}, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "messages[0].content[0].type"),
    ({"messages": [{"role": "assistant"}]}, "messages[0].content"),
    (image_message("http://example.org/a.png"), "messages[0].content[0].image_url"),
    (image_message("data:image/png;base64,!"), "messages[0].content[0].image_url"),
    (image_message(PIXEL), "messages[0].content[0]"),
    ({"messages": [{"role": "user", "content": "word " * 1100}]}, "messages"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"store": True}, "store"),
]


@pytest.mark.parametrize(("settings", "param"), REFUSED, ids=[param for _, param in REFUSED])
def test_a_field_that_is_not_heeded_is_refused_by_name(client: OpenAI, settings: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        chat(client, **settings)
    assert caught.value.param == param
    assert caught.value.type == "invalid_request_error"
    assert len(caught.value.message) < 500


REFUSED_ELSEWHERE: list[tuple[str, dict[str, Any], str]] = [
    ("/v1/responses", {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": PIXEL}]}]}, "input"),
    ("/v1/responses", {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input"),
    ("/v1/responses", {"input": "word " * 1100}, "input"),
    ("/v1/responses", {"input": "a", "text": {"format": {"type": "json_object"}}, "regex": "a"}, "regex"),
    ("/v1/responses", {"input": "a", "tool_choice": "required"}, "tool_choice"),
    ("/v1/responses", {"input": "a", "max_output_tokens": 0}, "max_output_tokens"),
    ("/v1/completions", {"prompt": [5, 99999]}, "prompt"),
    ("/v1/completions", {"prompt": "word " * 1100}, "prompt"),
    ("/v1/completions", {"prompt": "a", "echo": 1}, "echo"),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "\ud800"}]}, "messages"),
    ("/v1/completions", {"prompt": "a\ud800"}, "prompt"),
    ("/v1/responses", {"input": "a\ud800"}, "input"),
    ("/tokenize", {"prompt": "a\ud800"}, "prompt"),
    ("/tokenize", {"messages": [{"role": "user", "content": "a\ud800"}]}, "messages"),
    ("/tokenize", {"messages": [{"role": "user", "content": 1}]}, "messages[0].content"),
    ("/detokenize", {"tokens": [99999]}, "tokens"),
]


@pytest.mark.parametrize(("path", "body", "param"), REFUSED_ELSEWHERE)
def test_other_paths_name_the_field_as_well(http: httpx.Client, path: str, body: dict[str, Any], param: str) -> None:
    refused = http.post(path, content=json.dumps(body), headers={"content-type": "application/json"})
    assert refused.status_code == 400
    assert set(error := refused.json()["error"]) == {"message", "type", "param", "code"}
    assert (error["param"], error["type"]) == (param, "invalid_request_error")


def test_a_client_that_leaves_frees_its_row(serve: Callable[..., Any], gate: Path) -> None:
    server = serve("--slots", "8", "--max-seq", "1024", "--model-name", "tiny", gate=gate)
    streams = [chat(server.client(), stream=True, max_tokens=900, extra_body=ENDLESS) for _ in range(8)]
    for stream in streams:
        next(iter(stream))
        stream.close()
    server.await_gauge("num_requests_running", 0)
    assert server.gauge("num_requests_waiting") == server.gauge("kv_cache_usage_perc") == 0
    assert server.gauge("generation_tokens_total") == len(streams)
    gate.unlink()
    assert chat(server.client(), max_tokens=2).usage.completion_tokens == 2
    assert server.end() == 0


def test_tokens_and_texts_are_exchanged(http: httpx.Client, session: Session) -> None:
    ids = http.post("/tokenize", json={"prompt": "The list", "add_special_tokens": False}).json()["tokens"]
    assert ids == session.text.encode("The list", special_tokens=False)
    assert http.post("/detokenize", json={"tokens": ids}).json() == {"prompt": "The list"}
    found = http.post("/tokenize", json={"messages": ASKED}).json()
    assert found["tokens"] == session.text.encode_chat(ASKED)
    assert found["count"] == len(found["tokens"])
    assert http.post("/detokenize", json={"tokens": [10**6]}).status_code == 400


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("most", [0, 1, 3])
def test_an_echoed_prompt_has_the_log_probabilities_of_its_tokens(
    client: OpenAI, session: Session, stream: bool, most: int
) -> None:
    texts: Any = ["The list type", "A"]
    ids = [session.text.encode(text) for text in texts]
    for prompt in (texts, ids):
        asked: dict[str, Any] = {"model": "tiny", "prompt": prompt, "max_tokens": most, "temperature": 0}
        found: Any = client.completions.create(**asked, echo=True, logprobs=2, n=2, stream=stream)
        choices: list[dict[str, Any]] = [{} for _ in range(4)]
        for part in found if stream else [found]:
            for choice in part.choices:
                whole = choices[choice.index]
                whole["text"] = whole.get("text", "") + choice.text
                for name, values in choice.logprobs.model_dump().items():
                    whole[name] = whole.get(name, []) + values
        for index, whole in enumerate(choices):
            read = ids[index // 2]
            logits_SV = session.logits([read])[0]
            new = client.completions.create(**{**asked, "prompt": prompt[index // 2]}, logprobs=2).choices[0]
            fresh: Any = new.logprobs
            assert whole["text"] == texts[index // 2] + new.text
            assert whole["tokens"][len(read) :] == fresh.tokens
            assert whole["token_logprobs"][len(read) :] == fresh.token_logprobs
            assert whole["token_logprobs"][0] is whole["top_logprobs"][0] is None
            for place, token in enumerate(read[1:], 1):
                scored = read_logprobs(logits_SV[place - 1], token, 2)
                assert whole["token_logprobs"][place] == scored.logprob
                assert len(whole["top_logprobs"][place]) in (2, 3)
            for token, at in list(zip(whole["tokens"], whole["text_offset"], strict=True))[1:]:
                assert whole["text"].startswith(token, at) or new.finish_reason == "stop"
            assert whole["text_offset"][:2] == [0, 0]  # the tokenizer's own stands before the text


@pytest.mark.parametrize("strict", [False, True])
def test_what_is_nested_too_deeply_is_refused(http: httpx.Client, strict: bool) -> None:
    nested: dict[str, Any] = {}
    for _ in range(400):
        nested = {"type": "object", "properties": {"a": nested}}
    function = {"name": "f", "parameters": nested, "strict": strict}
    for path, body in (
        ("/v1/chat/completions", {"messages": ASKED, "tools": [{"type": "function", "function": function}]}),
        ("/v1/responses", {"input": "a", "tools": [{"type": "function", **function}]}),
        ("/tokenize", {"messages": ASKED, "tools": [{"type": "function", "function": function}]}),
    ):
        found = http.post(path, json=body)
        assert found.status_code == 400
        assert re.search("nested too deeply|shorten it", found.json()["error"]["message"])


def test_the_model_is_listed_and_another_not_found(client: OpenAI) -> None:
    assert [each.id for each in client.models.list()] == ["tiny"]
    found: Any = client.models.retrieve("tiny")
    assert found.object == "model"
    assert (found.input_modalities, found.output_modalities) == (["text"], ["text"])
    with pytest.raises(openai.NotFoundError):
        chat(client, model="other")
