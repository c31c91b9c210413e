"""From logits to the next token: greedy, or drawn after the filters that `transformers` knows, in its order.

The changes of `processors` first, then a grammar's mask, temperature, top-k, top-p, min-p, typical-p. The same seed
draws the same tokens.
"""

import copy
import math
from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import NDArray

from ..errors import ForbiddenError, SessionError
from .draws import Sampling, candidates, chosen
from .grammars.guide import Guide
from .processors import (
    FORBIDDEN,
    ForbiddenTokens,
    ForbiddenWords,
    LogitBias,
    NoRepeatedNgrams,
    OccurrencePenalties,
    Processor,
    RepetitionPenalty,
)
from .shortlist import Row, Shortlist


def open_processors(sampling: Sampling, ends: Collection[int], prompt: int) -> list[Processor]:
    """Opens the changes that the settings ask for, for one sequence.

    Args:
        sampling: The settings.
        ends: Tokens that end the sequence.
        prompt: Number of the prompt's tokens.
    """
    processors: list[Processor] = []
    if sampling.logit_bias:
        processors.append(LogitBias(sampling.logit_bias))
    if sampling.repetition_penalty != 1:
        processors.append(RepetitionPenalty(sampling.repetition_penalty))
    if sampling.frequency_penalty or sampling.presence_penalty:
        processors.append(OccurrencePenalties(sampling.frequency_penalty, sampling.presence_penalty, prompt))
    if sampling.no_repeat_ngram_size:
        processors.append(NoRepeatedNgrams(sampling.no_repeat_ngram_size))
    if sampling.bad_words_ids:
        processors.append(ForbiddenWords(sampling.bad_words_ids, ends))
    shortest = prompt + sampling.min_new_tokens if sampling.min_new_tokens else sampling.min_length
    if ends and shortest > prompt:
        processors.append(ForbiddenTokens(ends, until=shortest))
    if sampling.suppress_tokens:
        processors.append(ForbiddenTokens(sampling.suppress_tokens))
    if sampling.begin_suppress_tokens:
        processors.append(ForbiddenTokens(sampling.begin_suppress_tokens, prompt, prompt + 1))
    return processors


class Sampler:
    """Draws the tokens of one sequence, one after another.

    Args:
        sampling: The settings by which tokens are chosen.
        ends: Tokens that end the sequence.
        prompt: Number of the prompt's tokens.
        guide: Says which tokens may come, whatever the settings make of the others; None allows all.
    """

    def __init__(
        self, sampling: Sampling, ends: Collection[int] = (), prompt: int = 0, guide: Guide | None = None
    ) -> None:
        self.sampling, self.guide = sampling, guide
        self.rng = np.random.default_rng(sampling.seed)
        self.processors = open_processors(sampling, ends, prompt)
        self.changed_V = np.empty(0, np.float32)  # memory that is new each time would cost more than the changes

    def __call__(self, logits_V: Row, seen: Sequence[int]) -> int:
        """Chooses the next token.

        Args:
            logits_V: The model's logits, or a shortlist of them.
            seen: The ids of the prompt and of the tokens since: the same sequence every time, with more at its end.

        Raises:
            SessionError: The logits are not finite, or the settings forbid every token.
        """
        draw = None
        if isinstance(logits_V, Shortlist):
            if not (logits_V.odd or self.processors):
                likeliest = int(logits_V.tokens[0])
                if self.sampling.temperature == 0 and (self.guide is None or self.guide.allows(likeliest)):
                    return likeliest
                if self.sampling.temperature != 0 and self.guide is None:
                    draw = self.rng.random()
                    if (found := logits_V.draw(self.sampling, draw)) is not None:
                        return found
            logits_V = logits_V.whole()
        token = int(logits_V.argmax())  # of the first NaN where there is one
        if not (math.isfinite(logits_V[token]) and math.isfinite(logits_V.min())):
            raise _not_finite(logits_V)
        if self.processors:
            if len(self.changed_V) != len(logits_V):
                self.changed_V = np.empty(len(logits_V), np.float32)
            np.copyto(self.changed_V, logits_V)
            logits_V = self.changed_V
            for process in self.processors:
                process(logits_V, seen)
            token = int(logits_V.argmax())
        if self.guide is not None and not (self.sampling.temperature == 0 and self.guide.allows(token)):
            logits_V = self.guide.restrict(logits_V)
            token = int(logits_V.argmax())
        if not math.isfinite(top := logits_V[token]):
            among = "" if self.guide is None else " that the grammar allows"
            wrong = f"the settings forbid every token{among}, or make a logit too large"
            raise ForbiddenError(f"{wrong}: forbid or bias less")
        if self.sampling.temperature == 0:
            return token
        return self._draw(logits_V - top, self.rng.random() if draw is None else draw)

    def coming(self, count: int) -> list[float] | None:
        """The numbers by which the next tokens will be drawn; None where they are not drawn."""
        if self.sampling.temperature == 0:
            return None
        return copy.deepcopy(self.rng).random(count).tolist()

    def _draw(self, below_V: NDArray[np.float32], draw: float) -> int:
        """Chooses a token by a draw from 0 to 1 and the logits less the largest of them."""
        tokens, total = candidates(below_V, self.sampling, draw)
        tokens = tokens[below_V[tokens] > FORBIDDEN]  # a grammar forbids most of them
        tokens = tokens[np.argsort(-below_V[tokens], kind="stable")]
        return int(tokens[chosen(below_V[tokens], self.sampling, draw, total)])


def _not_finite(logits_V: NDArray[np.float32]) -> SessionError:
    """The error for a model's logits of which some are no finite numbers."""
    odd = np.count_nonzero(~np.isfinite(logits_V))
    return SessionError(
        f"{odd} of the model's {len(logits_V)} logits are no finite numbers: a weight is damaged or a type too narrow; "
        "find it with `arriero check --locate`, or export again from an intact checkpoint"
    )
