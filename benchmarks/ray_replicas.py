"""Two replicas under Ray Serve, by `examples/ray_serve.py`: routing, streams, a client that goes, back-pressure.

    python benchmarks/ray_replicas.py BUNDLE [--environment DIR] [--json FILE]

Linux, as root: Ray listens on many ports, so all runs in a network of its own. Ray is installed into an environment of
its own, which sees this one's packages; `--environment` keeps it. Each text is compared with its prompt's alone.
"""

import argparse
import asyncio
import json
import os
import random
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import httpx
from support.apart import environment, raise_loopback, run_apart
from support.beginnings import ASKS, SUBJECTS, beginning, returned
from support.server import LoggedProcess

import arriero

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "ray_serve.py"
VERSION = "2.60.0"
SLOTS, QUEUE, BURST = 4, 16, 48
STREAMED = 40
"""Tokens of a stream."""

GREEDY: dict[str, Any] = {"temperature": 0}
"""Settings of all questions; `prove` forbids the ends besides."""


async def answered(client: httpx.AsyncClient, prompt: str, tokens: int = 8) -> httpx.Response:
    """An answer, or the refusal of a system that is full."""
    found = await client.post("/v1/completions", json={"prompt": prompt, "max_tokens": tokens, **GREEDY})
    if found.status_code not in (200, 503):
        raise RuntimeError(found.text)
    return found


async def route(client: httpx.AsyncClient) -> dict[str, Any]:
    """Questions about the same beginnings, the first ones all at once, and which replica answered each."""
    homes: dict[str, list[str]] = {subject: [] for subject in SUBJECTS}
    known = total = 0
    for number in range(ASKS):
        subjects = random.Random(number).sample(SUBJECTS, len(SUBJECTS))
        asked = [answered(client, beginning(subject) + f"Question {number}:") for subject in subjects]
        found = await asyncio.gather(*asked) if not number else [await each for each in asked]
        for subject, answer in zip(subjects, found, strict=True):
            homes[subject].append(answer.headers["x-replica"])
            if number:
                usage = answer.json()["usage"]
                known += usage["prompt_tokens_details"]["cached_tokens"]
                total += usage["prompt_tokens"]
    asked_again, same = returned(homes.values())
    return {
        "asked_again": asked_again,
        "at_their_replica": same,
        "beginnings_a_replica": sorted(
            sum(seen[0] == name for seen in homes.values()) for name in {seen[0] for seen in homes.values()}
        ),
        "prompt_tokens_known": round(known / total, 3),
    }


async def stream(client: httpx.AsyncClient, prompt: str, tokens: int, leave_after: int = 0) -> tuple[str, int]:
    """A stream's text and its pieces."""
    body = {"prompt": prompt, "max_tokens": tokens, "stream": True, **GREEDY}
    texts: list[str] = []
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                texts += [choice["text"] for choice in json.loads(line[6:])["choices"]]
            if leave_after and len(texts) >= leave_after:
                break
    return "".join(texts), len(texts)


async def gauges(client: httpx.AsyncClient, prompt: str) -> list[float]:
    """Running requests and generated tokens of the replica that knows a prompt, by which the router goes here too."""
    text = (await client.request("GET", "/metrics", json={"prompt": prompt})).text
    names = ("num_requests_running", "generation_tokens_total")
    return [float(re.findall(rf"(?m)^vllm:{name}{{.*}} (\S+)$", text)[0]) for name in names]


async def leave(client: httpx.AsyncClient) -> dict[str, Any]:
    """A stream of 900 tokens whose client goes after five pieces: how many were computed."""
    prompt = "Once upon a time there was a river"
    await answered(client, prompt, 1)
    _, before = await gauges(client, prompt)
    await stream(client, prompt, 900, leave_after=5)
    running = 1.0
    while running:
        await asyncio.sleep(0.1)
        running, after = await gauges(client, prompt)
    return {"tokens_of_900": after - before}


async def burst(client: httpx.AsyncClient) -> dict[str, Any]:
    """More questions at once than have a place."""
    found = await asyncio.gather(*(answered(client, f"Number {each} is", 200) for each in range(BURST)))
    refused = [each for each in found if each.status_code == 503]
    return {
        "asked": BURST,
        "places": 2 * SLOTS + QUEUE,
        "answered": sum(each.status_code == 200 for each in found),
        "refused_with_retry_after": sum("retry-after" in each.headers for each in refused),
    }


async def prove(url: str, bundle: Path) -> dict[str, Any]:
    ends = json.loads((bundle / "generation_config.json").read_text())["eos_token_id"]
    GREEDY["logit_bias"] = {str(end): -100 for end in ends}
    async with httpx.AsyncClient(base_url=url, timeout=300) as client:
        found: dict[str, Any] = {"routing": await route(client)}
        prompts = [f"Chapter {number} of the book begins" for number in range(2 * SLOTS)]
        seen = await asyncio.gather(*(stream(client, prompt, STREAMED) for prompt in prompts))
        found["leaving"] = await leave(client)
        found["burst"] = await burst(client)
    bias = dict.fromkeys(ends, -100)
    session = arriero.load(bundle, max_seq=1024, threads=1)
    alone = [session.generate(each, STREAMED, temperature=0, logit_bias=bias).text for each in prompts]
    equal = sum(text == other for (text, _), other in zip(seen, alone, strict=True))
    found["streams"] = {"streams": len(prompts), "texts_as_alone": equal, "pieces": sum(pieces for _, pieces in seen)}
    return found


def inside(bundle: Path) -> dict[str, Any]:
    """Runs in the network of its own, by the environment's Python: Ray's prefix router, then round robin."""
    raise_loopback()
    busy = {"RAY_worker_niceness": "0", "RAY_raylet_start_wait_time_s": "200"}  # a machine that others use too
    os.environ |= busy
    found = {}
    for router in ("prefix", "round-robin"):
        options = ["--router", router, "--slots", str(SLOTS), "--queue", str(QUEUE)]
        with LoggedProcess(sys.executable, str(EXAMPLE), str(bundle), *options) as process:
            url = process.first_line()["address"]
            if router == "prefix":
                found[router] = asyncio.run(prove(url, bundle))
            else:
                found[router] = {"routing": asyncio.run(only_route(url))}
            process.end()
    return found


async def only_route(url: str) -> dict[str, Any]:
    async with httpx.AsyncClient(base_url=url, timeout=300) as client:
        return await route(client)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--environment", type=Path, help="folder of Ray's environment, which is kept")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.inside:
        print(json.dumps(inside(arguments.bundle)))
        return
    with tempfile.TemporaryDirectory(prefix="ray-environment-") as made:
        python = environment(arguments.environment or Path(made), [f"ray[serve]=={VERSION}"])
        found = run_apart(python, __file__, str(arguments.bundle.resolve()), "--inside")
    print(json.dumps(found, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
