"""A request's messages as a session takes them.

Enters: messages of the protocol. Leaves: dictionaries for the chat template, images in them as bytes, and tools.
Invariants: nothing of the server's own files is ever read for a message; a template that knows no tools is given them
in words, so that each model can be asked with tools.
"""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ..errors import SessionError, shortened, shortened_text
from .errors import RequestError
from .protocol.chat import AssistantMessage, ImageAddress, ImagePart, Instruction, Message, TextPart, Tool, ToolMessage

ReadImage = Callable[[ImageAddress, str], Any]
"""Reads an image, which stands in a field of this name, as its file's bytes or in pixels; or refuses to."""


def template_messages(
    messages: Sequence[Message], tools: Sequence[Tool], template: str, most_images: int, read: ReadImage
) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None]:
    """Writes messages and tools for a chat template.

    Args:
        messages: The turns.
        tools: Functions that the model is shown.
        template: The template's source, which is looked at for what it knows.
        most_images: Images at most.
        read: Reads images.

    Returns:
        The turns, and the tools where the template takes them.

    Raises:
        RequestError: An image cannot be read, or there are too many.
    """
    count = len(list(image_fields(messages)))
    if count > most_images:
        raise RequestError(f"messages has {count} images, this server takes at most {most_images}", "messages")
    turns = [_turn(message, index, template, read) for index, message in enumerate(messages)]
    described = [_described(tool) for tool in tools]
    if not described or "tools" in template:
        return turns, described or None
    words = TOOLS_IN_WORDS + "\n".join(json.dumps(each["function"], ensure_ascii=False) for each in described)
    if turns[0]["role"] == "system":
        first = turns[0]["content"]
        text = first if isinstance(first, str) else "\n".join(part["text"] for part in first)
        return [{"role": "system", "content": f"{text}\n\n{words}"}, *turns[1:]], None
    return [{"role": "system", "content": words}, *turns], None


TOOLS_IN_WORDS = (
    "You can call the functions below. To call some, answer with nothing but a list of calls in the form "
    '[name(argument="value"), name(argument=1)]; their results come back to you. Functions, as JSON schemas:\n'
)
"""Introduction of tools in the words of a system message."""


OF_PROMPTS = ("the prompt ", "the text ", "the chat template ", "the conversation ")
"""Beginnings of what a session says of a prompt."""


def of_prompt(error: SessionError, messages: Sequence[Message] | None) -> RequestError | None:
    """The refusal for an error that a session raised of a prompt, which names its field; None where it is of another.

    Args:
        error: The error.
        messages: The turns; None of a text or token ids.
    """
    text = shortened_text(str(error), 1000)
    images = [] if messages is None else list(image_fields(messages))
    if (found := re.match(r"image (\d+)\b", text)) and 0 < int(found[1]) <= len(images):
        return RequestError(text, f"{images[int(found[1]) - 1]}.image_url")
    if not text.startswith(OF_PROMPTS):
        return None
    code = "context_length_exceeded" if "shorten it" in text else None
    return RequestError(text, "prompt" if messages is None else "messages", code=code)


def image_fields(messages: Sequence[Message]) -> Iterator[str]:
    """The fields that hold images."""
    for index, message in enumerate(messages):
        for place, part in enumerate(_parts(message)):
            if isinstance(part, ImagePart):
                yield f"messages[{index}].content[{place}]"


def _parts(message: Message) -> Sequence[Any]:
    return message.content if isinstance(message.content, list) else ()


def _turn(message: Message, index: int, template: str, read: ReadImage) -> dict[str, Any]:
    """One message for a template."""
    where = f"messages[{index}].content"
    if isinstance(message, AssistantMessage):
        if message.content is None and message.refusal is None and not message.tool_calls:
            raise RequestError(f"{where} is missing: give it, or tool_calls", where)
        return _answer(message, template)
    content: Any = message.content
    if isinstance(content, list):
        parts = [_part(part, f"{where}[{place}]", read) for place, part in enumerate(content)]
        texts_only = all(part["type"] == "text" for part in parts)
        content = "".join(part["text"] for part in parts) if texts_only else parts
    if isinstance(message, ToolMessage):
        role = "tool" if "tool_call" in template or "ipython" in template else "ipython"
        answered = {"tool_call_id": message.tool_call_id} if role == "tool" else {}
    else:
        role, answered = "system" if isinstance(message, Instruction) else message.role, {}
    return {"role": role, "content": content, **answered, **({} if message.name is None else {"name": message.name})}


def _answer(message: AssistantMessage, template: str) -> dict[str, Any]:
    """An earlier answer, its calls in the template's form or as the model writes them."""
    if isinstance(message.content, list):
        text = "".join(part.text if isinstance(part, TextPart) else part.refusal for part in message.content)
    else:
        text = message.content or message.refusal or ""
    if not message.tool_calls:
        return {"role": "assistant", "content": text}
    calls = []
    for call in message.tool_calls:
        try:
            arguments = json.loads(call.function.arguments or "{}")
        except (ValueError, RecursionError) as error:
            shown = shortened(call.function.arguments)
            raise RequestError(f"the arguments {shown} of {call.function.name} are no JSON", "messages") from error
        if not isinstance(arguments, dict):
            raise RequestError(f"the arguments of {call.function.name} are no JSON object", "messages")
        calls.append(
            {"id": call.id, "type": "function", "function": {"name": call.function.name, "arguments": arguments}}
        )
    if "tool_calls" in template:
        return {"role": "assistant", "content": text, "tool_calls": calls}
    return {"role": "assistant", "content": text + written_calls(call["function"] for call in calls)}


def written_calls(calls: Any) -> str:
    """Calls as Llama 4 writes them: a list in Python's syntax."""
    shown = []
    for call in calls:
        arguments = ", ".join(f"{name}={value!r}" for name, value in call["arguments"].items())
        shown.append(f"{call['name']}({arguments})")
    return f"[{', '.join(shown)}]"


def _part(part: Any, where: str, read: ReadImage) -> dict[str, Any]:
    """One part for a template."""
    if not isinstance(part, ImagePart):
        return {"type": "text", "text": part.text}
    try:
        return {"type": "image", "image": read(part.image_url, where)}
    except (SessionError, RequestError) as error:
        raise RequestError(str(error), f"{where}.image_url") from error


def _described(tool: Tool) -> dict[str, Any]:
    """A tool as templates show it."""
    function: dict[str, Any] = {"name": tool.function.name}
    if tool.function.description is not None:
        function["description"] = tool.function.description
    function["parameters"] = tool.function.parameters or {"type": "object", "properties": {}}
    return {"type": "function", "function": function}
