"""One thing that was looked at, and in what state it was."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from ...errors import ArrieroError, shortened_text

State = Literal["ok", "found", "not checked"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        check: Its name, in a word or two.
        state: `ok`; `found`, where something is to be done; or `not checked`.
        text: What was seen; of something found what is wrong, and what to do.
    """

    check: str
    state: State
    text: str


def ok(check: str, text: str) -> Finding:
    """A finding with which all is well."""
    return Finding(check=check, state="ok", text=text)


def found(check: str, text: str) -> Finding:
    """A finding for which something is to be done."""
    return Finding(check=check, state="found", text=text)


def unchecked(check: str, text: str) -> Finding:
    """Something that was not looked at, and why."""
    return Finding(check=check, state="not checked", text=text)


def seen(check: str, look: Callable[[], Finding | str]) -> Finding:
    """A look at something, whose refusal is what was found.

    Args:
        check: Its name.
        look: Returns the finding, or the text of one with which all is well.
    """
    try:
        result = look()
    except ArrieroError as error:
        return found(check, shortened_text(str(error), 500))
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return found(check, f"{where}{error.strerror or error}: make it readable for this user")
    return ok(check, result) if isinstance(result, str) else result
