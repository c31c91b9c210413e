"""Cost of a server beside its flight: tokens a second, time to the first token, processor time.

Streams through `arriero serve` by raw HTTP, the same through the least server that there can be in Python
(`support/bare_server.py`), and the same requests in a flight of this process, of one bundle in one run. Processor time
a token is that of the thread that speaks with the clients; the other steps the flight. While a long prompt is being
read, the gaps between the tokens of other streams are compared with those undisturbed. Streams bound by a JSON schema
stand beside unbound ones, and the time until a server is ready beside that of `arriero run` to its first token. Rounds
of all alternate, so that a busy machine weighs on all.

    python benchmarks/server_speed.py BUNDLE [--streams 8] [--tokens 128] [--threads 2] [--rounds 3]
    python benchmarks/server_speed.py BUNDLE --gaps-only --prompt-tokens 32000 --gap-seconds 60

The second looks at the gaps alone, and no longer than a minute: a prompt of 32,000 tokens is read in several.
"""

import argparse
import asyncio
import itertools
import json
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from rich.console import Console
from rich.table import Table
from support.server import BareServer, ServerProcess

import arriero
from arriero.runtime import Flight, Session
from arriero.runtime.defaults import read_defaults

CHAT = "/v1/chat/completions"
Bias: TypeAlias = dict[int, float]
"""Numbers that are added to the logits of tokens."""

ENDLESS = {"type": "string", "minLength": 100_000}
"""A schema of a text that no number of tokens asked for here ends."""

PROMPT_TOKENS = 3500
"""Tokens of the long prompt, where no other number is asked for: what the tiny Llama 4 holds."""

LEAST_READ = 8
"""Tokens of a prompt that a step reads beside others at least."""

SINGLES = 12
"""Streams of two tokens in a round, each alone, of which the time to the first token is taken."""

REST = 0.05
"""Seconds before each way, in which threads of the one before come to rest: they look out for work a while longer, on
the processors that the next needs."""

PROMPT = "The list type is a mutable sequence. It"


@dataclass
class Load:
    """Times of one round of streams.

    Attributes:
        seconds: From the first request to the last token.
        cpu: Processor time of the thread that speaks with the clients.
        firsts: Seconds to each stream's first token.
    """

    seconds: float
    cpu: float
    firsts: list[float] = field(default_factory=list)


async def stream(
    host: str, port: int, body: dict[str, Any], path: str = "/v1/completions", into: list[float] | None = None
) -> list[float]:
    """Asks for a stream. Returns the moments of its pieces, the request's first; they may be put into a given list."""
    reader, writer = await asyncio.open_connection(host, port)
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n"
    moments = [] if into is None else into
    moments.append(time.perf_counter())
    writer.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
    try:
        while line := await reader.readline():
            if line.startswith(b"data: {"):
                moments.append(time.perf_counter())
    finally:
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


async def load(server: ServerProcess | BareServer, bias: Bias, streams: int, count: int) -> Load:
    """A round of streams through a server."""
    host, port = server.url.removeprefix("http://").rsplit(":", 1)
    cpu, started = server.cpu_seconds(), time.perf_counter()
    asked = [stream(host, int(port), body_of(bias, count, number)) for number in range(streams)]
    moments = await asyncio.gather(*asked)
    found = Load(time.perf_counter() - started, server.cpu_seconds() - cpu)
    for each in moments:
        found.firsts.append(each[1] - each[0])
    return found


async def gaps_beside(
    server: ServerProcess, bias: Bias, size: tuple[int, int], prompt: list[int], seconds: float | None
) -> tuple[list[float], list[float], float | None]:
    """Gaps between the tokens of streams, alone and then while a long prompt is read beside them.

    Args:
        server: The server.
        bias: What keeps the streams from ending.
        size: Their number, and tokens of each before the prompt comes.
        prompt: The long prompt.
        seconds: The time to look at the gaps beside it for; None is until it is read.

    Returns:
        The gaps alone, those beside the prompt, and the seconds that it was read in; None where that was not awaited.
    """
    host, port = server.url.removeprefix("http://").rsplit(":", 1)
    streams, tokens = size
    count = len(prompt) // LEAST_READ + 2 * tokens  # no stream ends before the prompt is read
    own: list[list[float]] = [[] for _ in range(streams)]
    asked = [
        asyncio.create_task(stream(host, int(port), body_of(bias, count, number), into=moments))
        for number, moments in enumerate(own)
    ]
    while not all(len(moments) > tokens for moments in own):
        await asyncio.sleep(0.01)
    begun = max(moments[2] for moments in own)  # from then on nobody joins
    read: list[float] = []
    reading = asyncio.create_task(stream(host, int(port), body_of(bias, 1, 0, prompt), into=read))
    await asyncio.wait([reading], timeout=seconds)
    end = read[1] if reading.done() else time.perf_counter()
    assert not any(each.done() for each in asked)
    for each in (reading, *asked):
        each.cancel()
    await asyncio.gather(reading, *asked, return_exceptions=True)
    alone, beside = gaps_within(own, begun, read[0]), gaps_within(own, read[0], end)
    return alone, beside, end - read[0] if len(read) > 1 else None


def gaps_within(own: list[list[float]], start: float, end: float) -> list[float]:
    """The gaps between each stream's moments from one time to another, from short to long."""
    within = [[each for each in moments if start <= each <= end] for moments in own]
    return sorted(after - before for moments in within for before, after in itertools.pairwise(moments))


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


def measure_gaps(server: ServerProcess, bias: Bias, size: tuple[int, int], asked: Any) -> list[tuple[str, str]]:
    """Gaps undisturbed and beside a long prompt, as rows of the table."""
    prompt = [5 + each % 1000 for each in range(asked.prompt_tokens)]
    calm, disturbed, seconds = asyncio.run(gaps_beside(server, bias, size, prompt, asked.gap_seconds))
    both = (("undisturbed", calm), (f"beside a prompt of {len(prompt)}", disturbed))
    p99 = [gaps[int(0.99 * len(gaps))] for _, gaps in both]
    rows = [(f"p99 between tokens, {name}, ms", f"{each * 1e3:.1f}") for (name, _), each in zip(both, p99, strict=True)]
    rows.append(("their ratio", f"{p99[1] / p99[0]:.2f}"))
    return [*rows, ("that prompt was read in, s", "not waited for" if seconds is None else f"{seconds:.1f}")]


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


def measure_cost(server: ServerProcess, bias: Bias, size: tuple[int, int], asked: Any) -> list[tuple[str, str]]:
    """Times the server beside its flight, and answers bound by a schema beside free ones. Returns rows of the table."""
    session = arriero.load(asked.folder, threads=asked.threads)
    asyncio.run(chat_load(server, bias, 1, 2, bound=True))  # compiles the schema
    fly(session, bias, 1, 8)
    rounds: list[list[Load]] = []
    singles: list[list[Load]] = []
    with BareServer(asked.folder, "--threads", str(asked.threads), "--slots", str(asked.streams + 1)) as bare:
        asyncio.run(load(bare, bias, 1, 8))
        for number in range(asked.rounds):
            rounds.append(three_ways(server, bare, session, bias, size, number % 3))
            singles += [three_ways(server, bare, session, bias, (1, 2), each % 3) for each in range(SINGLES)]
    shaped = [
        [asyncio.run(chat_load(server, bias, *size, bound=bound)).seconds for bound in (False, True)]
        for _ in range(asked.rounds)
    ]
    total = size[0] * size[1]
    served, _, flown = (statistics.median(total / each[way].seconds for each in rounds) for way in range(3))
    ratios = [statistics.median(each[2].seconds / each[way].seconds for each in rounds) for way in (0, 1)]
    added = [statistics.median(each[way].firsts[0] - each[2].firsts[0] for each in singles) for way in (0, 1)]
    costs = [sum(each[way].cpu for each in rounds) / (total * len(rounds)) for way in (0, 1)]
    slower = statistics.median(bound / free - 1 for free, bound in shaped)
    return [
        ("tokens a second, served", f"{served:.0f}"),
        ("tokens a second, the same flight from Python", f"{flown:.0f}"),
        ("their ratio, the median of rounds; the least server's", " ; ".join(f"{each:.1%}" for each in ratios)),
        ("added to the first token, ms; by the least server", " ; ".join(f"{each * 1e3:.2f}" for each in added)),
        ("processor time beside the step, µs a token; its", " ; ".join(f"{each * 1e6:.0f}" for each in costs)),
        ("slower where a JSON schema binds the answers", f"{slower:.1%}"),
    ]


def three_ways(
    server: ServerProcess, bare: BareServer, session: Session, bias: Bias, size: tuple[int, int], first: int = 0
) -> list[Load]:
    """A round through the server, one through the least server, and one in a flight of this process.

    Args:
        server: The server.
        bare: The least server.
        session: The flight's model.
        bias: Numbers that are added to logits.
        size: Streams, and tokens of each.
        first: The way that comes first, from 0 to 2; the others follow in turn.
    """
    ways = (
        lambda: asyncio.run(load(server, bias, *size)),
        lambda: asyncio.run(load(bare, bias, *size)),
        lambda: fly(session, bias, *size),
    )
    found: dict[int, Load] = {}
    for way in (first, (first + 1) % 3, (first + 2) % 3):
        time.sleep(REST)
        found[way] = ways[way]()
    return [found[way] for way in range(3)]


def show(title: str, rows: list[tuple[str, str]]) -> None:
    """Prints what was found."""
    table = Table("", "", title=title)
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description="What a server adds to its flight.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompt-tokens", type=int, default=PROMPT_TOKENS)
    parser.add_argument("--gaps-only", action="store_true", help="Nothing but the gaps beside a long prompt.")
    parser.add_argument("--gap-seconds", type=float, help="Look at these gaps no longer than this.")
    asked = parser.parse_args()
    max_seq = asked.prompt_tokens + 64 if asked.prompt_tokens > PROMPT_TOKENS else None
    size, title = (
        (asked.streams, asked.tokens),
        f"{asked.folder.name}, {asked.streams} streams of {asked.tokens} tokens",
    )
    options = ("--threads", str(asked.threads), "--slots", str(asked.streams + 1), "--prefix-bytes", "0", "--quiet")
    options += () if max_seq is None else ("--max-seq", str(max_seq))
    bias = dict.fromkeys(read_defaults(asked.folder).eos_token_ids, -100.0)  # an answer's length alone ends it
    with ServerProcess(asked.folder, *options) as server:
        asyncio.run(load(server, bias, 1, 8))
        rows = [] if asked.gaps_only else measure_cost(server, bias, size, asked)
        rows += measure_gaps(server, bias, size, asked)
        assert server.end() == 0
    if not asked.gaps_only:
        starts = [start_seconds(asked.folder, asked.threads) for _ in range(asked.rounds)]
        ready, first = (statistics.median(each[side] for each in starts) for side in (0, 1))
        rows += [("ready after, s", f"{ready:.2f}"), ("`arriero run`'s first token after, s", f"{first:.2f}")]
    show(title, rows)


if __name__ == "__main__":
    main()
