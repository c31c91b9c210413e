"""A log of one JSON object a line, on stderr: what was asked and how it ended, without what was said."""

import json
import logging
import random
import sys
import threading
import time
import traceback
from typing import Any, TextIO

from ..errors import shortened_text

_numbers = random.Random()


def new_number() -> str:
    """A number that no other request and no other answer has; unlike `uuid`'s it costs no call of the system."""
    return f"{_numbers.getrandbits(128):032x}"


class Log:
    """Writes events.

    Args:
        stream: A file; None takes stderr.
        has_prompts: Whether requests are written down as they came.
        is_silent: Whether nothing but errors is written.
        debug: Whether errors are written with their tracebacks.
    """

    def __init__(
        self, stream: TextIO | None = None, *, has_prompts: bool = False, is_silent: bool = False, debug: bool = False
    ) -> None:
        self.stream, self.has_prompts, self.is_silent, self.debug = stream, has_prompts, is_silent, debug
        self.lock = threading.Lock()

    def write(self, event: str, level: str = "info", **fields: Any) -> None:
        """Writes an event; fields that are None are left out."""
        if self.is_silent and level != "error":
            return
        given = {name: value for name, value in fields.items() if value is not None}
        line = json.dumps({"time": round(time.time(), 3), "level": level, "event": event, **given}, default=str)
        with self.lock:
            stream = self.stream or sys.stderr
            try:
                stream.write(line + "\n")
                stream.flush()
            except (OSError, ValueError):  # nobody reads it any more, which is no reason to end
                pass

    def fault(self, error: BaseException) -> None:
        """Writes an error that is not a request's own."""
        trace = "".join(traceback.format_exception(error)) if self.debug else None
        self.write("fault", "error", error=type(error).__name__, message=shortened_text(str(error)), traceback=trace)


class Handler(logging.Handler):
    """Writes warnings and errors of other libraries, as uvicorn's, to the log."""

    def __init__(self, log: Log) -> None:
        super().__init__(logging.WARNING)
        self.log = log

    def emit(self, record: logging.LogRecord) -> None:
        """Writes a record."""
        if record.exc_info and record.exc_info[1] is not None:
            self.log.fault(record.exc_info[1])
        else:
            self.log.write("library", record.levelname.lower(), library=record.name, message=record.getMessage())
