"""Heads of requests: of any size, in any form, at any pace."""

import asyncio
import json
import tracemalloc
from collections.abc import Iterable
from typing import Any

import pytest
import uvicorn
from uvicorn.server import ServerState

from arriero.serving import connections
from arriero.serving.connections import HEAD_BYTES, MOST_HEADERS, BoundedConnection

HEAD = b"POST / HTTP/1.1\r\nHost: a\r\n"
CHUNKS = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
MUCH = [b"y" * 65536] * 64
TOO_LARGE = {
    "headers": [HEAD, *([b"X-1: y\r\n" * 1000] * 200)],
    "a header": [HEAD, b"X: ", *MUCH],
    "a header's name": [HEAD, *MUCH],
    "an address": [b"GET /", *MUCH],
    "trailers": [CHUNKS, b"2\r\n{}\r\n0\r\n", *([b"X-1: y\r\n" * 1000] * 200)],
    "a trailer": [CHUNKS, b"2\r\n{}\r\n0\r\nX: ", *MUCH],
}


async def app(scope: Any, receive: Any, send: Any) -> None:
    """Answers with the number of headers and the body's length."""
    count, more = 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        count, more = count + len(message["body"]), message["more_body"]
    body = json.dumps([len(scope["headers"]), count]).encode()
    length = (b"content-length", str(len(body)).encode())
    await send({"type": "http.response.start", "status": 200, "headers": [length]})
    await send({"type": "http.response.body", "body": body})


async def write_at_once(scope: Any, receive: Any, send: Any) -> None:
    """Answers with the path, written with nothing to await."""
    writer = scope["state"]["writer"]
    assert not writer.is_open
    await send({"type": "http.response.start", "status": 200, "headers": []})
    assert writer.is_open
    writer.write(scope["path"].encode())
    await send({"type": "http.response.body", "body": b""})
    assert not writer.is_open


async def write_in_parts(scope: Any, receive: Any, send: Any) -> None:
    """Answers with two parts, whose length it does not tell."""
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"one", "more_body": True})
    assert scope["state"]["writer"].is_open == (scope["http_version"] == "1.1")
    await send({"type": "http.response.body", "body": b"two"})


async def say(pieces: Iterable[bytes], pause: float = 0.0, app: Any = app) -> bytes:
    """Sends pieces to a server of its own. Returns all that it answers until it closes the connection."""
    config = uvicorn.Config(app, log_config=None, ws="none")
    state, loop = ServerState(), asyncio.get_running_loop()
    server = await loop.create_server(lambda: BoundedConnection(config, state, {}), "127.0.0.1", 0)
    reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
    try:
        async with asyncio.timeout(20):
            reading = asyncio.create_task(reader.read())
            for piece in pieces:
                writer.write(piece)
                await writer.drain()
                if pause:
                    await asyncio.sleep(pause)
            return await reading
    finally:
        writer.close()
        server.close()


def status(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


@pytest.mark.parametrize("part", TOO_LARGE)
def test_a_head_of_any_size_is_refused_without_memory(part: str) -> None:
    tracemalloc.start()
    answer = asyncio.run(say(TOO_LARGE[part]))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert status(answer) == 431
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "head_too_large"
    assert peak < 3e6


def test_what_a_head_may_be_is_taken_whatever_stands_beside_it() -> None:
    last = b"Connection: close\r\n\r\n"
    headers = b"".join(b"X-%d: y\r\n" % number for number in range(MOST_HEADERS - 2))
    assert asyncio.run(say([HEAD, headers, last])).endswith(f"[{MOST_HEADERS}, 0]".encode())
    long = b"X: " + b"y" * (HEAD_BYTES - 200) + b"\r\n"
    assert asyncio.run(say([HEAD + long[:9], long[9:], last])).endswith(b"[3, 0]")
    body = b"Content-Length: 4194304\r\n\r\n"
    whole = asyncio.run(say([HEAD + body, *MUCH, HEAD + last]))  # the next request's head comes with a body's end
    assert whole.count(b"200 OK") == 2
    assert b"[2, 4194304]" in whole
    trailed = asyncio.run(say([CHUNKS + b"2\r\n{}\r\n0\r\nX: y\r\n\r\n" + HEAD + last]))
    assert trailed.count(b"200 OK") == 2
    assert b"[2, 2]" in trailed


def test_what_is_no_http_is_refused_in_openai_s_form() -> None:
    answer = asyncio.run(say([b"\x16\x03\x01 hello\r\n\r\n"]))
    assert status(answer) == 400
    assert "HTTP" in json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["message"]


@pytest.mark.parametrize(
    ("sent", "answer"),
    [(b"", b""), (b"\r\n" * 40, b""), (HEAD, b"HTTP/1.1 408 "), (HEAD + b"\r\n" + HEAD, b"HTTP/1.1 200 OK")],
    ids=["nothing", "empty lines", "a head", "a second head"],
)
def test_a_head_that_does_not_come_ends_its_connection(
    sent: bytes, answer: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "HEAD_SECONDS", 0.1)
    monkeypatch.setattr(connections, "LINGER_SECONDS", 0.05)
    found = asyncio.run(say([sent[:20], sent[20:]], pause=0.01))
    assert found.startswith(answer)
    assert (b" 408 " in found) == (b"Host" in sent)


def test_each_request_of_a_connection_is_written_to_by_its_own_writer() -> None:
    heads = [b"POST /%d HTTP/1.1\r\nHost: a\r\n\r\n" % number for number in range(3)]
    last = heads[-1].replace(b"Host", b"Connection: close\r\nHost")
    answer = asyncio.run(say([b"".join(heads[:-1]) + last], app=write_at_once))
    assert [part.partition(b"\r\n\r\n")[2] for part in answer.split(b"HTTP/1.1 200 OK")[1:]] == [
        b"2\r\n/%d\r\n0\r\n\r\n" % number for number in range(3)
    ]


@pytest.mark.parametrize("answers", [app, write_in_parts])
def test_http_1_0_is_answered_without_chunks(answers: Any) -> None:
    old = asyncio.run(say([b"POST / HTTP/1.0\r\nContent-Length: 2\r\n\r\n{}"], app=answers))
    head, _, body = old.partition(b"\r\n\r\n")
    assert status(old) == 200
    assert b"chunked" not in head
    assert b"connection: close" in head
    assert body == (b"[1, 2]" if answers is app else b"onetwo")
    new = asyncio.run(say([HEAD + b"Connection: close\r\nContent-Length: 2\r\n\r\n{}"], app=answers))
    assert (b"chunked" in new) == (answers is write_in_parts)


@pytest.mark.parametrize("size", [1, 10_000])
@pytest.mark.parametrize(
    "coding", [b"Content-Length: 2\r\n\r\n{}", b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n"]
)
def test_an_offer_of_another_protocol_is_passed_over(coding: bytes, size: int) -> None:
    """Java's own client makes one in every request without TLS."""
    offer = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n"
    last = b"Connection: close, Upgrade\r\nUpgrade: websocket\r\n"
    whole = HEAD + offer + coding + HEAD + coding + HEAD + last + coding
    answers = asyncio.run(say([whole[start : start + size] for start in range(0, len(whole), size)]))
    assert [part.partition(b"\r\n\r\n")[2] for part in answers.split(b"HTTP/1.1 200 OK")[1:]] == [
        b"[2, 2]",
        b"[2, 2]",
        b"[3, 2]",
    ]


def test_a_tunnel_is_refused() -> None:
    for offer in (b"", b"Upgrade: h2c\r\n", b"Connection: Upgrade\r\nUpgrade: h2c\r\n"):
        assert status(asyncio.run(say([b"CONNECT a:1 HTTP/1.1\r\nHost: a\r\n" + offer + b"\r\n..."]))) == 400
