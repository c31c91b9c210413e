"""The standard streams as they may be found: closed, on a full disk, of a reader that went away, or ASCII alone.

Writing never raises here: what a verb found out, and its exit code, do not depend on who reads. A reader that went away
ends the output silently; any other fault of stdout is one message at the end, and exit code 2 where it was 0.
"""

import codecs
import errno
import io
import json
import os
import sys
from pathlib import Path
from typing import IO, Any

from ..errors import SessionError
from ..files.disks import FULL
from ..files.reading import SMALL

PLAIN = {
    "≤": "<=",
    "≥": ">=",
    "×": "x",
    "–": "-",
    "—": "-",
    "…": "...",
    "·": "*",
    "’": "'",
    "“": '"',
    "”": '"',
    "✓": "v",
}
"""ASCII for the signs that tables and help pages hold."""

PLAIN_ERRORS = "arriero-plain"
"""Name of the treatment of characters that a terminal does not have."""

EMPTY_STDIN = "stdin is closed: give --prompt TEXT, or let stdin be a file, a pipe or a terminal"


def plain(error: UnicodeError) -> tuple[str, int]:
    """Replaces characters that an encoding lacks by ASCII that stands for them, or by their number."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lost = error.object[error.start : error.end]
    words = (PLAIN.get(char) or char.encode("ascii", "backslashreplace").decode() for char in lost)
    return "".join(words), error.end


codecs.register_error(PLAIN_ERRORS, plain)


class Output(io.TextIOWrapper):
    """A standard stream that takes everything, and keeps the first fault.

    Attributes:
        fault: The error that ended the stream; None while it is written to.
    """

    fault: OSError | None = None

    def write(self, text: str) -> int:
        """Writes text where the stream still takes it."""
        try:
            return super().write(text)
        except OSError as error:
            self._end(error)
            return len(text)

    def flush(self) -> None:
        """Hands over what was written where the stream still takes it."""
        try:
            super().flush()
        except OSError as error:
            self._end(error)

    def _end(self, error: OSError) -> None:
        """Keeps the fault, and lets all that follows, and what is buffered, go nowhere."""
        if self.fault is None:
            self.fault = error
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
        try:
            super().flush()
        except OSError:
            return


def open_streams() -> None:
    """Makes the standard streams fit to be written to and read from, whatever this process was given."""
    is_open = [_is_open(number) for number in range(3)]
    for number, stays in enumerate(is_open):
        if not stays:  # or else the next file that is opened would be taken for it
            os.dup2(nowhere := os.open(os.devnull, os.O_RDWR), number)
            if nowhere > 2:
                os.close(nowhere)
    sys.stdin = _input(sys.stdin) if is_open[0] else None
    for number, name in ((1, "stdout"), (2, "stderr")):
        old: Any = getattr(sys, name)
        if not is_open[number] or old is None:
            new = Output(open(number, "wb", closefd=False), encoding="utf-8")  # noqa: SIM115
        elif hasattr(old, "detach"):
            encoding, buffers = old.encoding, old.line_buffering or number == 2
            new = Output(old.detach(), encoding=encoding, errors=PLAIN_ERRORS, line_buffering=buffers)
        else:
            continue
        setattr(sys, name, new)
        setattr(sys, f"__{name}__", new)


def _is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True


def _input(stream: Any) -> Any:
    """Stdin, read as UTF-8 where it would be read as ASCII."""
    if stream is not None and codecs.lookup(stream.encoding).name == "ascii":
        stream.reconfigure(encoding="utf-8", errors="strict")
    return stream


def end_of_output() -> str | None:
    """Hands over what stdout still holds. Returns a message where it could not be, other than for want of a reader."""
    if not isinstance(sys.stdout, Output):
        return None
    sys.stdout.flush()
    fault = sys.stdout.fault
    if fault is None or fault.errno in (errno.EPIPE, errno.ECONNRESET):
        return None
    remedy = "make room where it is written to" if fault.errno in FULL else "give it another place to go"
    return f"stdout could not be written ({fault.strerror or fault}): {remedy}"


def is_read() -> bool:
    """Whether stdout still takes anything."""
    return getattr(sys.stdout, "fault", None) is None


SCHEMA = 1
"""Version of what `--json` prints; a key that changes its meaning or goes raises it, one more does not."""


def show_json(value: dict[str, Any]) -> None:
    """Prints a value on stdout in one line of JSON with a `schema`, in ASCII where stdout is not UTF-8."""
    value = {"schema": SCHEMA, **value}
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    print(json.dumps(value, ensure_ascii=not codecs.lookup(encoding).name.startswith("utf")), flush=True)


def read_stdin() -> str:
    """All of stdin.

    Raises:
        SessionError: It is closed.
    """
    try:
        return check_stdin().read()
    except OSError as error:
        raise SessionError(f"stdin cannot be read ({error.strerror or error}): give --prompt TEXT") from error


def check_stdin() -> IO[str]:
    """Stdin.

    Raises:
        SessionError: It is closed.
    """
    if sys.stdin is None or sys.stdin.closed:
        raise SessionError(EMPTY_STDIN)
    return sys.stdin


def as_utf8(text: str) -> str:
    """An argument's text, whatever the terminal's encoding made of its bytes.

    Raises:
        UnicodeDecodeError: Its bytes are no UTF-8.
    """
    return text.encode("utf-8", "surrogateescape").decode("utf-8")


def read_option(file: Path | None, option: str) -> str | None:
    """The text of the file that an option names; None where it names none.

    Raises:
        SessionError: It cannot be read as UTF-8 text.
    """
    if file is None:
        return None
    try:
        with file.open("rb") as opened:  # a pipe is taken, as the shell makes of `<(COMMAND)`
            content = opened.read(SMALL + 1)
        if len(content) > SMALL:
            raise ValueError(f"more than {SMALL} bytes")
        return content.decode("utf-8")
    except (OSError, ValueError) as error:
        raise SessionError(f"{option} {file} cannot be read ({error}): give a file of UTF-8 text") from error
