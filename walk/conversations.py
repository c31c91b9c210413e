"""Conversations for calibration and accuracy checks, as a session would read them.

Enters: JSONL files, a conversation a line, and the folder's tokenizer, chat template and preprocessor. Leaves: token
ids, with an image token for each image feature, and the images to be cut into tiles when they are needed.

A line is an object of `messages`, each with a `role` and a `content`: a text, or a list of parts, as in
`{"type": "text", "text": …}` and `{"type": "image", "path": …}`. `images` beside it are paths of images that come
before the first user's text. Paths are relative to the file.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError, FolderError, SessionError
from ..runtime.images.placeholders import ImagePrompts
from ..runtime.images.sources import read_image
from ..runtime.images.tiles import choose_grid, cut_tiles
from ..runtime.prompt import images_of, without_images
from ..runtime.text import Text

SUFFIX = ".jsonl"


@dataclass(frozen=True, slots=True)
class Conversation:
    """One conversation.

    Attributes:
        ids_S: Its tokens, images expanded.
        images: Paths, in order.
    """

    ids_S: NDArray[np.int64]
    images: tuple[Path, ...]


def read_conversations(path: Path, text: Text, prompts: ImagePrompts | None) -> list[Conversation]:
    """Reads a JSONL file.

    Args:
        path: The file.
        text: The folder's tokenizer and chat template.
        prompts: Puts images into prompts; None where the model takes none.

    Raises:
        DataError: The file or a line cannot be read, or a conversation is none that the model takes.
    """
    found = []
    for number, line in _lines(path):
        where = f"{path}, line {number}"
        messages = _messages(line, where, path.parent)
        try:
            images = tuple(Path(str(image)) for image in images_of(messages))
            ids = text.encode_chat([without_images(message) for message in messages])
            if images:
                if prompts is None:
                    raise DataError(f"{where} has an image, the model takes text only: leave it out")
                pictures = (read_image(image) for image in images)
                ids = prompts.expand(ids, [choose_grid(each.height, each.width, prompts.settings) for each in pictures])
        except (SessionError, FolderError) as error:
            raise DataError(f"{where}: {error}") from error
        found.append(Conversation(np.array(ids, np.int64), images))
    return found


def cut_images(images: tuple[Path, ...], prompts: ImagePrompts) -> NDArray[np.float16]:
    """The tiles of images [N, 3, P, P], in float16, which holds their values exactly.

    Raises:
        DataError: An image cannot be read any more.
    """
    try:
        tiles = [cut_tiles(read_image(image), prompts.settings)[0].astype(np.float16) for image in images]
    except SessionError as error:
        raise DataError(str(error)) from error
    return np.concatenate(tiles)


def read_utf8(path: Path) -> str:
    """A file's text.

    Raises:
        DataError: It cannot be read, or is none.
    """
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: convert it first") from error
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}: give text files with --data") from error


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(read_utf8(path).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}, line {number}: not JSON ({error}): correct it") from error
        if not isinstance(value, dict):
            raise DataError(f"{path}, line {number}: no JSON object: give one with messages")
        yield number, value


def _messages(line: dict[str, Any], where: str, folder: Path) -> list[dict[str, Any]]:
    """The messages of a line, every image a part with its absolute path."""
    messages, beside = line.get("messages"), line.get("images", [])
    if not isinstance(messages, list) or not messages or not all(_is_message(message) for message in messages):
        raise DataError(f"{where}: messages is no list of objects with role and content: correct it")
    if not isinstance(beside, list) or not all(isinstance(image, str) for image in beside):
        raise DataError(f"{where}: images is no list of paths: correct it")
    placed = [{**message, "content": _parts(message["content"], folder)} for message in messages]
    if beside:
        first = next((message for message in placed if message["role"] == "user"), None)
        if first is None:
            raise DataError(f"{where}: no user's message that its images could come before: correct it")
        content = first["content"]
        said = content if isinstance(content, list) else [{"type": "text", "text": content}]
        first["content"] = [*({"type": "image", "path": str(folder / image)} for image in beside), *said]
    return placed


def _is_message(message: Any) -> bool:
    return (
        isinstance(message, dict)
        and isinstance(message.get("role"), str)
        and isinstance(message.get("content"), str | list)
    )


def _parts(content: Any, folder: Path) -> Any:
    if not isinstance(content, list):
        return content
    return [
        {**part, "path": str(folder / part["path"])}
        if isinstance(part, dict) and isinstance(part.get("path"), str)
        else part
        for part in content
    ]
