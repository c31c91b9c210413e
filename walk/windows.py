"""Text and conversations as windows of token ids, for calibration and for accuracy checks.

Enters: text files and rows, and the folder's tokenizer, chat template and preprocessor. Leaves: `Windows`. A window of
text begins as the tokenizer begins a text; one of conversations begins with a conversation, and goes on with those that
follow. Windows are longer than the model's attention chunk where there is enough, so that chunk boundaries are crossed.
"""

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError, FolderError, SessionError
from ..files.folders import SPEC
from ..runtime.images.placeholders import START, ImagePrompts
from ..runtime.images.sources import ImageSource
from ..runtime.text import Text
from ..spec.geometry import ModelSpec, VisionSpec
from .conversations import Conversation, cut_images, read_conversations
from .rows import is_rows, read_utf8

SHORTEST_WINDOW = 512
FEWEST_TOKENS = 256
"""With fewer tokens nothing can be said about any channel."""

MOST_KEPT = 1 << 30
"""Bytes of tokens and of images, as their files have them, that all data have at most."""

MOST_CHARACTERS = 1 << 22
"""Characters of a row at most: tokenising takes 150 bytes of memory for each."""

PIECE = 1 << 20
"""Characters of a text file that are tokenised at once, up to the end of a word."""

END = re.compile(r"(?<=\w)(?= \w)")


@dataclass(frozen=True, kw_only=True, slots=True)
class Windows:
    """Token ids, and the images in them. W windows of S tokens.

    Attributes:
        ids_WS: Token ids.
        is_image_WS: Whether a token belongs to an image: its patches, its beginning and end, what stands between tiles.
        tiles_W: How many tiles each window's images have.
        pixels_N3PP: The tiles of all windows, in order, in float16, which holds their values exactly.
        vision: The vision tower's geometry; None where there are no images.
    """

    ids_WS: NDArray[np.int64]
    is_image_WS: NDArray[np.bool_] = field(default_factory=lambda: np.zeros((0, 0), bool))
    tiles_W: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    pixels_N3PP: NDArray[np.float16] = field(default_factory=lambda: np.zeros((0, 3, 0, 0), np.float16))
    vision: VisionSpec | None = None

    def __post_init__(self) -> None:
        if not self.is_image_WS.size:
            object.__setattr__(self, "is_image_WS", np.zeros(self.ids_WS.shape, bool))
            object.__setattr__(self, "tiles_W", np.zeros(len(self.ids_WS), np.int64))

    @property
    def image_token(self) -> int | None:
        """Id of the token that stands for an image feature; None where there are no images."""
        return None if self.vision is None else self.vision.image_token

    def pixels_of(self, window: int) -> NDArray[np.float32]:
        """A window's tiles."""
        first = int(self.tiles_W[:window].sum())
        return self.pixels_N3PP[first : first + int(self.tiles_W[window])].astype(np.float32)

    def features_of(self, window: int, features_MH: NDArray[np.float32] | None) -> NDArray[np.float32] | None:
        """A window's image features, one for each image token, of those of all tiles; None where it has none."""
        if self.vision is None or features_MH is None or not self.tiles_W[window]:
            return None
        first = int(self.tiles_W[:window].sum()) * self.vision.features
        return features_MH[first : first + int(np.count_nonzero(self.ids_WS[window] == self.image_token))]

    def features_in_order(self, features_MH: NDArray[np.float32] | None) -> NDArray[np.float32] | None:
        """The features of all windows, one for each image token; a last image may be cut off in each window."""
        parts = (self.features_of(window, features_MH) for window in range(len(self.ids_WS)))
        found = [part for part in parts if part is not None]
        return np.concatenate(found) if found else None

    def continued(self, ids_WC: NDArray[np.int64], prompt: int) -> "Windows":
        """The windows' first `prompt` tokens with other tokens behind them."""
        is_image_WC = np.zeros(ids_WC.shape, bool)
        is_image_WC[:, :prompt] = self.is_image_WS[:, :prompt]
        return replace(self, ids_WS=ids_WC, is_image_WS=is_image_WC)

    def at(self, rows: Sequence[int]) -> "Windows":
        """Some of the windows, in rising order, with their tiles."""
        taken_W = np.isin(np.arange(len(self.ids_WS)), rows)
        return Windows(
            ids_WS=self.ids_WS[taken_W],
            is_image_WS=self.is_image_WS[taken_W],
            tiles_W=self.tiles_W[taken_W],
            pixels_N3PP=self.pixels_N3PP[np.repeat(taken_W, self.tiles_W)],
            vision=self.vision,
        )

    def first(self, count: int) -> "Windows":
        """The first `count` windows."""
        return self.at(range(count))


def window_length(spec: ModelSpec) -> int:
    """A chunk and a quarter, at least `SHORTEST_WINDOW`, at most the context."""
    return min(spec.max_positions, max(SHORTEST_WINDOW, spec.chunk + spec.chunk // 4))


def read_windows(
    folder: Path,
    files: str | Path | Sequence[str | Path],
    spec: ModelSpec,
    samples: int,
    window: int | None = None,
    vision: VisionSpec | None = None,
) -> Windows:
    """Tokenises text files and conversations.

    Args:
        folder: The model folder or checkpoint, for its tokenizer.
        files: One or several: UTF-8 text, or JSON and Parquet of rows (`rows`), distinguished by their names' endings.
        spec: Geometry.
        samples: Windows at most, evenly spaced over the data.
        window: Tokens of a window; None takes `window_length`.
        vision: Geometry of the vision tower; None where the model takes no images.

    Raises:
        DataError: A file cannot be read, or there is too little data.
    """
    if samples < 1:
        raise DataError(f"samples is {samples}, expected a number of windows from 1 up")
    if window is not None and not 2 <= window <= spec.max_positions:
        raise DataError(f"window is {window}, expected 2 to {spec.max_positions} tokens")
    text = _text_of(folder)
    paths = [Path(file) for file in ([files] if isinstance(files, str | os.PathLike) else files)]
    prompts = _prompts(text) if vision is not None and any(map(is_rows, paths)) else None
    ids_S, talks = _read_all(paths, text, prompts)
    said = sum(len(talk.ids_S) for talk in talks)
    if len(ids_S) + said < FEWEST_TOKENS:
        raise DataError(f"the data has {len(ids_S) + said} tokens, expected at least {FEWEST_TOKENS}: give more --data")
    largest = max(int(each.max(initial=0)) for each in (ids_S, *(talk.ids_S for talk in talks)))
    if largest >= spec.vocab_size:
        raise DataError(f"the tokenizer makes id {largest}, the vocabulary has {spec.vocab_size}")
    start = np.array(text.encode(""), np.int64)
    length = min(
        window or window_length(spec), *([len(start) + len(ids_S)] if len(ids_S) else []), *([said] if said else [])
    )
    step = length - len(start)
    places = range(0, len(ids_S) - step + 1, step) if len(ids_S) else ()
    cut: list[Cut] = [(np.concatenate([start, ids_S[at : at + step]]), ()) for at in places]
    cut += _pack(talks, length)
    chosen = np.unique(np.linspace(0, len(cut) - 1, min(samples, len(cut))).round().astype(np.int64))
    return _with_images([cut[at] for at in chosen], vision, prompts)


def _read_all(
    paths: Sequence[Path], text: Text, prompts: ImagePrompts | None
) -> tuple[NDArray[np.int64], list[Conversation]]:
    """The tokens of all text files, and the conversations and texts of all rows.

    Raises:
        DataError: A file cannot be read, or they are too much together.
    """
    text.most_characters = min(text.most_characters, MOST_CHARACTERS)
    kept, pieces, talks = 0, [np.zeros(0, np.int64)], list[Conversation]()

    def keep(size: int, path: Path) -> None:
        nonlocal kept
        kept += size
        if kept > MOST_KEPT:
            of = f", of {len(paths)} files" if len(paths) > 1 else ""
            raise DataError(
                f"{path}: up to here the data has {kept} bytes of tokens and images{of}, expected {MOST_KEPT} at "
                "most: give fewer or smaller files with --data"
            )

    for path in paths:
        for piece in () if is_rows(path) else _pieces(_text(path)):
            pieces.append(np.array(text.encode(piece, special_tokens=False), np.int64))
            keep(pieces[-1].nbytes, path)
        for talk in read_conversations(path, text, prompts) if is_rows(path) else ():
            talks.append(talk)
            keep(talk.nbytes, path)
    return np.concatenate(pieces), talks


def _pieces(text: str) -> Iterator[str]:
    """A text in parts that are tokenised one after another: whole words, or a piece of one that is far longer."""
    at = 0
    while at < len(text):
        word = END.search(text, at + PIECE, at + 2 * PIECE)
        end = word.end() if word is not None else at + PIECE
        yield text[at:end]
        at = end


Cut = tuple[NDArray[np.int64], tuple[ImageSource, ...]]
"""A window's ids, and its images."""


def _pack(talks: Sequence[Conversation], length: int) -> Iterator[Cut]:
    """Windows of conversations; one that is cut at a window's end begins the next, but for the last of all."""
    at, left = 0, sum(len(talk.ids_S) for talk in talks)
    while at < len(talks):
        is_last = left < length
        while left < length:  # the last window is as long as the others
            at -= 1
            left += len(talks[at].ids_S)
        end, tokens = at, 0
        while tokens < length:
            tokens += len(talks[end].ids_S)
            end += 1
        taken = talks[at:end]
        ids_S = np.concatenate([talk.ids_S for talk in taken])[:length]
        yield ids_S, tuple(image for talk in taken for image in talk.images)
        if is_last or end == len(talks):
            return
        following = max(at + 1, end if tokens == length else end - 1)
        left -= sum(len(talk.ids_S) for talk in talks[at:following])
        at = following


def _with_images(cut: Sequence[Cut], vision: VisionSpec | None, prompts: ImagePrompts | None) -> Windows:
    ids_WS = np.stack([ids_S for ids_S, _ in cut]).astype(np.int64)
    if prompts is None or not any(images for _, images in cut):
        return Windows(ids_WS=ids_WS)
    begin = prompts.ids[START]
    begun = [images[: np.count_nonzero(ids_S == begin)] for ids_S, images in cut]
    tiles = [cut_images(images, prompts) if images else np.zeros((0,), np.float16) for images in begun]
    return Windows(
        ids_WS=ids_WS,
        is_image_WS=np.isin(ids_WS, list(prompts.ids.values())),
        tiles_W=np.array([len(each) for each in tiles]),
        pixels_N3PP=np.concatenate([each for each in tiles if len(each)]),
        vision=vision,
    )


def _prompts(text: Text) -> ImagePrompts:
    try:
        return ImagePrompts(text)
    except (SessionError, FolderError) as error:
        raise DataError(f"{error}: images cannot be read") from error


def _text_of(folder: Path) -> Text:
    try:
        text = Text(folder)
    except FolderError as error:
        raise DataError(str(error)) from error
    if text.tokenizer is None:
        remedy = "export again with --tokenizer DIR, a folder that has one"
        if not os.path.lexists(folder / SPEC):
            remedy = (
                "copy the tokenizer's files into it, or give the model that was exported from it with --tokenizer DIR"
            )
        raise DataError(f"{folder} has no tokenizer.json: {remedy}")
    return text


def _text(path: Path) -> str:
    text = read_utf8(path)
    if not text.strip():
        raise DataError(f"{path} holds no text: give text files with --data")
    return text
