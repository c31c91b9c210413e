"""A server's life: full, too slow, ended by a signal."""

import importlib.util
import json
import re
import signal
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
from arriero.errors import SessionError
from arriero.serving.listening import listen

LONG: dict[str, Any] = {"max_tokens": 40, "stream": True, "extra_body": ENDLESS}
ENDLESS_RESPONSE: dict[str, Any] = {"max_output_tokens": 40, "extra_body": ENDLESS}
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


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_a_signal_lets_answers_end_and_takes_no_more(serve: Callable[..., Any], gate: Path, number: int) -> None:
    server = serve("--slots", "2", "--max-seq", "512", "--total-seconds", "60", gate=gate)
    stream = ask(server, **LONG)
    parts = iter(stream)
    next(parts)
    code: list[int] = []
    ending = threading.Thread(target=lambda: code.append(server.end(number)))
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
    with server.client().responses.stream(
        model=server.about["model"], input="The list type", **ENDLESS_RESPONSE
    ) as events:
        found: list[Any] = [next(events)]
        while found[-1].type != "response.output_text.delta":
            found.append(next(events))
        threading.Thread(target=server.end).start()
        with pytest.raises(openai.APIError, match="stopped"):
            list(parts)
        found += events
    assert [event.type for event in found[-2:]] == ["error", "response.failed"]
    failed = found[-1].response
    text = "".join(event.delta for event in found if event.type == "response.output_text.delta")
    assert failed.status == "failed"
    assert [(item.status, item.content[0].text) for item in failed.output] == [("incomplete", text)]
    assert failed.output[0].id == next(each for each in found if each.type == "response.output_item.added").item.id
    gate.unlink()
    assert server.end() == 0


def test_a_hangup_that_is_ignored_stays_so(bundle: Path) -> None:
    program = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN); from arriero.cli.app import app; app()"
    command = [sys.executable, "-c", program, "serve", str(bundle), "--threads", "1", "--port", "0", "--json"]
    process = subprocess.Popen([*command, "--quiet"], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    url = json.loads(process.stdout.readline())["address"]
    process.send_signal(signal.SIGHUP)
    time.sleep(0.2)
    assert httpx.get(f"{url}/ready").json()["status"] == "ready"
    process.terminate()
    assert process.wait(30) == 0


def test_a_name_is_listened_on_at_all_its_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    kind = socket.SOCK_STREAM
    two: list[Any] = [
        (socket.AF_INET, kind, 6, "", ("127.0.0.1", 0)),
        (socket.AF_INET, kind, 6, "", ("127.0.0.2", 0)),
        (socket.AF_INET, kind, 6, "", ("127.0.0.1", 0)),
        (socket.AF_INET6, kind, 6, "", ("2001:db8::1", 0, 0, 0)),  # none of this machine's
    ]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *given, **named: two)
    opened = listen("here", 0)
    assert [each.getsockname()[0] for each in opened] == ["127.0.0.1", "127.0.0.2"]
    ports = {each.getsockname()[1] for each in opened}
    assert len(ports) == 1
    two[:3] = [
        (socket.AF_INET, kind, 6, "", ("127.0.0.3", *ports)),
        (socket.AF_INET, kind, 6, "", ("127.0.0.2", *ports)),
    ]
    with pytest.raises(SessionError, match=r"cannot listen on 'here' port \d+ \(Address already in use\)"):
        listen("here", *ports)
    for each in opened:
        each.close()
    two[:] = two[2:]
    with pytest.raises(SessionError, match="cannot listen on 'here' port 0"):
        listen("here", 0)


@pytest.mark.skipif(not socket.has_ipv6, reason="no IPv6")
def test_the_two_addresses_of_localhost_answer_at_one_port(monkeypatch: pytest.MonkeyPatch) -> None:
    kind = socket.SOCK_STREAM
    both: list[Any] = [
        (socket.AF_INET6, kind, 6, "", ("::1", 0, 0, 0)),
        (socket.AF_INET, kind, 6, "", ("127.0.0.1", 0)),
    ]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *given, **named: both)
    opened = listen("localhost", 0)
    port = opened[0].getsockname()[1]
    for each in opened:
        assert each.getsockname()[1] == port
        each.close()


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
