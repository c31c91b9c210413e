"""Prompts as a person gives them, read into tokens and tiles as the model takes them.

Enters: a text, a conversation or token ids, and images. Leaves: token ids, with an image token for each image feature,
and the images' tiles.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import FolderError, SessionError
from ..spec.geometry import VisionSpec
from .images.placeholders import IMAGE, ImagePrompts
from .images.sources import ImageSource
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


class PromptReader:
    """Reads prompts as a folder's tokenizer, chat template and preprocessor say.

    Args:
        text: The tokenizer and chat template.
        tower: The vision tower's geometry; None where the model takes no images.
    """

    def __init__(self, text: Text, tower: VisionSpec | None) -> None:
        self.text, self.tower = text, tower

    def read(self, prompt: Prompt, images: Sequence[ImageSource] = ()) -> Tokens:
        """Reads a prompt.

        Args:
            prompt: A text, token ids taken as they are, or messages for the chat template, whose content is a text or
                a list of parts, as in `{"type": "text", "text": …}` and `{"type": "image", "image": …}`.
            images: The images of a text or of token ids, one for each `<|image|>` in it. A text that has none of these
                is what a person says about the images, in the chat template where there is one.

        Raises:
            SessionError: The prompt or an image is none of these, or they do not belong together.
        """
        ids, sources = self._encode(prompt, list(images))
        if self.tower is None:
            if sources:
                raise SessionError(f"{self.text.folder}: the model takes text only, leave the images out")
            return Tokens(ids)
        has_places = self.tower.image_token in ids or (isinstance(prompt, str) and IMAGE in prompt)
        if not sources and not has_places:
            return Tokens(ids)
        ids, pixels_N3PP = self.image_prompts.prepare(ids, sources)
        return Tokens(ids, pixels_N3PP if sources else None)

    def _encode(self, prompt: Prompt, images: list[ImageSource]) -> tuple[list[int], list[ImageSource]]:
        """The token ids of a prompt, with a placeholder for each image, and the images in their order."""
        text = self.text
        if isinstance(prompt, str) and images and IMAGE not in prompt:
            if text.chat_template is None:
                prompt = IMAGE * len(images) + prompt
            else:
                parts = [*({"type": "image", "image": each} for each in images), {"type": "text", "text": prompt}]
                prompt, images = [{"role": "user", "content": parts}], []
        if isinstance(prompt, str):
            return text.encode(prompt), images
        if len(prompt) > 0 and isinstance(prompt[0], dict):
            messages: Sequence[Message] = prompt  # type: ignore[assignment]
            if images:
                raise SessionError("images came beside messages: put them into a message's content, where they belong")
            images = list(images_of(messages))
            return text.encode_chat([without_images(message) for message in messages]), images
        array = np.asarray(prompt)
        if array.ndim != 1 or (array.size and not np.issubdtype(array.dtype, np.integer)):
            found = f"{array.dtype} {list(array.shape)}"
            raise SessionError(f"the prompt is {found}, expected a text, messages, or one list of token ids")
        return array.tolist(), images

    @cached_property
    def image_prompts(self) -> ImagePrompts:
        """Puts images into prompts, as the tower takes them.

        Raises:
            SessionError: The folder has no preprocessor's settings, or its tokenizer no tokens of images.
            FolderError: The preprocessor cuts other tiles than the tower takes.
        """
        assert self.tower is not None
        prompts, spec = ImagePrompts(self.text), self.tower
        cut = {"size": prompts.settings.side, "features of a tile": prompts.patches, "image token": prompts.patch_id}
        for (name, found), taken in zip(cut.items(), (spec.image_size, spec.features, spec.image_token), strict=True):
            if found != taken:
                raise FolderError(
                    f"{prompts.folder}: the preprocessor's {name} is {found}, the vision tower's {taken}: correct "
                    "preprocessor_config.json or processor_config.json, and export again"
                )
        return prompts


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
    """A message as chat templates take it: an image is a part without its content."""
    content = message.get("content")
    if not isinstance(content, list):
        return message
    return {**message, "content": [{"type": "image"} if part["type"] == "image" else part for part in content]}


def shortened(value: Any) -> str:
    """A value for an error's line."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"
