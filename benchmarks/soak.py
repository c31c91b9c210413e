"""Sequences that join and leave a batch at random, for long: every output as if alone, and no growth of memory.

Requests are drawn from a pool: prompts of 1 to 300 tokens of documentation, some with a common beginning, greedy and
drawn, with ends of all kinds. The pool's outputs are computed alone first, by a session that shares nothing. Then so
many sequences join one of two flights at random moments; one of these keeps beginnings. Some are called off on their
way, and each output is compared, token for token. Where one differs, a tie may be the reason: two tokens so near each
other that the rounding of a product over another number of rows decides. It is taken for one if the other token comes
out when the logits of the sequence alone are changed by 1e-4 at random; ties are counted, all else is wrong.

    python benchmarks/soak.py [--minutes 10] [--sequences 2000] [--slots 8] [--threads 2] [--model MODEL]
"""

import argparse
import gc
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import arriero
from arriero.export import export_checkpoint
from arriero.runtime import Flight, Generated, Request, Session
from arriero.runtime.continuation import Continuation, joined

TINY = Path(__file__).parent.parent / "examples" / "tiny-llama4"
TEXT = TINY / "train.py"
POOL, LONGEST = 60, 60
PREFIX_BYTES = 4 << 20
NOISE, TRIALS = 1e-4, 200
GROWTH = 0.01
"""Share of the resident set that it may have grown by."""


@dataclass
class Found:
    """Findings of a soak."""

    sequences: int = 0
    called_off: int = 0
    tokens: int = 0
    reused: int = 0
    ties: int = 0
    wrong: list[str] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)

    @property
    def growth(self) -> int:
        """Bytes of the resident set's median in the last quarter above that in the second."""
        quarter = len(self.memory) // 4
        early, late = self.memory[quarter : 2 * quarter], self.memory[-quarter:]
        return int(np.median(late) - np.median(early)) if quarter else 0


def make_pool(session: Session, rng: np.random.Generator, size: int) -> list[Request]:
    """Requests of all kinds."""
    ids, requests = session.text.encode(TEXT.read_text("utf-8")), []
    common = ids[1000:1150]
    for number in range(size):
        start, length = int(rng.integers(0, len(ids) - 300)), int(rng.integers(1, 300))
        prompt = ids[start : start + length]
        prompt = common[: rng.integers(30, 150)] + prompt[:100] if number % 3 == 0 else prompt
        settings: dict[str, Any] = {"max_new_tokens": int(rng.integers(1, LONGEST)), "temperature": 0.0}
        if number % 4 == 1:
            settings |= {"temperature": 0.7, "top_p": 0.9, "seed": number}
        if number % 4 == 2:
            settings |= {"temperature": 1.0, "top_k": 30, "repetition_penalty": 1.1, "seed": number}
        if number % 5 == 0:
            settings["eos_token_id"] = []
        if number % 7 == 0:
            settings["stop_strings"] = ["the", "\n\n"]
        requests.append(session.request(prompt, **settings))
    return requests


def run_alone(session: Session, request: Request) -> Generated:
    """A request's output where nothing else runs."""
    state, continuation = session.start(1, request.positions), Continuation(request)
    logits_V = session.prefill(state, [request.prompt.ids])[0]
    pieces = [continuation.take(logits_V)]
    while pieces[-1].finish is None:
        pieces.append(continuation.take(session.decode(state, continuation.ids[-1:])[0]))
    return joined(pieces)


def is_tie(session: Session, request: Request, found: Sequence[int]) -> bool:
    """Whether the last of the tokens comes out where the logits alone are changed a little."""
    state, continuation = session.start(1, request.positions), Continuation(request)
    logits_V = session.prefill(state, [request.prompt.ids])[0]
    for token in found[:-1]:
        continuation.take(logits_V)
        logits_V = session.decode(state, [token])[0]
    rng, drawn = np.random.default_rng(0), continuation.sampler.rng.bit_generator.state
    for _ in range(TRIALS):
        continuation.sampler.rng.bit_generator.state = drawn
        changed_V = logits_V + rng.uniform(-NOISE, NOISE, logits_V.shape).astype(np.float32)
        if continuation.sampler(changed_V, continuation.ids) == found[-1]:
            return True
    return False


def soak(keeping: Session, plain: Session, sequences: int, seconds: float, slots: int, size: int = POOL) -> Found:
    """Lets sequences join and leave, at least `sequences` of them and for `seconds`.

    Args:
        keeping: Runs some of them together.
        plain: Runs each alone, and the others together.
        sequences: How many join.
        seconds: How long they go on joining.
        slots: Sequences at once in each flight.
        size: Requests in the pool.
    """
    rng, found = np.random.default_rng(0), Found()
    pool = make_pool(plain, rng, size)
    alone = [run_alone(plain, request) for request in pool]
    flights = [Flight(each, slots, max(request.positions for request in pool)) for each in (keeping, plain)]
    on_board: dict[tuple[int, int], tuple[int, list[Generated]]] = {}
    started = time.perf_counter()
    while found.sequences < sequences or time.perf_counter() - started < seconds or on_board:
        joining = found.sequences < sequences or time.perf_counter() - started < seconds
        while joining and len(on_board) < 4 * slots and rng.random() < 0.6:
            index, place = int(rng.integers(len(pool))), int(rng.integers(len(flights)))
            on_board[place, flights[place].join(pool[index])] = index, []
            found.sequences += 1
        for place, flight in enumerate(flights):
            for number, piece in flight.step():
                on_board[place, number][1].append(piece)
                if piece.finish is not None:
                    index, pieces = on_board.pop((place, number))
                    compare(plain, pool[index], joined(pieces), alone[index], found)
        if on_board and rng.random() < 0.01:
            place, number = list(on_board)[rng.integers(len(on_board))]
            flights[place].leave(number)
            index, pieces = on_board.pop((place, number))
            found.called_off += 1
            ids = joined(pieces).ids
            expected = Generated(alone[index].ids[: len(ids)], "", None)
            compare(plain, pool[index], Generated(ids, "", None), expected, found)
        if found.sequences % 10 == 0:
            found.memory.append(resident())
    return found


def compare(plain: Session, request: Request, together: Generated, alone: Generated, found: Found) -> None:
    """Takes down whether an output is as it is alone."""
    found.tokens += len(together.ids)
    found.reused += together.reused
    if together == alone:
        return
    pairs = zip(together.ids, alone.ids, strict=False)
    same = next((place for place, (ours, theirs) in enumerate(pairs) if ours != theirs), None)
    if same is not None and is_tie(plain, request, together.ids[: same + 1]):
        found.ties += 1
    else:
        found.wrong.append(f"{request.prompt.ids[-5:]} gave {together} and alone {alone}")


def resident() -> int:
    """Bytes of the resident set."""
    gc.collect(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def main() -> None:
    parser = argparse.ArgumentParser(description="A soak of sequences in flight.")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--sequences", type=int, default=2000)
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--model", type=Path, help="Model or bundle folder; the tiny Llama 4 where none is given.")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = arguments.model or export_checkpoint(TINY, Path(folder) / "model")
        plain = arriero.load(model, max_seq=512, threads=arguments.threads)
        keeping = Session(plain.decoder, plain.text, plain.defaults, plain.limits, prefix_bytes=PREFIX_BYTES)
        started = time.perf_counter()
        found = soak(keeping, plain, arguments.sequences, arguments.minutes * 60, arguments.slots)
    minutes = (time.perf_counter() - started) / 60
    print(f"{found.sequences} sequences, {found.called_off} called off, {found.tokens} tokens in {minutes:.1f} minutes")
    print(f"{found.reused} tokens of prompts reused, {found.ties} ties decided otherwise, {len(found.wrong)} wrong")
    print(f"memory {found.memory[-1] / 1e6:.1f} MB, growth {found.growth / 1e6:+.2f} MB")
    for line in found.wrong[:10]:
        print(line)
    sys.exit(bool(found.wrong) or found.growth > GROWTH * found.memory[-1])


if __name__ == "__main__":
    main()
