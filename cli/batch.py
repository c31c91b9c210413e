"""`arriero run --prompts`: a file of prompts in, a file of answers out, many in flight, and resumable.

Enters: JSONL, a prompt a line: `{"prompt": TEXT}` or `{"messages": […]}`, with any `id` beside it. Leaves: JSONL, an
answer a line in the order of the prompts, written when all are done; until then they lie in a sibling, from which the
same command goes on after a kill. A prompt that cannot be answered has an `error` instead, and ends no other.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ArrieroError, DataError, SessionError, printable
from ..files.fields import check_fields
from ..files.output import reason
from ..files.reading import read_bytes
from ..spec.json_text import parse_json
from ..spec.types import Progress

if TYPE_CHECKING:
    from ..runtime import Generated, Session
    from ..runtime.continuation import Request
    from ..runtime.guesses import Guessing

LARGEST = 1 << 32
"""Bytes of a file of answers at most."""

FORM = 'write each in a line of JSON, {"prompt": TEXT} or {"messages": […]}'
"""The way to a file of prompts."""

FILE = "give a file of prompts with --prompts"
"""The way to one."""

AT_ONCE = 256
"""Prompts that are read and held at once; their images too."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """One line of prompts.

    Attributes:
        number: Its number in the file, from 1.
        name: Its `id`; None where it has none.
        prompt: A text or messages.
    """

    number: int
    name: Any
    prompt: Any


def read_prompts(path: Path) -> list[Asked]:
    """Reads a file of prompts.

    Raises:
        DataError: The file or a line cannot be read.
    """
    from ..walk.rows import read_utf8

    found = []
    for number, line in enumerate(read_utf8(path, FILE, FILE).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = parse_json(line)
        except ValueError as error:
            raise DataError(f"{where}: not JSON ({str(error)[:100]}): {FORM}") from error
        given = [name for name in ("prompt", "messages") if isinstance(row, dict) and name in row]
        if len(given) != 1 or not isinstance(row[given[0]], str if given[0] == "prompt" else list):
            raise DataError(f"{where}: no prompt: {FORM}")
        found.append(Asked(number=number, name=row.get("id"), prompt=_located(row[given[0]], path.parent)))
    if not found:
        raise DataError(f"{path} holds no prompt: {FORM}")
    return found


def _located(prompt: Any, folder: Path) -> Any:
    """Messages whose images' paths are relative to the file."""
    for message in prompt if isinstance(prompt, list) else ():
        content = message.get("content") if isinstance(message, dict) else None
        for part in content if isinstance(content, list) else ():
            if isinstance(part, dict) and isinstance(part.get("path"), str):
                part["path"] = str(folder / part["path"])
    return prompt


class Answers:
    """The file of answers, and what an earlier run left of it.

    Args:
        path: The file.
        job: Fingerprint of all that an answer depends on.
        force: Whether an existing file is replaced.

    Raises:
        DataError: It exists, or cannot be written.
    """

    def __init__(self, path: Path, job: str, *, force: bool) -> None:
        self.path, self.job = path, job
        self.partial = path.with_name(f".{path.name}.partial")
        if path.exists() and not force:
            raise DataError(f"{path} exists: choose another output, or --force to replace it")
        if path.is_dir():
            raise DataError(f"{path} is a folder: give the name of a file with -o")
        self.done: dict[int, dict[str, Any]] = {}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._read_partial()
            lines = [{"job": job}, *self.done.values()]
            self.partial.write_text("".join(map(_line, lines)), "utf-8")
        except OSError as error:
            raise DataError(
                f"{path}: cannot be written ({reason(error, path.parent)}): choose another output"
            ) from error

    def _read_partial(self) -> None:
        """Takes the answers of an earlier run of the same job; a line that was cut off is left out."""
        if not self.partial.exists():
            return
        content = read_bytes(self.partial, remedy="remove it", most=LARGEST)
        lines = content.decode("utf-8", "replace").split("\n")
        if lines[0] + "\n" != _line({"job": self.job}):
            return
        for line in lines[1:]:
            try:
                answer = parse_json(line)
                check_fields(answer, {"line": int})
                self.done[answer["line"]] = answer
            except (ValueError, KeyError, TypeError):
                continue

    def add(self, answer: dict[str, Any]) -> None:
        """Keeps an answer at once."""
        self.done[answer["line"]] = answer
        with self.partial.open("a", encoding="utf-8") as file:
            file.write(_line(answer))
            file.flush()

    def finish(self) -> None:
        """Writes the file, whole and in the order of the prompts."""
        self.partial.write_text("".join(_line(self.done[number]) for number in sorted(self.done)), "utf-8")
        os.replace(self.partial, self.path)


def _line(value: dict[str, Any]) -> str:
    return printable(json.dumps(value, ensure_ascii=False)) + "\n"


def job_of(folder: Path, prompts: Path, settings: dict[str, Any]) -> str:
    """A fingerprint of the folder's contents, the prompts and the settings."""
    from ..files.contents_hash import contents_hash, file_hash
    from ..files.folders import read_spec

    read_spec(folder)  # which says best what is wrong with a folder
    parts = [contents_hash(folder), file_hash(prompts), {name: str(value) for name, value in settings.items()}]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def answer_all(
    session: "Session",
    asked: Sequence[Asked],
    answers: Answers,
    settings: dict[str, Any],
    progress: Progress,
    guessing: "Guessing | None" = None,
) -> int:
    """Answers what is not answered yet. Returns the number of prompts that could not be answered."""
    waiting = [each for each in asked if each.number not in answers.done]
    for start in range(0, len(waiting), AT_ONCE):
        for number, answer in _answered(session, waiting[start : start + AT_ONCE], settings, guessing):
            answers.add({"line": number, **answer})
            progress("prompts", len(answers.done), len(asked))
    failed = sum("error" in answer for answer in answers.done.values())
    answers.finish()
    return failed


def _answered(
    session: "Session", asked: Sequence[Asked], settings: dict[str, Any], guessing: "Guessing | None"
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Answers some prompts together; each comes when it is complete."""
    from ..runtime.continuation import joined
    from ..runtime.flight import stream_requests

    requests: list[Request] = []
    riding: list[Asked] = []
    for each in asked:
        try:
            requests.append(session.request(each.prompt, **settings))
            riding.append(each)
        except ArrieroError as error:
            yield each.number, {**_named(each), "error": str(error)}
    pieces: list[list[Generated]] = [[] for _ in requests]
    for place, piece in stream_requests(session, requests, None, guessing=guessing):
        pieces[place].append(piece)
        if piece.finish is None:
            continue
        whole, each = joined(pieces[place]), riding[place]
        pieces[place] = []
        found: dict[str, Any] = {**_named(each), "text": whole.text, "ids": whole.ids, "finish": whole.finish}
        yield each.number, {**found, "error": str(piece.error)} if piece.error is not None else found


def _named(asked: Asked) -> dict[str, Any]:
    return {} if asked.name is None else {"id": asked.name}


def check_prompts(
    prompts: Path | None,
    output: Path | None,
    of_one: dict[str, Any],
    prompt_lookup: int,
    top_logprobs: int | None,
    *,
    as_json: bool,
) -> None:
    """Refuses options that do not go with a file of prompts, or with none.

    Raises:
        SessionError: One is given, or the file for the answers is not.
    """
    if prompts is None:
        if output is not None:
            raise SessionError("-o is the file of answers to --prompts FILE: add it, or leave -o out")
        if top_logprobs is not None and not as_json:
            raise SessionError("--top-logprobs are shown in the JSON result alone: add --json, or leave them out")
        return
    if output is None:
        raise SessionError("--prompts needs a file for the answers: add -o OUT.jsonl")
    others = {**of_one, "--prompt-lookup": prompt_lookup, "--top-logprobs": top_logprobs is not None}
    if given := next((option for option, value in others.items() if value), None):
        raise SessionError(f"{given} does not go with --prompts, whose lines are whole prompts: leave it out")
