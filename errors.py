"""The errors a person can do something about: what was wrong, the value found, the remedy, in one line.

One class a stage, all under `ArrieroError`, which the command line prints without a traceback and exits with 2. What an
error quotes of its input is `shortened`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from reprlib import Repr
from typing import Any


class ArrieroError(Exception):
    """Something outside the program is not as it must be; the message says what, what was found, and the remedy."""


class ArrieroWarning(UserWarning):
    """Something that a folder asks for is not done; the message says what, in one line."""


class CheckpointError(ArrieroError):
    """A checkpoint's files are missing, damaged, or not those of a Llama 4 that Arriero knows."""


class ExportError(ArrieroError):
    """A checkpoint could not be turned into a model folder."""


class DataError(ArrieroError):
    """The text given as data cannot be read, or is too little."""


class CalibrationError(ArrieroError):
    """A model could not be quantised with the text and the recipe given."""


class StarvedError(CalibrationError):
    """Experts saw too few tokens; all that was done is kept for a run with more data or other demands."""


class FolderError(ArrieroError):
    """A model or bundle folder cannot be read or written as it stands."""


class BuildError(ArrieroError):
    """A model folder could not be lowered or built for its target."""


class AccuracyError(ArrieroError):
    """Two models cannot be compared, or one of them computes no numbers."""


class DeviceError(ArrieroError):
    """The device that was asked for is not there, or has too little memory."""


class SessionError(ArrieroError):
    """A running session was asked for something it cannot do."""


class ForbiddenError(SessionError):
    """A sequence cannot go on: its own settings or grammar forbid every token."""


class StepError(SessionError):
    """A step of the model failed, by no fault of what was asked."""


class MissingExtraError(ArrieroError, ModuleNotFoundError):
    """A library is not installed that one of the package's extras brings."""


def _quoting() -> Repr:
    """Writes values of any size as Python does, in bounded time."""
    quote = Repr()
    quote.maxstring = quote.maxother = 300
    quote.maxlong, quote.maxlevel = 60, 3
    return quote


_quote = _quoting()


def shortened(value: Any, most: int = 60) -> str:
    """A value for an error's line, as Python writes it, in `most` characters and an ellipsis at most."""
    try:
        text = " ".join(line.strip() for line in _quote.repr(value).splitlines())
    except ValueError:  # a number of more digits than Python writes
        text = f"<{type(value).__name__} instance>"
    return text if len(text) <= most else f"{text[:most]}…"


def shortened_text(text: str, most: int = 300) -> str:
    """Another's words for an error's line, in one line of `most` characters and an ellipsis at most."""
    line = " ".join(text[: 4 * most].split())
    return line if len(line) <= most else f"{line[:most]}…"


def printable(text: str) -> str:
    """A text that every UTF-8 file takes: what is no character, as in a path that is not UTF-8, as its escape."""
    return text.encode("utf-8", "backslashreplace").decode()


EXTRAS = {"matplotlib": "check", "lm_eval": "evaluation", "pyarrow": "parquet", "triton": "tensorrt"}
"""Modules that an extra of their own brings, smaller than that of what needs them."""


def extra_of(module: str | None, extra: str) -> str:
    """The smallest extra that brings a missing module, where what needs it has a larger one."""
    top = (module or "").partition(".")[0]
    return extra if extra == "calibration" and top == "matplotlib" else EXTRAS.get(top, extra)


def without_extra(error: ModuleNotFoundError, extra: str) -> ModuleNotFoundError:
    """The error for a library that is not installed, with the package's extra that brings it; others as they are.

    Args:
        error: The import's error.
        extra: The extra that brings what a room imports.
    """
    if isinstance(error, MissingExtraError) or (error.name or "").startswith(f"{__name__.rpartition('.')[0]}."):
        return error
    extra = extra_of(error.name, extra)
    return MissingExtraError(f"{error}, which is needed here: pip install 'arriero[{extra}]'", name=error.name)


@contextmanager
def needing(extra: str) -> Iterator[None]:
    """Imports that an extra of the package brings.

    Args:
        extra: Its name.

    Raises:
        MissingExtraError: A library is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise without_extra(error, extra) from error
