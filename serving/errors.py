"""Refusals as OpenAI's interface words them: a status, and a body that names the parameter.

Enters: whatever went wrong. Leaves: words for the client. Invariant: of a fault that is not the request's a client
learns its kind alone, and of the server's files no more than their names; the log has the rest.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import SessionError, StepError, shortened_text

TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
    504: "timeout_error",
}
"""OpenAI's types of errors by status; all others are `invalid_request_error`."""

NAMES = {
    "max_new_tokens": "max_tokens",
    "stop_strings": "stop",
    "json_schema": "response_format",
}
"""Fields of a request by the names that a session has for them."""

FIELDS = (
    "logit_bias",
    "grammar",
    "regex",
    "repetition_penalty",
    "top_logprobs",
    "messages",
    "tools",
    *NAMES,
)
"""Settings that a session's messages begin with."""


FOLDERS = re.compile(r"(?<![\w/:.])/(?:[^/\n]*[^/\s]/)+")
"""The folders of an absolute path."""


class RequestError(Exception):
    """A request is refused.

    Args:
        message: One line: what was found, and what to do.
        param: Name of the field that is to blame; None where none is.
        status: HTTP's status.
        code: A word for programs.
        headers: Headers that go with the answer.
    """

    def __init__(
        self,
        message: str,
        param: str | None = None,
        *,
        status: int = 400,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message, self.param, self.status, self.code = message, param, status, code
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """The answer's body."""
        kind = TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def of_session(error: Exception, folder: Path | None = None, name: str = "") -> RequestError:
    """The refusal for an error that a session raised: the request's fault where it is a `SessionError`.

    Args:
        error: The error.
        folder: The model's folder, which such errors begin with.
        name: The model's name, which clients read instead.
    """
    if isinstance(error, RequestError):
        return error
    if not is_requests_own(error):
        return step_failed(error)
    text = str(error)
    if folder is not None and str(folder) != folder.name:
        text = text.replace(str(folder), name)
    message = shortened_text(text, 1000)
    first = message.replace(":", " ").split(" ", 1)[0]
    return RequestError(message, NAMES.get(first, first) if first in FIELDS else None)


def is_requests_own(error: Exception) -> bool:
    """Whether an error is the request's own fault; any other belongs into the log."""
    return isinstance(error, RequestError | SessionError) and not isinstance(error, StepError)


def step_failed(error: Exception) -> RequestError:
    """The answer to a request that ended with no fault of its own."""
    if isinstance(error, MemoryError) or isinstance(error.__cause__, MemoryError):
        return RequestError("the server has too little memory for it: ask for less, or later", status=500)
    kind = type(error.__cause__ or error).__name__
    return RequestError(f"the server failed at it ({kind}; its log says more): ask again", status=500)


def stopped() -> RequestError:
    """The end of a request that was under way when the server ended."""
    return RequestError("the server has stopped: ask again", status=503, code="stopped")


def lost_model(reason: str) -> RequestError:
    """The refusal of a request where the model is lost for good."""
    return RequestError(f"the model is lost ({reason}): start the server again", status=503, code="model_lost")


def without_folders(text: str) -> str:
    """A text with files by their names, without the folders that they are in."""
    return FOLDERS.sub("", text)
