"""Many replicas by simulation: two real ones are driven by conversations, a model is fitted, and it goes on to 64.

    python benchmarks/fleet.py BUNDLE [--json FILE] [--conversations 30] [--times 1]

The trace is synthetic (`support/fleet_model.py`): conversations of several turns about shared system prompts. Real
servers (`arriero serve`, one thread each) answer it at several loads, one replica and two; the costs of a step are
fitted to what was seen, held against a load that was not fitted, and the error is told. Then 2, 4, 16 and 64 replicas
at the same load a replica, routed at random, in turn, and to the replica that knows most of a prompt's beginning. A
real replica shares its cores with the others and with the client; a model's has its own. The figures are of the bundle.
`--times` multiplies the conversations a second of all loads, for a machine or bundle that they leave idle.
"""

import argparse
import asyncio
import json
import time
from contextlib import AsyncExitStack, ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from rich.console import Console
from rich.table import Table
from support.fleet_model import (
    BLOCK,
    Conversation,
    Costs,
    Router,
    Seen,
    Traffic,
    beginnings,
    conversations,
    simulate,
    summary,
    system_prompt,
)
from support.server import ServerProcess

import arriero
from arriero.files.circumstances import circumstances

WAYS = ("random", "round robin", "prefix")
SLOTS, PREFIX_BYTES, MAX_SEQ = 8, 6_000_000, 2048
FITTED = ((1, 2.0), (1, 4.0), (2, 3.0), (2, 6.0))
"""Replicas, and conversations a second, of the loads that costs are fitted to; `HELD` is held against them."""

HELD, EACH = (2, 4.5), 3.0
"""`EACH` conversations a second and replica are simulated."""

COUNTS = (2, 4, 16, 64)
JUDGED = ("tokens_per_second", "ttft_mean", "ttft_p95", "known")


async def turn(client: httpx.AsyncClient, text: str, new: int, ends: dict[str, int]) -> tuple[Seen, str]:
    """One question, streamed; and the answer's text."""
    body = {"prompt": text, "max_tokens": new, "temperature": 0, "stream": True, "logit_bias": ends}
    asked, first, answer, usage = time.monotonic(), 0.0, "", {}
    async with client.stream(
        "POST", "/v1/completions", json={**body, "stream_options": {"include_usage": True}}
    ) as found:
        async for line in found.aiter_lines():
            if line.startswith("data: {"):
                event = json.loads(line[6:])
                for choice in event["choices"]:
                    first = first or time.monotonic()
                    answer += choice["text"]
                usage = event.get("usage") or usage
    known = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
    last, prompt = time.monotonic(), usage["prompt_tokens"]
    return Seen(asked=asked, first=first, last=last, prompt=prompt, known=known, new=usage["completion_tokens"]), answer


async def drive(urls: list[str], traffic: Traffic, way: str, ends: dict[str, int]) -> list[Seen]:
    """Answers a trace by real replicas."""
    router, seen, began = Router(way, len(urls)), [], time.monotonic()
    async with AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(httpx.AsyncClient(base_url=url, timeout=300)) for url in urls]

        async def talk(each: Conversation) -> None:
            await asyncio.sleep(max(0.0, began + each.start - time.monotonic()))
            text = system_prompt(traffic, each.system)
            for message, new, pause in each.turns:
                text += " " + message
                chosen = router.choose(beginnings(text))
                found, answer = await turn(clients[chosen], text, new, ends)
                router.done(chosen)
                seen.append(found)
                text += answer
                await asyncio.sleep(pause)

        await asyncio.gather(*map(talk, conversations(traffic)))
    return seen


def real(bundle: Path, replicas: int, traffic: Traffic, way: str) -> dict[str, float]:
    """The summary of a trace over fresh replicas."""
    ends = dict.fromkeys(map(str, json.loads((bundle / "generation_config.json").read_text())["eos_token_id"]), -100)
    options = ["--threads", "1", "--slots", str(SLOTS), "--max-seq", str(MAX_SEQ), "--quiet", "--queue", "512"]
    with ExitStack() as stack:
        servers = [
            stack.enter_context(ServerProcess(bundle, *options, "--prefix-bytes", str(PREFIX_BYTES)))
            for _ in range(replicas)
        ]
        found = asyncio.run(drive([server.url for server in servers], traffic, way, ends))
        for server in servers:
            server.end()
    return summary(found)


def shape(bundle: Path) -> tuple[float, int]:
    """Tokens of the trace's words, each; and blocks that `PREFIX_BYTES` hold."""
    session = arriero.load(bundle, max_seq=MAX_SEQ, threads=1)
    text = system_prompt(Traffic(rate=1, conversations=1), 0)
    caches = session.start(1).caches
    bytes_per_token = caches.row_bytes(caches.positions) / caches.positions
    return len(session.text.encode(text)) / len(text.split()), int(PREFIX_BYTES / bytes_per_token / BLOCK)


def fitted(seen: list[tuple[int, Traffic, dict[str, float]]], how: dict[str, Any]) -> tuple[Costs, int]:
    """The costs, and the blocks kept, whose simulation comes closest in logarithms to the real; by random steps."""

    def parts(logs: np.ndarray) -> tuple[Costs, int]:
        return Costs(*(float(each) for each in np.exp(logs[:4]))), max(1, round(float(np.exp(logs[4]))))

    def far(logs: np.ndarray) -> float:
        costs, capacity = parts(logs)
        made = [
            simulate(traffic, replicas, "prefix", costs, **{**how, "capacity": capacity})
            for replicas, traffic, _ in seen
        ]
        return sum(
            float(np.log(one[name] / other[name]) ** 2)
            for one, (_, _, other) in zip(made, seen, strict=True)
            for name in JUDGED
        )

    rng, best = np.random.default_rng(0), np.log([5e-3, 2e-3, 1e-3, 5e-3, how["capacity"] / 2])
    least, width = far(best), 0.8
    for _ in range(150):
        tried = best + width * rng.standard_normal(5)
        if (found := far(tried)) < least:
            best, least = tried, found
        width = max(0.05, width * 0.98)
    return parts(best)


def show(title: str, rows: list[dict[str, Any]]) -> None:
    table = Table(*rows[0], title=title)
    for row in rows:
        table.add_row(*(f"{value:.3g}" if isinstance(value, float) else str(value) for value in row.values()))
    Console(width=160).print(table)


def compared(found: dict[str, float], model: dict[str, float]) -> dict[str, float]:
    """Real figures and the model's, side by side."""
    return {key: value for name in JUDGED for key, value in ((name, found[name]), (f"{name}, model", model[name]))}


def measured(bundle: Path, count: int, times: float) -> list[dict[str, Any]]:
    """Runs of real replicas: the fitted loads, the held one, and the held one routed in the other ways."""
    runs = [(replicas, rate * times, "prefix") for replicas, rate in (*FITTED, HELD)]
    runs += [(HELD[0], HELD[1] * times, way) for way in WAYS if way != "prefix"]
    return [
        {"replicas": replicas, "rate": rate, "seed": seed, "conversations": count, "way": way}
        | real(bundle, replicas, Traffic(rate=rate, conversations=count, seed=seed), way)
        for seed, (replicas, rate, way) in ((min(index, len(FITTED)), run) for index, run in enumerate(runs))
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--conversations", type=int, default=30, help="of each real load")
    parser.add_argument("--times", type=float, default=1.0, help="as many conversations a second")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--seen", type=Path, help="an earlier --json, whose real figures are fitted anew")
    arguments = parser.parse_args()
    ratio, capacity = shape(arguments.bundle)
    how = {"slots": SLOTS, "capacity": capacity, "tokens_a_word": ratio}
    was = json.loads(arguments.seen.read_text()) if arguments.seen else None
    seen = was["seen"] if was else measured(arguments.bundle, arguments.conversations, arguments.times)
    traffic = [Traffic(rate=each["rate"], conversations=each["conversations"], seed=each["seed"]) for each in seen]
    fits = [(each["replicas"], one, each) for each, one in zip(seen, traffic, strict=True)][: len(FITTED)]
    costs, how["capacity"] = fitted(fits, how)
    rows = []
    for index, (each, one) in enumerate(zip(seen, traffic, strict=True)):
        model = simulate(one, each["replicas"], each["way"], costs, **how)
        load = {
            "load": "held" if index >= len(FITTED) else "fitted",
            "replicas": each["replicas"],
            "rate": each["rate"],
        }
        rows.append({**load, "way": each["way"]} | compared(each, model))
    show("real and modelled", rows)
    fleets = []
    for replicas in COUNTS:
        one = Traffic(rate=EACH * arguments.times * replicas, conversations=40 * replicas, seed=9)
        for way in WAYS:
            fleets.append({"replicas": replicas, "way": way, **simulate(one, replicas, way, costs, **how)})
    show("simulated", fleets)
    if arguments.json:
        about = was["circumstances"] if was else circumstances()
        found = {"costs": asdict(costs), "blocks": how["capacity"], "seen": seen, "circumstances": about}
        arguments.json.write_text(json.dumps({**found, "simulated": fleets}, indent=1) + "\n")


if __name__ == "__main__":
    main()
