"""Messages as callers give them, as chat templates take them.

Enters: dictionaries, and objects that are as good, with contents of texts, parts and images. Leaves: plain data in
which an image is a part without its content, and the images in their order. Invariant: what is given is taken or
refused, never dropped.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ...errors import SessionError, shortened
from ..images.data_urls import decode_base64
from ..images.sources import ImageSource

Message = dict[str, Any]
"""One turn of a conversation: `role`, and `content`, a text or a list of parts."""

DEEPEST = 100
"""Levels of lists and dictionaries in a message or a tool."""

SOURCES = ("image", "url", "path", "base64", "image_url")
"""Keys that a part's image may stand under."""

TOOL_ROLES = ("tool", "ipython", "function")
"""Roles of messages whose content is a tool's answer: any data."""


def read_messages(given: Any) -> tuple[list[Message], list[ImageSource | None]]:
    """Reads a conversation.

    Args:
        given: A list of messages, or one message.

    Returns:
        The messages in plain data, without fields that are None, and their images in order: None is one that comes
        beside the messages, of a part `{"type": "image"}`.

    Raises:
        SessionError: A message is none, or a part neither an image nor a text.
    """
    messages = given if isinstance(given, list | tuple) else [given]
    if not messages:
        raise SessionError("the conversation has no messages: give at least one")
    images: list[ImageSource | None] = []
    return [_message(message, number, images) for number, message in enumerate(messages, 1)], images


def with_images_beside(images: Sequence[ImageSource | None], beside: Sequence[ImageSource]) -> list[ImageSource]:
    """The images of a conversation, those that came beside it in their places.

    Raises:
        SessionError: They are not as many as the places.
    """
    places = sum(image is None for image in images)
    if places != len(beside):
        raise SessionError(
            f'the messages have {places} parts {{"type": "image"}} without an image, and {len(beside)} images came '
            "beside them: give one for each, or put the images into the parts"
        )
    remaining = iter(beside)
    return [next(remaining) if image is None else image for image in images]


def is_message(value: Any) -> bool:
    """Whether a value is meant as a message: an object with a role."""
    fields = _fields(value)
    return fields is not None and "role" in fields


def plain(value: Any, where: str, depth: int = 0) -> Any:
    """A value as plain data, for templates: texts, numbers, lists and dictionaries.

    Raises:
        SessionError: It holds something else, or lists within lists without an end.
    """
    if depth > DEEPEST:
        raise SessionError(f"{where} has lists within lists, {DEEPEST} deep: give it with fewer")
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, str | int | float):  # an enumeration's, say
        return str.__str__(value) if isinstance(value, str) else int(value) if isinstance(value, int) else float(value)
    if isinstance(value, list | tuple):
        return [plain(each, where, depth + 1) for each in value]
    fields = _fields(value)
    wrong = [value] if fields is None else [name for name in fields if not isinstance(name, str | int | float | None)]
    if fields is None or wrong:
        raise SessionError(
            f"{where} holds {shortened(wrong[0])}, of type {type(wrong[0]).__name__}: give texts, numbers, lists and "
            "dictionaries"
        )
    return {plain(name, where, depth + 1): plain(each, where, depth + 1) for name, each in fields.items()}


def _fields(value: Any) -> Mapping[Any, Any] | None:
    """The fields of a dictionary, or of an object that has some; None of anything else."""
    if isinstance(value, Mapping):
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    dump = None if isinstance(value, type) else getattr(value, "model_dump", None)
    if not callable(dump):
        return None
    try:
        fields = dump()
    except Exception as error:  # another library's
        raise SessionError(f"{shortened(value)} does not give its fields ({error}): give a dictionary") from error
    return fields if isinstance(fields, Mapping) else None


def _message(given: Any, number: int, images: list[ImageSource | None]) -> Message:
    """One message in plain data; its images are appended to `images`, None for one that comes beside."""
    fields, where = _fields(given), f"message {number}"
    if fields is None:
        raise SessionError(f"{where} is {shortened(given)}, expected a dictionary with role and content")
    role, content = fields.get("role"), fields.get("content")
    if not isinstance(role, str):
        raise SessionError(f"the role of {where} is {shortened(role)}, expected a text such as 'user'")
    beside = fields.get("images")
    if beside is not None and not (isinstance(beside, list | tuple) and len(beside) == 0):
        raise SessionError(f'{where} has images beside its content: put {{"type": "image", …}} into the content')
    rest = {name: value for name, value in fields.items() if name != "content" and value is not None}
    message: Message = plain(rest, where)
    if "content" not in fields or content is None:
        return message
    if isinstance(content, Mapping) and "type" in content and role not in TOOL_ROLES:
        content = [content]
    if isinstance(content, list | tuple):
        message["content"] = [_part(part, role, where, images) for part in content]
    elif isinstance(content, str) or role in TOOL_ROLES:
        message["content"] = plain(content, where)
    else:
        raise SessionError(f"the content of {where} is {shortened(content)}, expected a text or a list of parts")
    return {name: message[name] for name in fields if name in message}  # in the order they came


def _part(part: Any, role: str, where: str, images: list[ImageSource | None]) -> Any:
    """One part in plain data, without its image."""
    fields = _fields(part) or {}
    kind = fields.get("type")
    if kind == "text" and isinstance(fields.get("text"), str):
        return plain(fields, where)
    if kind in ("image", "image_url"):
        found = [name for name in SOURCES if fields.get(name) is not None]
        if len(found) < 2 and (found or kind == "image"):
            images.append(_source(fields[found[0]], found[0], where) if found else None)
            if not found:
                return {"type": "image"}
            name = {"image_url": "url", "base64": "image"}.get(found[0], found[0])
            return {"type": "image", name: "<image>"}
    elif role in TOOL_ROLES:
        return plain(part, where)
    raise SessionError(
        f"{where} has the part {shortened(part)}, expected a type of 'text' with a text, or of 'image' with one image, "
        "path or url"
    )


def _source(value: Any, name: str, where: str) -> ImageSource:
    """The image of a part, as `read_image` takes it."""
    if name == "image_url" and isinstance(value, Mapping):  # as OpenAI's clients write it
        value = value.get("url")
    if name == "base64" and isinstance(value, str):
        return decode_base64(value, f"{where}: the image")
    if name in ("url", "image_url") and not isinstance(value, str):
        raise SessionError(f"{where} has an image whose {name} is {shortened(value)}, expected a data URL or a path")
    source: ImageSource = value
    return source
