"""Cost of a server beside its flight: tokens a second, time to the first token, processor time.

Streams through `arriero serve` by raw HTTP, and the same requests in a flight of this process, of one bundle in one
run. Processor time a token is that of the thread that speaks with the clients; the other steps the flight. While a long
prompt is being read, the gaps between the tokens of other streams are compared with those undisturbed. Streams bound by
a JSON schema stand beside unbound ones, and the time until a server is ready beside that of `arriero run` to its first
token. Rounds of both alternate, so that a busy machine weighs on both.

    python benchmarks/server_speed.py BUNDLE [--streams 8] [--tokens 128] [--threads 2] [--rounds 3]
"""

import argparse
import asyncio
import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from rich.console import Console
from rich.table import Table
from support.server import ServerProcess

import arriero
from arriero.runtime import Flight, Session

CHAT = "/v1/chat/completions"
Bias: TypeAlias = dict[int, float]
"""Numbers that are added to the logits of tokens."""

ENDLESS = {"type": "string", "minLength": 100_000}
"""A schema of a text that no number of tokens asked for here ends."""

PROMPT_TOKENS = 3500
"""Tokens of the long prompt, where no other number is asked for: what the tiny Llama 4 holds."""

LEAST_READ = 24
"""Tokens of a prompt that a step reads beside others at least, some less than its budget."""

PROMPT = "The list type is a mutable sequence. It"


@dataclass
class Load:
    """Times of one round of streams.

    Attributes:
        seconds: From the first request to the last token.
        cpu: Processor time of the thread that speaks with the clients.
        firsts: Seconds to each stream's first token.
        gaps: Seconds between tokens.
    """

    seconds: float
    cpu: float
    firsts: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)


async def stream(host: str, port: int, body: dict[str, Any], path: str = "/v1/completions") -> list[float]:
    """Asks for a stream. Returns the moments of its pieces, the request's first."""
    reader, writer = await asyncio.open_connection(host, port)
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n"
    moments = [time.perf_counter()]
    writer.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
    while line := await reader.readline():
        if line.startswith(b"data: {"):
            moments.append(time.perf_counter())
    writer.close()
    return moments


def body_of(bias: Bias, count: int, number: int, prompt: Any = None) -> dict[str, Any]:
    """A request for a number of tokens, no more and no fewer."""
    words = f"{PROMPT} {number}" if prompt is None else prompt
    return {
        "prompt": words,
        "max_tokens": count,
        "temperature": 0,
        "logit_bias": {str(token): each for token, each in bias.items()},
        "stream": True,
    }


async def load(server: ServerProcess, bias: Bias, streams: int, count: int) -> Load:
    """A round of streams through the server."""
    host, port = server.url.removeprefix("http://").rsplit(":", 1)
    cpu, started = server.cpu_seconds(), time.perf_counter()
    asked = [stream(host, int(port), body_of(bias, count, number)) for number in range(streams)]
    moments = await asyncio.gather(*asked)
    found = Load(time.perf_counter() - started, server.cpu_seconds() - cpu)
    for each in moments:
        found.firsts.append(each[1] - each[0])
        found.gaps += [after - before for before, after in itertools.pairwise(each[1:])]
    return found


async def gaps_beside(server: ServerProcess, bias: Bias, streams: int, prompt: list[int]) -> tuple[list[float], float]:
    """Gaps between the tokens of streams while a long prompt is read beside them, and the seconds that this takes."""
    host, port = server.url.removeprefix("http://").rsplit(":", 1)
    count = len(prompt) // LEAST_READ  # no stream ends before the prompt is read
    asked = [stream(host, int(port), body_of(bias, count, number)) for number in range(streams)]
    *moments, read = await asyncio.gather(*asked, _later(lambda: stream(host, int(port), body_of(bias, 1, 0, prompt))))
    assert all(each[-1] > read[1] for each in moments)
    within = [[each for each in own if read[0] <= each <= read[1]] for own in moments]
    return [after - before for own in within for before, after in itertools.pairwise(own)], read[1] - read[0]


async def chat_load(server: ServerProcess, bias: Bias, streams: int, count: int, *, bound: bool) -> Load:
    """A round of conversations, their answers bound by a JSON schema or not."""
    host, port = server.url.removeprefix("http://").rsplit(":", 1)
    schema = {"type": "json_schema", "json_schema": {"name": "text", "schema": ENDLESS}}
    asked = []
    for number in range(streams):
        body = body_of(bias, count, number)
        body["messages"] = [{"role": "user", "content": body.pop("prompt")}]
        asked.append(stream(host, int(port), body | ({"response_format": schema} if bound else {}), CHAT))
    started = time.perf_counter()
    await asyncio.gather(*asked)
    return Load(time.perf_counter() - started, 0.0)


def start_seconds(folder: Path, threads: int) -> tuple[float, float]:
    """Seconds from a process's start until a server is ready, and until `arriero run` writes its first token."""
    started = time.perf_counter()
    with ServerProcess(folder, "--threads", str(threads), "--quiet") as server:
        ready = time.perf_counter() - started
        assert server.end() == 0
    command = [sys.executable, "-m", "arriero", "run", str(folder), "--threads", str(threads), "--prompt", PROMPT]
    command += ["--max-new-tokens", "1"]
    started = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as run:
        assert run.stdout is not None
        assert run.stdout.read(1)
        first = time.perf_counter() - started
        run.stdout.read()
    return ready, first


async def _later(ask: Callable[[], Awaitable[list[float]]]) -> list[float]:
    await asyncio.sleep(0.3)
    return await ask()


def fly(session: Session, bias: Bias, streams: int, count: int) -> Load:
    """A round of the same requests in a flight of this process."""
    flight = Flight(session, streams, cache_bytes=1 << 40)
    settings: dict[str, Any] = {"do_sample": False, "logit_bias": bias}
    started = time.perf_counter()
    for number in range(streams):
        flight.join(session.request(f"{PROMPT} {number}", count, **settings))
    first: dict[int, float] = {}
    while flight.waiting or flight.riding:
        for number, _ in flight.step():
            first.setdefault(number, time.perf_counter() - started)
    return Load(time.perf_counter() - started, 0.0, list(first.values()))


def main() -> None:
    parser = argparse.ArgumentParser(description="What a server adds to its flight.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompt-tokens", type=int, default=PROMPT_TOKENS)
    asked = parser.parse_args()
    max_seq = asked.prompt_tokens + 64 if asked.prompt_tokens > PROMPT_TOKENS else None
    session = arriero.load(asked.folder, threads=asked.threads, max_seq=max_seq)
    bias = dict.fromkeys(session.defaults.eos_token_ids, -100.0)  # an answer's length alone ends it
    size = asked.streams, asked.tokens
    total = asked.streams * asked.tokens
    pairs: list[tuple[Load, Load]] = []
    singles: list[tuple[Load, Load]] = []
    options = ("--threads", str(asked.threads), "--slots", str(asked.streams + 1), "--prefix-bytes", "0", "--quiet")
    options += () if max_seq is None else ("--max-seq", str(max_seq))
    with ServerProcess(asked.folder, *options) as server:
        asyncio.run(load(server, bias, 1, 8))
        asyncio.run(chat_load(server, bias, 1, 2, bound=True))  # compiles the schema
        fly(session, bias, 1, 8)
        for _ in range(asked.rounds):
            pairs.append((asyncio.run(load(server, bias, *size)), fly(session, bias, *size)))
            singles += [(asyncio.run(load(server, bias, 1, 2)), fly(session, bias, 1, 2)) for _ in range(5)]
        long = [5 + each % 1000 for each in range(min(asked.prompt_tokens, session.max_seq - 8))]
        shaped = [
            [asyncio.run(chat_load(server, bias, *size, bound=bound)).seconds for bound in (False, True)]
            for _ in range(asked.rounds)
        ]
        calm = sorted(asyncio.run(load(server, bias, *size)).gaps)
        disturbed, reading = asyncio.run(gaps_beside(server, bias, asked.streams, long))
        disturbed.sort()
        assert server.end() == 0
    starts = [start_seconds(asked.folder, asked.threads) for _ in range(asked.rounds)]
    served, flown = (statistics.median(total / each[side].seconds for each in pairs) for side in (0, 1))
    ratio = statistics.median(flight.seconds / server.seconds for server, flight in pairs)
    added = statistics.median(server.firsts[0] - flight.firsts[0] for server, flight in singles)
    cost = sum(server.cpu for server, _ in pairs) / (total * len(pairs))
    table = Table("", "", title=f"{asked.folder.name}, {asked.streams} streams of {asked.tokens} tokens")
    table.add_row("tokens a second, served", f"{served:.0f}")
    table.add_row("tokens a second, the same flight from Python", f"{flown:.0f}")
    table.add_row("their ratio, the median of rounds", f"{ratio:.1%}")
    table.add_row("added to the first token, ms", f"{added * 1e3:.2f}")
    table.add_row("processor time beside the step, µs a token", f"{cost * 1e6:.0f}")
    slower = statistics.median(bound / free - 1 for free, bound in shaped)
    table.add_row("slower where a JSON schema binds the answers", f"{slower:.1%}")
    for name, gaps in (("undisturbed", calm), (f"beside a prompt of {len(long)}", disturbed)):
        table.add_row(f"p99 between tokens, {name}, ms", f"{gaps[int(0.99 * len(gaps))] * 1e3:.1f}")
    table.add_row("that prompt was read in, s", f"{reading:.1f}")
    ready, first = (statistics.median(each[side] for each in starts) for side in (0, 1))
    table.add_row("ready after, s", f"{ready:.2f}")
    table.add_row("`arriero run`'s first token after, s", f"{first:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
