"""Sequences that join and leave a batch at random, for long, among faults: every output as if alone, no growth.

Requests are drawn from a pool: prompts of 1 to 300 tokens of documentation, some with a common beginning, greedy and
drawn, with ends of all kinds. The pool's outputs are computed alone first, by a session that shares nothing. Then
sequences join flights at random moments, several flights in threads of their own over sessions that they share; some of
these keep beginnings. Meanwhile some sequences are called off, some steps raise a `MemoryError` before or after they
are computed, and requests come that must be refused: images for a model without eyes, prompts that are too long, more
rows than there is memory for. Each request ends exactly once, and each output is compared, token for token; of one
that was called off or failed, its tokens until then. Where one differs, a tie may be the reason: two tokens so near
each other that the rounding of a product over another number of rows decides. It is taken for one if the other token
comes out when the logits of the sequence alone are changed by 1e-4 at random; ties are counted, all else is wrong.

    python benchmarks/soak.py [--minutes 10] [--sequences 2000] [--slots 8] [--threads 2] [--riders 2] [--model MODEL]

With a head (`--draft examples/tiny-llama4-draft`, or a model that has one) flights guess tokens and verify them.
"""

import argparse
import dataclasses
import gc
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import arriero
from arriero.errors import SessionError, StepError
from arriero.export import export_checkpoint
from arriero.runtime import Flight, Generated, Request, Session
from arriero.runtime.continuation import Continuation, joined

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "support"))

from free_drafts import FreeDrafts

TINY = Path(__file__).parent.parent / "examples" / "tiny-llama4"
TEXT = TINY / "train.py"
POOL, LONGEST = 60, 60
PREFIX_BYTES = 4 << 20
NOISE, TRIALS = 1e-4, 200
FAILING = 0.002
"""Share of the steps that lack memory."""
GROWTH = 0.01
"""Share of the resident set that it may have grown by."""


@dataclass
class Found:
    """Findings of a soak."""

    sequences: int = 0
    called_off: int = 0
    failed: int = 0
    ended: int = 0
    refused: int = 0
    tokens: int = 0
    reused: int = 0
    drafted: int = 0
    accepted: int = 0
    ties: int = 0
    wrong: list[str] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)

    @property
    def lost(self) -> int:
        """Requests that neither ended nor were called off."""
        return self.sequences - self.ended - self.called_off

    @property
    def growth(self) -> int:
        """Bytes of the resident set's median in the last quarter above that in the second."""
        quarter = len(self.memory) // 4
        early, late = self.memory[quarter : 2 * quarter], self.memory[-quarter:]
        return int(np.median(late) - np.median(early)) if quarter else 0


class FailingDecoder:
    """A decoder of which some steps lack memory, before they are computed or after.

    Args:
        decoder: The decoder.
        share: Share of the steps that fail.
    """

    def __init__(self, decoder: Any, share: float) -> None:
        self.decoder, self.share, self.rng = decoder, share, np.random.default_rng(1)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.decoder, name)

    def bind(self, caches: Any, rows: slice) -> "FailingBinding":
        return FailingBinding(self, self.decoder.bind(caches, rows))


class FailingBinding:
    """A binding of such a decoder."""

    def __init__(self, owner: FailingDecoder, binding: Any) -> None:
        self.owner, self.binding = owner, binding

    def step(self, *arguments: Any) -> Any:
        return self._run(self.binding.step, arguments)

    def step_with_states(self, *arguments: Any) -> Any:
        return self._run(self.binding.step_with_states, arguments)

    def decode(self, *arguments: Any) -> Any:
        return self._run(self.binding.decode, arguments)

    def _run(self, act: Callable[..., Any], arguments: Sequence[Any]) -> Any:
        drawn = self.owner.rng.random()
        if drawn < self.owner.share / 2:
            raise MemoryError("before a step")
        logits = act(*arguments)
        if drawn < self.owner.share:
            raise MemoryError("after a step")
        return logits


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


@dataclass
class Soak:
    """A soak that is going on: what its threads share.

    Attributes:
        plain: Computes each request alone.
        pool: The requests.
        alone: Their outputs.
        sequences: Sequences that join at least.
        until: Time until which they go on joining.
        slots: Sequences at once in a flight.
        found: What was found.
        lock: Held where that changes.
    """

    plain: Session
    pool: list[Request]
    alone: list[Generated]
    sequences: int
    until: float
    slots: int
    found: Found = field(default_factory=Found)
    lock: Any = field(default_factory=threading.RLock)

    @property
    def is_joining(self) -> bool:
        """Whether sequences still join."""
        return self.found.sequences < self.sequences or time.perf_counter() < self.until


class Ride:
    """One flight of a soak, in a thread of its own, and who is on board."""

    def __init__(self, soak: Soak, session: Session, number: int) -> None:
        self.soak, self.session = soak, session
        self.rng = np.random.default_rng(number)
        self.flight = Flight(session, soak.slots, max(request.positions for request in soak.pool))
        self.on_board: dict[int, tuple[int, list[Generated]]] = {}
        self.measures = number == 0

    def run(self) -> None:
        """Rides until no more join and all have left; what it raises is found wrong."""
        try:
            while self.soak.is_joining or self.on_board:
                self._join()
                self._step()
                self._call_off()
                self._be_refused()
        except Exception as error:  # of whatever kind: a thread's own would be lost
            with self.soak.lock:
                self.soak.found.wrong.append(f"a flight ended: {error!r}")

    def _join(self) -> None:
        while self.soak.is_joining and len(self.on_board) < 2 * self.soak.slots and self.rng.random() < 0.6:
            index = int(self.rng.integers(len(self.soak.pool)))
            self.on_board[self.flight.join(self.soak.pool[index])] = index, []
            with self.soak.lock:
                self.soak.found.sequences += 1

    def _step(self) -> None:
        for number, piece in self.flight.step():
            self.on_board[number][1].append(piece)
            if piece.finish is None:
                continue
            index, pieces = self.on_board.pop(number)
            with self.soak.lock:
                self.soak.found.ended += 1
                if piece.finish != "error":
                    self._compare(index, joined(pieces), self.soak.alone[index])
                elif isinstance(piece.error, StepError) and isinstance(piece.error.__cause__, MemoryError):
                    self.soak.found.failed += 1
                    self._compare_begun(index, pieces)
                else:
                    self.soak.found.wrong.append(f"a request failed: {piece.error!r}")
        if self.measures and self.rng.random() < 0.1:
            self.soak.found.memory.append(resident())

    def _call_off(self) -> None:
        if self.on_board and self.rng.random() < 0.01:
            number = list(self.on_board)[self.rng.integers(len(self.on_board))]
            self.flight.leave(number)
            index, pieces = self.on_board.pop(number)
            with self.soak.lock:
                self.soak.found.called_off += 1
                self._compare_begun(index, pieces)

    def _be_refused(self) -> None:
        """Asks for what must be refused."""
        if self.rng.random() > 0.02:
            return
        session, flight = self.session, self.flight
        longest = session.max_seq
        asked = [
            lambda: session.request("What is this?", images=[np.zeros((8, 8, 3), np.uint8)]),
            lambda: session.request([1] * (longest + 1)),
            lambda: session.request([1] * longest, max_new_tokens=1),
            lambda: flight.join(session.request([1] * 10, max_new_tokens=longest - 10)),
            lambda: session.start(10**9),
            lambda: session.request("a" * 10**7),
        ]
        for ask in asked:
            try:
                ask()
            except SessionError:
                with self.soak.lock:
                    self.soak.found.refused += 1
            else:
                with self.soak.lock:
                    self.soak.found.wrong.append("what must be refused was taken")

    def _compare_begun(self, index: int, pieces: list[Generated]) -> None:
        begun = joined([piece for piece in pieces if piece.finish != "error"])
        expected = Generated(self.soak.alone[index].ids[: len(begun.ids)], "", None)
        self._compare(index, dataclasses.replace(begun, text="", finish=None), expected)

    def _compare(self, index: int, together: Generated, alone: Generated) -> None:
        compare(self.soak.plain, self.soak.pool[index], together, alone, self.soak.found)


def soak(
    keeping: Session,
    plain: Session,
    sequences: int,
    seconds: float,
    slots: int,
    size: int = POOL,
    riders: int = 1,
    failing: float = FAILING,
) -> Found:
    """Lets sequences join and leave, at least `sequences` of them and for `seconds`.

    Args:
        keeping: Runs some of them together.
        plain: Runs each alone.
        sequences: How many join.
        seconds: How long they go on joining.
        slots: Sequences at once in each flight.
        size: Requests in the pool.
        riders: Flights of each of two sessions, each in a thread.
        failing: Share of the flights' steps that lack memory.
    """
    pool = make_pool(plain, np.random.default_rng(0), size)
    alone = [run_alone(plain, request) for request in pool]
    until = time.perf_counter() + seconds
    shared = Soak(plain=plain, pool=pool, alone=alone, sequences=sequences, until=until, slots=slots)
    sessions = []
    for bytes_kept in (keeping.prefixes.limit, 0):
        decoder: Any = FailingDecoder(plain.decoder, failing)
        parts = (decoder, plain.text, plain.defaults, plain.limits)
        session = Session(*parts, prefix_bytes=bytes_kept, draft=plain.draft)
        session.lock, session.costs = plain.lock, FreeDrafts()  # they share its decoder
        sessions.append(session)
    rides = [Ride(shared, session, number) for number, session in enumerate(sessions * riders)]
    threads = [threading.Thread(target=ride.run) for ride in rides]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return shared.found


def compare(plain: Session, request: Request, together: Generated, alone: Generated, found: Found) -> None:
    """Takes down whether an output is as it is alone."""
    found.tokens += len(together.ids)
    found.reused += together.reused
    found.drafted, found.accepted = found.drafted + together.drafted, found.accepted + together.accepted
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
    parser.add_argument("--riders", type=int, default=2)
    parser.add_argument("--model", type=Path, help="Model or bundle folder; the tiny Llama 4 where none is given.")
    parser.add_argument("--draft", type=Path, help="An EAGLE-3 head of the tiny Llama 4.")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = arguments.model or export_checkpoint(TINY, Path(folder) / "model", draft=arguments.draft)
        plain = arriero.load(model, max_seq=512, threads=arguments.threads)
        keeping = Session(plain.decoder, plain.text, plain.defaults, plain.limits, prefix_bytes=PREFIX_BYTES)
        started = time.perf_counter()
        seconds, slots, riders = arguments.minutes * 60, arguments.slots, arguments.riders
        found = soak(keeping, plain, arguments.sequences, seconds, slots, riders=riders)
    minutes = (time.perf_counter() - started) / 60
    print(f"{found.sequences} sequences, {found.called_off} called off, {found.tokens} tokens in {minutes:.1f} minutes")
    print(f"{found.failed} ended by a step without memory, {found.refused} refused, {found.lost} lost")
    print(f"{found.accepted} of {found.drafted} guesses right")
    print(f"{found.reused} tokens of prompts reused, {found.ties} ties decided otherwise, {len(found.wrong)} wrong")
    parts = (part for part in np.array_split(found.memory, 8) if len(part))
    print(f"memory, MB, by eighths: {', '.join(f'{np.median(part) / 1e6:.1f}' for part in parts)}")
    print(f"growth from the second quarter to the last {found.growth / 1e6:+.2f} MB")
    for line in found.wrong[:10]:
        print(line)
    sys.exit(bool(found.wrong) or found.lost != 0 or found.growth > GROWTH * found.memory[-1])


if __name__ == "__main__":
    main()
