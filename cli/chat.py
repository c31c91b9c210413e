"""A conversation on the terminal: a line a turn, commands that begin with a slash, and answers that can be ended."""

import os
import re
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from ..errors import SessionError
from .streams import check_stdin, is_read
from .terminal import Terminal

COMMANDS = {
    "/help": "what can be typed",
    "/image FILE": "an image for the next turn; several files, quotes and ~ are understood",
    "/clear": "forget the conversation, but not the system message",
    "/exit": "end; so does the end of input (Ctrl-D)",
}
"""The commands, and a line on each."""

COMMAND = re.compile(r"/[A-Za-z?]+(?!\S)")
"""A line that begins like a command; a path has more slashes, and two slashes begin text with one."""

Answer = Callable[[list[dict[str, Any]], Callable[[], bool]], str]
"""A function that streams the answer to messages until it is complete or asked to end. Returns its text."""


@dataclass(kw_only=True)
class Chat:
    """A conversation: the messages so far, and what the next turn brings along.

    Attributes:
        answer: Streams an answer.
        terminal: Messages go there.
        messages: The conversation, a system message first where there is one.
        waiting: Images of the next turn.
    """

    answer: Answer
    terminal: Terminal
    messages: list[dict[str, Any]] = field(default_factory=list)
    waiting: list[Path] = field(default_factory=list)

    def run(self, first: str | None) -> None:
        """Takes the first turn where it is given, then a line a turn from stdin, until stdin ends or /exit."""
        if first is not None:
            self.turn(first)
        for line in lines(self.refuse):
            if not is_read() or line in ("/exit", "/quit"):
                return
            if COMMAND.match(line):
                self.command(line)
            else:
                self.turn(line[1:] if line.startswith("//") else line)

    def command(self, line: str) -> None:
        """Does what a line with a slash asks for."""
        name, _, rest = line.partition(" ")
        if name == "/image":
            self.add_images(rest.strip())
        elif name == "/clear":
            self.messages = [message for message in self.messages if message["role"] == "system"]
            self.waiting = []
            self.terminal.say("[the conversation is forgotten]")
        elif name in ("/help", "/?"):
            for shown, meaning in COMMANDS.items():
                print(f"{shown:12} {meaning}", file=sys.stderr)
        else:
            self.terminal.show_error(
                SessionError(f"{name[:40]} is no command: /help lists them; a line that begins with // is text")
            )

    def add_images(self, typed: str) -> None:
        """Takes images for the next turn; a file that is not there is reported at once."""
        if not typed:
            self.terminal.show_error(SessionError("/image names no file: /image FILE"))
            return
        for path in paths(typed):
            if os.path.isfile(path):  # False for names that no system takes
                self.waiting.append(path)
            else:
                self.terminal.show_error(SessionError(f"{str(path)[:200]} is no file: give another to /image"))

    def turn(self, text: str) -> None:
        """Answers a turn. One that is refused is reported and forgotten; one that Ctrl-C ended keeps what was said."""
        [turn] = turn_of(text, self.waiting)
        self.waiting = []
        said = ""
        try:
            with interrupts_counted() as is_asked:
                said = self.answer([*self.messages, turn], is_asked)
        except Exception as error:  # whatever it is, the conversation so far stays
            self.refuse(error)
            return
        except KeyboardInterrupt:  # while nothing had come yet
            print(file=sys.stderr)
            self.terminal.say("[the answer was ended]")
            return
        if is_asked():
            self.terminal.say("[the answer was ended]")
        if said or not is_asked():
            self.messages += [turn, {"role": "assistant", "content": said}]

    def refuse(self, error: Exception) -> None:
        """Reports a turn that cannot be answered."""
        self.terminal.show_error(error)


def turn_of(text: str, images: Sequence[Path]) -> list[dict[str, Any]]:
    """A turn of the user's alone, its images before its text."""
    parts = [{"type": "image", "path": str(path)} for path in images]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}] if parts else text}]


@contextmanager
def interrupts_counted() -> Iterator[Callable[[], bool]]:
    """Lets the first Ctrl-C ask for an end between two tokens, and the second one raise. Yields whether it is asked."""
    asked: list[int] = []

    def note(number: int, _: Any) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    try:
        before = signal.signal(signal.SIGINT, note)
    except ValueError:  # not the main thread
        yield lambda: False
        return
    try:
        yield lambda: bool(asked)
    finally:
        signal.signal(signal.SIGINT, before)


def lines(refuse: Callable[[Exception], None]) -> Iterator[str]:
    """The user's lines, without those that are empty; one that is not UTF-8 is refused."""
    stdin = check_stdin()
    interactive = stdin.isatty()
    source: Any = getattr(stdin, "buffer", stdin)  # bytes, so that a bad line spoils no other
    while True:
        if interactive:
            print("> ", end="", file=sys.stderr, flush=True)
        line = source.readline()
        if not line:
            if interactive:
                print(file=sys.stderr)
            return
        try:
            text = line.decode("utf-8") if isinstance(line, bytes) else line
        except UnicodeDecodeError as error:
            refuse(error)
            continue
        if text.strip():
            yield text.strip()


def paths(typed: str) -> Sequence[Path]:
    """The files that were typed or dropped: as they stand, in quotes, with escaped spaces, or as file:// addresses."""
    if os.path.isfile(whole := _expanded(typed)):
        return [whole]
    try:
        words = shlex.split(typed, posix=sys.platform != "win32")
    except ValueError:  # a quote that is not closed belongs to the name
        words = [typed]
    found = [_path(word.strip("\"'") if sys.platform == "win32" else word) for word in words]
    if len(found) > 1 and not any(map(os.path.isfile, found)):  # one name with spaces in it
        return [_path(typed)]
    return found


def _path(word: str) -> Path:
    """A word as a path."""
    if word.startswith("file://"):
        return Path(unquote(urlsplit(word).path))
    return _expanded(word)


def _expanded(word: str) -> Path:
    """A path with the home folder in the place of ~."""
    try:
        return Path(word).expanduser()
    except RuntimeError:  # ~ of a user that there is not
        return Path(word)
