"""A conversation as a chat template writes it.

Enters: a conversation, a template and the checkpoint's special tokens. Leaves: the prompt's text, that of
`transformers` but where this would print Python's lists or lose what was said.
"""

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any

from ...errors import SessionError, shortened_text
from .environment import BrokenTemplateError, CostlyTemplateError, FailedTemplateError, StandIns
from .messages import Message
from .sandbox import render
from .settings import Chat
from .templates import ChatTemplate

MARK = "THE_LAST_MESSAGE_IS_OPENED "
"""Put where a message is to be continued; the space at its end shows whether the template trims."""

REASONING = ("reasoning_content", "thinking", "reasoning")
"""Fields that a message's reasoning stands in, the one that templates read first."""

PROBE = "probe of the content"
"""Said to a template to see whether it takes texts."""

Marking = Callable[[Any], Any]
"""Changes the texts in a value of plain data."""


class Writer:
    """Writes one conversation, as often as it is asked to.

    Args:
        template: The chat template.
        chat: The conversation.
        named: The special tokens by their names.

    Raises:
        SessionError: The template does not take these messages, or writes no text that could be continued.
        FolderError: The folder's template does not compile.
    """

    def __init__(self, template: ChatTemplate, chat: Chat, named: Mapping[str, str]) -> None:
        self.template, self.chat, self.now = template, chat, datetime.now()
        self.named = {name: text for name, text in named.items() if name not in chat.variables}
        try:
            self.text = self._written()
        except BrokenTemplateError as error:
            raise template.fault(str(error)) from error
        except FailedTemplateError as error:
            said = shortened_text(str(error))
            raise SessionError(f"the chat template does not take these messages: {said}") from error
        except CostlyTemplateError as error:
            raise template.too_costly(str(error)) from error

    def again(self, marking: Marking, source: str, named: Mapping[str, str], stand_ins: StandIns) -> str | None:
        """Writes the conversation once more with other texts; None where the template does not take these."""
        chat = self.chat
        marked = replace(
            chat, **{name: marking(getattr(chat, name)) for name in ("turns", "tools", "documents", "variables")}
        )
        try:
            return self._write(marked, source, named, stand_ins)
        except (FailedTemplateError, SessionError):
            return None
        except CostlyTemplateError as error:
            raise self.template.too_costly(str(error)) from error

    def given(self) -> list[Any]:
        """Everything in the prompt that is the caller's."""
        return [self.chat.turns, self.chat.tools, self.chat.documents, self.chat.variables]

    def _written(self) -> str:
        """Writes the conversation; a template that takes texts gets texts, and one that takes parts gets parts."""
        turns = self.chat.turns
        named = tuple(sorted(self.named.items()))
        if any(isinstance(turn.get("content"), str) for turn in turns) and _takes_parts(self.template.source, named):
            self.chat = replace(self.chat, turns=[_in_parts(turn) for turn in turns])
        try:
            text = self._write(self.chat, self.template.source, self.named, {})
        except FailedTemplateError as error:
            turns = [_in_one_text(turn) for turn in self.chat.turns]
            if turns == self.chat.turns:
                raise
            self.chat = replace(self.chat, turns=turns)
            try:
                return self._write(self.chat, self.template.source, self.named, {})
            except FailedTemplateError:
                raise error from None
        printed = [_prints_parts(turn, text) for turn in self.chat.turns]
        if not any(printed):
            return text
        turns = [_in_one_text(turn) if each else turn for turn, each in zip(self.chat.turns, printed, strict=True)]
        if turns == self.chat.turns:
            raise SessionError("the chat template takes texts, and a message has an image: leave the image out")
        self.chat = replace(self.chat, turns=turns)
        return self._write(self.chat, self.template.source, self.named, {})

    def _write(self, chat: Chat, source: str, named: Mapping[str, str], stand_ins: StandIns) -> str:
        turns = [_with_reasoning(turn) for turn in chat.turns]
        last = None if chat.open_field is None else _open_last(turns, chat.open_field, self.template.source)
        variables = {"tools": chat.tools, "documents": chat.documents, "add_generation_prompt": chat.asks}
        text = render(source, {**named, **chat.variables, **variables, "messages": turns}, self.now, stand_ins)
        return text if last is None else _up_to_mark(text, last)


def _with_reasoning(turn: Message) -> Message:
    """A message whose reasoning stands under each name that templates read."""
    reasoning = next((turn[name] for name in REASONING if turn.get(name) is not None), None)
    return turn if reasoning is None else {"thinking": reasoning, **turn, "reasoning_content": reasoning}


def _open_last(turns: list[Message], field: str, source: str) -> str:
    """Puts the mark at the end of the last message's field, in `turns`. Returns what the field says."""
    last = dict(turns[-1])
    value = last.get(field)
    names = [field]
    if field in REASONING:
        names = [name for name in REASONING if last.get(name) == value]
    if not any(name in source for name in names):
        raise SessionError(f"the chat template reads no {shortened_text(field, 60)}: it cannot be continued")
    if isinstance(value, list):
        at = next((at for at in reversed(range(len(value))) if isinstance(_text_of(value[at]), str)), None)
        if at is not None:
            said: str = value[at]["text"]
            last[field] = [*value[:at], {**value[at], "text": said + MARK}, *value[at + 1 :]]
            turns[-1] = last
            return said
    if not isinstance(value, str):
        raise SessionError(f"the last message has no text in its {shortened_text(field, 60)} that could be continued")
    turns[-1] = {**last, **dict.fromkeys(names, value + MARK)}
    return value


def _up_to_mark(text: str, last: str) -> str:
    """The text that a template wrote before the mark, without the space that it trims from a message's end."""
    place = text.rfind(MARK.strip())
    if place < 0 or last.strip() not in text:
        raise SessionError("the chat template leaves out the end of the last message: it cannot be continued")
    return text[:place] if text[place:].startswith(MARK) else text[:place].rstrip()


def _text_of(part: Any) -> Any:
    return part.get("text") if isinstance(part, dict) else None


def _in_one_text(turn: Message) -> Message:
    """A message with its texts in one, a line each, as other servers join them; as it is where it has other parts."""
    content = turn.get("content")
    if not isinstance(content, list) or not all(isinstance(_text_of(part), str) for part in content):
        return turn
    return {**turn, "content": "\n".join(part["text"] for part in content)}


def _in_parts(turn: Message) -> Message:
    content = turn.get("content")
    return {**turn, "content": [{"type": "text", "text": content}]} if isinstance(content, str) else turn


def _prints_parts(turn: Message, text: str) -> bool:
    """Whether a template wrote a message's parts as Python prints them."""
    content = turn.get("content")
    if not isinstance(content, list) or not content:
        return False
    return any(isinstance(part, dict) and str(part) in text for part in content)


@functools.lru_cache(maxsize=16)
def _takes_parts(source: str, named: tuple[tuple[str, str], ...]) -> bool:
    """Whether a template leaves out a content that is a text, and writes it where it is a part."""
    if re.search(r"\bis\s+(not\s+)?string\b", source):
        return False
    text, parts = (_probed(source, named, content) for content in (PROBE, [{"type": "text", "text": PROBE}]))
    return PROBE not in text and PROBE in parts and "'text'" not in parts


def _probed(source: str, named: tuple[tuple[str, str], ...], content: str | Sequence[Any]) -> str:
    """A message of some content as a template writes it; empty where it does not take this."""
    variables = {"tools": None, "documents": None, "add_generation_prompt": True}
    try:
        return render(
            source, {**dict(named), **variables, "messages": [{"role": "user", "content": content}]}, datetime.now()
        )
    except FailedTemplateError:
        return ""
