"""Prompts as a person gives them: a text, a conversation or token ids, with images, to what the model takes.

Enters: the prompt and its images. Leaves: token ids, with an image token for each image feature, and the images' tiles.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import SessionError
from .images.placeholders import IMAGE
from .images.sources import ImageSource
from .images.tower import Vision
from .text import Message, Text

Prompt = str | Sequence[int] | Sequence[Message]


@dataclass(frozen=True, slots=True)
class Tokens:
    """A prompt as the model takes it.

    Attributes:
        ids: Token ids.
        pixels_N3PP: The tiles of its images, in order; None where it has none.
    """

    ids: list[int]
    pixels_N3PP: NDArray[np.float32] | None = None


def read_prompt(prompt: Prompt, images: Sequence[ImageSource], text: Text, vision: Vision | None) -> Tokens:
    """Reads a prompt.

    Args:
        prompt: A text, token ids taken as they are, or messages for the chat template, whose content is a text or a
            list of parts, as in `{"type": "text", "text": …}` and `{"type": "image", "image": …}`.
        images: The images of a text or of token ids, one for each `<|image|>` in it. A text that has none of these is
            what a person says about the images, in the chat template where there is one.
        text: The tokenizer and chat template.
        vision: What takes images; None where the model takes none.

    Raises:
        SessionError: The prompt or an image is none of these, or they do not belong together.
    """
    images = list(images)
    is_chat = not isinstance(prompt, str) and len(prompt) > 0 and isinstance(prompt[0], dict)
    if isinstance(prompt, str) and images and IMAGE not in prompt:
        if text.chat_template is None:
            prompt = IMAGE * len(images) + prompt
        else:
            parts = [*({"type": "image", "image": each} for each in images), {"type": "text", "text": prompt}]
            prompt, images, is_chat = [{"role": "user", "content": parts}], [], True
    if is_chat:
        messages: Sequence[Message] = prompt  # type: ignore[assignment]
        if images:
            raise SessionError("images came beside messages: put them into a message's content, where they belong")
        images = list(images_of(messages))
        ids = text.encode_chat([without_images(message) for message in messages])
    elif isinstance(prompt, str):
        ids = text.encode(prompt)
    else:
        array = np.asarray(prompt)
        if array.ndim != 1 or (array.size and not np.issubdtype(array.dtype, np.integer)):
            found = f"{array.dtype} {list(array.shape)}"
            raise SessionError(f"the prompt is {found}, expected a text, messages, or one list of token ids")
        ids = array.tolist()
    has_places = vision is not None and (
        vision.spec.image_token in ids or (isinstance(prompt, str) and IMAGE in prompt)
    )
    if vision is not None and (images or has_places):
        ids, pixels_N3PP = vision.prompts.prepare(ids, images)
        return Tokens(ids, pixels_N3PP if images else None)
    if images:
        raise SessionError(f"{text.folder}: the model takes text only, leave the images out")
    return Tokens(ids)


def images_of(messages: Sequence[Message]) -> Iterator[ImageSource]:
    """The images in messages, in order.

    Raises:
        SessionError: A part is neither an image nor a text.
    """
    for message in messages:
        content = message.get("content")
        for part in content if isinstance(content, list) else ():
            match part:
                case {"type": "image", "image": image}:
                    yield image
                case {"type": "image", "path": path}:
                    yield path
                case {"type": "text", "text": str()}:
                    pass
                case _:
                    raise SessionError(
                        f"a message has the part {shortened(part)}, expected a type of 'text' with a text, or of "
                        "'image' with an image or a path"
                    )


def without_images(message: Message) -> Message:
    """A message as chat templates take it: of an image only that it is there."""
    content = message.get("content")
    if not isinstance(content, list):
        return message
    return {**message, "content": [{"type": "image"} if part["type"] == "image" else part for part in content]}


def shortened(value: Any) -> str:
    """A value for an error's line."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"
