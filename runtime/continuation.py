"""One prompt's continuation: from logits to tokens and text, until it ends.

Enters: a request, and logits after each token. Leaves: pieces of text. It knows no engine: whoever runs the model, over
one sequence or many, hands it the logits. Invariant: `ids` are the prompt and the tokens since; the last of them has
not been through the model yet.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from .chat.settings import ChatSettings
from .prompt import Tokens
from .sampling import Sampler, Sampling
from .stopping import StopText
from .text import Text

Finish = Literal["eos", "stop", "length"]
COUNTS = ("reused", "drafted", "accepted")
"""Names of the counts that a continuation has beside its tokens."""


class Settings(ChatSettings, total=False):
    """How a prompt is read and continued, in the words of `transformers`' `apply_chat_template` and `generate`.

    A setting that is None or left out is as the checkpoint's generation config says.

    Attributes:
        temperature: 0 is greedy. See `sampling.Sampling` for this and the next four.
        top_k: Keep this number of the likeliest; 0 keeps all.
        top_p: Keep the likeliest that make up this probability.
        min_p: Keep those with this share of the likeliest's probability.
        repetition_penalty: Above 1 discourages tokens that occurred.
        seed: The seed of the draws.
        eos_token_id: Tokens that end the sequence: one, or several, or an empty list for none.
        stop_strings: Texts that end it; the text returned ends before them.
    """

    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    seed: int | None
    eos_token_id: int | Sequence[int] | None
    stop_strings: str | Sequence[str] | None


@dataclass(frozen=True, slots=True)
class Generated:
    """New tokens and their text: all of a continuation, or in a stream those since the last piece.

    Attributes:
        ids: New token ids, an end-of-sequence token included.
        text: Their text, without special tokens, up to a stop string.
        finish: The reason of its end: an end-of-sequence token, a stop string, or the length; None where it goes on.
        reused: Tokens of the prompt that were known from an earlier one; counted in the first piece.
        drafted: Tokens that prompt lookup guessed; counted in the first piece that they were verified for.
        accepted: Drafted tokens that the model chose as well.
    """

    ids: list[int]
    text: str
    finish: Finish | None
    reused: int = field(default=0, compare=False)
    drafted: int = field(default=0, compare=False)
    accepted: int = field(default=0, compare=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """A prompt and how it is to be continued, checked.

    Attributes:
        prompt: Token ids and tiles.
        count: New tokens at most.
        sampling: The choice of tokens.
        ends: Tokens that end the sequence.
        stop_strings: Texts that end it.
        text: The tokenizer that writes the new tokens' text; None gives token ids and no text.
    """

    prompt: Tokens
    count: int
    sampling: Sampling
    ends: frozenset[int]
    stop_strings: str | Sequence[str]
    text: Text | None = None

    @property
    def positions(self) -> int:
        """Tokens that its sequence may have."""
        return len(self.prompt.ids) + self.count

    @property
    def is_plain(self) -> bool:
        """Whether there is something to do, and no image in it."""
        return self.count > 0 and self.prompt.pixels_N3PP is None


class Continuation:
    """A request under way.

    Args:
        request: The prompt and how to continue it.
        reused: Tokens of the prompt that were known.
    """

    def __init__(self, request: Request, reused: int = 0) -> None:
        self.request, self.ids, self.reused = request, list(request.prompt.ids), reused
        self.sampler, self.stop = Sampler(request.sampling), StopText(request.stop_strings)
        self.read: Callable[[int], str] = _no_text if request.text is None else request.text.open_stream()

    @property
    def left(self) -> int:
        """New tokens that may still come."""
        return self.request.positions - len(self.ids)

    def take(self, logits_V: NDArray[np.float32]) -> Generated:
        """Chooses the next token from the logits after the last one. Returns it with the text that it completes."""
        token = self.sampler(logits_V, self.ids)
        self.ids.append(token)
        text, stopped = self.stop.take(self.read(token))
        finish: Finish | None = "stop" if stopped else "eos" if token in self.request.ends else None
        if finish is None and not self.left:
            finish = "length"
        if finish in ("eos", "length"):
            text += self.stop.rest()
        reused, self.reused = self.reused, 0
        return Generated([token], text, finish, reused)


def joined(pieces: Sequence[Generated]) -> Generated:
    """Joins the pieces of a stream into one."""
    ids = [token for piece in pieces for token in piece.ids]
    text, finish = "".join(piece.text for piece in pieces), pieces[-1].finish if pieces else "length"
    reused, drafted, accepted = (sum(getattr(piece, name) for piece in pieces) for name in COUNTS)
    return Generated(ids, text, finish, reused, drafted, accepted)


def _no_text(token: int) -> str:
    """The text of a token where there is no tokenizer."""
    return ""
