"""Settings of a conversation: tools, documents, its template, in the words of `transformers`' `apply_chat_template`.

Enters: keywords as a caller gives them. Leaves: a `Chat`, checked and in plain data.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

from ...errors import SessionError, shortened
from .messages import Message, plain

RESERVED = ("messages", "tools", "documents", "add_generation_prompt")
"""Variables of a template that have keywords of their own."""


class ChatSettings(TypedDict, total=False):
    """How a conversation becomes a prompt. A setting that is None is as if it were not given.

    Attributes:
        tools: Tools that the model may call, each as its JSON schema in a dictionary.
        documents: Documents that it may read, each a dictionary, as a rule of title and text.
        chat_template: The name of one of the checkpoint's templates, or a template in Jinja.
        chat_template_kwargs: Other variables that the template reads, as in `{"enable_thinking": False}`.
        add_generation_prompt: Whether the prompt ends where the assistant begins to speak; None does so unless the last
            message is the assistant's.
        continue_final_message: Whether the prompt ends within the last message, to be continued; a text names another
            field of it than its content.
        sanitize_control_tokens: Whether control tokens are the template's alone, and those written in messages, tools,
            documents and variables are read as ordinary text. True unless given.
    """

    tools: Sequence[Mapping[str, Any]] | None
    documents: Sequence[Mapping[str, Any]] | None
    chat_template: str | None
    chat_template_kwargs: Mapping[str, Any] | None
    add_generation_prompt: bool | None
    continue_final_message: bool | str | None
    sanitize_control_tokens: bool | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Chat:
    """A conversation and what came with it, in plain data.

    Attributes:
        turns: The messages.
        tools: The tools' schemas.
        documents: The documents.
        template: A template's name or source; None takes the checkpoint's.
        variables: Other variables of the template.
        asks: Whether the assistant speaks next.
        open_field: The field of the last message that is to be continued; None where it is complete.
        sanitizes: Whether control tokens are the template's alone.
    """

    turns: list[Message]
    tools: list[dict[str, Any]] | None
    documents: list[dict[str, Any]] | None
    template: str | None
    variables: dict[str, Any]
    asks: bool
    open_field: str | None
    sanitizes: bool


def read_chat(turns: list[Message], settings: ChatSettings) -> Chat:
    """Reads what came with a conversation.

    Raises:
        SessionError: A setting is not of its kind, or two contradict each other.
    """
    if unknown := settings.keys() - ChatSettings.__annotations__.keys():
        names = ", ".join(ChatSettings.__annotations__)
        raise SessionError(f"unknown setting {shortened(min(unknown))}: choose from {names}")
    given: dict[str, Any] = {name: value for name, value in settings.items() if value is not None}
    kinds = {
        "chat_template": (str, "a template's name or a template"),
        "chat_template_kwargs": (Mapping, "a dictionary of variables"),
        "add_generation_prompt": (bool, "True or False"),
        "continue_final_message": (bool | str, "True, False or the name of a field"),
        "sanitize_control_tokens": (bool, "True or False"),
    }
    for name, (kind, expected) in kinds.items():
        if name in given and not isinstance(given[name], kind):
            raise SessionError(f"{name} is {shortened(given[name])}, expected {expected}")
    variables = plain(given.get("chat_template_kwargs", {}), "chat_template_kwargs")
    if wrong := [name for name in variables if not isinstance(name, str) or name in RESERVED]:
        raise SessionError(f"chat_template_kwargs has {shortened(wrong[0])}: give it as a keyword of its own")
    opens = given.get("continue_final_message", False)
    asks = given.get("add_generation_prompt", not opens and turns[-1]["role"] != "assistant")
    if opens and asks:
        raise SessionError("continue_final_message and add_generation_prompt exclude each other: give one of them")
    return Chat(
        turns=turns,
        tools=_objects("tools", given.get("tools"), "the JSON schemas of functions"),
        documents=_objects("documents", given.get("documents"), "dictionaries of title and text"),
        template=given.get("chat_template"),
        variables=variables,
        asks=asks,
        open_field=(opens if isinstance(opens, str) else "content") if opens else None,
        sanitizes=given.get("sanitize_control_tokens", True),
    )


def _objects(name: str, value: Any, expected: str) -> list[dict[str, Any]] | None:
    if value is None:
        return None
    if callable(value) or (isinstance(value, list | tuple) and any(callable(each) for each in value)):
        raise SessionError(f"{name} has a Python function: give its JSON schema, {{'type': 'function', 'function': …}}")
    if not isinstance(value, list | tuple):
        raise SessionError(f"{name} is {shortened(value)}, expected a list of {expected}")
    objects: list[dict[str, Any]] = plain(value, name)
    if wrong := [each for each in objects if not isinstance(each, dict)]:
        raise SessionError(f"{name} has {shortened(wrong[0])}, expected a list of {expected}")
    return objects
