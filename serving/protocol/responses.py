"""`/v1/responses`: items in, items out. Nothing is stored, so that each request holds its whole conversation."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from ..errors import RequestError
from .answers import PromptDetails, TokenLogprob
from .chat import MOST_TOOLS, Detail, Function, FunctionName
from .reading import Sized, Within
from .sampling import Choosing, Name


@dataclass(frozen=True, kw_only=True, slots=True)
class InputText:
    """A text of a message; `output_text` is one of an earlier answer."""

    type: Literal["input_text", "output_text", "text"]
    text: str
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class InputImage:
    """An image: its data, or an address on a host that the server allows."""

    type: Literal["input_image"]
    image_url: Annotated[str, Sized(least=1)]
    detail: Detail | None = None
    file_id: None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class MessageItem:
    """A message."""

    role: Literal["user", "system", "developer", "assistant"]
    content: str | Annotated[list[InputText | InputImage], Sized(least=1)]
    type: Literal["message"] | None = None
    id: Name | None = None
    status: Literal["in_progress", "completed", "incomplete"] | None = None
    phase: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class CallItem:
    """A call that an earlier answer made."""

    type: Literal["function_call"]
    call_id: Name
    name: FunctionName
    arguments: str
    id: Name | None = None
    status: Literal["in_progress", "completed", "incomplete"] | None = None
    namespace: None = None
    caller: None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class CallOutputItem:
    """A tool's answer to a call."""

    type: Literal["function_call_output"]
    call_id: Name
    output: str | Annotated[list[InputText], Sized(least=1)]
    id: Name | None = None
    status: Literal["in_progress", "completed", "incomplete"] | None = None
    name: Name | None = None
    namespace: None = None
    caller: None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ResponseTool(Function):
    """A function that may be called."""

    type: Literal["function"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ResponseNamedTool:
    """The one function that is to be called."""

    type: Literal["function"]
    name: FunctionName


@dataclass(frozen=True, kw_only=True, slots=True)
class ResponsePlain:
    """The text is free, or a JSON object."""

    type: Literal["text", "json_object"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ResponseSchema:
    """The text is JSON of a schema."""

    type: Literal["json_schema"]
    name: Annotated[str, Sized(least=1, most=64, pattern="^[a-zA-Z0-9_-]+$")]
    schema: dict[str, Any]
    description: str | None = None
    strict: bool | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ResponseText:
    """The form of the text."""

    format: ResponsePlain | ResponseSchema | None = None
    verbosity: Literal["medium"] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ResponseRequest(Choosing):
    """A conversation to be continued, as items.

    Attributes:
        input: A user's text, or the conversation's items.
        model: The model's name, as `/v1/models` lists it.
        instructions: A system message that comes first.
        max_output_tokens: New tokens at most.
        text: The form of the text.
        tools: Functions that the model may call.
        tool_choice: Whether it may, may not or must call one, or the one that it must.
        parallel_tool_calls: Whether there may be several calls in an answer.
        top_logprobs: The likeliest tokens in each place, where `include` asks for log-probabilities.
        include: What an answer has beside its text.
        truncation: A prompt that is too long is refused.
        background: Only false is taken.
        previous_response_id: Nothing is stored: only null is taken, give the whole conversation.
        stream_options: What a stream has beside its text.
        conversation: Nothing is stored: only null is taken.
        prompt: Only null is taken: give `instructions` and `input`.
        reasoning: Only null is taken.
        max_tool_calls: Only null is taken: the server calls no tool.
        context_management: Only null is taken.
    """

    input: str | Annotated[list[MessageItem | CallItem | CallOutputItem], Sized(least=1, most=4096)]
    model: Name | None = None
    instructions: str | None = None
    max_output_tokens: Annotated[int, Within(1, 1 << 31)] | None = None
    text: ResponseText | None = None
    tools: Annotated[list[ResponseTool], Sized(most=MOST_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ResponseNamedTool | None = None
    parallel_tool_calls: bool | None = None
    top_logprobs: Annotated[int, Within(0, 20)] | None = None
    include: Annotated[list[Literal["message.output_text.logprobs"]], Sized(most=1)] | None = None
    truncation: Literal["disabled"] | None = None
    background: Literal[False] | None = None
    previous_response_id: None = None
    stream_options: "ResponseStreamOptions | None" = None
    conversation: None = None
    prompt: None = None
    reasoning: None = None
    max_tool_calls: None = None
    context_management: None = None

    def __post_init__(self) -> None:
        if self.top_logprobs and not self.include:
            raise RequestError(
                "top_logprobs is given without message.output_text.logprobs in include: give it as well", "top_logprobs"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class ResponseStreamOptions:
    """Pads against listeners; only false is taken: use TLS."""

    include_obfuscation: Literal[False] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class OutputText:
    """A text of an answer."""

    type: Literal["output_text"]
    text: str
    annotations: list[Any]
    logprobs: list[TokenLogprob]


@dataclass(frozen=True, kw_only=True, slots=True)
class OutputMessage:
    """The assistant's message."""

    type: Literal["message"]
    id: str
    status: Literal["in_progress", "completed", "incomplete"]
    role: Literal["assistant"]
    content: list[OutputText]


@dataclass(frozen=True, kw_only=True, slots=True)
class OutputCall:
    """A call of the model's."""

    type: Literal["function_call"]
    id: str
    call_id: str
    name: str
    arguments: str
    status: Literal["in_progress", "completed", "incomplete"]


@dataclass(frozen=True, kw_only=True, slots=True)
class OutputDetails:
    """Tokens of an answer that are not its text."""

    reasoning_tokens: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class ResponseUsage:
    """Tokens that were read and written."""

    input_tokens: int
    input_tokens_details: PromptDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Incomplete:
    """The reason of an early end."""

    reason: Literal["max_output_tokens"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ResponseAnswer:
    """The answer to a conversation of items, and the request's settings."""

    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    background: Literal[False]
    error: dict[str, Any] | None
    incomplete_details: Incomplete | None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    model: str
    output: list[OutputMessage | OutputCall]
    parallel_tool_calls: bool
    previous_response_id: None
    reasoning: dict[str, Any]
    service_tier: Literal["default"]
    store: Literal[False]
    temperature: float | None
    text: dict[str, Any]
    tool_choice: Any
    tools: list[dict[str, Any]]
    top_logprobs: int
    top_p: float | None
    truncation: Literal["disabled"]
    usage: ResponseUsage | None
    user: str | None
