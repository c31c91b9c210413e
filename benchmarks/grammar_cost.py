"""The cost of a JSON schema: tokens a second of 8 sequences with and without, and the time of a mask.

Runs take turns. A mask that takes long is computed beside the model's step, so that a step pays for taking it and
little more; the masks' own times are those of a vocabulary of 2,048 and of one as large as Llama 4's, 202,048:
syllables, words, numbers and signs, or the tokens of a tiktoken file.

    python benchmarks/grammar_cost.py [FOLDER] [--rows 8] [--tokens 200] [--runs 5] [--ranks o200k_base.tiktoken]

`--cpu-time` counts the process's processor time instead of the clock's, masks included: for a busy machine, with one
thread.
"""

import argparse
import base64
import itertools
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from llguidance import LLMatcher
from rich.console import Console
from rich.table import Table

import arriero
from arriero.export import export_checkpoint
from arriero.runtime import Session
from arriero.runtime.grammars.trial import OPTIONS
from arriero.runtime.grammars.vocabulary import END, Vocabulary

TINY = Path(__file__).parent.parent / "examples" / "tiny-llama4"
LLAMA4 = 202048
ITEM = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}, "kind": {"enum": ["a", "b", "c"]}},
    "required": ["name", "age", "kind"],
    "additionalProperties": False,
}
SCHEMA = {"type": "array", "items": ITEM, "minItems": 200}
"""Longer than any run."""

PROMPT = "Items: "


class Tokens(Vocabulary):
    """A vocabulary of given tokens."""

    def __init__(self, tokens: Sequence[bytes]) -> None:
        self.size = len(tokens)
        self.tokens, self.special_token_ids = [*tokens, END], [self.size]
        self.eos_token_id, self.bos_token_id = self.size, None
        self.single = {token: number for number, token in enumerate(tokens) if len(token) == 1}

    def __call__(self, text: str | bytes) -> list[int]:
        return [self.single[bytes([byte])] for byte in (text.encode() if isinstance(text, str) else text)]


def drawn_tokens(size: int) -> list[bytes]:
    """Bytes, numbers, signs, and words of syllables as a byte-level vocabulary has them."""
    rng, found = random.Random(0), [bytes([byte]) for byte in range(256)]
    found += [b"%d" % number for number in range(10, 1000)]
    found += [
        b"".join(signs) for signs in itertools.product((b'"', b",", b"}", b"]", b"{", b":", b" ", b"\n"), repeat=3)
    ]
    seen, syllables = set(found), [a + b for a in "bcdfghjklmnprstvwz" for b in ("a", "e", "i", "o", "u", "an", "er")]
    while len(seen) < size:
        word = "".join(rng.choices(syllables, k=rng.randint(1, 5)))
        seen.add(rng.choice((word, " " + word, " " + word.title(), word.upper())).encode())
    return [*found, *sorted(seen - set(found))][:size]


def mask_times(tokens: Sequence[bytes], steps: int = 3000) -> dict[str, float]:
    """Seconds to take the tokens in, to compile the schema, and microseconds of a mask and of a token taken."""
    started = time.perf_counter()
    opened = Tokens(tokens).open()
    taken = time.perf_counter()
    grammar = LLMatcher.grammar_from_json_schema(SCHEMA, overrides=OPTIONS)
    matcher = LLMatcher(opened, grammar, log_level=0)
    compiled = time.perf_counter()
    words, rng = np.zeros((len(tokens) + 32) // 32, np.int32), np.random.default_rng(0)
    fills, consumed = [], []
    for _ in range(steps):
        before = time.perf_counter()
        matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
        filled = time.perf_counter()
        allowed = np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little")[: len(tokens)])
        chosen = int(rng.choice(allowed))
        after = time.perf_counter()
        matcher.consume_token(chosen)
        consumed.append(time.perf_counter() - after)
        fills.append(filled - before)
    micro = np.quantile(fills, [0.5, 0.99, 1.0]) * 1e6
    return {
        "tokens": len(tokens), "taken, s": taken - started, "compiled, ms": (compiled - taken) * 1e3,
        "mask p50, µs": micro[0], "p99": micro[1], "longest": micro[2], "token taken, µs": median(consumed) * 1e6,
    }  # fmt: skip


def rate(session: Session, rows: int, tokens: int, clock: Callable[[], float], **settings: Any) -> float:
    """Tokens a second of several sequences in flight, all of them as long as they may be."""
    started = clock()
    found = session.generate_many([PROMPT] * rows, tokens, slots=rows, **settings)
    seconds = clock() - started
    assert all(len(each.ids) == tokens for each in found)  # else they stand for less than the prompts beside them
    return rows * tokens / seconds


def unused_end(session: Session, tokens: int, choices: Sequence[dict[str, Any]]) -> int:
    """A token that may end a sequence, as one has, and that no free one comes to."""
    found = {token for each in choices for token in session.generate(PROMPT, tokens, eos_token_id=[], **each).ids}
    special = session.text.tokenizer.get_added_tokens_decoder()
    return next(token for token in special if token not in found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="model or bundle; the tiny Llama 4 where none is given")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--ranks", type=Path, help="a tiktoken file, whose tokens stand for Llama 4's")
    parser.add_argument("--cpu-time", action="store_true")
    options = parser.parse_args()
    clock = time.process_time if options.cpu_time else time.perf_counter
    console = Console()
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or export_checkpoint(TINY, Path(scratch) / "model")
        session = arriero.load(folder, max_seq=options.tokens + 64, threads=options.threads)
        shapes: dict[str, dict[str, Any]] = {"free": {}, "JSON schema": {"json_schema": SCHEMA}}
        table = Table("", "tokens/s", "least", "most", "of the free one's")
        choices: dict[str, dict[str, Any]] = {"greedy": {"temperature": 0}, "drawn": {"temperature": 1.0, "seed": 1}}
        end = unused_end(session, options.tokens, list(choices.values()))
        for name, choice in choices.items():
            rates: dict[str, list[float]] = {shape: [] for shape in shapes}
            for run in range(options.runs + 1):
                for shape, grammar in shapes.items():
                    found = rate(session, options.rows, options.tokens, clock, eos_token_id=end, **choice, **grammar)
                    rates[shape] += [found] if run else []  # the first warms up
            pairs = zip(rates["JSON schema"], rates["free"], strict=True)
            shares = {"free": 1.0, "JSON schema": median(with_one / without for with_one, without in pairs)}
            for shape, found in rates.items():
                figures = (f"{median(found):,.0f}", f"{min(found):,.0f}", f"{max(found):,.0f}", f"{shares[shape]:.3f}")
                table.add_row(f"{name}, {shape}", *figures)
        console.print(table)
    large = drawn_tokens(LLAMA4)
    if options.ranks is not None:
        known = [base64.b64decode(line.split()[0]) for line in options.ranks.read_bytes().splitlines() if line]
        large = [*known, *(b"\xff%d" % number for number in range(LLAMA4 - len(known)))][:LLAMA4]
    measured = [mask_times(tokens) for tokens in (drawn_tokens(2048), large)]
    table = Table(*measured[0])
    for each in measured:
        table.add_row(*(f"{value:,.1f}" if isinstance(value, float) else f"{value:,}" for value in each.values()))
    console.print(table)


if __name__ == "__main__":
    main()
