"""Conversations and texts in rows, for calibration and accuracy checks, as a session would read them.

Enters: JSON and Parquet files, a conversation or a text a row (see `rows`), and the folder's tokenizer, chat template
and preprocessor. Leaves: token ids, with an image token for each image feature, and the images to be cut into tiles
when they are needed.

Messages have a `role` and a `content`: a text, or a list of parts, as in `{"type": "text", "text": …}`,
`{"type": "image", "path": …}` and `{"type": "image_url", "image_url": {"url": …}}`, a data URL or a path. `images`
beside them are those of parts that have none, or where there are no such parts, come before the first user's text.
Paths are relative to the file. `tools`, `documents` and `chat_template_kwargs` beside them are settings of these names
(`ChatSettings`). As in a session, control tokens are the chat template's alone.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError, FolderError, SessionError, shortened
from ..runtime.chat.messages import Message, read_messages, with_images_beside
from ..runtime.images.data_urls import scheme_of
from ..runtime.images.placeholders import ImagePrompts
from ..runtime.images.sources import ImageSource, read_image
from ..runtime.images.tiles import choose_grid, cut_tiles
from ..runtime.text import Text
from .rows import read_rows, said_in

BESIDE = ("tools", "documents", "chat_template_kwargs")
"""Keys of a line that are settings of its conversation."""

OVERHEAD = 256
"""Bytes that a conversation and each of its images take beside tokens and an image's file, about."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """One conversation.

    Attributes:
        ids_S: Its tokens, images expanded.
        images: Paths, data URLs and files' bytes, in order.
    """

    ids_S: NDArray[np.int64]
    images: tuple[ImageSource, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of memory that it takes, about."""
        held = sum(len(image) for image in self.images if isinstance(image, str | bytes))
        return OVERHEAD * (1 + len(self.images)) + self.ids_S.nbytes + held


def read_conversations(path: Path, text: Text, prompts: ImagePrompts | None) -> Iterator[Conversation]:
    """Reads a file of rows, one after another; a text begins as the tokenizer begins one.

    Args:
        path: The file.
        text: The folder's tokenizer and chat template.
        prompts: Puts images into prompts; None where the model takes none.

    Raises:
        DataError: The file or a line cannot be read, or a conversation is none that the model takes.
    """
    for where, row in read_rows(path):
        said = said_in(row, where)
        images: tuple[ImageSource, ...] = ()
        settings: Any = {name: row[name] for name in BESIDE if name in row}
        try:
            if isinstance(said, str):
                ids = text.encode(said)
            else:
                messages, images = _read(said, row, where, path.parent)
                if images and prompts is None:
                    raise DataError(f"{where} has an image, the model takes text only: leave it out")
                ids = text.encode_chat(messages, **settings)
            if prompts is not None and images:
                pictures = (read_image(image) for image in images)
                ids = prompts.expand(ids, [choose_grid(each.height, each.width, prompts.settings) for each in pictures])
        except (SessionError, FolderError) as error:
            raise DataError(f"{where}: {error}") from error
        yield Conversation(np.array(ids, np.int64), images)


def cut_images(images: Sequence[ImageSource], prompts: ImagePrompts) -> NDArray[np.float16]:
    """The tiles of images [N, 3, P, P], in float16, which holds their values exactly.

    Raises:
        DataError: An image cannot be read any more.
    """
    try:
        tiles = [cut_tiles(read_image(image), prompts.settings)[0].astype(np.float16) for image in images]
    except SessionError as error:
        raise DataError(str(error)) from error
    return np.concatenate(tiles)


def _read(
    messages: list[Any], row: Mapping[str, Any], where: str, folder: Path
) -> tuple[list[Message], tuple[ImageSource, ...]]:
    """The messages of a row, and their images, each path an absolute one."""
    beside = _images_beside(row, where)
    turns, images = read_messages(messages)
    if beside and None not in images:
        first = next((turn for turn in turns if turn["role"] == "user"), None)
        if first is None:
            raise DataError(f"{where}: no user's message that its images could come before: correct it")
        content = first.get("content", "")
        said = content if isinstance(content, list) else [{"type": "text", "text": content}]
        first["content"] = [*({"type": "image"} for _ in beside), *said]
        before = sum(_images(turn) for turn in turns[: turns.index(first)])
        images[before:before] = [None] * len(beside)
    return turns, tuple(_located(image, folder) for image in with_images_beside(images, beside))


def _images_beside(row: Mapping[str, Any], where: str) -> list[str | bytes]:
    """A row's images: paths and data URLs, and files' bytes as Parquet files have them."""
    given = row.get("images") or row.get("image") or []
    listed = given if isinstance(given, list) else [given] if "images" not in row else None
    if listed is not None:
        places = ((each.get("bytes") or each.get("path")) if isinstance(each, Mapping) else each for each in listed)
        found: list[Any] = list(places)
        if all(isinstance(image, str | bytes) for image in found):
            return found
    raise DataError(f"{where}: images is no list of paths: correct it")


def _images(turn: Message) -> int:
    """The number of a message's images."""
    content = turn.get("content")
    parts = content if isinstance(content, list) else []
    return sum(isinstance(part, dict) and part.get("type") == "image" for part in parts)


def _located(image: ImageSource, folder: Path) -> ImageSource:
    """An image whose path is relative to a folder."""
    if isinstance(image, bytes):
        return image
    if not isinstance(image, str):
        raise SessionError(f"an image is {shortened(image)}, expected a path or a data URL")
    return image if scheme_of(image) else folder / image
