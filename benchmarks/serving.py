"""Serving several sequences, sharing beginnings and guessing tokens: costs and savings on this machine's CPU.

A random Scout-like checkpoint in float32 (half a billion parameters by default), runs of all variants in turn, medians:

- batch: tokens a second of requests one after another, and in flight; a decode step over some rows, over as many idle
  ones besides, and what moving a row costs instead;
- shared beginnings: seconds to the first token of a prompt whose beginning is not known, and is;
- guesses: a piece of several tokens beside a step of one, and how often guesses are right in continuations of
  documentation by the tiny Llama 4;
- host: a step's time outside ONNX Runtime over layers of next to no size, and a draw from 202,048 logits.

    python benchmarks/serving.py [--layers 4] [--hidden 1024] [--experts 16] [--threads 2] [--runs 5]
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from support.dense import scout_like, write_random_checkpoint

import arriero
from arriero.export import export_checkpoint
from arriero.runtime import Session
from arriero.runtime.draws import Sampling
from arriero.runtime.sampling import Sampler

TINY = Path(__file__).parent.parent / "examples" / "tiny-llama4"
FREE: dict[str, Any] = {"temperature": 0, "eos_token_id": []}
PROMPT, NEW, SHARED = 64, 32, 1024


def clock(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def in_turn(works: dict[str, Callable[[], object]], runs: int) -> dict[str, float]:
    """Median seconds of each, after a run that is not timed."""
    taken: dict[str, list[float]] = {name: [] for name in works}
    for run in range(runs + 1):
        for name, work in works.items():
            seconds = clock(work)
            if run:
                taken[name].append(seconds)
    return {name: median(seconds) for name, seconds in taken.items()}


def batches(session: Session, runs: int) -> Table:
    rng, rows = np.random.default_rng(0), 8
    prompts = rng.integers(7, session.spec.vocab_size, (rows, PROMPT)).tolist()
    state = session.start(rows, 1024)
    session.prefill(state, prompts)
    tokens = rng.integers(7, session.spec.vocab_size, rows).tolist()

    def step(count: int) -> None:
        part = state.rows(0, count)
        session.decode(part, tokens[:count])
        part.rewind([PROMPT] * count)

    found = in_turn(
        {
            "8 requests one after another": lambda: [session.generate(prompt, NEW, **FREE) for prompt in prompts],
            "8 requests in flight": lambda: session.generate_many(prompts, NEW, slots=rows, **FREE),
            "a step over 1 row": lambda: step(1),
            "a step over 4 rows": lambda: step(4),
            "a step over 8 rows": lambda: step(8),
            f"a row of {PROMPT} tokens moved": lambda: state.move(7, 6),
        },
        runs,
    )
    table = Table("batch", "ms", "tokens/s")
    for name, seconds in found.items():
        rate = f"{rows * NEW / seconds:.1f}" if "requests" in name else ""
        table.add_row(name, f"{seconds * 1e3:.2f}", rate)
    return table


def beginnings(session: Session, knowing: Session, runs: int) -> Table:
    rng = np.random.default_rng(1)
    shared = rng.integers(7, session.spec.vocab_size, SHARED).tolist()
    rest = iter(rng.integers(7, session.spec.vocab_size, (4 * runs + 8, 20)).tolist())
    found = in_turn(
        {
            "not known": lambda: session.generate(shared + next(rest), 1, **FREE),
            "known": lambda: knowing.generate(shared + next(rest), 1, **FREE),
        },
        runs,
    )
    table = Table(f"{SHARED} shared and 20 other tokens", "first token, ms")
    for name, seconds in found.items():
        table.add_row(name, f"{seconds * 1e3:.1f}")
    return table


def guesses(session: Session, tiny: Session, runs: int) -> Table:
    rng = np.random.default_rng(2)
    state = session.start(1, 1024)
    session.prefill(state, rng.integers(7, session.spec.vocab_size, (1, PROMPT)).tolist())

    def piece(count: int) -> None:
        ids = rng.integers(7, session.spec.vocab_size, count).tolist()
        if count == 1:
            session.decode(state, ids)
        else:
            list(session.extend(state, [ids]))
        state.rewind([PROMPT])

    costs = in_turn({str(count): lambda count=count: piece(count) for count in (1, 2, 3, 5, 9)}, 2 * runs)
    table = Table("tokens of a piece", "ms", "of a step of one")
    for name, seconds in costs.items():
        table.add_row(name, f"{seconds * 1e3:.2f}", f"{seconds / costs['1']:.2f}")
    ids = tiny.text.encode((TINY / "corpus.py").read_text("utf-8") + (TINY / "train.py").read_text("utf-8"))
    for drafts in (2, 8):
        found = [
            tiny.generate(ids[start : start + 300], 200, prompt_lookup_num_tokens=drafts, **FREE)
            for start in range(0, len(ids) - 300, 600)
        ]
        new, drafted, accepted = (
            sum(counts)
            for counts in zip(*((len(each.ids), each.drafted, each.accepted) for each in found), strict=True)
        )
        rate = f"{accepted / drafted:.0%} of guesses right, {new / (new - accepted):.2f} tokens a step"
        table.add_row(f"tiny, {drafts} guessed at most", "", rate)
    return table


def host(session: Session, runs: int) -> Table:
    state = session.start(1, 1024)
    session.prefill(state, [[5] * 20])
    binding: Any = state.binding(slice(0, 1))
    inside: list[float] = []

    class Timed:
        """ONNX Runtime's session with its runs timed."""

        def __init__(self, session: Any) -> None:
            self.session = session

        def run_with_iobinding(self, io: Any) -> None:
            inside.append(clock(lambda: self.session.run_with_iobinding(io)))

    binding.session = Timed(binding.session)
    outside = [clock(lambda: session.decode(state, [7])) - inside[-1] for _ in range(40 * runs)]
    table = Table("host", "ms")
    table.add_row(f"a step of {len(session.spec.layers)} layers, outside ONNX Runtime", f"{median(outside) * 1e3:.3f}")
    logits_V = (np.random.default_rng(0).standard_normal(session.spec.vocab_size) * 3).astype(np.float32)
    for settings in ({}, {"temperature": 0.6, "top_p": 0.9}, {"temperature": 1.0, "top_k": 50}, {"temperature": 1.0}):
        sampler = Sampler(Sampling(seed=0, **settings))
        seconds = median(clock(lambda sampler=sampler: sampler(logits_V, [])) for _ in range(20 * runs))
        table.add_row(f"a token chosen, {settings or 'greedy'}", f"{seconds * 1e3:.3f}")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description="Batches in flight, shared beginnings, guesses, host overhead.")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=5)
    arguments = parser.parse_args()
    runs, settings = arguments.runs, {"threads": arguments.threads, "max_seq": 2048}
    small = {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    thin = {**small, "intermediate_size": 8, "intermediate_size_mlp": 8, "vocab_size": 202048}
    with tempfile.TemporaryDirectory() as name:
        folder, models = Path(name), {}
        write_random_checkpoint(scout_like(arguments.layers, arguments.hidden, arguments.experts), folder / "large")
        write_random_checkpoint({**scout_like(48, experts=2), **thin}, folder / "thin")
        for each, checkpoint in {"large": folder / "large", "thin": folder / "thin", "tiny": TINY}.items():
            models[each] = export_checkpoint(checkpoint, folder / f"{each}-model", dtype="float32")
        session = arriero.load(models["large"], **settings)
        knowing = Session(session.decoder, session.text, session.defaults, session.limits, prefix_bytes=1 << 30)
        tables = [
            batches(session, runs),
            beginnings(session, knowing, runs),
            guesses(session, arriero.load(models["tiny"], threads=arguments.threads), runs),
            host(arriero.load(models["thin"], **settings), runs),
        ]
    for table in tables:
        Console().print(table)


if __name__ == "__main__":
    main()
