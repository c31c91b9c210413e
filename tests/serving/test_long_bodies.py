"""Bodies near their limit: read as `json.loads` reads them, beside whatever else runs."""

import asyncio
import base64
import json
import random
import re
import sys
import threading
from collections.abc import AsyncIterator, Callable
from io import StringIO
from typing import Any

import httpx
import pytest

from arriero.runtime.images.data_urls import decode_base64
from arriero.serving.app import make_app
from arriero.serving.errors import RequestError
from arriero.serving.logs import Log
from arriero.serving.protocol import long_json
from arriero.serving.protocol.completions import CompletionRequest, DetokenizeRequest
from arriero.serving.protocol.long_json import read_json
from arriero.serving.protocol.reading import read
from arriero.serving.service import Limits, Service

LETTERS = 'ab "\\\n\t€😀\x7f\ud83d\ude00é/'
SIGNS = '"\\[]{},:0123-.eu \n\x01N'


def document(draw: random.Random, depth: int = 0) -> Any:
    kind = draw.randrange(9 if depth < 4 else 6)
    text = "".join(draw.choice(LETTERS) for _ in range(draw.randrange(30)))
    plain = [None, draw.randrange(-(10**20), 10**20), draw.random() * 10 ** draw.randrange(-300, 300), text, text, text]
    if kind < len(plain):
        return plain[kind]
    if kind == 6:
        return [document(draw, depth + 1) for _ in range(draw.randrange(12))]
    if kind == 7:
        return [draw.randrange(100) for _ in range(draw.randrange(30))]
    return {text[: draw.randrange(5)] + str(key): document(draw, depth + 1) for key in range(draw.randrange(6))}


def damaged(text: str, draw: random.Random) -> str:
    place = draw.randrange(len(text))
    return text[:place] + draw.choice(["", draw.choice(SIGNS)]) + text[place + draw.randrange(2) :]


def outcome(reader: Callable[[bytes], Any], body: bytes) -> Any:
    try:
        return reader(body)
    except (ValueError, RecursionError):
        return "refused"


def test_a_long_body_is_read_as_a_short_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long_json, "SHORT", 4)
    monkeypatch.setattr(long_json, "PIECE", 3)
    for name in ("PLAIN", "NUMBERS", "ESCAPED"):
        pattern = re.sub(r"\{[01],\d+\}", lambda found: found[0][:2] + ",3}", getattr(long_json, name).pattern)
        monkeypatch.setattr(long_json, name, re.compile(pattern))
    draw, refused = random.Random(1), 0
    for _ in range(1500):
        text = json.dumps(document(draw), ensure_ascii=draw.random() < 0.5, indent=draw.choice([None, 1]))
        for each in (text, damaged(text, draw)):
            body = each.encode("utf-8", "replace")
            expected = outcome(lambda given: json.loads(given, parse_constant=long_json._no_constant), body)
            assert outcome(read_json, body) == expected, each
            refused += expected == "refused"
    assert 500 < refused < 1500


def test_a_long_body_of_many_values_or_levels_is_refused() -> None:
    count = long_json.MOST_VALUES + 1
    for body in (
        b"[" + b"{}," * count + b"0]",
        b"{" + b'"a":0,' * count + b'"b":0}',
        b"[" * 200_000,
        b"\xff" * 200_000,
    ):
        assert outcome(read_json, body) == "refused"


def beats(work: Callable[[], Any]) -> int:
    """Does work in another thread. Returns how often this one ran meanwhile."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(0.0005)
    thread, count = threading.Thread(target=work), 0
    thread.start()
    while thread.is_alive():
        thread.join(0.0005)
        count += 1
    sys.setswitchinterval(before)
    return count


@pytest.mark.parametrize(
    "body",
    [
        b'{"tokens": [' + b"12345, " * 300_000 + b"1]}",
        b'{"a": "' + b"\\n" * 4_000_000 + b'"}',
        b"[" + b'"a", ' * 100_000 + b"1]",
    ],
    ids=["numbers", "escapes", "texts"],
)
def test_others_run_while_a_long_body_is_read(body: bytes) -> None:
    assert beats(lambda: read_json(body)) > 20


def test_lists_of_numbers_are_checked_some_at_a_time() -> None:
    tokens = list(range(1_000)) * 50
    assert read(DetokenizeRequest, {"tokens": tokens}).tokens == tokens
    for wrong in (-1, 1 << 31, True, 1.5, "1", None):
        with pytest.raises(RequestError, match=r"tokens\[50000\]"):
            read(DetokenizeRequest, {"tokens": [*tokens, wrong]})
    assert read(DetokenizeRequest, {"tokens": [*tokens, 2.0]}).tokens[-1] == 2
    nested: list[Any] = [tokens, tokens]
    assert read(CompletionRequest, {"prompt": nested}).prompts == nested


def test_base64_is_read_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("arriero.runtime.images.data_urls.PIECE", 3)
    for text in ("YWJjZGVm", "YW Jj\nZGVm\n", "YWJjZA==", "YWJjZA", "YWJjZGU= \n", "_-8A"):
        packed = "".join(text.split()).rstrip("=").replace("-", "+").replace("_", "/")
        assert decode_base64(text, "image") == base64.b64decode(packed + "=" * (-len(packed) % 4))
    for text in ("YWI=YWJj", "YW=JjZGVm", "YWJ*", "YWJjZ"):
        with pytest.raises(Exception, match="damaged base64"):
            decode_base64(text, "image")


def test_a_body_near_the_limit_is_answered_and_refused_by_name(http: httpx.Client) -> None:
    long = list(range(5, 105)) * 2000
    for path, body, said in (
        ("/v1/completions", {"prompt": long}, "200000 tokens"),
        ("/detokenize", {"tokens": long}, "200000 ids"),
        ("/v1/completions", {"prompt": "a", "logit_bias": {str(-token): 1 for token in range(1, 9000)}}, "logit_bias"),
    ):
        refused = http.post(path, json=body)
        assert refused.status_code == 400
        assert said in refused.json()["error"]["message"]
    assert http.post("/detokenize", json={"tokens": long[:20_000]}).status_code == 200


def test_bodies_under_way_are_bounded_in_common() -> None:
    service = Service("tiny", Limits(all_bodies_bytes=60_000), shares_prefixes=False, report=print)
    app = make_app(service, Log(StringIO()))
    transport = httpx.ASGITransport(app)

    async def act() -> None:
        going, more = asyncio.Event(), asyncio.Event()

        async def pieces() -> AsyncIterator[bytes]:
            yield b'{"prompt": "' + b"a" * 50_000
            going.set()
            await more.wait()
            yield b'"}'

        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as http:

            async def ask(content: Any) -> httpx.Response:
                return await http.post("/tokenize", content=content, headers={"content-type": "application/json"})

            first = asyncio.create_task(ask(pieces()))
            await going.wait()
            await asyncio.sleep(0)
            long = b'{"prompt": "' + b"a" * 20_000 + b'"}'
            refused = await ask(long)
            assert refused.status_code == 429
            assert refused.json()["error"]["code"] == "bodies_full"
            assert refused.headers["retry-after"] == "1"
            assert service.metrics.refused == 1
            assert (await ask(b'{"prompt": "a"}')).status_code == 503  # it goes on, to a model that is not there
            more.set()
            assert (await first).status_code == 503
            assert (await ask(long)).status_code == 503

    asyncio.run(act())
    service.close()
