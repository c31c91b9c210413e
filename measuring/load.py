"""How fast a server answers: several clients at once, each asking again as soon as it has its answer.

Enters: the address of any OpenAI server. Leaves: figures ready for JSON. Prompts are words drawn at random, each time
others, so that no beginning is known but one that all may share; a first request says how many words make the tokens
that are asked for.
"""

import random
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from .. import __version__
from ..errors import SessionError
from ..files.circumstances import circumstances, machine_text
from ..spec.types import Progress
from .endpoint import Answered, Endpoint

CLIENTS, LENGTH = (1, 4, 16, 64), 128
LEAST = 16
"""Requests of each case at least: fewer have no tail to speak of."""

PROBE = 64
"""Words whose tokens are counted first."""

PERCENTILES = (50, 95, 99)
WORDS: Sequence[str] = [
    "time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world", "school", "state",
    "family", "student", "group", "country", "problem", "hand", "part", "place", "case", "week", "company",
    "system", "program", "question", "work", "number", "night", "point", "home", "water", "room", "mother",
    "area", "money", "story", "fact", "month", "lot", "right", "study", "book", "eye", "job", "word", "business",
    "issue", "side", "kind", "head", "house", "service", "friend", "father", "power",
]  # fmt: skip


def measure_url(
    endpoint: Endpoint,
    *,
    prefill: Sequence[int] | None = None,
    clients: Sequence[int] | None = None,
    decode_tokens: int = 32,
    runs: int = 3,
    shared: int = 0,
    progress: Progress = lambda phase, done, total: None,
) -> dict[str, Any]:
    """Measures a server under load.

    Args:
        endpoint: The server.
        prefill: Tokens of a prompt, about; None takes 128.
        clients: Requests at once; None takes 1, 4, 16 and 64.
        decode_tokens: New tokens of each answer at most.
        runs: Requests of each client at least; there are 16 of each case at least.
        shared: Tokens, about, that all prompts begin with, before those of `prefill`; asked for once beforehand.
        progress: Called with the phase, the requests done and the requests in all.

    Returns:
        JSON-ready: the machine that asked, and for each case percentiles of the time to first token and of the time
        between tokens in seconds, tokens and requests a second, and the requests that failed.

    Raises:
        SessionError: The server does not answer, or a setting is out of range.
    """
    lengths, sizes = sorted(set(prefill or (LENGTH,))), sorted(set(clients or CLIENTS))
    if min(*lengths, *sizes, decode_tokens, runs) < 1 or shared < 0:
        given = f"{lengths}, {sizes}, {decode_tokens}, {runs} and {shared}"
        raise SessionError(f"prefill, batch, decode_tokens, runs and shared are {given}: give whole numbers from 1 up")
    words = _words(endpoint)
    beginning = f"{words(shared)} " if shared else ""
    if shared:
        endpoint.ask(beginning, 1)
    counts = [max(runs, -(-LEAST // size)) for size in sizes]
    total = len(lengths) * sum(size * count for size, count in zip(sizes, counts, strict=True))
    cases, done = [], 0
    for length in lengths:
        for size, count in zip(sizes, counts, strict=True):
            progress(f"{size} clients", done, total)
            prompts = [[beginning + words(length) for _ in range(count)] for _ in range(size)]
            cases.append({"prefill": length, "batch": size, **_measure(endpoint, prompts, decode_tokens)})
            done += size * count
    return {
        "url": endpoint.url,
        "endpoint": endpoint.kind,
        "model": endpoint.model,
        "version": __version__,
        **circumstances(),
        "decode_tokens": decode_tokens,
        "shared": shared,
        "cases": cases,
    }


def _words(endpoint: Endpoint) -> Callable[[int], str]:
    """Asks how many tokens words have. Returns a function that draws texts of a number of tokens."""
    rng = random.Random()  # other words in each run too: a server knows those of the last
    found = endpoint.ask(" ".join(rng.choices(WORDS, k=PROBE)), 1).prompt
    per_word = found / PROBE if found else 1.3
    return lambda tokens: " ".join(rng.choices(WORDS, k=max(1, round(tokens / per_word))))


def _measure(endpoint: Endpoint, prompts: Sequence[Sequence[str]], tokens: int) -> dict[str, Any]:
    """One case: a thread a client, all starting together."""

    def client(own: Sequence[str]) -> list[Answered | SessionError]:
        found: list[Answered | SessionError] = []
        for prompt in own:
            try:
                found.append(endpoint.ask(prompt, tokens))
            except SessionError as error:
                found.append(error)
        return found

    started = time.perf_counter()
    with ThreadPoolExecutor(len(prompts)) as pool:
        found = [each for several in pool.map(client, prompts) for each in several]
    seconds = time.perf_counter() - started
    answers = [each for each in found if isinstance(each, Answered)]
    errors = [each for each in found if isinstance(each, SessionError)]
    if not answers:
        raise errors[0]
    gaps = [gap for each in answers for gap in each.gaps]
    made = sum(each.tokens for each in answers)
    return {
        "requests": len(answers),
        "failed": len(errors),
        "first_error": str(errors[0]) if errors else None,
        "seconds": seconds,
        "tokens_per_second": made / seconds,
        "requests_per_second": len(answers) / seconds,
        "prompt_tokens": sum(each.prompt for each in answers) / len(answers),
        "cached_tokens": sum(each.cached for each in answers) / len(answers),
        "new_tokens": made / len(answers),
        "ttft_seconds": _percentiles([each.first for each in answers]),
        "itl_seconds": _percentiles(gaps),
    }


def _percentiles(values: Sequence[float]) -> dict[str, float | None]:
    if not values:
        return {f"p{rank}": None for rank in PERCENTILES}
    return {f"p{rank}": float(np.percentile(values, rank)) for rank in PERCENTILES}


def draw_load(found: dict[str, Any], file: Path) -> None:
    """Draws tokens a second and the percentiles of times over the clients at once, a line a prompt length."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4), layout="constrained")
    rate, first, between = figure.subplots(1, 3)
    sizes = sorted({case["batch"] for case in found["cases"]})
    lengths = sorted({case["prefill"] for case in found["cases"]})
    for number, length in enumerate(lengths):
        cases = [case for case in found["cases"] if case["prefill"] == length]
        colour, across = f"C{number}", [case["batch"] for case in cases]
        name = f"prompts of {length} tokens"
        rate.plot(across, [case["tokens_per_second"] for case in cases], "o-", color=colour, label=name)
        for axes, kind in ((first, "ttft_seconds"), (between, "itl_seconds")):
            for rank, style in zip(PERCENTILES, ("-", "--", ":"), strict=True):
                values = [case[kind][f"p{rank}"] for case in cases]
                milliseconds = [np.nan if value is None else value * 1e3 for value in values]
                axes.plot(across, milliseconds, style, marker="o", markersize=4, color=colour, label=f"p{rank}")
    titles = ((rate, "tokens/s of all clients"), (first, "time to first token, ms"), (between, "between tokens, ms"))
    for axes, label in titles:
        axes.set(xlabel="clients at once", ylabel=label, xscale="log")
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.minorticks_off()
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e8e8e8", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.set_ylim(bottom=0)
    if len(lengths) > 1:
        rate.legend(frameon=False)
    first.legend(first.get_lines()[:3], [f"p{rank}" for rank in PERCENTILES], frameon=False, loc="best")
    asked = f"{found['model']} at {found['url']}, {found['decode_tokens']} new tokens a request"
    around = f"asked from {machine_text(found['machine'])}; {found['date'][:10]}, Arriero {found['version']}"
    figure.suptitle(f"{asked}\n{around}", x=0.01, ha="left", fontsize=10)
    figure.savefig(file, dpi=110)
