"""Prompts as a person gives them, read into tokens and tiles as the model takes them.

Enters: a text, a conversation or token ids, and images. Leaves: token ids, with an image token for each image feature,
and the images' tiles. Invariant: whatever is given, it is taken or refused by a `SessionError`.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from numbers import Integral
from typing import Any, Unpack

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..errors import FolderError, SessionError, shortened
from ..spec.geometry import VisionSpec
from .chat.messages import Message, is_message, read_messages, with_images_beside
from .chat.settings import ChatSettings
from .checks import array
from .images.placeholders import IMAGE, ImagePrompts
from .images.sources import ImageSource
from .text import Text

Prompt = str | Sequence[int] | Sequence[Message] | Message
Images = ImageSource | Sequence[ImageSource] | None


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

    def read(self, prompt: Prompt, images: Images = (), **settings: Unpack[ChatSettings]) -> Tokens:
        """Reads a prompt.

        Args:
            prompt: A text, token ids taken as they are, or messages for the chat template, whose content is a text or
                a list of parts, as in `{"type": "text", "text": …}` and `{"type": "image", "image": …}`.
            images: The images of a text or of token ids, one for each `<|image|>` in it. A text that has none of these
                is what a person says about the images, in the chat template where there is one. Beside messages, one
                for each part `{"type": "image"}` without an image.
            **settings: What is said beside messages, see `ChatSettings`.

        Raises:
            SessionError: The prompt or an image is none of these, or they do not belong together.
        """
        ids, sources = self._encode(prompt, image_list(images), settings)
        if self.tower is None:
            return Tokens(ids)
        has_places = self.tower.image_token in ids or (isinstance(prompt, str) and IMAGE in prompt)
        if not sources and not has_places:
            return Tokens(ids)
        ids, pixels_N3PP = self.image_prompts.prepare(ids, sources)
        return Tokens(ids, pixels_N3PP if sources else None)

    def _encode(
        self, prompt: Any, images: list[ImageSource], settings: ChatSettings
    ) -> tuple[list[int], list[ImageSource]]:
        """The token ids of a prompt, with a placeholder for each image, and the images in their order."""
        text = self.text
        if images and self.tower is None:
            raise self._takes_text_only()
        if isinstance(prompt, str) and images and IMAGE not in prompt:
            if text.templates:
                places = [{"type": "image"} for _ in images]
                prompt = [{"role": "user", "content": [*places, {"type": "text", "text": prompt}]}]
            else:
                prompt = IMAGE * len(images) + prompt
        if is_message(prompt) or (isinstance(prompt, list | tuple) and prompt and _is_object(prompt[0])):
            turns, found = read_messages(prompt)
            images = with_images_beside(found, images)
            if images and self.tower is None:
                raise self._takes_text_only()
            return text.encode_chat(turns, **settings), images
        if given := [name for name, value in settings.items() if value is not None]:
            raise SessionError(f"{given[0]} came beside a prompt that is no messages: give messages, or leave it out")
        return (text.encode_prompt(prompt) if isinstance(prompt, str) else _ids(prompt)), images

    def _takes_text_only(self) -> SessionError:
        return SessionError(f"{self.text.folder}: the model takes text only, leave the images out")

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


def image_list(images: Any) -> list[ImageSource]:
    """Images as a list, of one image as well: an array of two or three dimensions is one.

    Raises:
        SessionError: They are neither.
    """
    if images is None:
        return []
    if isinstance(images, str | bytes | bytearray | Image.Image) or hasattr(images, "__fspath__"):
        return [images]
    if isinstance(images, np.ndarray):
        return [images] if images.ndim < 4 else list(images)
    if isinstance(images, list | tuple):
        return list(images)
    raise SessionError(
        f"images is {shortened(images)}, of type {type(images).__name__}: give an image, or a list of images"
    )


def prompt_list(prompts: Any) -> list[Prompt]:
    """Several prompts as a list.

    Raises:
        SessionError: They are one prompt.
    """
    is_one = isinstance(prompts, str | bytes | bytearray | Mapping) or is_message(prompts)
    if not is_one and isinstance(prompts, Iterable):
        several = list(prompts)
        if not several or not isinstance(several[0], Integral):
            return several
    raise SessionError(f"the prompts are {shortened(prompts)}, expected a list of prompts: [prompt] is a list of one")


def _is_object(value: Any) -> bool:
    return isinstance(value, Mapping) or is_message(value)


def _ids(prompt: Any) -> list[int]:
    """Token ids as they were given."""
    ids_S = array(prompt)
    if ids_S.ndim == 1 and (not ids_S.size or ids_S.dtype.kind in "iu"):
        ids: list[int] = ids_S.tolist()
        return ids
    found = f"{ids_S.dtype} {list(ids_S.shape)}" if ids_S.dtype.kind in "iufb" and ids_S.ndim else shortened(prompt)
    raise SessionError(f"the prompt is {found}, expected {EXPECTED}")


EXPECTED = "a text, messages, or one list of token ids"
