"""Refusals as OpenAI's interface words them: a status, and a body that names the parameter."""

from collections.abc import Mapping
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


def of_session(error: Exception) -> RequestError:
    """The refusal for an error that a session raised: the request's fault where it is a `SessionError`."""
    if isinstance(error, RequestError):
        return error
    message = shortened_text(str(error), 1000)
    if isinstance(error, StepError):
        return RequestError(message, status=500)
    if isinstance(error, SessionError):
        first = message.replace(":", " ").split(" ", 1)[0]
        return RequestError(message, NAMES.get(first, first) if first in FIELDS else None)
    return RequestError(f"the request failed: {type(error).__name__}: {message[:300]}", status=500)
