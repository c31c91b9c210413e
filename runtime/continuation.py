"""One prompt's continuation: from logits to tokens and text, until it ends.

Enters: a request, and logits after each token. Leaves: pieces of text. It knows no engine: whoever runs the model, over
one sequence or many, hands it the logits. Invariant: `ids` are the prompt and the tokens since; the last of them has
not been through the model yet.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from .chat.settings import ChatSettings
from .draws import Sampling
from .grammars.compiler import Grammar
from .logprobs import TokenLogprobs, read_logprobs
from .prompt import Tokens
from .sampling import Sampler
from .shortlist import Row, whole
from .stopping import StopText, special_texts
from .text import Text

Finish = Literal["eos", "stop", "length", "error"]
COUNTS = ("reused", "drafted", "accepted")
"""Names of the counts that a continuation has beside its tokens."""


class Settings(ChatSettings, total=False):
    """How a prompt is read and continued, in the words of `transformers`, and where it has none in those of OpenAI.

    A setting that is None or left out is as the checkpoint's generation config says.

    Attributes:
        do_sample: True draws, at the checkpoint's temperature or 1; False is greedy, whatever the temperature.
        temperature: 0 is greedy. See `sampling.Sampling` for this and those up to `seed`.
        top_k: Keep this number of the likeliest; 0 keeps all. 50 where the generation config does not say.
        top_p: Keep the likeliest that make up this probability.
        min_p: Keep those with this share of the likeliest's probability.
        typical_p: Keep those nearest to the expected information that make up this probability.
        repetition_penalty: Above 1 discourages tokens that occurred, in the prompt or since.
        frequency_penalty: From -2 to 2: above 0 discourages new tokens, the more often they occurred.
        presence_penalty: From -2 to 2: above 0 discourages new tokens that occurred.
        logit_bias: Numbers from -100 to 100 that are added to logits, by token id.
        no_repeat_ngram_size: No n-gram of this size comes twice; 0 is no limit.
        bad_words_ids: Sequences of token ids that do not come.
        min_new_tokens: No token ends the sequence before this number of new ones.
        min_length: The same with the prompt's tokens; counts only without `min_new_tokens`.
        suppress_tokens: Tokens that do not come.
        begin_suppress_tokens: Tokens that do not come first.
        seed: The seed of the draws.
        max_length: Tokens of prompt and continuation at most; counts only without `max_new_tokens`.
        eos_token_id: Tokens that end the sequence: one, or several, or an empty list for none.
        stop_strings: Texts that end it, those of special tokens too; the text returned ends before them.
        logprobs: Whether `Generated.logprobs` is filled.
        top_logprobs: Likeliest tokens in it for each new one, 20 at most.
        grammar: A grammar in llguidance's Lark that the text follows. This and the next two need `arriero[grammar]`;
            one of them is given at most. The sequence ends where the grammar does, and before only by its length or a
            stop string.
        json_schema: A JSON schema that the text follows, a dictionary or JSON text. What cannot be enforced is refused.
        regex: A regular expression that the whole text matches.
    """

    do_sample: bool | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    typical_p: float | None
    repetition_penalty: float | None
    frequency_penalty: float | None
    presence_penalty: float | None
    logit_bias: Mapping[int, float] | None
    no_repeat_ngram_size: int | None
    bad_words_ids: Sequence[Sequence[int]] | None
    min_new_tokens: int | None
    min_length: int | None
    suppress_tokens: Sequence[int] | None
    begin_suppress_tokens: Sequence[int] | None
    seed: int | None
    max_length: int | None
    eos_token_id: int | Sequence[int] | None
    stop_strings: str | Sequence[str] | None
    logprobs: bool | None
    top_logprobs: int | None
    grammar: str | None
    json_schema: Mapping[str, Any] | str | None
    regex: str | None


@dataclass(frozen=True, slots=True)
class Generated:
    """New tokens and their text: all of a continuation, or in a stream those since the last piece.

    Attributes:
        ids: New token ids, an end-of-sequence token included.
        text: Their text, without special tokens, up to a stop string.
        finish: The reason of its end: an end-of-sequence token; "stop", a stop string or the end of the grammar; the
            length; or an error of this sequence among many. None where it goes on.
        reused: Tokens of the prompt that were known from an earlier one; counted in the first piece.
        drafted: Tokens that were guessed; counted in the first piece that they were verified for.
        accepted: Drafted tokens that the model chose as well.
        error: The error that ended it; None where none did. A sequence that runs alone raises its error.
        logprobs: Log-probabilities of each new token in the model's own distribution, where they are asked for.
    """

    ids: list[int]
    text: str
    finish: Finish | None
    reused: int = field(default=0, compare=False)
    drafted: int = field(default=0, compare=False)
    accepted: int = field(default=0, compare=False)
    error: Exception | None = None
    logprobs: tuple[TokenLogprobs, ...] = field(default=(), compare=False)


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
        top_logprobs: Likeliest tokens whose log-probabilities are returned beside the chosen one's; None returns none.
        scope: Requests of one scope share the beginnings that a session keeps, those of others do not.
        grammar: The grammar that the text follows; None is free.
        shown: Texts of special tokens that belong to the text, by their ids; others have none.
    """

    prompt: Tokens
    count: int
    sampling: Sampling
    ends: frozenset[int]
    stop_strings: str | Sequence[str]
    text: Text | None = None
    top_logprobs: int | None = None
    scope: bytes = b""
    grammar: Grammar | None = None
    shown: Mapping[int, str] = field(default_factory=dict)

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
        self.guide = None if request.grammar is None else request.grammar.open(request.ends)
        self.sampler = Sampler(request.sampling, request.ends, len(self.ids), self.guide)
        self.stop = StopText(request.stop_strings)
        tokenizer = None if request.text is None else request.text.tokenizer
        self.special = special_texts(tokenizer) if self.stop.stops and tokenizer is not None else {}
        self.read: Callable[[int], str] = _no_text if request.text is None else request.text.open_stream()

    @property
    def left(self) -> int:
        """New tokens that may still come."""
        return self.request.positions - len(self.ids)

    def fitting(self, draft: list[int]) -> list[int]:
        """The first tokens of a draft, as far as the grammar takes them; all where there is none."""
        return draft if self.guide is None else self.guide.fitting(draft)

    def take(self, logits_V: Row) -> Generated:
        """Chooses the next token from the logits after the last one. Returns it with the text that it completes.

        Raises:
            SessionError: The logits are not finite, the settings forbid every token, or a grammar has grown too large.
        """
        token, top = self.sampler(logits_V, self.ids), self.request.top_logprobs
        logprobs = () if top is None else (read_logprobs(whole(logits_V), token, top),)
        self.ids.append(token)
        if self.guide is not None:
            self.guide.advance(token)
        read, shown = self.read(token), self.request.shown.get(token)
        if shown is None:
            text, stopped = self.stop.take(read, self.special.get(token, ""))
        else:
            text, stopped = self.stop.take(read + shown)
        finish: Finish | None = "stop" if stopped else "eos" if token in self.request.ends else None
        if finish is None and self.guide is not None and self.guide.is_complete:
            finish = "stop"
        if finish is None and not self.left:
            finish = "length"
        if finish is not None and not stopped:
            text += self.stop.rest()
        reused, self.reused = self.reused, 0
        return Generated([token], text, finish, reused, logprobs=logprobs)


def joined(pieces: Sequence[Generated]) -> Generated:
    """Joins the pieces of a stream into one."""
    ids = [token for piece in pieces for token in piece.ids]
    text, finish = "".join(piece.text for piece in pieces), pieces[-1].finish if pieces else "length"
    reused, drafted, accepted = (sum(getattr(piece, name) for piece in pieces) for name in COUNTS)
    logprobs = tuple(each for piece in pieces for each in piece.logprobs)
    error = pieces[-1].error if pieces else None
    return Generated(ids, text, finish, reused, drafted, accepted, error, logprobs)


def _no_text(token: int) -> str:
    """The text of a token where there is no tokenizer."""
    return ""
