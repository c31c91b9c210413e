"""A request in a row of a state: its prompt is read in, then it goes on token by token, alone or in a flight.

Enters: a request and a row. Leaves: pieces of its continuation. Invariant: keys and values that may serve later
prompts are kept in time, before the tokens of the next chunk take their slots, and at the end.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..errors import SessionError
from .continuation import Continuation, Generated, Request
from .guesses import Guesses, Guessing
from .images.features import Features
from .prefix import Trail
from .shortlist import Row
from .state import State
from .token_session import TokenSession

NONE = Guessing()
"""No guesses."""

BEGUN = 8
"""New tokens from which on a sequence has begun: one with fewer came with those that still wait for their first."""


@dataclass(frozen=True, slots=True)
class Rider:
    """A request under way, the blocks of its sequence that are kept, and the guesses at how it goes on."""

    continuation: Continuation
    trail: Trail
    guesses: Guesses

    @property
    def has_begun(self) -> bool:
        """Whether it has had a few tokens."""
        return len(self.continuation.ids) - len(self.continuation.request.prompt.ids) >= BEGUN

    def take(self, state: State, row: int, logits_V: Row) -> Generated:
        """Chooses the next token from the logits after the last one in its row. Returns its piece."""
        piece = self.continuation.take(logits_V)
        self._keep(state, row, piece)
        return piece

    def verify(self, state: State, draft: Sequence[int], logits_SV: NDArray[np.float32]) -> list[Generated]:
        """Chooses tokens as long as they are the draft's, and one more; the rest of the draft is taken back.

        Args:
            state: Its row alone, which holds the last token and the draft.
            draft: The guessed tokens; there may be none.
            logits_SV: The logits after the last token and after each of the draft.

        Returns:
            Their pieces; the first has the draft's length, and the number of its tokens that were right.
        """
        pieces: list[Generated] = []
        for guess, logits_V in zip([*draft, None], logits_SV, strict=True):
            try:
                pieces.append(self.continuation.take(logits_V))
            except SessionError:
                if not pieces:
                    raise
                break  # the tokens before stand; the step from the last of them raises it again
            if pieces[-1].finish is not None or pieces[-1].ids != [guess]:
                break
        accepted = sum(piece.ids == [guess] for piece, guess in zip(pieces, draft, strict=False))
        pieces[0] = dataclasses.replace(pieces[0], drafted=len(draft), accepted=accepted)
        self.guesses.judge(len(draft), accepted)
        state.rewind([len(self.continuation.ids) - 1])
        self._keep(state, 0, pieces[-1])
        return pieces

    def _keep(self, state: State, row: int, last: Generated) -> None:
        keep = self.trail.follow if last.finish is None else self.trail.keep
        keep(state, row, self.continuation.ids)


class Boarding:
    """A request whose prompt is being read into a row, piece by piece.

    Args:
        session: The model.
        state: The row, alone; what it holds is forgotten.
        request: The request.
        guessing: How its next tokens are guessed.
    """

    def __init__(self, session: TokenSession, state: State, request: Request, guessing: Guessing = NONE) -> None:
        self.session, self.state, self.request, self.guessing = session, state, request, guessing
        self.features: list[NDArray[np.float32]] = []
        self.trail: Trail | None = None
        _begin(session, state, [request])

    @property
    def left(self) -> int:
        """Tokens of the prompt that its row does not hold yet."""
        return len(self.request.prompt.ids) - int(self.state.past_B[0])

    def read(self, budget: int) -> tuple[int, NDArray[np.float32] | None]:
        """Computes the next tiles of the prompt's images, or reads its next tokens, to the next chunk at most.

        Args:
            budget: Tokens at most; a tile counts as the tokens that it stands for, and one at least is computed.

        Returns:
            Tokens read, and once all are, the logits [V] after the last; None before.
        """
        pixels_N3PP, tower = self.request.prompt.pixels_N3PP, self.session.tower
        if pixels_N3PP is not None and tower is not None and len(self.features) < len(pixels_N3PP):
            per_tile = tower.spec.features
            tiles = pixels_N3PP[len(self.features) :][: max(1, budget // per_tile)]
            features_MH = self.session.encode(tiles)
            assert features_MH is not None
            self.features += np.split(features_MH, len(tiles))
            return len(tiles) * per_tile, None
        ids = self.request.prompt.ids
        if self.trail is None:
            features_MH = np.concatenate(self.features) if self.features else None
            self.trail = Trail(self.session.prefixes, self.session.image_token, features_MH, self.request.scope)
            self.trail.restore(self.state, 0, ids)
        done, chunk = int(self.state.past_B[0]), self.session.spec.chunk or len(ids)
        stop = min(done - done % chunk + chunk, done + max(1, budget), len(ids))
        logits_1V = self.session.prefill(self.state, [ids[done:stop]], self._features(done, stop))
        if stop == len(ids) or stop % chunk == 0:  # blocks are kept before the next chunk takes their slots
            self.trail.keep(self.state, 0, ids)
        return stop - done, logits_1V[0] if stop == len(ids) else None

    def riders(self, requests: Sequence[Request]) -> list[Rider]:
        """Requests of this prompt under way, the first in this row, the others each in a copy of it."""
        assert self.trail is not None
        reused = self.trail.reused
        trails = [self.trail, *(self.trail.fork() for _ in requests[1:])]
        return [
            Rider(Continuation(each, reused), trail, _guesses(self.session, each, self.guessing))
            for each, trail in zip(requests, trails, strict=True)
        ]

    def _features(self, start: int, stop: int) -> Features:
        """The image features of some of the prompt's tokens, as a session's `prefill` takes them."""
        if not self.features:
            return ()
        seen, after = (
            sum(token == self.session.image_token for token in self.request.prompt.ids[:end]) for end in (start, stop)
        )
        return [np.concatenate(self.features)[seen:after]]


def board_together(
    session: TokenSession, state: State, requests: Sequence[Request], guessing: Guessing = NONE
) -> tuple[list[Rider], NDArray[np.float32]]:
    """Reads the prompts of several requests without images at once, a row each; what the rows hold is forgotten.

    Returns:
        The requests under way, and the logits [B, V] after their prompts.
    """
    _begin(session, state, requests)
    riders = [
        Rider(
            Continuation(each),
            Trail(session.prefixes, scope=each.scope),
            _guesses(session, each, guessing),
        )
        for each in requests
    ]
    return riders, session.prefill(state, [each.prompt.ids for each in requests])


def _begin(session: TokenSession, state: State, requests: Sequence[Request]) -> None:
    """Forgets what rows hold; the draft follows those of requests for which it may be asked."""
    state.rewind([0] * len(requests))
    if state.followed is not None:
        for row, request in enumerate(requests):
            rest = session.costs.rests[request.sampling.temperature > 0]
            state.followed.heed(state.first + row, 0, not rest.is_given_up)


def _guesses(session: TokenSession, request: Request, guessing: Guessing) -> Guesses:
    return Guesses(guessing, session.costs, is_drawn=request.sampling.temperature > 0)
