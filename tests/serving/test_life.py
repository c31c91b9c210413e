"""A server's life: full, too slow, ended by a signal."""

import importlib.util
import json
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from endless import ENDLESS
from typer.testing import CliRunner

from arriero.cli.app import app

LONG: dict[str, Any] = {"max_tokens": 40, "stream": True, "extra_body": ENDLESS}
ASKED: list[Any] = [{"role": "user", "content": "The list type"}]


def ask(server: Any, **settings: Any) -> Any:
    client = server.client()
    return client.chat.completions.create(**{"model": server.about["model"], "messages": ASKED, **settings})


def test_a_full_queue_is_429_with_a_time_to_come_again(serve: Callable[..., Any], gate: Path) -> None:
    server = serve("--slots", "1", "--queue", "1", "--max-seq", "512", "--first-token-seconds", "5", gate=gate)
    first = ask(server, **LONG)
    next(iter(first))
    failures: list[Exception] = []

    def wait() -> None:
        try:
            ask(server, **LONG)
        except openai.APIStatusError as error:
            failures.append(error)

    waiting = threading.Thread(target=wait)
    waiting.start()
    server.await_gauge("num_requests_waiting", 1)
    with pytest.raises(openai.RateLimitError) as caught:
        ask(server, max_tokens=1)
    assert int(caught.value.response.headers["retry-after"]) >= 1
    waiting.join()
    assert [error.status_code for error in failures] == [504]  # type: ignore[attr-defined]
    first.close()
    gate.unlink()
    assert ask(server, max_tokens=2, messages=ASKED).usage.completion_tokens <= 2
    assert server.end() == 0


def test_a_signal_while_the_model_is_loaded_ends_with_zero(bundle: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "arriero",
        "serve",
        str(bundle),
        "--port",
        "0",
        "--host",
        "0.0.0.0",
        "--threads",
        "1",
    ]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    port = json.loads(process.stderr.readline())["address"].rsplit(":", 1)[1]
    while True:
        try:
            httpx.get(f"http://127.0.0.1:{port}/health")
            break
        except httpx.TransportError:
            assert process.poll() is None
    process.terminate()
    said = [json.loads(line)["event"] for line in process.stderr]
    assert process.wait(60) == 0
    assert not {"library", "fault"} & set(said)


def test_a_signal_lets_answers_end_and_takes_no_more(serve: Callable[..., Any], gate: Path) -> None:
    server = serve("--slots", "2", "--max-seq", "512", "--total-seconds", "60", gate=gate)
    stream = ask(server, **LONG)
    parts = iter(stream)
    next(parts)
    code: list[int] = []
    ending = threading.Thread(target=lambda: code.append(server.end()))
    ending.start()
    with server.http() as http:
        while http.get("/ready").json()["status"] != "draining":
            time.sleep(0.01)
        assert http.get("/ready").status_code == 503
        refused = http.post("/v1/chat/completions", json={"messages": ASKED})
        assert refused.status_code == 503
        assert refused.headers["retry-after"]
    gate.unlink()
    rest = list(parts)
    ending.join()
    assert rest[-1].choices[0].finish_reason == "length"
    assert code == [0]


def test_what_has_not_ended_in_time_is_ended_with_an_error(serve: Callable[..., Any], gate: Path) -> None:
    server = serve("--slots", "2", "--max-seq", "512", "--drain-seconds", "0.2", gate=gate)
    parts = iter(ask(server, **LONG))
    next(parts)
    threading.Thread(target=server.end).start()
    with pytest.raises(openai.APIError, match="stopped"):
        list(parts)
    gate.unlink()
    assert server.end() == 0


HANGING = """
import threading
from arriero.cli.app import app
from arriero.runtime import Flight
step = Flight.step
Flight.step = lambda flight: step(flight) if len(flight.rows) < 2 else threading.Event().wait()
app()
"""
"""A server whose step with two rows never ends."""


def test_a_second_signal_ends_a_step_that_hangs_and_all_who_wait_learn_so(bundle: Path) -> None:
    command = [sys.executable, "-c", HANGING, "serve", str(bundle), "--threads", "1", "--port", "0", "--json"]
    process = subprocess.Popen([*command, "--quiet"], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    url = json.loads(process.stdout.readline())["address"]
    answers: dict[bool, httpx.Response] = {}

    def wait(*, streams: bool) -> None:
        body = {"messages": ASKED, "max_tokens": 800, "stream": streams, **ENDLESS}
        answers[streams] = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60)

    asking = [threading.Thread(target=wait, kwargs={"streams": streams}) for streams in (True, False)]
    for each in asking:
        each.start()
    while not re.search(r"vllm:num_requests_running\S* 2", httpx.get(f"{url}/metrics").text):
        time.sleep(0.02)
    process.terminate()
    while httpx.get(f"{url}/ready").json()["status"] != "draining":
        time.sleep(0.01)
    process.terminate()
    for each in asking:
        each.join(30)
    assert process.wait(30) == 0
    assert answers[False].status_code == 503
    assert answers[False].json()["error"]["code"] == "stopped"
    events = answers[True].text.strip().split("\n\n")
    assert events[-1] == "data: [DONE]"
    assert json.loads(events[-2].removeprefix("data: "))["error"]["code"] == "stopped"


def test_what_cannot_be_served_is_said_in_one_line(bundle: Path, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        keys = tmp_path / "keys"
        keys.write_text("\n# none\n")
        for options, said in (
            (["--port", port], "give another --host or --port"),
            (["--api-key-file", str(keys)], "holds no keys"),
            (["--api-key-file", str(tmp_path / "absent")], "cannot be read"),
            (["--prefix-bytes", "many"], "--prefix-bytes"),
            (["--slots", "0"], "--slots"),
            (["--max-seq", "9999999", "--port", "0"], "max_seq"),
            (["--cache-bytes", "10", "--port", "0"], "cache_bytes"),
            (["--tls-key", str(keys)], "--tls-certificate"),
            (["--cors-origin", "example.org"], "an origin as browsers send it"),
            (["--cors-origin", "https://example.org/"], "an origin as browsers send it"),
            (["--allow-host", "example.org:8000"], "a host's name alone"),
            (["--allow-image-host", "https://example.org"], "a host's name alone"),
        ):
            found = CliRunner().invoke(app, ["serve", str(bundle), "--quiet", *options])
            assert found.exit_code == 2, options
            assert said in found.stderr, found.stderr
            assert len(found.stderr.strip().splitlines()) == 1


def test_a_model_folder_without_what_lowers_it_is_refused_in_one_line(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnx" else known(name))
    found = CliRunner().invoke(app, ["serve", str(tiny_model), "--port", "0"])
    assert found.exit_code == 2
    assert "arriero[export]" in found.stderr
    assert len(found.stderr.strip().splitlines()) == 1
