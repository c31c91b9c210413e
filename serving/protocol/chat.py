"""`/v1/chat/completions`: a conversation to be continued."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from ..errors import RequestError
from .reading import Sized, Within
from .sampling import MOST_CHOICES, Choosing, Name, StreamOptions

MOST_MESSAGES = 4096
MOST_TOOLS = 128
Text = Annotated[str, Sized()]
Detail = Literal["auto", "low", "high"]
FunctionName = Annotated[str, Sized(least=1, most=64, pattern="^[a-zA-Z0-9_.-]+$")]


@dataclass(frozen=True, kw_only=True, slots=True)
class TextPart:
    """A text among a message's parts."""

    type: Literal["text"]
    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class RefusalPart:
    """A refusal of the assistant's, as earlier answers have it; it is read as text."""

    type: Literal["refusal"]
    refusal: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageAddress:
    """An image.

    Attributes:
        url: Its data, `data:image/png;base64,…`, or an address on a host that the server allows.
        detail: Whether it is seen whole and in tiles, as its size says, or (low) made as small as one tile first.
    """

    url: Annotated[str, Sized(least=1)]
    detail: Detail | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ImagePart:
    """An image among a message's parts."""

    type: Literal["image_url"]
    image_url: ImageAddress


@dataclass(frozen=True, kw_only=True, slots=True)
class CalledFunction:
    """A function with its arguments, as JSON in a text."""

    name: FunctionName
    arguments: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ToolCall:
    """A call that the assistant made."""

    id: Name
    type: Literal["function"]
    function: CalledFunction


@dataclass(frozen=True, kw_only=True, slots=True)
class Instruction:
    """A message that says how to answer."""

    role: Literal["system", "developer"]
    content: str | Annotated[list[TextPart], Sized(least=1)]
    name: Name | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class UserMessage:
    """A user's message: a text, or texts and images."""

    role: Literal["user"]
    content: str | Annotated[list[TextPart | ImagePart], Sized(least=1)]
    name: Name | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class AssistantMessage:
    """An earlier answer."""

    role: Literal["assistant"]
    content: str | Annotated[list[TextPart | RefusalPart], Sized(least=1)] | None = None
    refusal: str | None = None
    name: Name | None = None
    tool_calls: Annotated[list[ToolCall], Sized(most=MOST_TOOLS)] | None = None
    annotations: list[Any] | None = None
    audio: None = None
    function_call: None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ToolMessage:
    """A tool's answer to a call."""

    role: Literal["tool"]
    content: str | Annotated[list[TextPart], Sized(least=1)]
    tool_call_id: Name
    name: Name | None = None


Message = Instruction | UserMessage | AssistantMessage | ToolMessage


@dataclass(frozen=True, kw_only=True, slots=True)
class Function:
    """A function that may be called.

    Attributes:
        name: Its name.
        description: What it is for, for the model to read.
        parameters: The JSON schema of its arguments.
        strict: Whether arguments must match the schema, where the model decides to call; those of required and named
            calls always do.
    """

    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Tool:
    """A tool that the model may call."""

    type: Literal["function"]
    function: Function


@dataclass(frozen=True, kw_only=True, slots=True)
class FunctionChoice:
    """The name of a function."""

    name: FunctionName


@dataclass(frozen=True, kw_only=True, slots=True)
class NamedTool:
    """The one tool that is to be called."""

    type: Literal["function"]
    function: FunctionChoice


@dataclass(frozen=True, kw_only=True, slots=True)
class NamedSchema:
    """A JSON schema with a name."""

    name: Annotated[str, Sized(least=1, most=64, pattern="^[a-zA-Z0-9_-]+$")]
    schema: dict[str, Any] | None = None
    description: str | None = None
    strict: bool | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class TextFormat:
    """The text is free."""

    type: Literal["text"]


@dataclass(frozen=True, kw_only=True, slots=True)
class JsonFormat:
    """The text is a JSON object."""

    type: Literal["json_object"]


@dataclass(frozen=True, kw_only=True, slots=True)
class SchemaFormat:
    """The text is JSON of a schema."""

    type: Literal["json_schema"]
    json_schema: NamedSchema


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatRequest(Choosing):
    """A conversation to be continued by the assistant.

    Attributes:
        messages: The turns.
        model: The model's name, as `/v1/models` lists it.
        n: Continuations; the prompt is read once for all.
        max_tokens: New tokens at most; the older name of the next.
        max_completion_tokens: New tokens at most.
        logprobs: Whether the tokens' log-probabilities are given.
        top_logprobs: The likeliest tokens in each place, with `logprobs` only.
        stream_options: What a stream has beside its text.
        response_format: The form of the text.
        tools: Functions that the model may call.
        tool_choice: Whether it may (auto), may not (none) or must (required) call one, or the one that it must.
        parallel_tool_calls: Whether there may be several calls in an answer.
        modalities: Only text is written.
        verbosity: Only the usual one is taken.
        functions: Only null is taken: give `tools`.
        function_call: Only null is taken: give `tool_choice`.
        audio: Only null is taken.
        prediction: Only null is taken.
        reasoning_effort: Only null is taken.
        web_search_options: Only null is taken.
    """

    messages: Annotated[list[Message], Sized(least=1, most=MOST_MESSAGES)]
    model: Name | None = None
    n: Annotated[int, Within(1, MOST_CHOICES)] | None = None
    max_tokens: Annotated[int, Within(1, 1 << 31)] | None = None
    max_completion_tokens: Annotated[int, Within(1, 1 << 31)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Within(0, 20)] | None = None
    stream_options: StreamOptions | None = None
    response_format: TextFormat | JsonFormat | SchemaFormat | None = None
    tools: Annotated[list[Tool], Sized(most=MOST_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    modalities: Annotated[list[Literal["text"]], Sized(most=1)] | None = None
    verbosity: Literal["medium"] | None = None
    functions: None = None
    function_call: None = None
    audio: None = None
    prediction: None = None
    reasoning_effort: None = None
    web_search_options: None = None

    def __post_init__(self) -> None:
        if self.top_logprobs and not self.logprobs:
            raise RequestError("top_logprobs is given without logprobs: give logprobs true as well", "top_logprobs")
        if self.max_tokens and self.max_completion_tokens and self.max_tokens != self.max_completion_tokens:
            raise RequestError("max_tokens and max_completion_tokens differ: give one of them", "max_tokens")
        if self.stream_options is not None and not self.stream:
            raise RequestError("stream_options is given without stream: give stream true as well", "stream_options")
        chosen, names = self.tool_choice, [tool.function.name for tool in self.tools or ()]
        if doubled := [name for name in names if names.count(name) > 1]:
            raise RequestError(f"tools has two functions named {doubled[0]}: name each otherwise", "tools")
        if not names and chosen not in (None, "none", "auto"):
            raise RequestError("tool_choice asks for a call, but tools has none: give tools", "tool_choice")
        if isinstance(chosen, NamedTool) and chosen.function.name not in names:
            raise RequestError(f"tool_choice names {chosen.function.name}, which is not among the tools", "tool_choice")
        self._check_constraints((bool(names) and chosen in ("required",)) or isinstance(chosen, NamedTool))

    @property
    def limit(self) -> int | None:
        """New tokens at most."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def limit_field(self) -> str:
        """The field that names it."""
        return "max_completion_tokens" if self.max_completion_tokens else "max_tokens"

    @property
    def binds_calls(self) -> bool:
        """Whether the model decides about calls, and they are bound: of strict functions, or beside a schema."""
        if not self.tools or self.tool_choice not in (None, "auto"):
            return False
        return self.json_schema is not None or any(tool.function.strict for tool in self.tools)

    @property
    def json_schema(self) -> dict[str, Any] | None:
        """The schema that the text is to match; None where there is none."""
        if isinstance(self.response_format, JsonFormat):
            return {"type": "object"}
        if isinstance(self.response_format, SchemaFormat):
            found = self.response_format.json_schema.schema
            return {} if found is None else found
        return None

    def _check_constraints(self, must_call: bool) -> None:
        """Refuses two constraints of one text."""
        given = {
            "response_format": self.json_schema is not None,
            "grammar": self.grammar is not None,
            "regex": self.regex is not None,
            "tool_choice": must_call,
        }
        if len(names := [name for name, is_given in given.items() if is_given]) > 1:
            raise RequestError(f"{names[0]} and {names[1]} exclude each other: give one of them", names[1])
        if self.binds_calls and (self.grammar is not None or self.regex is not None):
            name = "regex" if self.grammar is None else "grammar"
            raise RequestError(f"{name} and strict tools exclude each other: give one of them, or no strict", name)
