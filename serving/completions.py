"""`/v1/completions`: the continuations of prompts, whole or as a stream of chunks."""

import time
from typing import Any

from ..runtime import Generated
from .chat import DONE
from .choices import Choice, finish_all, new_id, open_choices, usage_of
from .errors import RequestError
from .protocol.answers import CompletionAnswer, CompletionChoice
from .protocol.completions import CompletionRequest
from .protocol.reading import plain
from .rides import Ride
from .service import Service
from .streams import event, quoted


async def whole_completion(service: Service, request: CompletionRequest, ride: Ride) -> dict[str, Any]:
    """Waits for all choices. Returns the answer."""
    choices = open_choices(ride)
    await finish_all(ride, choices)
    echoed = echoes(service, request, ride)
    answer = CompletionAnswer(
        id=new_id("cmpl"),
        object="text_completion",
        created=int(time.time()),
        model=service.name,
        choices=[_choice(service, request, ride, choice, echoed[choice.index]) for choice in choices],
        usage=usage_of(ride, choices),
        system_fingerprint=service.fingerprint,
    )
    return plain(answer)


def _choice(service: Service, request: CompletionRequest, ride: Ride, choice: Choice, echoed: str) -> CompletionChoice:
    logprobs: Any = None if request.logprobs is None else service.texts.completion(choice.logprobs, len(echoed))
    if logprobs is not None and (before := echoed_logprobs(service, ride, choice.index, echoed)) is not None:
        logprobs = {name: before[name] + logprobs[name] for name in before}
    finish: Any = choice.finish
    return CompletionChoice(index=choice.index, text=echoed + choice.text, logprobs=logprobs, finish_reason=finish)


def echoes(service: Service, request: CompletionRequest, ride: Ride) -> list[str]:
    """The text that comes before each choice's own."""
    if not request.echo:
        return [""] * len(ride.timelines)
    found = []
    for prompt, party in zip(request.prompts, ride.parties, strict=True):
        found += [prompt if isinstance(prompt, str) else service.texts.whole(prompt, special=False)] * len(party)
    return found


def echoed_logprobs(service: Service, ride: Ride, index: int, text: str) -> dict[str, Any] | None:
    """The log-probabilities of the prompt before a choice's own text; None where they are not asked for."""
    if not ride.prompt_logprobs:
        return None
    owners = [number for number, party in enumerate(ride.parties) for _ in party]
    ids = ride.parties[owners[index]][0].prompt.ids
    return service.texts.echoed(ids, ride.prompt_logprobs[owners[index]], text)


class CompletionWriter:
    """Writes a ride as chunks.

    Args:
        service: The model.
        request: The request.
        ride: Its ride.
    """

    def __init__(self, service: Service, request: CompletionRequest, ride: Ride) -> None:
        self.service, self.request, self.ride = service, request, ride
        self.choices = open_choices(ride)
        self.offsets = [0] * len(self.choices)
        self.counts = request.stream_options is not None and bool(request.stream_options.include_usage)
        self.head = {
            "id": new_id("cmpl"),
            "object": "text_completion",
            "created": int(time.time()),
            "model": service.name,
            "system_fingerprint": service.fingerprint,
        }
        start = event(self.head)[:-3].decode()  # without the end of its object, and of the event
        self.starts = [f'{start},"choices":[{{"index":{index},"text":' for index in range(len(self.choices))]
        self.rest = ',"logprobs":null,"finish_reason":null}]' + (',"usage":null}' if self.counts else "}") + "\n\n"

    def begin(self) -> bytes:
        """A chunk a choice with its prompt where that is echoed."""
        echoed = echoes(self.service, self.request, self.ride)
        found = b""
        for index, text in enumerate(echoed):
            self.offsets[index] = len(text)
            logprobs = echoed_logprobs(self.service, self.ride, index, text)
            found += self._chunk(index, text, logprobs, None) if text or logprobs else b""
        return found

    def write(self, index: int, piece: Generated) -> bytes:
        """The chunk of a piece."""
        if self.request.logprobs is None and (text := self.choices[index].text_alone(piece)) is not None:
            return f"{self.starts[index]}{quoted(text)}{self.rest}".encode() if text else b""
        added, logprobs = self.choices[index].take(piece), None
        if self.request.logprobs is not None:
            logprobs = self.service.texts.completion(added.logprobs, self.offsets[index])
            self.offsets[index] += sum(map(len, logprobs["tokens"]))
        return self._chunk(index, added.content, logprobs, added.finish)

    def end(self) -> bytes:
        """The tokens' counts where they are asked for, and the end."""
        if not self.counts:
            return DONE
        usage = plain(usage_of(self.ride, self.choices))
        return event({**self.head, "choices": [], "usage": usage}) + DONE

    def fail(self, error: RequestError) -> bytes:
        """The error, and the end."""
        return event(error.body) + DONE

    def _chunk(self, index: int, text: str, logprobs: Any, finish: str | None) -> bytes:
        choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}
        return event({**self.head, "choices": [choice], **({"usage": None} if self.counts else {})})
