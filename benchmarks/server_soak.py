"""A server under clients that join, leave and err at random, for long: no lost answer, no wrong token, flat memory.

Greedy answers of a pool of prompts are taken alone first, from a session of this process. Then clients ask for them at
random, whole or as streams, with some that leave on their way and some whose requests are wrong; each answer is
compared. In the end SIGTERM comes while streams fly: all of them must end whole, and the server with 0. Serve an int8
or int4 bundle: its texts do not depend on what runs beside them.

    python benchmarks/server_soak.py BUNDLE [--minutes 10] [--clients 24] [--threads 2]
"""

import argparse
import asyncio
import json
import random
import sys
import threading
import time
import urllib.request
from collections import Counter
from pathlib import Path
from typing import Any

from openai import APIStatusError, AsyncOpenAI
from support.server import ServerProcess

import arriero

GROWTH = 0.05
"""Share of the resident set that it may have grown by between the second and the last quarter."""

WRONG: tuple[dict[str, Any], ...] = (
    {"temperature": 9},
    {"messages": []},
    {"unknown": 1},
    {"top_logprobs": 5},
    {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}]},
    {"regex": "("},
    {"max_tokens": -1},
)


def pool_of(session: arriero.runtime.Session) -> list[tuple[list[dict[str, str]], int, str]]:
    """Conversations with the number of tokens asked for, and what each gives alone."""
    found = []
    for number in range(24):
        words = f"Explain {['list.append', 'the with statement', 'dict', 'generators'][number % 4]}. " * (
            1 + number % 9
        )
        messages = [{"role": "user", "content": words + str(number % 5)}]
        count = 4 + 5 * (number % 8)
        found.append((messages, count, session.generate(messages, count, do_sample=False, draft_tokens=0).text))
    return found


async def ask(client: AsyncOpenAI, model: str, pool: list[Any], rng: random.Random, found: Counter[str]) -> None:
    """One request of a random kind."""
    messages, count, text = rng.choice(pool)
    kind = rng.choices(("whole", "stream", "leave", "wrong"), (4, 4, 2, 1))[0]
    settings: dict[str, Any] = {"model": model, "messages": messages, "max_tokens": count, "temperature": 0}
    found["asked"] += 1
    try:
        if kind == "wrong":
            wrong = rng.choice(WRONG)
            try:
                await client.chat.completions.create(**settings, extra_body=wrong)
                found["wrong request taken"] += 1
            except APIStatusError as error:
                found["refused" if error.status_code == 400 else f"wrong request gave {error.status_code}"] += 1
        elif kind == "whole":
            answer = await client.chat.completions.create(**settings)
            found["same" if answer.choices[0].message.content == text else "different"] += 1
        else:
            stream = await client.chat.completions.create(**settings, stream=True)
            got, last, most = "", None, rng.randrange(1, 12) if kind == "leave" else 1 << 30
            async for number, chunk in aenumerate(stream):
                got += chunk.choices[0].delta.content or ""
                last = chunk.choices[0].finish_reason
                if number == most:
                    await stream.close()
                    break
            if kind == "leave":
                found["left" if text.startswith(got) else "different"] += 1
            else:
                found["same" if got == text and last else "different"] += 1
    except APIStatusError as error:
        found["full" if error.status_code == 429 else f"status {error.status_code}"] += 1


async def aenumerate(stream: Any) -> Any:
    """Numbers what a stream gives."""
    number = 0
    async for each in stream:
        yield number, each
        number += 1


async def soak(
    server: ServerProcess, pool: list[Any], seconds: float, clients: int, seed: int
) -> tuple[Counter[str], list[int], str]:
    """Lets clients ask until the time is over, then ends the server under them.

    Returns:
        What came of the requests, the server's memory, and its counts of guesses.
    """
    found: Counter[str] = Counter()
    memory: list[int] = []
    end = time.monotonic() + seconds

    async def live(number: int) -> None:
        rng = random.Random(seed * 1000 + number)
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120) as client:
            while time.monotonic() < end:
                await ask(client, server.model, pool, rng, found)
                memory.append(server.resident())
                if rng.random() < 0.2:
                    await asyncio.sleep(rng.random())

    await asyncio.gather(*(live(number) for number in range(clients)))
    with urllib.request.urlopen(f"{server.url}/metrics") as answer:
        guesses = [line.decode() for line in answer if line.startswith(b"vllm:spec_decode")]
    async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120) as client:
        begun = asyncio.Semaphore(0)
        last = [asyncio.create_task(finish(client, server.model, each, found, begun)) for each in pool[:8]]
        for _ in last:
            await begun.acquire()
        ending = threading.Thread(target=server.end, args=(120,))
        ending.start()
        await asyncio.gather(*last)
    ending.join()
    return found, memory, " ".join(line.rpartition("{")[0] + line.rpartition("}")[2].rstrip() for line in guesses)


async def finish(client: AsyncOpenAI, model: str, asked: Any, found: Counter[str], begun: asyncio.Semaphore) -> None:
    """A stream that a signal finds on its way."""
    messages, count, text = asked
    stream = await client.chat.completions.create(
        model=model, messages=messages, max_tokens=count, temperature=0, stream=True
    )
    begun.release()
    got = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
    found["landed" if got == text else "not landed"] += 1


def main() -> None:
    parser = argparse.ArgumentParser(description="A soak of a server.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--clients", type=int, default=24)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    pool = pool_of(arriero.load(asked.folder, threads=asked.threads, max_seq=1024))
    options = (
        "--threads",
        str(asked.threads),
        "--slots",
        "8",
        "--queue",
        "16",
        "--max-seq",
        "1024",
        "--cache-bytes",
        "8M",
    )
    with ServerProcess(asked.folder, *options, "--prefix-bytes", "4M") as server:
        found, memory, guesses = asyncio.run(soak(server, pool, asked.minutes * 60, asked.clients, asked.seed))
        code = server.process.wait()
    quarter = len(memory) // 4
    early, late = (sorted(each)[len(each) // 2] for each in (memory[quarter : 2 * quarter], memory[-quarter:]))
    faults = [line for line in server.log if line["event"] in ("fault", "text")]
    print(json.dumps(dict(found)), guesses)
    print(f"exit code {code}, memory {late / 1e6:.1f} MB, growth {(late - early) / 1e6:+.2f} MB, faults {faults[:3]}")
    fine = {"asked", "same", "left", "refused", "full", "landed"}
    sys.exit(bool(set(found) - fine or code or faults or late - early > GROWTH * late or found["landed"] != 8))


if __name__ == "__main__":
    main()
