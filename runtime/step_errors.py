"""Steps that fail: one error for whatever a back end raises.

Enters: an exception out of a step. Leaves: a `StepError` of one line, raised from it. Invariant: errors of the project
go through as they are.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import ArrieroError, StepError, shortened_text


@contextmanager
def one_step() -> Iterator[None]:
    """Has whatever fails within fail with a `StepError`, or an error of the project's own.

    Raises:
        StepError: It raised an exception of whatever kind.
    """
    try:
        yield
    except ArrieroError:
        raise
    except Exception as error:  # back ends raise kinds of their own
        raise step_error(error) from error


def step_error(error: Exception) -> ArrieroError:
    """The error for an exception out of a step; one of the project's own is that itself."""
    if isinstance(error, ArrieroError):
        return error
    said = shortened_text(f"{type(error).__name__}: {error}".rstrip(": "))
    if isinstance(error, MemoryError):
        made = StepError(f"there is not enough memory for a step ({said}): free some, or load with a smaller max_seq")
    else:
        made = StepError(f"a step of the model failed ({said}): try again, and write the folder again if that fails")
    made.__cause__ = error
    return made
