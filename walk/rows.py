"""Rows of data files in the forms that people have: JSON lines, a list in JSON, and Parquet, as one kind of dictionary.

Enters: a file. Leaves: rows with their places, and what a row says: a text, or messages. A row is one of

| keys | |
|---|---|
| `messages` | a conversation, with `images`, `tools`, `documents`, `chat_template_kwargs` beside it |
| `conversations` | as ShareGPT has it: `from`, `value` or `role`, `content`; `<image>` where one of `images` goes |
| `prompt` and `completion` | texts one after the other, or two lists of messages |
| `text` | a text |
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import DataError, shortened, shortened_text, without_extra
from ..files.reading import open_regular, read_bytes
from ..files.safetensors import POINTER
from ..spec.json_text import parse_json

PARQUET = ".parquet"
JSON = (".jsonl", ".ndjson", ".json")
"""Endings of files of JSON: an object a line, or a list of them."""

REFUSED = {
    ".csv": "is a table of values apart by commas: save it as Parquet, or as JSON lines with text in each",
    ".tsv": "is a table of values apart by tabs: save it as Parquet, or as JSON lines with text in each",
    ".arrow": "is an Arrow file: save it as Parquet",
    ".pkl": "is a pickle, which is code: save it as Parquet, or as JSON lines",
    **dict.fromkeys((".gz", ".bz2", ".xz", ".zst", ".zip"), "is compressed: unpack it first"),
}
"""Endings of files that are taken neither for rows nor for prose, and what to do."""

SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
}
"""ShareGPT's names of speakers, and the roles that they are."""

IMAGE = "<image>"
FORMS = "messages, conversations (ShareGPT), prompt and completion, or text"
LARGEST = 1 << 28
"""Bytes of a file of text or JSON lines at most."""

FACTOR = 64
"""Bytes of values for each byte of a Parquet file at most, above `LARGEST`: one text may stand for many rows."""

BATCH = 256
"""Rows of a Parquet file that are read at once."""


def is_rows(path: Path) -> bool:
    """Whether a file holds rows, by its name's ending."""
    return path.suffix.lower() in (PARQUET, *JSON)


def read_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """A file's rows, each with its place for messages.

    Raises:
        DataError: The file or a row cannot be read.
        MissingExtraError: It is Parquet, and pyarrow is not installed.
    """
    yield from _parquet(path) if path.suffix.lower() == PARQUET else _json(path)


def read_utf8(
    path: Path,
    remedy: str = "give text files with --data",
    of_folder: str = "give the files in it with --data, each by itself",
) -> str:
    """A file's text.

    Args:
        path: The file.
        remedy: The way out where it cannot be read.
        of_folder: The way out where it is a folder.

    Raises:
        DataError: It cannot be read, or is none.
    """
    if path.is_dir():
        raise DataError(f"{path} is a folder: {of_folder}")
    if why := REFUSED.get(path.suffix.lower()):
        raise DataError(f"{path} {why}")
    try:
        content = read_bytes(path, DataError, remedy, most=LARGEST)
    except FileNotFoundError as error:
        raise DataError(f"{path}: {error.strerror}: {remedy}") from error
    if content.startswith(POINTER):
        raise DataError(f"{path} is a git-lfs pointer, not the file itself: run `git lfs pull` in its folder")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: convert it first") from error


def _json(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for where, value in _values(path):
        if not isinstance(value, dict):
            raise DataError(f"{where}: no JSON object: give one with {FORMS}")
        yield where, value


def _values(path: Path) -> Iterator[tuple[str, Any]]:
    """The values of a list, or of lines, each with its place."""
    text, may_be_list = read_utf8(path), path.suffix.lower() == ".json"
    if may_be_list and text.lstrip()[:1] == "[":
        for number, row in enumerate(_parsed(text, str(path), "correct it"), start=1):
            yield f"{path}, row {number}", row
        return
    remedy = "give an object a line, or one list of objects" if may_be_list else "correct it"
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield (where := f"{path}, line {number}"), _parsed(line, where, remedy)


def _parsed(text: str, where: str, remedy: str) -> Any:
    try:
        return parse_json(text)
    except ValueError as error:
        raise DataError(f"{where}: not JSON ({shortened_text(str(error), 100)}): {remedy}") from error


def _parquet(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ModuleNotFoundError as error:
        raise without_extra(error, "parquet") from error
    number = 0
    try:
        with open_regular(path) as start:
            if start.read(len(POINTER)) == POINTER:
                raise DataError(f"{path} is a git-lfs pointer, not the file itself: run `git lfs pull` in its folder")
        with path.open("rb") as whole, parquet.ParquetFile(whole) as file:  # pyarrow takes no path that is not UTF-8
            most = max(LARGEST, FACTOR * path.stat().st_size)
            for batch in file.iter_batches(batch_size=_batch(file.metadata)):
                for row in batch.to_pylist():
                    number += 1
                    most -= _size(row)
                    if most < 0:
                        raise DataError(f"{path}: far more data than its size holds: give another file with --data")
                    yield f"{path}, row {number}", _without_nulls(row)
    except (OSError, ValueError, ArithmeticError, pyarrow.ArrowException) as error:  # names that are no UTF-8, years
        why = error.strerror if isinstance(error, OSError) and error.strerror else "no Parquet file, or damaged"
        raise DataError(f"{path}: {why}: give another file with --data") from error


def _batch(metadata: Any) -> int:
    """Rows of a Parquet file to read at once, so that one text that stands in each of them is not held so often."""
    groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
    sizes = [
        max((group.column(index).total_uncompressed_size for group in groups), default=0)
        for index in range(metadata.num_columns)
    ]
    return max(1, min(BATCH, LARGEST // max(1, sum(sizes))))


def _size(value: Any) -> int:
    """Bytes of a row's texts and images, and some for each other value."""
    if isinstance(value, dict | list):
        return 8 + sum(map(_size, value.values() if isinstance(value, dict) else value))
    return len(value) if isinstance(value, str | bytes) else 8


def _without_nulls(value: Any) -> Any:
    """A row without the empty fields that a common schema gives to every object."""
    if isinstance(value, dict):
        return {name: _without_nulls(each) for name, each in value.items() if each is not None}
    return [_without_nulls(each) for each in value] if isinstance(value, list) else value


def said_in(row: dict[str, Any], where: str) -> str | list[Any]:
    """A row's text, or its messages in the form that a session reads.

    Raises:
        DataError: It is in none of the forms.
    """
    if "messages" in row:
        messages = row["messages"]
        if not isinstance(messages, list) or not messages:
            raise DataError(f"{where}: messages is no list of objects with role and content: correct it")
        return messages
    if "conversations" in row:
        return _sharegpt(row, where)
    if "prompt" in row and "completion" in row:
        return _completed(row["prompt"], row["completion"], where)
    if "text" in row:
        if not isinstance(row["text"], str) or not row["text"].strip():
            raise DataError(f"{where}: text is {shortened(row['text'])}, expected a text: correct it")
        return row["text"]
    names = shortened_text(", ".join(map(str, row)) or "nothing", 100)
    raise DataError(f"{where} has {names}: expected {FORMS}")


def _completed(prompt: Any, completion: Any, where: str) -> str | list[Any]:
    if isinstance(prompt, str) and isinstance(completion, str) and (prompt + completion).strip():
        return prompt + completion
    if isinstance(prompt, list) and isinstance(completion, list) and prompt and completion:
        return [*prompt, *completion]
    found = f"{shortened(prompt, 40)} and {shortened(completion, 40)}"
    raise DataError(f"{where}: prompt and completion are {found}, expected two texts or two lists of messages")


def _sharegpt(row: dict[str, Any], where: str) -> list[dict[str, Any]]:
    """ShareGPT's turns as messages."""
    turns = row["conversations"]
    if not isinstance(turns, list) or not turns:
        raise DataError(f"{where}: conversations is no list of objects with from and value: correct it")
    has_images = bool(row.get("image") or row.get("images"))
    messages: list[dict[str, Any]] = []
    if isinstance(row.get("system"), str):
        messages.append({"role": "system", "content": row["system"]})
    for number, turn in enumerate(turns, start=1):
        speaker, value = _turn(turn)
        if not isinstance(value, str) or not isinstance(speaker, str) or speaker not in SPEAKERS:
            raise DataError(
                f"{where}: turn {number} is {shortened(turn)}, expected a value, and from as one of "
                f"{', '.join(SPEAKERS)}"
            )
        messages.append({"role": SPEAKERS[speaker], "content": _parts(value) if has_images else value})
    return messages


def _turn(turn: Any) -> tuple[Any, Any]:
    """Who speaks, and what, in either spelling; None where a turn has neither."""
    if not isinstance(turn, dict):
        return None, None
    return turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))


def _parts(value: str) -> str | list[dict[str, str]]:
    """A text with a part for each image's place in it."""
    if IMAGE not in value:
        return value
    parts: list[dict[str, str]] = []
    for at, piece in enumerate(value.split(IMAGE)):
        parts += [{"type": "image"}] if at else []
        parts += [{"type": "text", "text": text}] if (text := piece.strip("\n")) else []
    return parts
