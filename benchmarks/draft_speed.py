"""An EAGLE-3 head's worth on a CPU: tokens a step, and decoding with it beside decoding without, in turns.

    python benchmarks/draft_speed.py                        the tiny Llama 4 with its own head, over held-out prose
    python benchmarks/draft_speed.py --replay int4,int8     and 1.4 billion random weights in Scout's shape: a replay

The tiny model goes on from pieces of text that neither it nor its head was trained on, greedily and drawn; the texts
with and without the head are compared. A step is one of the decoder's: for one token, or for a piece that verifies
guesses.

A replay shows what guesses would save in a model whose weights are random, and whose head guesses nothing. Everything
is computed, the head's steps and the pieces that verify; but the head's tokens are exchanged: as many of a step's
guesses are the model's own next tokens as were right in a step of the tiny model, and the one behind them is wrong.
"""

import argparse
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from support.dense import peer
from support.replay import Asked, recorded, replayed
from support.workshop import Entry, Workshop
from tokenizers import Tokenizer

import arriero
from arriero.engine import build_bundle
from arriero.export import export_checkpoint
from arriero.runtime import Session, speculation

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "support"))

from free_drafts import FreeDrafts

EXAMPLES = Path(__file__).parent.parent / "examples"
TINY, HEAD = EXAMPLES / "tiny-llama4", EXAMPLES / "tiny-llama4-draft"
sys.path.insert(0, str(TINY))

from corpus import held_out_text  # noqa: E402

PROMPT = 64
LARGER = 0.05, 0.23
"""A step of the head and a token more to verify, in steps of the model whose guesses are replayed."""
CLOCK = time.perf_counter
GREEDY: dict[str, Any] = {"temperature": 0}
WAYS: dict[str, dict[str, Any]] = {
    "greedy": GREEDY,
    "drawn at temperature 0.7": {"do_sample": True, "temperature": 0.7, "top_k": 0, "seed": 1},
}


def prompts(text: str, count: int) -> list[list[int]]:
    """Beginnings of sequences from all over a text, each with the token that begins one."""
    tokenizer = Tokenizer.from_file(str(TINY / "tokenizer.json"))
    pieces = [text[start : start + 4000] for start in range(0, len(text), 4000)]
    ids = [token for piece in pieces for token in tokenizer.encode(piece, add_special_tokens=False).ids]
    begin = tokenizer.token_to_id("<|begin_of_text|>")
    starts = np.linspace(0, len(ids) - PROMPT, count).astype(int).tolist()
    return [[begin, *ids[start : start + PROMPT - 1]] for start in starts]


def clock(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds that work takes, and what it returns."""
    started = CLOCK()
    found = work()
    return CLOCK() - started, found


@dataclass(slots=True)
class Decoded:
    """A continuation, from its first token on: seconds, tokens, and the decoder's steps behind the first."""

    seconds: float
    ids: list[int]
    steps: int = 0


def decode(session: Session, prompt: list[int], count: int, **settings: Any) -> Decoded:
    """Continues a prompt to its end, or for so many tokens."""
    pieces = session.stream(prompt, count, **settings)
    found, left = Decoded(0.0, list(next(pieces).ids)), 0
    started = CLOCK()
    for piece in pieces:
        found.ids += piece.ids
        found.steps, left = (found.steps + 1, piece.accepted) if left == 0 else (found.steps, left - 1)
    found.seconds = CLOCK() - started
    return found


def tiny_rows(
    session: Session, texts: dict[str, list[list[int]]], count: int, most: int, rounds: int, lookup: int
) -> list[Any]:
    """A record of each text and way: tokens a step, and tokens a second with and without guesses."""
    found = []
    for (name, asked), (way, settings) in itertools.product(texts.items(), WAYS.items()):
        rates: dict[int, list[float]] = {0: [], most: []}
        for _ in range(rounds):
            seconds, new, steps = dict.fromkeys(rates, 0.0), 0, 0
            for prompt in asked:
                both = {
                    tokens: decode(
                        session,
                        prompt,
                        count,
                        draft_tokens=tokens,
                        prompt_lookup_num_tokens=lookup if tokens else 0,
                        **settings,
                    )
                    for tokens in rates
                }
                assert both[0].ids == both[most].ids, "a text is another with the head"
                new, steps = new + len(both[0].ids) - 1, steps + both[most].steps
                for tokens, each in both.items():
                    seconds[tokens] += each.seconds
            for tokens, taken in seconds.items():
                rates[tokens].append(new / taken)
        found.append(
            {
                "text": name,
                "way": way,
                "tokens": new,
                "tokens_per_step": new / steps,
                "without": median(rates[0]),
                "with": median(rates[most]),
                "ratio": median(b / a for a, b in zip(rates[0], rates[most], strict=True)),
            }
        )
    return found


def replay_row(bundle: Path, steps: list[list[Asked]], count: int, most: int, threads: int, rounds: int) -> Any:
    """A record of a bundle whose steps are replayed."""
    session = arriero.load(bundle, max_seq=1024, threads=threads)
    session.costs = FreeDrafts()
    rng = np.random.default_rng(0)
    asked = [rng.integers(7, session.spec.vocab_size, PROMPT).tolist() for _ in steps]
    free: dict[str, Any] = {"draft_tokens": 0, "temperature": 0, "eos_token_id": []}
    texts = [session.generate(prompt, count, **free).ids for prompt in asked]
    ratios, rates, taken = [], [], 0
    for _ in range(rounds):
        plain = with_head = 0.0
        taken = 0
        for prompt, text, own in zip(asked, texts, steps, strict=True):
            plain += decode(session, prompt, count, **free).seconds
            read = clock(lambda prompt=prompt: session.generate(prompt, 1, **free))[0]
            seconds, used = clock(partial(replayed, session, prompt, text, own, most))
            with_head, taken = with_head + seconds - read, taken + used - 1
        rates.append(len(asked) * (count - 1) / plain)
        ratios.append(plain / with_head)
    return {
        "text": f"1.4 billion weights, {bundle.name}: a replay",
        "way": "greedy",
        "tokens": len(asked) * (count - 1),
        "tokens_per_step": len(asked) * (count - 1) / taken,
        "without": median(rates),
        "with": median(rates) * median(ratios),
        "ratio": median(ratios),
    }


def main() -> None:
    """Measures and shows a table."""
    parser = argparse.ArgumentParser(description="decoding with an EAGLE-3 head beside decoding without")
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--draft-tokens", type=int, default=5)
    parser.add_argument("--lookup", type=int, default=0, help="tokens guessed by prompt lookup, beside the head")
    parser.add_argument(
        "--every-guess", action="store_true", help="verify guesses that the head does not trust as well"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--head", type=Path, default=HEAD)
    parser.add_argument("--replay", type=lambda text: text.split(","), default=[], help="of int4, int8, bfloat16")
    parser.add_argument("--folder", type=Path, help="where to keep what is made for the replay, 6 GB")
    parser.add_argument("--json", type=Path)
    parser.add_argument(
        "--cpu-time", action="store_true", help="the processor's seconds, where others use the machine; one thread only"
    )
    arguments = parser.parse_args()
    if arguments.cpu_time:
        global CLOCK
        CLOCK = time.process_time
    if arguments.every_guess:
        speculation.LEAST_TRUST = 0.0
    count, most, rounds = arguments.tokens, arguments.draft_tokens, arguments.rounds
    texts = {
        "held-out documents": prompts(held_out_text(), arguments.prompts),
        "unseen.txt": prompts((TINY / "unseen.txt").read_text("utf-8"), arguments.prompts),
    }
    with tempfile.TemporaryDirectory() as name:
        model = export_checkpoint(TINY, Path(name) / "model", draft=arguments.head)
        bundle = build_bundle(model, Path(name) / "bundle")
        session = arriero.load(bundle, max_seq=PROMPT + count, threads=arguments.threads)
        session.costs = FreeDrafts() if arguments.every_guess else session.costs
        found = tiny_rows(session, texts, count, most, rounds, arguments.lookup)
        session.costs = FreeDrafts(*LARGER)
        asked = texts["held-out documents"][:8]
        steps = [recorded(session, prompt, count, draft_tokens=most, **GREEDY)[1] for prompt in asked]
        steps = [each for each in steps if each]
    with tempfile.TemporaryDirectory() as name:
        place = arguments.folder or Path(name)
        for form in arguments.replay:
            workshop = Workshop(place / "scout-8-16", place / "drafted", peer("scout"), 32, drafted=True)
            bundle = workshop.make(Entry(engine="arriero", form=form, bits=0))
            found.append(replay_row(bundle, steps, count, most, arguments.threads, rounds))
    table = Table("text", "way", "tokens a step", "without", "with", "ratio")
    for row in found:
        speeds = [f"{row[name]:.0f}" for name in ("without", "with")]
        table.add_row(row["text"], row["way"], f"{row['tokens_per_step']:.2f}", *speeds, f"{row['ratio']:.2f}")
    Console(width=120).print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
