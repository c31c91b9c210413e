"""Tools: calls taken out of a stream of text, and the grammar of calls that a request demands.

Enters: text piece by piece. Leaves: content, and calls as OpenAI's streams have them. Invariant: text is either given
out as it came or read as calls, whole and of known tools; what merely looks like a call is content.

Llama 4 writes `[f(a=1), g(b="x")]` or `{"name": "f", "parameters": {"a": 1}}`, at the beginning of its answer or within
`<|python_start|>` and `<|python_end|>`.
"""

import json
import re
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import SessionError, shortened
from ..runtime.grammars.json_schemas import enforceable
from ..runtime.grammars.trial import OPTIONS
from .calls import LONGEST, Brackets, Call, may_begin, read_calls

START, END = "<|python_start|>", "<|python_end|>"
HEAD, MIDDLE, BETWEEN = '{"name": ', ', "parameters": ', "; "
"""Texts of demanded calls: before a name, between it and the arguments, and between two calls."""

MOST_CALLS = 16
"""Demanded calls of one answer at most, so that a small model comes to an end."""

MARKED = re.compile(rf"\s*{re.escape(START)}")
MORE = re.compile(r";?\s*(\{|$)")
"""Another call in JSON behind one, or what may become it."""

Deltas = list[dict[str, Any]]


class ToolCallReader:
    """Reads calls from an answer as it grows.

    Args:
        tools: The tools that may be called, in OpenAI's form; a call of another is content.
        parallel: Whether there may be several calls; otherwise only the first is given.
        demanded: Whether the text follows `tool_grammar`: then calls are given while they are written, otherwise once
            they are whole and nothing but calls.
        begins: The expression of beginnings that `bound_grammar` binds: calls of strict tools that begin otherwise are
            content, since nothing has bound them.
    """

    def __init__(
        self,
        tools: Sequence[Mapping[str, Any]],
        *,
        parallel: bool = True,
        demanded: bool = False,
        begins: re.Pattern[str] | None = None,
    ) -> None:
        self.begins = begins
        self.strict = {function_of(tool)["name"] for tool in tools if function_of(tool).get("strict")}
        self.names = [function_of(tool)["name"] for tool in tools]
        self.parallel, self.count = parallel, 0
        self.held, self.is_first = "", True  # nothing but white space has come yet, or since a mark
        self.brackets, self.offset = Brackets(), 0
        self.demanded = DemandedCalls() if demanded else None

    def feed(self, text: str) -> tuple[str, Deltas]:
        """Takes the next text. Returns the content and the pieces of calls that are certain by it."""
        if self.demanded is not None:
            return "", self.demanded.feed(text)
        self.held += text
        content, deltas = "", Deltas()
        while self.held:
            before = len(self.held)
            shown, more = self._candidate() if self._is_candidate() else (self._content(), [])
            content, deltas = content + shown, deltas + more
            if len(self.held) == before:
                break
        return content, deltas

    def end(self) -> tuple[str, Deltas]:
        """Takes the end of the text. Returns what was held back."""
        held, self.held = self.held, ""
        if self.count and not held.strip():
            return "", []
        calls = self._calls(held) if self.is_first or held.startswith(START) else None
        return (held, []) if calls is None else ("", self._deltas(calls))

    def _is_candidate(self) -> bool:
        """Whether what is held begins like calls, or may still do so."""
        bare = self.held.lstrip() if self.is_first else self.held
        if bare.startswith(START):
            return True
        return self.is_first and (not bare or START.startswith(bare) or may_begin(bare, self.names))

    def _content(self) -> str:
        """Gives out what is held, up to where a mark begins or may begin."""
        places = [at for mark in (START, END) if (at := self.held.find(mark)) >= 0]
        ends = bool(places) and self.held.startswith(END, min(places))
        if ends:  # calls may follow
            return self._release(min(places) + len(END), is_first=True)
        held_back = max(_overlap(self.held, mark) for mark in (START, END))
        return self._release(min(places) if places else len(self.held) - held_back)

    def _candidate(self) -> tuple[str, Deltas]:
        """Looks on in what may be calls. Returns calls that are whole, or content where they turn out to be none."""
        marked = MARKED.match(self.held)
        offset = marked.end() if marked else 0
        body = self.held[offset:]
        bare = body.lstrip()
        if marked and bare and not may_begin(bare, self.names):
            return self._release(offset), []
        if self.offset != offset:
            self.brackets, self.offset = Brackets(), offset
        closed = self.brackets.scan(body)
        if closed is None and len(body) <= LONGEST:
            return "", []
        after = body[closed:].lstrip()
        if closed and after.startswith(END):
            whole = len(self.held) - len(after) + len(END)
            calls = self._calls(self.held[:whole])
            shown = self._release(whole, is_first=True)
            return (shown, []) if calls is None else ("", self._deltas(calls))
        if closed and len(body) <= LONGEST and (END.startswith(after) or MORE.match(after)):
            return "", []
        return self._release(offset + (closed or 1)), []

    def _release(self, count: int, *, is_first: bool = False) -> str:
        """Takes the first characters of what is held from it."""
        shown, self.held = self.held[:count], self.held[count:]
        self.brackets, self.is_first = Brackets(), is_first or (self.is_first and not shown.strip())
        return shown

    def _calls(self, text: str) -> list[Call] | None:
        bare = text.strip().removeprefix(START).strip().removesuffix(END)
        calls = read_calls(bare, self.names)
        if calls is None or self.begins is None or self.begins.match(text.lstrip(" \t\r\n").removeprefix(START)):
            return calls
        return None if any(call.name in self.strict for call in calls) else calls

    def _deltas(self, calls: Sequence[Call]) -> Deltas:
        """Calls as OpenAI's streams have them, each in one piece."""
        given = calls if self.parallel else calls[: max(0, 1 - self.count)]
        deltas = [_beginning(self.count + number, call.name, call.arguments) for number, call in enumerate(given)]
        self.count += len(given)
        return deltas


class DemandedCalls:
    """Calls as `tool_grammar` has them, their arguments given while they are written."""

    HEAD = re.compile(rf'(?:{re.escape(BETWEEN)})?{re.escape(HEAD)}"([^"]*)"{re.escape(MIDDLE)}')

    def __init__(self) -> None:
        self.held, self.count, self.brackets = "", 0, Brackets()
        self.is_inside, self.given = False, 0

    def feed(self, text: str) -> Deltas:
        """Takes the next text. Returns the pieces of calls that it completes."""
        self.held += text
        deltas: Deltas = []
        while True:
            if not self.is_inside:
                head = self.HEAD.match(self.held)
                if head is None:
                    return deltas
                deltas.append(_beginning(self.count, head[1], ""))
                self.held, self.is_inside, self.given, self.brackets = self.held[head.end() :], True, 0, Brackets()
            end = self.brackets.scan(self.held)
            new = self.held[self.given : end]
            if new:
                deltas.append({"index": self.count, "function": {"arguments": new}})
            self.given += len(new)
            if end is None or len(self.held) == end:
                return deltas
            self.held = self.held[end + 1 :]  # the brace behind the arguments
            self.is_inside, self.count = False, self.count + 1


def tool_grammar(
    tools: Sequence[Mapping[str, Any]], choice: str | Mapping[str, Any], parallel: bool = True
) -> str | None:
    """The grammar of an answer that consists of calls, in Llama 4's JSON format.

    Args:
        tools: The tools, in OpenAI's form.
        choice: OpenAI's `tool_choice`: "required" demands calls, an object one call of the function that it names.
        parallel: Whether there may be several where none is named.

    Returns:
        Lark, for `Session.request(grammar=…)`, which refuses schemas that it cannot enforce; None where the choice
        demands no call.

    Raises:
        SessionError: There are no tools, the choice names none of them, or parameters are no object's schema.
    """
    if choice in ("auto", "none"):
        return None
    name = None if choice == "required" else function_of(choice).get("name") if isinstance(choice, Mapping) else choice
    functions = [function_of(tool) for tool in tools]
    chosen = [function for function in functions if name in (None, function["name"])]
    if not chosen:
        among = shortened([function["name"] for function in functions], 200)
        raise SessionError(f"tool_choice is {shortened(choice)} and the tools are {among}: name one of them")
    more = f" ({json.dumps(BETWEEN)} call){{0,{MOST_CALLS - 1}}}" if parallel and name is None else ""
    lines = [f"start: call{more}", "call: " + " | ".join(f"tool_{number}" for number in range(len(chosen)))]
    for number, function in enumerate(chosen):
        head = json.dumps(HEAD + json.dumps(function["name"]) + MIDDLE)
        written = json.dumps({**parameters_of(function), "type": "object", "x-guidance": OPTIONS})
        lines += [f'tool_{number}: {head} arguments_{number} "}}"', f"arguments_{number}: %json {written}"]
    return "\n".join(lines)


def parameters_of(function: Mapping[str, Any]) -> Mapping[str, Any]:
    """The schema of a function's arguments, in keywords that are enforced, where there are such.

    Raises:
        SessionError: It is no object's schema, or too deep.
    """
    schema = function.get("parameters") or {"properties": {}, "additionalProperties": False}
    if not isinstance(schema, Mapping) or schema.get("type", "object") != "object":
        raise SessionError(
            f"the parameters of {shortened(function['name'])} are {shortened(schema)}, expected an object's JSON schema"
        )
    try:
        found: Mapping[str, Any] = enforceable(schema)
    except RecursionError as error:
        raise SessionError(
            f"the parameters of {shortened(function['name'])} are nested too deeply: flatten them"
        ) from error
    return found


def function_of(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    """The function of a tool or of a choice, which OpenAI's two interfaces write within it or as itself."""
    function = tool.get("function", tool)
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise SessionError(f"a tool is {shortened(tool)}, expected a function with a name")
    return function


def _beginning(index: int, name: str, arguments: str) -> dict[str, Any]:
    """The first piece of a call."""
    function = {"name": name, "arguments": arguments}
    return {"index": index, "id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}


def _overlap(text: str, mark: str) -> int:
    """Characters at the end of a text that begin a mark."""
    longest = min(len(text), len(mark) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(mark[:size])), 0)
