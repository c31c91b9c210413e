"""Doors: who may ask, from where, how much."""

import asyncio
import base64
import gzip
import hashlib
import subprocess
from collections.abc import Callable
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from PIL import Image

from arriero.serving.app import make_app
from arriero.serving.logs import Log
from arriero.serving.service import Limits, Service

BODY = {"messages": [{"role": "user", "content": "The list type"}], "max_tokens": 2}


def test_keys_open_the_doors_and_tenants_share_no_beginnings(serve: Callable[..., Any], tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("# ours\nfirst-key\n\nsecond-key\n")
    origin = "https://example.org"
    server = serve("--api-key-file", str(keys), "--cors-origin", origin, "--max-seq", "512", "--log-prompts")
    with server.http() as http:
        for key in (None, "wrong", "first-key2", "first"):
            headers = {} if key is None else {"Authorization": f"Bearer {key}"}
            refused = http.post("/v1/chat/completions", json=BODY, headers=headers)
            assert refused.status_code == 401
            assert refused.json()["error"]["type"] == "authentication_error"
            assert http.get("/metrics", headers=headers).status_code == 401
        assert http.get("/health").status_code == http.get("/ready").status_code == http.get("/").status_code == 200
        asked = {"Origin": origin, "Access-Control-Request-Method": "POST"}
        allowed = http.options("/v1/chat/completions", headers=asked)
        assert allowed.headers["access-control-allow-origin"] == origin
        other = http.options("/v1/chat/completions", headers={**asked, "Origin": "https://evil.example"})
        assert "access-control-allow-origin" not in other.headers
        shown = http.get("/ready", headers={"Origin": origin}).headers["access-control-expose-headers"]
        assert {name.strip() for name in shown.split(",")} >= {
            "x-request-id",
            "retry-after",
        }  # for those that try again
    long: Any = [{"role": "user", "content": "The quick brown fox jumps over the lazy dog. " * 10}]
    cached = []
    for key in ("first-key", "second-key", "first-key"):
        found = server.client(key).chat.completions.create(model=server.about["model"], messages=long, max_tokens=1)
        assert found.usage is not None
        assert found.usage.prompt_tokens_details is not None
        cached.append(found.usage.prompt_tokens_details.cached_tokens)
    assert cached[0] == cached[1] == 0 != cached[2]
    assert server.end() == 0
    lines = [line for line in server.log if line.get("path") == "/v1/chat/completions"]
    assert "lazy dog" in str(lines[-1]["request"])
    assert "first-key" not in str(server.log)


def test_metrics_may_be_read_without_a_key_where_the_server_says_so() -> None:
    statuses = {}
    for opens in (False, True):
        service = Service("tiny", Limits(), shares_prefixes=False, report=print)
        app = make_app(service, Log(StringIO()), keys=[hashlib.sha256(b"key").digest()], opens_metrics=opens)

        async def ask(app: Any = app) -> dict[str, int]:
            async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as http:
                described = (await http.get("/openapi.json", headers={"Authorization": "Bearer key"})).json()["paths"]
                needs_key = "security" not in described["/metrics"]["get"]
                found = {
                    path: (await http.get(path)).status_code for path in ("/metrics", "/v1/models", "/openapi.json")
                }
                return {**found, "needs a key": needs_key}

        statuses[opens] = asyncio.run(ask())
    assert statuses[False] == {"/metrics": 401, "/v1/models": 401, "/openapi.json": 401, "needs a key": True}
    assert statuses[True] == {"/metrics": 200, "/v1/models": 401, "/openapi.json": 401, "needs a key": False}


def test_without_keys_another_site_s_name_is_refused(http: httpx.Client) -> None:
    refused = http.post("/v1/chat/completions", json=BODY, headers={"Host": "evil.example:80"})
    assert refused.status_code == 403
    assert http.get("/v1/models", headers={"Host": "localhost:1234"}).status_code == 200
    assert "access-control-allow-origin" not in http.get("/v1/models", headers={"Origin": "https://a.example"}).headers


def test_what_is_no_request_is_refused_in_openai_s_form(http: httpx.Client) -> None:
    path = "/v1/chat/completions"
    json_type = {"content-type": "application/json"}
    answers = {
        415: [
            http.post(path, content=b"{}", headers={"content-type": "text/plain"}),
            http.post(path),
            http.post(path, content=gzip.compress(b"{}"), headers={**json_type, "content-encoding": "gzip"}),
        ],
        400: [
            http.post(path, content=content, headers=json_type)
            for content in (
                b"",
                b"[1",
                b"[]",
                b"3",
                b'{"n": NaN}',
                b"\xff",
                b"[" * 200_000,
                b'{"n": ' + b"9" * 5000 + b"}",
            )
        ],
        404: [http.get("/v2"), http.post("/v1/chat", json={})],
        405: [http.get(path), http.delete("/v1/models"), http.post("/health")],
    }
    for status, found in answers.items():
        for answer in found:
            assert answer.status_code == status, answer.text
            error = answer.json()["error"]
            assert error["message"]
            assert len(error["message"]) < 400
            assert set(error) == {"message", "type", "param", "code"}


def test_a_request_s_number_is_the_client_s_or_a_new_one(http: httpx.Client) -> None:
    assert http.get("/health", headers={"X-Request-Id": "mine-1"}).headers["x-request-id"] == "mine-1"
    numbers = {http.get("/health", headers={"X-Request-Id": "a b" * 99}).headers["x-request-id"] for _ in range(2)}
    assert len(numbers) == 2


def test_images_come_in_the_request_or_not_at_all(
    served: Any, bundle: Path, client: openai.OpenAI, tmp_path: Path
) -> None:
    secret = tmp_path / "secret.png"
    secret.write_bytes(b"secret")
    file = BytesIO()
    Image.new("RGB", (8, 8)).save(file, "PNG")
    for url in (
        str(secret),
        f"file://{secret}",
        "http://127.0.0.1:1/a.png",
        "https://example.org/a.png",
        "ftp://example.org/a",
        "data:image/png;base64,!!!!",
        "data:image/png;base64,aGVsbG8=",
        "data:image/png;base64," + base64.b64encode(file.getvalue()).decode(),
    ):
        content: Any = [{"type": "image_url", "image_url": {"url": url}}]
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": content}])
        assert "secret.png: not an image" not in str(caught.value)
        assert str(bundle) not in str(caught.value)
    assert "tiny: the model takes text only" in str(caught.value)
    with pytest.raises(openai.BadRequestError, match="at most 1"):
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": content * 2}])


def test_large_bodies_and_long_prompts_are_refused(serve: Callable[..., Any]) -> None:
    server = serve("--max-body-bytes", "20K", "--max-prompt-tokens", "50", "--max-new-tokens", "8", "--max-seq", "256")
    with server.http() as http:
        words = {"prompt": "word " * 6000}
        assert http.post("/v1/completions", json=words).status_code == 413

        def pieces() -> Any:
            yield from (b" " * 4096 for _ in range(9))

        streamed = http.post("/v1/completions", content=pieces(), headers={"content-type": "application/json"})
        assert streamed.status_code == 413
        for prompt in ("word " * 60, "word " * 2000):
            refused = http.post("/v1/completions", json={"prompt": prompt})
            assert refused.status_code == 400
            assert "tokens" in refused.json()["error"]["message"]
        assert (
            http.post("/v1/completions", json={"prompt": "a", "max_tokens": 9}).json()["error"]["param"] == "max_tokens"
        )
        for path, field, asked in (
            ("/v1/chat/completions", "max_completion_tokens", {**BODY, "max_tokens": None}),
            ("/v1/responses", "max_output_tokens", {"input": "a"}),
        ):
            error = http.post(path, json={**asked, field: 9}).json()["error"]
            assert error["param"] == field
            assert error["message"].startswith(f"{field} is 9")
        none_named = http.post("/v1/chat/completions", json={**BODY, "max_tokens": None, "logit_bias": {"1": -100}})
        assert none_named.json()["usage"]["completion_tokens"] <= 8
    assert server.end() == 0


def test_a_socket_s_file_is_an_address_too(bundle: Path, tmp_path: Path, serve: Callable[..., Any]) -> None:
    path = tmp_path / "socket"
    server = serve("--unix-socket", str(path), "--max-seq", "256")
    assert server.url == f"unix:{path}"
    with httpx.Client(transport=httpx.HTTPTransport(uds=str(path)), base_url="http://any.name") as http:
        assert http.get("/ready").json() == {"status": "ready"}
    assert server.end() == 0
    assert not path.exists()


def test_tls_is_spoken_where_there_is_a_certificate(tmp_path: Path, serve: Callable[..., Any]) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    made = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:prime256v1",
        "-nodes",
        "-days",
        "2",
    ]
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    try:
        subprocess.run([*made, "-keyout", key, "-out", certificate, *names], check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("openssl is not installed")
    server = serve("--tls-certificate", str(certificate), "--tls-key", str(key), "--max-seq", "256")
    assert server.url.startswith("https://")
    with server.http(verify=str(certificate)) as http:
        assert http.get("/ready").status_code == 200
    assert server.end() == 0
