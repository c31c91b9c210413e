"""A server under load, measured from outside: its times are those that it was given."""

import json
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import Answers
from typer.testing import CliRunner

from arriero.cli.app import app
from arriero.errors import SessionError
from arriero.measuring.endpoint import Endpoint
from arriero.measuring.load import draw_load, measure_url


@pytest.fixture
def server() -> Iterator[Answers]:
    with Answers(b"") as found:
        found.pieces, found.pause = ["word "] * 5, 0.02
        yield found
        found.shutdown()


def test_times_and_tokens_are_those_of_the_server(server: Answers, tmp_path: Path) -> None:
    found = measure_url(Endpoint(server.url, "chat"), prefill=[80], clients=[1, 4], decode_tokens=5, runs=1)
    assert found["model"] == "tiny-llama4"
    assert {"date", "machine", "command"} <= found.keys()
    one, four = found["cases"]
    assert (one["requests"], four["requests"], one["failed"]) == (16, 16, 0)
    assert one["new_tokens"] == 5
    assert one["cached_tokens"] == 512
    for case in (one, four):
        times = case["itl_seconds"]
        assert 0.018 < times["p50"] <= times["p95"] <= times["p99"]
        assert 0 < case["ttft_seconds"]["p50"] <= case["ttft_seconds"]["p99"]
        assert case["tokens_per_second"] == pytest.approx(80 / case["seconds"])
    assert four["tokens_per_second"] > 2 * one["tokens_per_second"]
    bodies = [body for body in server.asked if body["stream_options"] == {"include_usage": True}]
    assert len(bodies) == 33
    texts = [body["messages"][0]["content"] for body in bodies]
    assert len(set(texts)) == 33  # no beginning is known
    draw_load(found, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes()[:4] == b"\x89PNG"


def test_prompts_share_a_beginning_where_they_are_to(server: Answers) -> None:
    server.pause = 0.0
    found = measure_url(Endpoint(server.url), prefill=[80], clients=[2], decode_tokens=5, runs=1, shared=400)
    assert found["shared"] == 400
    warmed, *texts = [body["prompt"] for body in server.asked if "prompt" in body][1:]
    assert len(warmed) > 60
    assert len(texts) == len(set(texts)) == 16
    assert all(text.startswith(warmed) and len(text) > len(warmed) for text in texts)


def test_an_answer_without_a_text_is_one(server: Answers) -> None:
    server.pieces = [""]
    (case,) = measure_url(Endpoint(server.url), clients=[2], decode_tokens=5)["cases"]
    assert (case["requests"], case["failed"]) == (16, 0)
    assert case["itl_seconds"]["p50"] is None


def test_the_verb_measures_a_server(server: Answers, tmp_path: Path) -> None:
    key, server.pause = tmp_path / "key", 0.0
    key.write_text("secret\n")
    asked = ["bench", "--url", server.url + "v1", "--batch", "2", "--json", "--api-key-file", str(key)]
    ran = CliRunner().invoke(app, [*asked, "--decode-tokens", "5", "--model", "named"])
    assert ran.exit_code == 0, ran.output
    assert json.loads(ran.stdout)["cases"][0]["batch"] == 2
    assert set(server.paths) == {"/v1/completions"}
    assert server.asked[0]["model"] == "named"
    shown = CliRunner().invoke(app, ["bench", "--url", server.url, "--batch", "1", "--decode-tokens", "5"])
    assert "TTFT, ms" in shown.output
    assert "p50 / p95 / p99" in shown.output
    assert "tiny-llama4 at" in shown.output


def test_what_is_no_server_is_refused_in_a_line(server: Answers) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        free = taken.getsockname()[1]
    for url, reason in (
        ("127.0.0.1:8000", "expected an address"),
        ("http://", "expected an address"),
        ("http://127.0.0.1:99999", "expected an address"),
        (f"http://127.0.0.1:{free}", "start the server, or correct --url"),
    ):
        with pytest.raises(SessionError, match=reason):
            Endpoint(url)
    with pytest.raises(SessionError, match="expected completions or chat"):
        Endpoint(server.url, "messages")
    server.status = 429
    with pytest.raises(SessionError, match=r"answers /v1/completions with 429 .*too many"):
        measure_url(Endpoint(server.url))
    with pytest.raises(SessionError, match="give whole numbers from 1 up"):
        measure_url(Endpoint(server.url), decode_tokens=0)


def test_a_folder_or_a_server_is_measured_and_not_both(server: Answers) -> None:
    for asked, said in (
        ([], "one of the two"),
        (["x", "--url", server.url], "one of the two"),
        (["x", "--shared", "5"], "--shared is for a server, by --url, and a folder is measured: leave it out"),
        (["x", "--endpoint", "chat"], "--endpoint is for a server"),
        (["--url", server.url, "--threads", "2"], f"--threads is for a folder, and {server.url} is measured"),
        (["--url", server.url, "--pages", "file"], "--pages is for a folder"),
    ):
        ran = CliRunner().invoke(app, ["bench", *asked])
        assert ran.exit_code == 2
        assert said in ran.stderr


def test_failures_of_some_are_counted(server: Answers) -> None:
    endpoint, server.pause = Endpoint(server.url), 0.0
    real, count = endpoint.ask, iter(range(99))

    def ask(prompt: str, tokens: int) -> object:
        if next(count) % 4 == 3:
            raise SessionError("refused")
        return real(prompt, tokens)

    endpoint.ask = ask  # type: ignore[method-assign, assignment]
    (case,) = measure_url(endpoint, clients=[2])["cases"]
    assert (case["requests"], case["failed"], case["first_error"]) == (12, 4, "refused")
