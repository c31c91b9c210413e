"""Changes of the logits before a token is chosen, in the order in which `transformers` makes them.

Enters: logits, and the sequence so far. Leaves: the same logits, changed in place. Invariant: a sequence only grows, so
that each looks at its new tokens alone.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Logits = NDArray[np.float32]
FORBIDDEN = np.float32(-np.inf)


class Processor(Protocol):
    """A change of the logits."""

    def __call__(self, logits_V: Logits, seen: Sequence[int]) -> None:
        """Changes the logits in place.

        Args:
            logits_V: The logits, as the changes before have left them.
            seen: The ids of the prompt and of the tokens since: the same sequence every time, with more at its end.
        """


class LogitBias:
    """Adds a number to some tokens' logits, as OpenAI's `logit_bias`."""

    def __init__(self, bias: Mapping[int, float]) -> None:
        self.tokens, self.values = np.array(list(bias), np.int64), np.array(list(bias.values()), np.float32)

    def __call__(self, logits_V: Logits, seen: Sequence[int]) -> None:
        """Changes the logits in place."""
        logits_V[self.tokens] += self.values


class Occurrences:
    """The tokens of a sequence, each once, in the order of their coming: a step costs what its new tokens cost.

    Args:
        counted: Tokens at the beginning that do not count.
    """

    def __init__(self, counted: int = 0) -> None:
        self.counted = counted
        self.places: dict[int, int] = {}
        self._tokens, self._counts = np.empty(64, np.int64), np.empty(64, np.int64)

    def follow(self, seen: Sequence[int]) -> None:
        """Counts the tokens that are new since the last call."""
        for token in seen[self.counted :]:
            place = self.places.get(token)
            if place is None:
                place = self.places[token] = len(self.places)
                if place == len(self._tokens):
                    self._tokens, self._counts = np.resize(self._tokens, 2 * place), np.resize(self._counts, 2 * place)
                self._tokens[place], self._counts[place] = token, 0
            self._counts[place] += 1
        self.counted = max(self.counted, len(seen))

    @property
    def tokens(self) -> NDArray[np.int64]:
        """The tokens."""
        return self._tokens[: len(self.places)]

    @property
    def counts(self) -> NDArray[np.int64]:
        """The number of times that each occurred."""
        return self._counts[: len(self.places)]


class RepetitionPenalty:
    """Divides the positive logits of tokens that occurred, multiplies the negative ones (Keskar et al. 2019)."""

    def __init__(self, penalty: float) -> None:
        self.penalty, self.occurred = np.float32(penalty), Occurrences()

    def __call__(self, logits_V: Logits, seen: Sequence[int]) -> None:
        """Changes the logits in place."""
        self.occurred.follow(seen)
        tokens = self.occurred.tokens
        scores = logits_V[tokens]
        logits_V[tokens] = np.where(scores < 0, scores * self.penalty, scores / self.penalty)


class OccurrencePenalties:
    """Subtracts from the logits of new tokens that occurred, as OpenAI's `frequency_penalty` and `presence_penalty`.

    Args:
        frequency: Subtracted for each time that it occurred.
        presence: Subtracted once.
        prompt: Tokens of the prompt, which do not count.
    """

    def __init__(self, frequency: float, presence: float, prompt: int) -> None:
        self.frequency, self.presence, self.occurred = frequency, presence, Occurrences(prompt)

    def __call__(self, logits_V: Logits, seen: Sequence[int]) -> None:
        """Changes the logits in place."""
        self.occurred.follow(seen)
        counts = self.occurred.counts
        logits_V[self.occurred.tokens] -= (counts * self.frequency + self.presence).astype(np.float32)


class NoRepeatedNgrams:
    """Forbids the token that would make the last ones an n-gram that has come before, in the prompt or since."""

    def __init__(self, size: int) -> None:
        self.size, self.counted = size, 0
        self.following: dict[tuple[int, ...], set[int]] = {}

    def __call__(self, logits_V: Logits, seen: Sequence[int]) -> None:
        """Changes the logits in place."""
        before = self.size - 1
        for end in range(max(self.counted, before), len(seen)):
            self.following.setdefault(tuple(seen[end - before : end]), set()).add(seen[end])
        self.counted = len(seen)
        if self.following:
            logits_V[list(self.following.get(tuple(seen[len(seen) - before :]), ()))] = FORBIDDEN


class ForbiddenWords:
    """Forbids the last token of some sequences where those before it have just come.

    Args:
        words: The sequences; an end of sequence alone is none of them.
        ends: Tokens that end the sequence.
    """

    def __init__(self, words: Sequence[Sequence[int]], ends: Collection[int]) -> None:
        self.single = np.array([word[0] for word in words if len(word) == 1 and word[0] not in ends], np.int64)
        self.following: dict[tuple[int, ...], list[int]] = {}
        for word in words:
            if len(word) > 1:
                self.following.setdefault(tuple(word[:-1]), []).append(word[-1])
        self.lengths = {len(prefix) for prefix in self.following}

    def __call__(self, logits_V: Logits, seen: Sequence[int]) -> None:
        """Changes the logits in place."""
        logits_V[self.single] = FORBIDDEN
        for length in self.lengths:
            logits_V[self.following.get(tuple(seen[-length:]), [])] = FORBIDDEN


class ForbiddenTokens:
    """Forbids some tokens, from one length of the sequence to another.

    Args:
        tokens: Their ids.
        first: Length of the sequence from which they are forbidden.
        until: Length from which they are allowed again; None is never.
    """

    def __init__(self, tokens: Collection[int], first: int = 0, until: int | None = None) -> None:
        self.tokens, self.first, self.until = np.array(sorted(tokens), np.int64), first, until

    def __call__(self, logits_V: Logits, seen: Sequence[int]) -> None:
        """Changes the logits in place."""
        if self.first <= len(seen) and (self.until is None or len(seen) < self.until):
            logits_V[self.tokens] = FORBIDDEN
