"""One sequence's way through a grammar: which tokens may come next.

Enters: the tokens as they are chosen. Leaves: a mask of the next ones. Invariant: where masks take long, that of the
next step is computed by another thread from the moment that a token is chosen, so that it lies ready when the model's
step is done; whoever asks for it earlier waits. One that takes less than waking that thread is computed when it is
asked for, and not at all where the likeliest token alone is asked for and may come.
"""

import threading
import time
import weakref
from collections import deque
from collections.abc import Collection, Sequence
from queue import SimpleQueue
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ...errors import ForbiddenError, shortened_text

if TYPE_CHECKING:
    from llguidance import LLMatcher

LONG = 30e-6
"""Seconds of a mask, in the mean of the last, from which on another thread computes it: waking it costs as much."""

WEIGHT = 0.1
"""The weight of a mask's time in that mean."""

BITS = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
BOUNDS = np.where(BITS == 1, np.inf, -np.inf).astype(np.float32)
"""The bounds of the logits of eight tokens, by the byte of a mask that says which of them may come."""


class Guide:
    """A grammar's matcher at one place of one sequence.

    Args:
        matcher: The matcher at the beginning; the guide's own.
        words: The mask there, 32 tokens a word.
        size: Tokens that there are.
        ends: Tokens that end the sequence: they may come where the grammar's text may end.
        textless: Tokens that write no text.
        worker: Computes masks.
    """

    def __init__(
        self,
        matcher: "LLMatcher",
        words: NDArray[np.uint32],
        size: int,
        ends: Collection[int],
        textless: Collection[int],
        worker: "MaskWorker",
    ) -> None:
        self.matcher, self.words, self.size = matcher, words.copy(), size
        self.view, self.address = self.words.data, self.words.ctypes.data  # each is slow to ask for
        self.bytes = self.words.view(np.uint8)
        self.ends = {token: token in textless for token in sorted(ends) if token < size}
        self.worker, self.ready = worker, threading.Lock()
        self.is_due, self.seconds = False, 0.0  # a mask that nobody has begun; the mean of their times
        self.is_complete, self.fault = False, ""
        self._admit_ends()
        self._end_where_nothing_follows()

    def allows(self, token: int) -> bool:
        """Whether a token may come next, as the mask has it; one alone is asked for faster than all are found."""
        if self.is_due and token not in self.ends:
            if not self.matcher.validate_tokens([token]):
                return False
            fixed = self.matcher.compute_ff_tokens()  # of text that has no choice: its first token alone may come
            return not fixed or bool(fixed[0] == token)
        self._wait()
        return self._has(token)

    def restrict(self, logits_V: NDArray[np.float32]) -> NDArray[np.float32]:
        """A copy of logits [V] in which those of tokens that may not come are -∞."""
        self._wait()
        bound_V = BOUNDS.take(self.bytes, axis=0).reshape(-1)[: len(logits_V)]  # the fastest way of several
        return np.minimum(logits_V, bound_V, out=bound_V)

    def advance(self, token: int) -> None:
        """Takes the token that was chosen, one that may come.

        Raises:
            SessionError: The grammar has become too large to follow.
        """
        self._leave_due()
        matcher = self.matcher
        if self.ends.get(token) and not matcher.validate_tokens([token]):  # no text of the grammar's
            self.is_complete = True
            return
        if not matcher.consume_token(token):
            raise self._error(matcher.get_error())
        if matcher.is_stopped():
            self.is_complete = True
        elif self.ends and self.seconds > LONG:
            self.ready.acquire()
            self.worker.fill(self)
        else:
            self.is_due = True
            self._end_where_nothing_follows()

    def fitting(self, draft: Sequence[int]) -> list[int]:
        """The first tokens of a draft, as far as the grammar takes them."""
        self._leave_due()
        return list(draft[: self.matcher.validate_tokens(list(draft))])

    def fill(self) -> None:
        """Computes the mask in a thread that is not the sequence's, which may wait for it."""
        try:
            self._compute()
        finally:
            self.ready.release()

    def _compute(self) -> None:
        """Computes the mask; whatever it raises is raised where the mask is asked for."""
        started = time.perf_counter()
        try:
            self.matcher.unsafe_compute_mask_ptr(self.address, self.view.nbytes)
            self._admit_ends()
        except Exception as error:  # of whatever kind: it belongs to this sequence, not to the worker
            self.fault = self.fault or f"{type(error).__name__}: {error}"
        self.seconds += WEIGHT * (time.perf_counter() - started - self.seconds)

    def _leave_due(self) -> None:
        """Waits until nobody is at the matcher; a mask that nobody has begun may not be needed."""
        if not self.is_due:
            self._wait()

    def _wait(self) -> None:
        """Waits until the mask is there, or computes it where nobody has begun to."""
        if self.is_due:
            self.is_due = False
            self._compute()
        elif self.ready.locked():
            if self.worker.take(self):
                self.fill()
            with self.ready:
                pass
        if self.fault:
            raise self._error(self.fault)

    def _admit_ends(self) -> None:
        """Puts the tokens that end the sequence into the mask, or takes them from it."""
        if self.matcher.is_error():
            self.fault = self.matcher.get_error()
            return
        accepts = self.matcher.is_accepting()
        for token, textless in self.ends.items():
            admitted = accepts and textless
            if self._has(token):  # the grammar has it as text: it may end the sequence where the text may end behind it
                probe = self.matcher.deep_copy()
                admitted = admitted or (probe.consume_token(token) and probe.is_accepting())
            word, bit = self.view[token >> 5], 1 << (token & 31)
            self.view[token >> 5] = word | bit if admitted else word & ~bit

    def _end_where_nothing_follows(self) -> None:
        """Without a token that could end it, a sequence is complete where no token may come."""
        if not self.ends:
            self._wait()
            bits = np.unpackbits(self.words.view(np.uint8), bitorder="little")[: self.size]
            self.is_complete = not bits.any() and self.matcher.is_accepting()

    def _has(self, token: int) -> bool:
        return bool(self.view[token >> 5] >> (token & 31) & 1)

    def _error(self, reason: str) -> ForbiddenError:
        return ForbiddenError(f"the grammar cannot be followed further ({shortened_text(reason, 200)}): simplify it")


class MaskWorker:
    """A thread that computes masks while the model's step runs. It begins with the first, and ends with its owner.

    Masks lie in a queue until the thread, or whoever needs one first, takes them: nobody waits for a mask that is not
    being computed. The thread is woken for the first of a step alone, since waking it costs more than most masks.
    """

    def __init__(self) -> None:
        self.pending: deque[Guide] = deque()
        self.bell: SimpleQueue[bool] = SimpleQueue()  # rung with False at the end
        self.lock, self.is_running = threading.Lock(), False

    def fill(self, guide: Guide) -> None:
        """Has a guide's mask computed; its `ready` is held until it is."""
        self.pending.append(guide)
        if len(self.pending) == 1:
            self._begin()
            self.bell.put(True)

    def take(self, guide: Guide) -> bool:
        """Takes a guide out of the queue, for another to compute its mask. Returns whether it was still there."""
        try:
            self.pending.remove(guide)
        except ValueError:
            return False
        return True

    def _begin(self) -> None:
        if not self.is_running:
            with self.lock:
                if not self.is_running:
                    arguments = (self.pending, self.bell)
                    threading.Thread(target=_fill_masks, args=arguments, name="masks", daemon=True).start()
                    weakref.finalize(self, self.bell.put, False)
                    self.is_running = True


def _fill_masks(pending: "deque[Guide]", bell: "SimpleQueue[bool]") -> None:
    """Computes masks as they come, until the bell rings for the end."""
    while bell.get():
        while True:
            try:
                guide = pending.popleft()
            except IndexError:
                break
            guide.fill()
            del guide  # with the last of a session, its worker may go
