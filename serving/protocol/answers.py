"""Answers of `/v1/chat/completions` and `/v1/completions`, of lists and of tokens."""

from dataclasses import dataclass
from typing import Any, Literal, cast

from .reading import ABSENT

Reason = Literal["stop", "length", "tool_calls"]
State = Literal["ok", "loading", "ready", "draining", "lost"]


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptDetails:
    """Tokens of a prompt that were known from an earlier one."""

    cached_tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Usage:
    """Tokens that were read and written."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails

    @classmethod
    def of(cls, prompt: int, completion: int, cached: int) -> "Usage":
        """Counts of an answer."""
        return cls(
            prompt_tokens=prompt,
            completion_tokens=completion,
            total_tokens=prompt + completion,
            prompt_tokens_details=PromptDetails(cached_tokens=cached),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class TopLogprob:
    """A token and its log-probability."""

    token: str
    logprob: float
    bytes: list[int]


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenLogprob(TopLogprob):
    """A new token, and the likeliest in its place."""

    top_logprobs: list[TopLogprob]


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatLogprobs:
    """Log-probabilities of new tokens."""

    content: list[TokenLogprob]
    refusal: None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class AnsweredFunction:
    """A function that is to be called, and its arguments as JSON in a text."""

    name: str
    arguments: str


@dataclass(frozen=True, kw_only=True, slots=True)
class AnsweredCall:
    """A call of the model's."""

    id: str
    type: Literal["function"]
    function: AnsweredFunction


@dataclass(frozen=True, kw_only=True, slots=True)
class AnsweredMessage:
    """The assistant's message; its calls are there where it makes some."""

    role: Literal["assistant"]
    content: str | None
    refusal: None = None
    tool_calls: list[AnsweredCall] = cast(Any, ABSENT)  # noqa: RUF009 # never changed


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatChoice:
    """One continuation of a conversation."""

    index: int
    message: AnsweredMessage
    logprobs: ChatLogprobs | None
    finish_reason: Reason


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatAnswer:
    """The continuations of a conversation."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    system_fingerprint: str
    service_tier: Literal["default"] = "default"


@dataclass(frozen=True, kw_only=True, slots=True)
class CompletionLogprobs:
    """Log-probabilities of tokens, by columns; an echoed prompt's first token has none."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


@dataclass(frozen=True, kw_only=True, slots=True)
class CompletionChoice:
    """One continuation of a prompt."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Reason


@dataclass(frozen=True, kw_only=True, slots=True)
class CompletionAnswer:
    """The continuations of prompts."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage
    system_fingerprint: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    """A model that is served.

    Attributes:
        max_model_len: Tokens of a prompt and its continuation at most.
        input_modalities: Kinds of contents that messages may have.
        output_modalities: Kinds of contents that answers have.
    """

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int
    input_modalities: list[Literal["text", "image"]]
    output_modalities: list[Literal["text"]]


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelList:
    """The models that are served: one."""

    object: Literal["list"]
    data: list[Model]


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizeAnswer:
    """The tokens of a text or of a conversation."""

    count: int
    max_model_len: int
    tokens: list[int]


@dataclass(frozen=True, kw_only=True, slots=True)
class DetokenizeAnswer:
    """The text of tokens."""

    prompt: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Health:
    """The state of the server.

    Attributes:
        status: "lost" where the model is gone for good, and the server must be started again.
        reason: Why it is lost.
    """

    status: State
    reason: str = cast(Any, ABSENT)  # never changed


@dataclass(frozen=True, kw_only=True, slots=True)
class ErrorDetails:
    """A refusal: one line, its kind, and the field that is to blame."""

    message: str
    type: str
    param: str | None
    code: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class ErrorAnswer:
    """A refusal."""

    error: ErrorDetails
