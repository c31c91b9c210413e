"""Text as windows of token ids, for calibration and for accuracy checks.

Enters: text files, and the model folder's tokenizer. Leaves: ids [W, S], each window begun as the tokenizer begins a
text, and longer than the model's attention chunk where there is text enough, so that chunk boundaries are crossed.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from ..errors import DataError
from ..geometry import ModelSpec

SHORTEST_WINDOW = 512
FEWEST_TOKENS = 256
"""With fewer tokens nothing can be said about any channel."""


def window_length(spec: ModelSpec) -> int:
    """A chunk and a quarter, at least `SHORTEST_WINDOW`, at most the context."""
    return min(spec.max_positions, max(SHORTEST_WINDOW, spec.chunk + spec.chunk // 4))


def read_windows(
    folder: Path, files: Sequence[str | Path], spec: ModelSpec, samples: int, window: int | None = None
) -> NDArray[np.int64]:
    """Tokenises text files.

    Args:
        folder: The model folder, for its tokenizer.
        files: UTF-8 text.
        spec: Geometry.
        samples: Windows at most, evenly spaced over the text.
        window: Tokens of a window; None takes `window_length`.

    Returns:
        Ids [W, S].

    Raises:
        DataError: A file cannot be read, or there is too little text.
    """
    if samples < 1 or (window is not None and not 2 <= window <= spec.max_positions):
        raise DataError(f"{samples} samples of {window} tokens: expected 1 up, and 2 to {spec.max_positions}")
    tokenizer = _tokenizer(folder)
    ids: list[int] = []
    for file in files:
        ids += tokenizer.encode(_text(Path(file)), add_special_tokens=False).ids
    if len(ids) < FEWEST_TOKENS:
        raise DataError(f"the text has {len(ids)} tokens, expected at least {FEWEST_TOKENS}: give more --data")
    if outside := [token for token in ids if token >= spec.vocab_size]:
        raise DataError(f"the tokenizer makes id {outside[0]}, the vocabulary has {spec.vocab_size}")
    start = tokenizer.encode("", add_special_tokens=True).ids
    length = min(window or window_length(spec), len(ids) + len(start)) - len(start)
    count = len(ids) // length
    chosen = np.unique(np.linspace(0, count - 1, min(samples, count)).round().astype(np.int64))
    return np.array([start + ids[at * length : (at + 1) * length] for at in chosen], dtype=np.int64)


def _tokenizer(folder: Path) -> Tokenizer:
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise DataError(f"{folder} has no tokenizer.json: export again from a checkpoint that has one")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the tokenizers library raises plain Exception
        raise DataError(f"{path}: damaged ({error}): export again from an intact checkpoint") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _text(path: Path) -> str:
    try:
        text = path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: convert it first") from error
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}: give text files with --data") from error
    if not text.strip():
        raise DataError(f"{path} holds no text: give text files with --data")
    return text
