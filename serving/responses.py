"""`/v1/responses`: a conversation of items as a chat, and its answer as items, whole or as a stream of events."""

import dataclasses
import json
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ..runtime import Generated
from .chat import open_chat
from .choices import finish_all, new_id, usage_of
from .errors import RequestError
from .protocol import chat
from .protocol.answers import PromptDetails
from .protocol.reading import plain
from .protocol.responses import (
    CallItem,
    CallOutputItem,
    InputImage,
    InputText,
    MessageItem,
    OutputDetails,
    ResponseAnswer,
    ResponseNamedTool,
    ResponseRequest,
    ResponseSchema,
    ResponseUsage,
)
from .protocol.sampling import SAME
from .rides import Ride
from .service import Service

FIELDS = {"response_format": "text.format", "max_completion_tokens": "max_output_tokens", "messages": "input"}
"""Fields of this interface by those of a chat's."""


@contextmanager
def own_fields() -> Iterator[None]:
    """Names this interface's fields in refusals that name those of a chat."""
    try:
        yield
    except RequestError as error:
        own, line = FIELDS.get(re.split(r"[\[.]", error.param or "")[0], error.param), error.message
        if error.param is not None and own is not None and line.startswith(f"{error.param} "):
            line = own + line.removeprefix(error.param)
        raise RequestError(line, own, status=error.status, code=error.code, headers=error.headers) from error


def as_chat(request: ResponseRequest) -> chat.ChatRequest:
    """A request as one for `/v1/chat/completions`.

    Raises:
        RequestError: Its items do not make a conversation, or fields contradict each other.
    """
    return chat.ChatRequest(
        messages=_messages(request),
        max_completion_tokens=request.max_output_tokens,
        logprobs=True if request.include else None,
        top_logprobs=request.top_logprobs if request.include else None,
        response_format=_format(request),
        tools=[_tool(tool) for tool in request.tools or ()] or None,
        tool_choice=_choice(request.tool_choice),
        **{name: getattr(request, name) for name in (*SAME, *SHARED)},
    )


SHARED = ("model", "parallel_tool_calls", "seed", "stop", "stream", "user", "safety_identifier", "prompt_cache_key")
"""Fields that both interfaces have."""


def _messages(request: ResponseRequest) -> list[chat.Message]:
    found: list[chat.Message] = []
    if request.instructions is not None:
        found.append(chat.Instruction(role="system", content=request.instructions))
    if isinstance(request.input, str):
        return [*found, chat.UserMessage(role="user", content=request.input)]
    for item in request.input:
        if isinstance(item, CallItem):
            function = chat.CalledFunction(name=item.name, arguments=item.arguments)
            call = chat.ToolCall(id=item.call_id, type="function", function=function)
            last = found.pop() if found and isinstance(found[-1], chat.AssistantMessage) else None
            answer = last if isinstance(last, chat.AssistantMessage) else chat.AssistantMessage(role="assistant")
            found.append(dataclasses.replace(answer, tool_calls=[*(answer.tool_calls or ()), call]))
        elif isinstance(item, CallOutputItem):
            output = item.output if isinstance(item.output, str) else "".join(each.text for each in item.output)
            found.append(chat.ToolMessage(role="tool", content=output, tool_call_id=item.call_id))
        else:
            found.append(_message(item))
    return found


def _message(item: MessageItem) -> chat.Message:
    parts: Any = item.content
    if isinstance(item.content, list):
        parts = [_part(part, item.role) for part in item.content]
    if item.role == "user":
        return chat.UserMessage(role="user", content=parts)
    if item.role == "assistant":
        return chat.AssistantMessage(role="assistant", content=parts)
    return chat.Instruction(role="system", content=parts)


def _part(part: InputText | InputImage, role: str) -> chat.TextPart | chat.ImagePart:
    if isinstance(part, InputText):
        return chat.TextPart(type="text", text=part.text)
    if role != "user":
        raise RequestError(f"an image stands in a message of the role {role}: put it into a user's", "input")
    return chat.ImagePart(type="image_url", image_url=chat.ImageAddress(url=part.image_url, detail=part.detail))


def _format(request: ResponseRequest) -> Any:
    given = None if request.text is None else request.text.format
    if isinstance(given, ResponseSchema):
        named = chat.NamedSchema(name=given.name, schema=given.schema)
        return chat.SchemaFormat(type="json_schema", json_schema=named)
    return chat.JsonFormat(type="json_object") if given is not None and given.type == "json_object" else None


def _tool(tool: chat.Function) -> chat.Tool:
    function = chat.Function(
        name=tool.name, description=tool.description, parameters=tool.parameters, strict=tool.strict
    )
    return chat.Tool(type="function", function=function)


def _choice(chosen: Any) -> Any:
    if isinstance(chosen, ResponseNamedTool):
        return chat.NamedTool(type="function", function=chat.FunctionChoice(name=chosen.name))
    return chosen


async def whole_response(service: Service, request: ResponseRequest, ride: Ride) -> dict[str, Any]:
    """Waits for the answer. Returns it."""
    writer = ResponseWriter(service, request, ride)
    await finish_all(ride, [writer.choice])
    return writer.whole()


class ResponseWriter:
    """Writes a ride as events.

    Args:
        service: The model.
        request: The request.
        ride: Its ride.
    """

    def __init__(self, service: Service, request: ResponseRequest, ride: Ride) -> None:
        self.service, self.request, self.ride = service, request, ride
        (self.choice,) = open_chat(service, as_chat(request), ride)
        self.id, self.message_id, self.created = new_id("resp"), new_id("msg"), int(time.time())
        self.call_ids: list[str] = []
        self.number = 0
        self.logprobs: list[dict[str, Any]] = []  # of tokens whose text, if they have any, is still held back
        self.places: dict[str, int] = {}

    def begin(self) -> bytes:
        """The answer before its output."""
        found = self._answer("in_progress", [])
        return self._event("response.created", response=found) + self._event("response.in_progress", response=found)

    def write(self, index: int, piece: Generated) -> bytes:
        """The events of a piece."""
        added = self.choice.take(piece)
        if self.request.include:
            self.logprobs += self.service.texts.chat(added.logprobs)
        found = self._open_message() + self._text(added.content) if added.content else b""
        for call in added.calls:
            found += self._call(call)
        return found

    def end(self) -> bytes:
        """The items' ends, and the whole answer."""
        found = b"" if self.choice.calls or self.places else self._open_message()
        if self.logprobs and self.message_id in self.places:
            found += self._text("")
        answer = self.whole()
        for place, item in enumerate(answer["output"]):
            found += self._close(place, item)
        return found + self._event(f"response.{answer['status']}", response=answer)

    def fail(self, error: RequestError) -> bytes:
        """The error, and the answer that has failed."""
        about = {"code": "server_error" if error.status >= 500 else "invalid_prompt", "message": error.message}
        found = self._event("error", **about, param=error.param)
        output = self._output("incomplete", is_begun=bool(self.choice.text))
        return found + self._event("response.failed", response=self._answer("failed", output, error=about))

    def whole(self) -> dict[str, Any]:
        """The answer."""
        is_cut = self.choice.finish == "length"
        status = "incomplete" if is_cut else "completed"
        output = self._output(status, is_begun=bool(self.choice.text) or not self.choice.calls)
        return self._answer(
            status, output, usage=self._usage(), cut={"reason": "max_output_tokens"} if is_cut else None
        )

    def _output(self, status: str, *, is_begun: bool) -> list[dict[str, Any]]:
        """The items until now, the message among them where it has begun."""
        logprobs = self.service.texts.chat(self.choice.logprobs) if self.request.include else []
        output = [
            self._item(index, call["id"], call["function"]["name"], call["function"]["arguments"], status)
            for index, call in enumerate(self.choice.calls)
        ]
        if is_begun:
            part = {"type": "output_text", "text": self.choice.text, "annotations": [], "logprobs": logprobs}
            message = {"type": "message", "id": self.message_id, "status": status, "role": "assistant"}
            output.insert(self.choice.calls_before, {**message, "content": [part]})
        return output

    def _usage(self) -> ResponseUsage:
        found = usage_of(self.ride, [self.choice])
        return ResponseUsage(
            input_tokens=found.prompt_tokens,
            input_tokens_details=PromptDetails(cached_tokens=found.prompt_tokens_details.cached_tokens),
            output_tokens=found.completion_tokens,
            output_tokens_details=OutputDetails(),
            total_tokens=found.total_tokens,
        )

    def _answer(
        self, status: Any, output: Sequence[Any], *, usage: Any = None, cut: Any = None, error: Any = None
    ) -> dict[str, Any]:
        request = self.request
        given = None if request.text is None else request.text.format
        chosen = request.tool_choice
        return plain(
            ResponseAnswer(
                id=self.id,
                object="response",
                created_at=self.created,
                status=status,
                background=False,
                error=error,
                incomplete_details=cut,
                instructions=request.instructions,
                max_output_tokens=request.max_output_tokens,
                metadata=request.metadata or {},
                model=self.service.name,
                output=list(output),
                parallel_tool_calls=request.parallel_tool_calls is not False,
                previous_response_id=None,
                reasoning={"effort": None, "summary": None},
                service_tier="default",
                store=False,
                temperature=request.temperature,
                text={"format": {"type": "text"} if given is None else plain(given)},
                tool_choice="auto" if chosen is None else plain(chosen),
                tools=[plain(tool) for tool in request.tools or ()],
                top_logprobs=request.top_logprobs or 0,
                top_p=request.top_p,
                truncation="disabled",
                usage=usage,
                user=request.user,
            )
        )

    def _event(self, kind: str, **fields: Any) -> bytes:
        data = {"type": kind, "sequence_number": self.number, **fields}
        self.number += 1
        return f"event: {kind}\ndata: {json.dumps(data, separators=(',', ':'))}\n\n".encode()

    def _text_place(self) -> dict[str, Any]:
        return {"item_id": self.message_id, "output_index": self.places[self.message_id], "content_index": 0}

    def _open_message(self) -> bytes:
        """The beginning of the message, once."""
        if self.message_id in self.places:
            return b""
        place = self.places[self.message_id] = len(self.places)
        item = {"type": "message", "id": self.message_id, "status": "in_progress", "role": "assistant", "content": []}
        part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        found = self._event("response.output_item.added", output_index=place, item=item)
        return found + self._event("response.content_part.added", **self._text_place(), part=part)

    def _text(self, text: str) -> bytes:
        """The event of a text, and of the tokens since the last."""
        logprobs, self.logprobs = self.logprobs, []
        return self._event("response.output_text.delta", **self._text_place(), delta=text, logprobs=logprobs)

    def _call(self, delta: dict[str, Any]) -> bytes:
        """The events of a piece of a call."""
        index, function, found = delta["index"], delta["function"], b""
        if index == len(self.call_ids):
            item = self._item(index, delta["id"], function["name"], "", "in_progress")
            place = self.places[self.call_ids[index]] = len(self.places)
            found += self._event("response.output_item.added", output_index=place, item=item)
        if function.get("arguments"):
            name = self.call_ids[index]
            where = {"item_id": name, "output_index": self.places[name]}
            found += self._event("response.function_call_arguments.delta", **where, delta=function["arguments"])
        return found

    def _item(self, index: int, call_id: str, name: str, arguments: str, status: str) -> dict[str, Any]:
        if index == len(self.call_ids):
            self.call_ids.append(new_id("fc"))
        return {
            "type": "function_call",
            "id": self.call_ids[index],
            "call_id": call_id,
            "name": name,
            "arguments": arguments,
            "status": status,
        }

    def _close(self, place: int, item: dict[str, Any]) -> bytes:
        """The end of an item."""
        if item["type"] == "message":
            part = item["content"][0]
            where = self._text_place()
            found = self._event(
                "response.output_text.done", **where, text=part["text"], logprobs=part["logprobs"]
            ) + self._event("response.content_part.done", **where, part=part)
        else:
            where = {"item_id": item["id"], "output_index": place}
            found = self._event(
                "response.function_call_arguments.done", **where, name=item["name"], arguments=item["arguments"]
            )
        return found + self._event("response.output_item.done", output_index=place, item=item)
