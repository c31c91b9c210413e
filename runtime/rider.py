"""A request in a row of a state: its prompt is read in, then it goes on token by token, alone or in a flight.

Enters: a request and an empty row. Leaves: pieces of its continuation. Invariant: keys and values that may serve later
prompts are kept in time, before the tokens of the next chunk take their slots, and at the end.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .continuation import Continuation, Generated, Request
from .lookup import Lookup
from .prefix import Trail
from .state import State
from .token_session import TokenSession


@dataclass(frozen=True, slots=True)
class Rider:
    """A request under way, and the blocks of its sequence that are kept."""

    continuation: Continuation
    trail: Trail

    def take(self, state: State, row: int, logits_V: NDArray[np.float32]) -> Generated:
        """Chooses the next token from the logits after the last one in its row. Returns its piece."""
        piece = self.continuation.take(logits_V)
        self._keep(state, row, piece)
        return piece

    def verify(self, state: State, draft: Sequence[int], logits_SV: NDArray[np.float32]) -> list[Generated]:
        """Chooses tokens as long as they are the draft's, and one more; the rest of the draft is taken back.

        Args:
            state: Its row alone, which holds the last token and the draft.
            draft: The guessed tokens.
            logits_SV: The logits after the last token and after each of the draft.

        Returns:
            Their pieces; the first has the draft's length, and the number of its tokens that were right.
        """
        pieces: list[Generated] = []
        for guess, logits_V in zip([*draft, None], logits_SV, strict=True):
            pieces.append(self.continuation.take(logits_V))
            if pieces[-1].finish is not None or pieces[-1].ids != [guess]:
                break
        accepted = sum(piece.ids == [guess] for piece, guess in zip(pieces, draft, strict=False))
        pieces[0] = dataclasses.replace(pieces[0], drafted=len(draft), accepted=accepted)
        state.rewind([len(self.continuation.ids) - 1])
        self._keep(state, 0, pieces[-1])
        return pieces

    def _keep(self, state: State, row: int, last: Generated) -> None:
        keep = self.trail.follow if last.finish is None else self.trail.keep
        keep(state, row, self.continuation.ids)


def board(session: TokenSession, state: State, requests: Sequence[Request]) -> tuple[list[Rider], NDArray[np.float32]]:
    """Reads prompts, their images included, into the empty rows of a state, a row each.

    Several are read at once and have no images; of one alone a beginning that is known is not computed.

    Returns:
        The requests under way, and the logits [B, V] after their prompts.
    """
    if len(requests) > 1:
        riders = [Rider(Continuation(each), Trail(session.prefixes)) for each in requests]
        return riders, session.prefill(state, [each.prompt.ids for each in requests])
    request = requests[0]
    ids, features_MH = request.prompt.ids, session.encode(request.prompt.pixels_N3PP)
    trail = Trail(session.prefixes, session.image_token, features_MH)
    done = trail.restore(state, 0, ids)
    chunk = session.spec.chunk or len(ids)
    while done < len(ids):
        stop = min(done - done % chunk + chunk, len(ids))  # blocks are kept before the next chunk takes their slots
        seen, after = (sum(token == session.image_token for token in ids[:end]) for end in (done, stop))
        features = () if features_MH is None else [features_MH[seen:after]]
        logits_1V = session.prefill(state, [ids[done:stop]], features)
        trail.keep(state, 0, ids)
        done = stop
    return [Rider(Continuation(request, trail.reused), trail)], logits_1V


def ride_alone(session: TokenSession, request: Request, lookup: Lookup) -> Iterator[Generated]:
    """Continues one prompt, several tokens at a time where a draft of them is right."""
    if request.count == 0:
        return
    state = session.start(1, request.positions)
    (rider,), logits_1V = board(session, state, [request])
    pieces = [rider.take(state, 0, logits_1V[0])]
    yield from pieces
    ids = rider.continuation.ids
    while pieces[-1].finish is None:
        draft = lookup.draft(ids, _room(session, len(ids) - 1, rider.continuation.left))
        if session.image_token in draft:
            draft = draft[: draft.index(session.image_token)]  # no feature comes with it
        if draft:
            ((_, _, logits_SV),) = session.extend(state, [[ids[-1], *draft]])
            pieces = rider.verify(state, draft, logits_SV)
            lookup.judge(len(draft), pieces[0].accepted)
        else:
            pieces = [rider.take(state, 0, session.decode(state, ids[-1:])[0])]
        yield from pieces


def _room(session: TokenSession, past: int, left: int) -> int:
    """Tokens of a draft at most: those that fit into one piece behind the last token, and are still wanted."""
    chunk = session.spec.chunk
    in_chunk = chunk - past % chunk - 1 if chunk else left  # a piece over a boundary could not be taken back
    return min(left - 1, in_chunk, session.decoder.longest_with_logits - 1)
