"""Two workers of NVIDIA Dynamo over one bundle: routing by known beginnings, cancelling, a worker killed, events.

    python benchmarks/dynamo_workers.py BUNDLE [--environment DIR] [--json FILE]

Linux, as root: the workers and the frontend listen on all addresses, so all runs in a network of its own, without etcd
or NATS: the three find each other by files, and speak TCP. Dynamo is installed into an environment of its own, which
sees this one's packages; `--environment` keeps it. Each text is compared with the one of its prompt alone.
"""

import argparse
import asyncio
import base64
import io
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
from PIL import Image
from support.apart import environment, raise_loopback, run_apart
from support.beginnings import ASKS, SUBJECTS, beginning, returned
from support.server import LoggedProcess, ServerProcess

import arriero

VERSION = "1.6.1"
NEEDED = (
    "aiohttp>=3.14",
    "msgspec",
    "prometheus-client<1",
    "pyzmq>=26",
    "zstandard<1",
    "pydantic<=2.13.5",
    "pyyaml",
    "uvloop",
)
PORT, NAME = 8100, "tiny"
URL = f"http://127.0.0.1:{PORT}"
STREAMS, TOKENS, MIGRATIONS = 20, 160, 3
SETTLE = 1.5
"""Seconds in which events reach the frontend's index."""


def worker(bundle: str, prefix_bytes: str) -> ServerProcess:
    """A worker that takes requests."""
    options = ["--dynamo", "--model-name", NAME, "--slots", "16", "--max-seq", "1024", "--threads", "1"]
    return ServerProcess(Path(bundle), *options, "--prefix-bytes", prefix_bytes, with_requests=True)


async def answered(client: httpx.AsyncClient, prompt: str, **settings: Any) -> dict[str, Any]:
    """One whole completion, greedy."""
    asked = {"model": NAME, "prompt": prompt, "temperature": 0, "ignore_eos": True, "max_tokens": 8, **settings}
    found, end = await client.post("/v1/completions", json=asked), time.monotonic() + 60
    while found.status_code == 503 and time.monotonic() < end:  # nobody is known to be there, for a while
        await asyncio.sleep(0.5)
        found = await client.post("/v1/completions", json=asked)
    if found.status_code != 200:
        raise RuntimeError(found.text)
    answer: dict[str, Any] = found.json()
    return answer


async def wait_for_models(client: httpx.AsyncClient) -> None:
    """Until both workers are known and answer."""
    end = time.monotonic() + 120
    while NAME not in (await client.get("/v1/models")).text:
        if time.monotonic() > end:
            raise RuntimeError("the frontend knows no model")
        await asyncio.sleep(0.2)
    await asyncio.sleep(SETTLE)


async def route(client: httpx.AsyncClient, workers: list[ServerProcess]) -> dict[str, Any]:
    """Questions about the same beginnings, the first ones all at once, and which worker answered each."""
    homes: dict[str, list[int]] = {subject: [] for subject in SUBJECTS}
    known = total = 0
    for number in range(ASKS):
        asked = [answered(client, beginning(subject) + f"Question {number}:") for subject in SUBJECTS]
        found = await asyncio.gather(*asked) if not number else [await each for each in asked]
        await asyncio.sleep(SETTLE)  # events reach the index, and lines the logs
        seen = [{line["id"] for line in each.requests()} for each in workers]
        for subject, answer in zip(SUBJECTS, found, strict=True):
            homes[subject].append(next(i for i, ids in enumerate(seen) if answer["id"].partition("-")[2] in ids))
            if number:
                known += answer["usage"]["prompt_tokens_details"]["cached_tokens"]
                total += answer["usage"]["prompt_tokens"]
    asked_again, same = returned(homes.values())
    return {
        "asked_again": asked_again,
        "at_their_worker": same,
        "beginnings_a_worker": [sum(seen[0] == i for seen in homes.values()) for i in range(len(workers))],
        "prompt_tokens_known": round(known / total, 3),
    }


async def cancel(client: httpx.AsyncClient, workers: list[ServerProcess]) -> dict[str, Any]:
    """A stream whose client goes after a few pieces: how many tokens it had been given a row for."""
    before = {id(line) for each in workers for line in each.requests()}
    asked = {"model": NAME, "prompt": "Once", "max_tokens": 900, "temperature": 0, "ignore_eos": True, "stream": True}
    async with client.stream("POST", "/v1/completions", json=asked) as answer:
        pieces = 0
        async for line in answer.aiter_lines():
            pieces += line.startswith("data:")
            if pieces >= 5:
                break
    left, end = [], time.monotonic() + 30
    while not left and time.monotonic() < end:
        await asyncio.sleep(0.1)
        left = [line for each in workers for line in each.requests() if id(line) not in before]
    return {"left": bool(left and left[0].get("left")), "tokens_of_900": left[0]["completion_tokens"] if left else None}


async def constraints(client: httpx.AsyncClient) -> dict[str, Any]:
    """A schema, a demanded tool, log-probabilities, two choices, and the field that the frontend keeps."""
    schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}
    schema["additionalProperties"] = False
    tool = {"type": "function", "function": {"name": "look", "parameters": schema}}
    chat: dict[str, Any] = {"model": NAME, "messages": [{"role": "user", "content": "Is it?"}], "temperature": 0}
    chat["max_tokens"] = 120
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    with_schema = (await client.post("/v1/chat/completions", json={**chat, "response_format": form})).json()
    demanded = {**chat, "tools": [tool], "tool_choice": "required"}
    with_tool = (await client.post("/v1/chat/completions", json=demanded)).json()
    message = with_tool["choices"][0]["message"] if "choices" in with_tool else {}
    counted = await answered(client, "The sun", logprobs=2, n=2, temperature=0.7, seed=1)
    plain, biased = await answered(client, "The sun"), await answered(client, "The sun", logit_bias={"5": 100})
    return {
        "schema_followed": isinstance(json.loads(with_schema["choices"][0]["message"]["content"])["a"], bool),
        "tool_called": [call["function"]["name"] for call in message.get("tool_calls") or ()],
        "choices": len(counted["choices"]),
        "tokens_with_logprobs": len(counted["choices"][0]["logprobs"]["token_logprobs"]),
        "logit_bias_is_dropped_by_the_frontend": plain["choices"][0]["text"] == biased["choices"][0]["text"],
    }


async def look(client: httpx.AsyncClient, bundle: str) -> dict[str, Any] | None:
    """A picture through the frontend, and the same question asked of the bundle itself; None of a model of text."""
    if not (Path(bundle) / "vision.onnx").exists():
        return None
    picture = io.BytesIO()
    Image.new("RGB", (60, 40), (255, 0, 0)).save(picture, "PNG")
    url = "data:image/png;base64," + base64.b64encode(picture.getvalue()).decode()
    question = "What is in the image?"
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
    asked = {"model": NAME, "messages": [{"role": "user", "content": parts}], "max_tokens": 12, "temperature": 0}
    found = (await client.post("/v1/chat/completions", json=asked)).json()["choices"][0]["message"]["content"]
    session = arriero.load(bundle, max_seq=1024, threads=1)
    own = session.generate(question, 12, [url], temperature=0).text
    return {"through_the_frontend": found, "own": own, "equal": found == own}


async def kill_one(client: httpx.AsyncClient, workers: list[ServerProcess]) -> dict[str, Any]:
    """Streams over both workers, one of which is killed in their middle."""
    prompts = [f"Chapter {number} of the book about {SUBJECTS[number % 8]} begins" for number in range(STREAMS)]
    before = len(workers[1].requests())
    texts: list[list[str]] = [[] for _ in prompts]

    async def stream(number: int) -> str | None:
        asked = {"model": NAME, "prompt": prompts[number], "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
        async with client.stream("POST", "/v1/completions", json={**asked, "stream": True}) as answer:
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    event = json.loads(line[6:])
                    if "error" in event:
                        return str(event["error"])
                    texts[number] += [choice["text"] for choice in event["choices"]]
                elif line.startswith(("event: error", ": ")):
                    return line
        return None

    streams = [asyncio.create_task(stream(number)) for number in range(STREAMS)]
    while sum(map(len, texts)) < STREAMS * TOKENS // 4:
        await asyncio.sleep(0.02)
    killed = time.time()
    workers[0].process.kill()
    found = await asyncio.gather(*streams, return_exceptions=True)
    await asyncio.sleep(0.5)
    served = workers[1].requests()[before:]
    alone = [(await answered(client, each, max_tokens=TOKENS))["choices"][0]["text"] for each in prompts]
    carried = sum(line["time"] - line["seconds"] > killed - 0.05 for line in served)
    return {
        "streams": STREAMS,
        "carried_on": carried,
        "untouched": len(served) - carried,
        "failed": sum(each is not None for each in found),
        "texts_as_alone": sum("".join(text) == whole for text, whole in zip(texts, alone, strict=True)),
        "errors": sorted({str(each)[:200] for each in found if each is not None}),
    }


async def prove(client: httpx.AsyncClient, workers: list[ServerProcess], bundle: str) -> dict[str, Any]:
    """All parts, in an order that leaves one worker."""
    await wait_for_models(client)
    return {
        "routing": await route(client, workers),
        "cancelling": await cancel(client, workers),
        "constraints": await constraints(client),
        "picture": await look(client, bundle),
        "killing": await kill_one(client, workers),
    }


def inside(bundle: str, prefix_bytes: str) -> dict[str, Any]:
    """Runs in the network of its own, by the environment's Python."""
    raise_loopback()
    with tempfile.TemporaryDirectory(prefix="dynamo-") as place:
        ways = {"DISCOVERY_BACKEND": "file", "REQUEST_PLANE": "tcp", "EVENT_PLANE": "zmq", "FILE_KV": place}
        os.environ.update({f"DYN_{name}": value for name, value in ways.items()} | {"DYN_LOG": "error"})
        os.environ["HF_HUB_OFFLINE"] = "1"
        front = [sys.executable, "-m", "dynamo.frontend", "--http-host", "127.0.0.1", "--http-port", str(PORT)]
        front += ["--router-mode", "kv", "--migration-limit", str(MIGRATIONS)]
        with worker(bundle, prefix_bytes) as first, worker(bundle, prefix_bytes) as second, LoggedProcess(*front):

            async def run() -> dict[str, Any]:
                async with httpx.AsyncClient(base_url=URL, timeout=300) as client:
                    for _ in range(300):
                        try:
                            await client.get("/health")
                            break
                        except httpx.TransportError:
                            await asyncio.sleep(0.2)
                    return await prove(client, [first, second], bundle)

            found = asyncio.run(run())
            found["exit_code_of_the_other"] = second.end()
            found["blocks_of_the_other"] = [line for line in second.log if line["event"] == "blocks"]
            return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--environment", type=Path, help="folder of Dynamo's environment, which is kept")
    parser.add_argument("--prefix-bytes", default="6M", help="known beginnings of a worker; little, so that some go")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.inside:
        print(json.dumps(inside(str(arguments.bundle), arguments.prefix_bytes)))
        return
    own = [f"ai-dynamo=={VERSION}", f"ai-dynamo-runtime=={VERSION}"]
    with tempfile.TemporaryDirectory(prefix="dynamo-environment-") as made:
        # A stub among their requirements does not install.
        python = environment(arguments.environment or Path(made), ["--no-deps", *own], NEEDED)
        options = ["--inside", "--prefix-bytes", arguments.prefix_bytes]
        found = run_apart(python, __file__, str(arguments.bundle.resolve()), *options)
    print(json.dumps(found, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
