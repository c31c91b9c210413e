"""Sequences as they are answered: their texts, calls, log-probabilities and ends, piece by piece.

Enters: pieces of a ride. Leaves: what each adds. Invariant: a stream and a whole answer are made of the same additions.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..runtime import Generated
from ..runtime.logprobs import TokenLogprobs
from .errors import RequestError, of_session
from .logs import new_number
from .protocol.answers import Usage
from .rides import FINISHES, Ride
from .tools import ToolCallReader


@dataclass(slots=True)
class Added:
    """Additions of a piece to a choice.

    Attributes:
        content: Text.
        calls: Pieces of calls, as OpenAI's streams have them.
        logprobs: Those of its tokens.
        finish: OpenAI's reason of the end; None where it goes on.
    """

    content: str = ""
    calls: Sequence[dict[str, Any]] = ()
    logprobs: Sequence[TokenLogprobs] = ()
    finish: str | None = None


@dataclass(slots=True)
class Choice:
    """One sequence of an answer.

    Attributes:
        index: Its number.
        reader: Takes calls out of its text; None where there are no tools.
        calls_before: Calls that came before its first text.
    """

    index: int
    reader: ToolCallReader | None = None
    content: list[str] = field(default_factory=list)
    calls: list[dict[str, Any]] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish: str | None = None
    tokens: int = 0
    reused: int = 0
    calls_before: int = 0

    @property
    def text(self) -> str:
        """Its text until now."""
        return "".join(self.content)

    def text_alone(self, piece: Generated) -> str | None:
        """Takes a piece that adds nothing but text, as nearly all do, and returns this; None where it is another."""
        if self.reader is not None or piece.finish is not None or piece.logprobs:
            return None
        self.tokens += len(piece.ids)
        self.reused += piece.reused
        return piece.text

    def take(self, piece: Generated) -> Added:
        """Takes a piece. Returns what it adds.

        Raises:
            RequestError: An error ended the sequence.
        """
        if piece.error is not None:
            raise of_session(piece.error)
        self.tokens += len(piece.ids)
        self.reused += piece.reused
        content: str = piece.text
        calls: Sequence[dict[str, Any]] = ()
        if self.reader is not None:
            content, calls = self._read(piece)
        if piece.finish is not None:
            is_called = (self.calls or calls) and piece.finish != "length"  # one that is cut off may not be whole
            self.finish = "tool_calls" if is_called else FINISHES[piece.finish]
        if content:
            self.calls_before = self.calls_before if self.content else len(self.calls)
            self.content.append(content)
        for call in calls:
            self._add_call(call)
        self.logprobs += piece.logprobs
        return Added(content, calls, piece.logprobs, self.finish)

    def _read(self, piece: Generated) -> tuple[str, Any]:
        """The text and the calls that a piece completes."""
        assert self.reader is not None
        content, calls = self.reader.feed(piece.text)
        if piece.finish is not None:
            rest, more = self.reader.end()
            content, calls = content + rest, [*calls, *more]
        return content, calls

    def _add_call(self, delta: dict[str, Any]) -> None:
        """Adds a piece of a call to the whole calls."""
        if delta["index"] == len(self.calls):
            function = {"name": delta["function"]["name"], "arguments": ""}
            self.calls.append({"id": delta["id"], "type": "function", "function": function})
        self.calls[delta["index"]]["function"]["arguments"] += delta["function"].get("arguments", "")


def open_choices(
    ride: Ride,
    tools: Sequence[Any] = (),
    *,
    parallel: bool = True,
    demanded: bool = False,
    begins: re.Pattern[str] | None = None,
) -> list[Choice]:
    """The choices of a ride.

    Args:
        ride: The ride.
        tools: Tools that the model may call, in OpenAI's form.
        parallel: Whether there may be several calls.
        demanded: Whether the answer must be a call.
        begins: The expression of beginnings from which on calls are bound; None where they are not.
    """
    readers = [
        ToolCallReader(tools, parallel=parallel, demanded=demanded, begins=begins) if tools else None
        for _ in range(len(ride.timelines))
    ]
    return [Choice(index, reader) for index, reader in enumerate(readers)]


async def finish_all(ride: Ride, choices: Sequence[Choice]) -> None:
    """Waits until every choice has ended.

    Raises:
        RequestError: An error ended one.
    """
    while pieces := await ride.next():
        for index, piece in pieces:
            choices[index].take(piece)
    if any(choice.finish is None for choice in choices):
        raise RequestError("the client has gone", status=499)


def usage_of(ride: Ride, choices: Sequence[Choice]) -> Usage:
    """The tokens of a ride; a prompt of several choices counts once."""
    prompt = sum(len(party[0].prompt.ids) for party in ride.parties)
    cached, first = 0, 0
    for party in ride.parties:
        cached += max(choice.reused for choice in choices[first : first + len(party)])
        first += len(party)
    return Usage.of(prompt, sum(choice.tokens for choice in choices), cached)


def new_id(prefix: str) -> str:
    """A name that no other answer has."""
    return f"{prefix}-{new_number()}"
