"""Guesses of the next tokens of several sequences, from what came before in each or from the model's draft.

Enters: sequences under way, side by side in a state. Leaves: a few tokens for each that may come next, for the model to
verify in one piece. Invariant: guesses change nothing but the time: whoever verifies them goes on from the first token
that the model would have chosen otherwise.

A sequence that draws its tokens has the draft's guesses drawn by the same numbers from 0 to 1 as its own tokens will
be, from the likeliest on: where the draft's distribution is the model's, the guess is the token. So a text is, token
for token, the one that it would be without guesses, and its distribution the model's own, as speculative sampling
(Leviathan et al. 2023) keeps it.
"""

import time
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from .continuation import Generated, Request
from .draft_costs import DraftCosts
from .draws import Sampling, candidates, chosen
from .guesses import Guessing
from .rider import NONE, Boarding, Rider
from .state import State
from .token_session import TokenSession

LEAST_TRUST = 0.25
"""Probability that a draft must have from end to end, in the draft's own eyes; what falls below is not verified, nor
what falls below a token's cost in the piece that is verified."""

LEAD = 16
"""Steps before a draft is asked again in which it follows the sequence: its last tokens say most."""


def guess_next(session: TokenSession, state: State, riders: Sequence[Rider]) -> list[list[int]]:
    """Guesses the next tokens of sequences that lie side by side in a state, each as far as it is worth while.

    Returns:
        Each one's guesses; with its newest token they fit into one piece of any row.
    """
    if state.followed is not None:
        for row, rider in enumerate(riders):
            state.followed.heed(state.first + row, state.past_B[row], rider.guesses.resting <= LEAD)
    if not any(rider.guesses.lookup.limit for rider in riders) and not state.is_followed:
        return [rider.guesses.ask_draft(0) * [0] for rider in riders]
    room = _room(session, state)
    drafts: list[list[int]] = []
    wanted: list[int] = []
    for rider in riders:
        own = min(room, rider.continuation.left - 1)
        found = rider.guesses.lookup.draft(rider.continuation.ids, own)
        drafts.append(found)
        rider.guesses.by_draft = not found
        is_asked = state.followed is not None and not found and session.costs.knows(len(riders))
        wanted.append(rider.guesses.ask_draft(own) if is_asked else 0)
    if state.followed is not None and session.draft is not None and any(wanted):
        newest = [rider.continuation.ids[-1] for rider in riders]
        chooser = Chooser(session, riders, wanted)
        with session.lock:
            drafted = state.followed.propose(state.first, newest, wanted, chooser.choose)
        for asked, seconds in zip(chooser.asked[1:], chooser.seconds[1:], strict=True):
            session.costs.saw_draft(len(riders), asked, seconds)
        drafts = [found or by_draft for found, by_draft in zip(drafts, drafted, strict=True)]
    return [_usable(session, rider, draft) for rider, draft in zip(riders, drafts, strict=True)]


def settle(costs: DraftCosts, riders: Sequence[Rider], seconds: float, *, with_guesses: bool) -> None:
    """Books what a draft saved and cost in a step of some sequences that is over.

    Args:
        costs: What guesses cost in the session.
        riders: The sequences.
        seconds: The time of the step, with all that was done to guess.
        with_guesses: Whether there were any to verify, from wherever.
    """
    asked = [rider.guesses for rider in riders if rider.guesses.is_asked]
    if asked and (cost := costs.beyond_step(len(riders), seconds)) is not None:
        for guesses in asked:
            guesses.book(cost * len(riders) / len(asked))
    elif not with_guesses:
        costs.saw_step(len(riders), seconds)


class Chooser:
    """Chooses guesses from a draft's logits, as each sequence's own tokens are chosen from the model's.

    Args:
        session: The model, with its draft.
        riders: The sequences.
        counts: Tokens that are guessed of each at most.
    """

    def __init__(self, session: TokenSession, riders: Sequence[Rider], counts: Sequence[int]) -> None:
        samplers = [rider.continuation.sampler for rider in riders]
        self.tokens = None if session.draft is None else session.draft.tokens
        self.sampling = [sampler.sampling for sampler in samplers]
        self.draws = [sampler.coming(count) for sampler, count in zip(samplers, counts, strict=True)]
        self.trust = [1.0] * len(samplers)
        self.least_verified = max(LEAST_TRUST, session.costs.verifying)
        self.least = [rider.guesses.least_trust for rider in riders]
        self.asked, self.seconds, self.began = list[int](), list[float](), time.perf_counter()

    def choose(self, row: int, step: int, logits_V: NDArray[np.float32]) -> tuple[int | None, bool]:
        """A guess at a row's token `step` after its newest, None where the draft does not trust itself.

        Returns:
            The guess, and whether the draft trusts it enough to go on behind it.
        """
        self._note(step)
        draws = self.draws[row]
        token, temperature = int(logits_V.argmax()), 1.0
        if draws is not None:
            token, temperature = drawn(logits_V, self.sampling[row], draws[step]), self.sampling[row].temperature
        with np.errstate(over="ignore", invalid="ignore"):
            self.trust[row] /= float(np.exp((logits_V - logits_V[token]) / temperature).sum())
        if not self.trust[row] >= self.least_verified:  # or no number
            return None, False
        guess = token if self.tokens is None else int(self.tokens[token])
        return guess, self.trust[row] >= self.least[row]

    def _note(self, step: int) -> None:
        """Takes down the time of a step, with the choices after the one before it, and for how many rows it is made."""
        if step == len(self.seconds):
            now = time.perf_counter()
            self.seconds.append(now - self.began)
            self.asked.append(0)
            self.began = now
        self.asked[step] += 1


def drawn(logits_V: NDArray[np.float32], sampling: Sampling, draw: float) -> int:
    """The token of a draft that a draw chooses, by the filters of the settings but without their penalties."""
    token = int(logits_V.argmax())
    if not np.isfinite(logits_V[token]):
        return token
    below_V = logits_V - logits_V[token]
    tokens, total = candidates(below_V, sampling, draw)
    tokens = tokens[np.argsort(-below_V[tokens], kind="stable")]
    return int(tokens[chosen(below_V[tokens], sampling, draw, total)])


def _usable(session: TokenSession, rider: Rider, draft: list[int]) -> list[int]:
    """A draft up to an image's token, with which no feature comes, and as far as the grammar takes it."""
    if session.image_token in draft:
        draft = draft[: draft.index(session.image_token)]
    return rider.continuation.fitting(draft)


def _room(session: TokenSession, state: State) -> int:
    """Guesses at most: those with which the newest token fits into a piece of any row, within its chunk.

    A piece over a boundary could not be taken back; and a row is padded to the length of the longest.
    """
    chunk, past = session.spec.chunk, int(state.past_B.max())
    rooms = [session.decoder.longest_with_logits - 1, state.caches.positions - past - 1]
    if chunk:
        rooms.append(chunk - 1 - int((state.past_B % chunk).max()))
    return max(0, min(rooms))


def ride_alone(session: TokenSession, request: Request, guessing: Guessing = NONE) -> Iterator[Generated]:
    """Continues one prompt, several tokens at a time where guesses of them are right."""
    if request.count == 0:
        return
    state = session.start(1, request.positions, drafted=guessing.draft > 0)
    boarding, logits_V = Boarding(session, state, request, guessing), None
    while logits_V is None:
        _, logits_V = boarding.read(session.decoder.longest)
    (rider,) = boarding.riders([request])
    pieces = [rider.take(state, 0, logits_V)]
    yield from pieces
    ids = rider.continuation.ids
    while pieces[-1].finish is None:
        started = time.perf_counter()
        (draft,) = guess_next(session, state, [rider]) if rider.guesses.are_on else [[]]
        if draft:
            (logits_SV,) = session.verify(state, [[ids[-1], *draft]])
            pieces = rider.verify(state, draft, logits_SV)
        else:
            pieces = [rider.take(state, 0, session.decode_rows(state, ids[-1:])[0])]
        settle(session.costs, [rider], time.perf_counter() - started, with_guesses=bool(draft))
        yield from pieces
