"""`/v1/chat/completions`: a conversation's continuations, whole or as a stream of chunks."""

import time
from typing import Any

from ..runtime import Generated
from .bound_calls import beginnings
from .choices import Added, Choice, finish_all, new_id, open_choices, usage_of
from .errors import RequestError
from .protocol.answers import ChatAnswer, ChatChoice
from .protocol.chat import ChatRequest
from .protocol.reading import plain
from .rides import Ride
from .service import Service
from .streams import event, quoted

DONE = b"data: [DONE]\n\n"


def shown_tools(request: ChatRequest) -> list[dict[str, Any]]:
    """The tools that the model may call, as it is shown them."""
    if request.tool_choice == "none":
        return []
    return [plain(tool) for tool in request.tools or ()]


def open_chat(service: Service, request: ChatRequest, ride: Ride) -> list[Choice]:
    """The choices of a conversation's continuations, which may hold calls."""
    demanded = request.tool_choice not in (None, "auto", "none")
    parallel = request.parallel_tool_calls is not False
    tools = shown_tools(request)
    begins = beginnings(tools) if request.binds_calls else None
    return open_choices(ride, tools, parallel=parallel, demanded=demanded, begins=begins)


async def whole_chat(service: Service, request: ChatRequest, ride: Ride) -> dict[str, Any]:
    """Waits for all choices. Returns the answer."""
    choices = open_chat(service, request, ride)
    await finish_all(ride, choices)
    answer = ChatAnswer(
        id=new_id("chatcmpl"),
        object="chat.completion",
        created=int(time.time()),
        model=service.name,
        choices=[_choice(service, request, choice) for choice in choices],
        usage=usage_of(ride, choices),
        system_fingerprint=service.fingerprint,
    )
    return plain(answer)


def _choice(service: Service, request: ChatRequest, choice: Choice) -> ChatChoice:
    message: dict[str, Any] = {"role": "assistant", "content": choice.text, "refusal": None}
    if choice.calls:
        message |= {"content": choice.text or None, "tool_calls": choice.calls}
    logprobs: Any = {"content": service.texts.chat(choice.logprobs), "refusal": None} if request.logprobs else None
    shown: Any = message
    finish: Any = choice.finish
    return ChatChoice(index=choice.index, message=shown, logprobs=logprobs, finish_reason=finish)


class ChatWriter:
    """Writes a ride as chunks.

    Args:
        service: The model.
        request: The request.
        ride: Its ride.
    """

    def __init__(self, service: Service, request: ChatRequest, ride: Ride) -> None:
        self.service, self.request, self.ride = service, request, ride
        self.choices = open_chat(service, request, ride)
        self.counts = request.stream_options is not None and bool(request.stream_options.include_usage)
        self.head: dict[str, Any] = {
            "id": new_id("chatcmpl"),
            "object": "chat.completion.chunk",
            "created": int(time.time()),
            "model": service.name,
            "system_fingerprint": service.fingerprint,
        }
        start = event(self.head)[:-3].decode()  # without the end of its object, and of the event
        self.starts = [
            f'{start},"choices":[{{"index":{index},"delta":{{"content":' for index in range(len(self.choices))
        ]
        self.rest = '},"logprobs":null,"finish_reason":null}]' + (',"usage":null}' if self.counts else "}") + "\n\n"

    def begin(self) -> bytes:
        """A chunk a choice that names the role."""
        delta = {"role": "assistant", "content": "", "refusal": None}
        return b"".join(self._chunk(index, delta, None, None) for index in range(len(self.choices)))

    def write(self, index: int, piece: Generated) -> bytes:
        """The chunks of a piece."""
        if not self.request.logprobs and (text := self.choices[index].text_alone(piece)) is not None:
            return f"{self.starts[index]}{quoted(text)}{self.rest}".encode() if text else b""
        added = self.choices[index].take(piece)
        if added.finish is None and not added.calls and not self.request.logprobs:
            if not added.content:
                return b""
            return f"{self.starts[index]}{quoted(added.content)}{self.rest}".encode()
        return self._chunks(index, added)

    def end(self) -> bytes:
        """The tokens' counts where they are asked for, and the end."""
        if not self.counts:
            return DONE
        usage = plain(usage_of(self.ride, self.choices))
        return event({**self.head, "choices": [], "usage": usage}) + DONE

    def fail(self, error: RequestError) -> bytes:
        """The error, and the end."""
        return event(error.body) + DONE

    def _chunks(self, index: int, added: Added) -> bytes:
        logprobs = None
        if self.request.logprobs:
            logprobs = {"content": self.service.texts.chat(added.logprobs), "refusal": None}
        found = b""
        if added.content or (added.logprobs and logprobs):
            found += self._chunk(index, {"content": added.content}, logprobs, None)
        for call in added.calls:
            found += self._chunk(index, {"tool_calls": [call]}, None, None)
        return found + (b"" if added.finish is None else self._chunk(index, {}, None, added.finish))

    def _chunk(self, index: int, delta: dict[str, Any], logprobs: Any, finish: str | None) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return event({**self.head, "choices": [choice], **({"usage": None} if self.counts else {})})
