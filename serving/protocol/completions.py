"""`/v1/completions`, and texts to tokens and back: prompts without a conversation."""

from dataclasses import dataclass
from typing import Annotated, Literal

from ..errors import RequestError
from .chat import MOST_MESSAGES, Message, Tool
from .reading import Sized, Within
from .sampling import MOST_CHOICES, Choosing, Name, StreamOptions

TokenId = Annotated[int, Within(0, (1 << 31) - 1)]
Ids = Annotated[list[TokenId], Sized(least=1)]
MOST_PROMPTS = 64
DEFAULT_TOKENS = 16
"""New tokens where a completion names no number, as in OpenAI's interface."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CompletionRequest(Choosing):
    """One prompt or several to be continued.

    Attributes:
        prompt: A text, token ids, or a list of either.
        model: The model's name, as `/v1/models` lists it.
        n: Continuations of each prompt.
        best_of: As `n`; no more are made than are given.
        max_tokens: New tokens at most, 16 where nothing is said.
        echo: Whether the prompt's text comes before the new one, and its tokens' log-probabilities before theirs.
        logprobs: The likeliest tokens in each place whose log-probabilities are given, beside the chosen one's.
        stream_options: What a stream has beside its text.
        suffix: Text that follows; only an empty one is taken.
    """

    prompt: (
        Annotated[str, Sized(least=1)]
        | Ids
        | Annotated[list[Annotated[str, Sized(least=1)]], Sized(least=1, most=MOST_PROMPTS)]
        | Annotated[list[Ids], Sized(least=1, most=MOST_PROMPTS)]
    )
    model: Name | None = None
    n: Annotated[int, Within(1, MOST_CHOICES)] | None = None
    best_of: Annotated[int, Within(1, MOST_CHOICES)] | None = None
    max_tokens: Annotated[int, Within(0, 1 << 31)] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Within(0, 20)] | None = None
    stream_options: StreamOptions | None = None
    suffix: Literal[""] | None = None

    def __post_init__(self) -> None:
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise RequestError(f"best_of is {self.best_of} and n {self.n or 1}: give both alike", "best_of")
        if self.stream_options is not None and not self.stream:
            raise RequestError("stream_options is given without stream: give stream true as well", "stream_options")
        if self.grammar is not None and self.regex is not None:
            raise RequestError("grammar and regex exclude each other: give one of them", "regex")

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, one or several."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]  # which may be millions
        return [each for each in self.prompt if isinstance(each, str | list)]


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizeRequest:
    """A text or a conversation to be read into tokens.

    Attributes:
        prompt: A text.
        messages: A conversation, written by the chat template.
        tools: Functions that the conversation's template is shown.
        add_special_tokens: Whether a text gets the tokenizer's own tokens before it; true unless given.
        add_generation_prompt: Whether a conversation ends where the assistant begins to speak; true unless given.
        model: The model's name, as `/v1/models` lists it.
    """

    prompt: str | None = None
    messages: Annotated[list[Message], Sized(least=1, most=MOST_MESSAGES)] | None = None
    tools: Annotated[list[Tool], Sized(most=128)] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    model: Name | None = None

    def __post_init__(self) -> None:
        if (self.prompt is None) == (self.messages is None):
            raise RequestError("expected one of prompt and messages", "prompt")


@dataclass(frozen=True, kw_only=True, slots=True)
class DetokenizeRequest:
    """Tokens to be written as text.

    Attributes:
        tokens: Token ids.
        model: The model's name, as `/v1/models` lists it.
    """

    tokens: list[TokenId]
    model: Name | None = None
