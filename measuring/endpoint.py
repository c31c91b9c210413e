"""One client of an OpenAI server: a request, and when each piece of its answer came.

Enters: a server's address and a prompt. Leaves: times and counts. It needs nothing but the standard library, so that a
server can be measured from any machine.
"""

import http.client
import itertools
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from ..errors import SessionError, shortened, shortened_text

PATHS = {"completions": "/completions", "chat": "/chat/completions"}
PATIENCE = 600
"""Seconds without a byte after which a server is given up."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Answered:
    """One answer.

    Attributes:
        first: Seconds from the request to the first text, or to the end where there is none.
        gaps: Seconds between each two pieces of text.
        tokens: New tokens, as the server counts them, or else pieces.
        prompt: Tokens of the prompt as the server counts them; 0 where it does not.
        cached: Those that it knew from an earlier one.
    """

    first: float
    gaps: tuple[float, ...]
    tokens: int
    prompt: int
    cached: int


class Endpoint:
    """A server's address, as clients have it.

    Args:
        url: Its address, with `/v1` or without.
        kind: "completions" or "chat".
        model: The model's name; None takes the first that the server lists.
        key: An API key.

    Raises:
        SessionError: The address is none, or nobody answers there.
    """

    def __init__(self, url: str, kind: str = "completions", model: str | None = None, key: str | None = None) -> None:
        parts = urlsplit(url)
        try:
            port = parts.port
        except ValueError:
            port = -1
        if parts.scheme not in ("http", "https") or not parts.hostname or port == -1:
            raise SessionError(f"--url is {shortened(url)}, expected an address as http://127.0.0.1:8000")
        if kind not in PATHS:
            raise SessionError(f"--endpoint is {shortened(kind)}, expected {' or '.join(PATHS)}")
        self.url, self.kind, self.key = url, kind, key
        self.parts = parts
        base = parts.path.rstrip("/")
        self.base = base if base.endswith("/v1") else f"{base}/v1"
        self.model = self._first_model() if model is None else model

    def ask(self, prompt: str, tokens: int) -> Answered:
        """Has a prompt continued.

        Args:
            prompt: The prompt.
            tokens: New tokens at most.

        Raises:
            SessionError: The server refuses, is not reached, or its stream breaks off.
        """
        said = {"prompt": prompt} if self.kind == "completions" else {"messages": [{"role": "user", "content": prompt}]}
        body = {**said, "model": self.model, "max_tokens": tokens, "stream": True, "temperature": 0}
        body["stream_options"] = {"include_usage": True}
        started, times, ended = time.perf_counter(), list[float](), False
        usage: dict[str, Any] = {}
        for event in self._events(PATHS[self.kind], body):
            choice = (event.get("choices") or [{}])[0]
            usage = event.get("usage") or usage
            if choice.get("text") or (choice.get("delta") or {}).get("content"):
                times.append(time.perf_counter())
            if choice.get("finish_reason"):
                ended, times = True, times or [time.perf_counter()]  # its first token may have ended it
            if event.get("error"):
                raise SessionError(f"{self.url} reports {shortened_text(str(event['error']))}: see its log")
        if not times or not (ended or usage):
            raise SessionError(f"{self.url} gave {len(times)} pieces of text and no end: see its log")
        return Answered(
            first=times[0] - started,
            gaps=tuple(after - before for before, after in itertools.pairwise(times)),
            tokens=int(usage.get("completion_tokens") or len(times)),
            prompt=int(usage.get("prompt_tokens") or 0),
            cached=int((usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0),
        )

    def _first_model(self) -> str:
        """The name of the first model that the server lists."""
        try:
            listed = json.loads(self._text("GET", "/models"))
        except (ValueError, RecursionError) as error:
            raise SessionError(
                f"{self.url}{self.base}/models gives no JSON: give an OpenAI server's address"
            ) from error
        data = listed.get("data") if isinstance(listed, dict) else None
        names = [each.get("id") for each in data if isinstance(each, dict)] if isinstance(data, list) else []
        if not names or not isinstance(names[0], str):
            raise SessionError(f"{self.url} lists no model: give --model NAME")
        return names[0]

    def _events(self, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The events of a stream."""
        connection, answer = self._open("POST", path, body)
        try:
            while line := answer.readline():
                if line.startswith(b"data:") and (data := line[5:].strip()):
                    if data == b"[DONE]":
                        return
                    event = json.loads(data)
                    if isinstance(event, dict):
                        yield event
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise SessionError(
                f"{self.url} broke off its answer ({error or type(error).__name__}): see its log"
            ) from error
        finally:
            connection.close()

    def _text(self, method: str, path: str) -> str:
        connection, answer = self._open(method, path, None)
        try:
            return answer.read().decode()
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise SessionError(f"{self.url} gives no text ({error}): give an OpenAI server's address") from error
        finally:
            connection.close()

    def _open(
        self, method: str, path: str, body: dict[str, Any] | None
    ) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        """Sends a request. Returns the connection and the answer, once its status is there."""
        secure = self.parts.scheme == "https"
        made = (http.client.HTTPSConnection if secure else http.client.HTTPConnection)(
            self.parts.hostname or "", self.parts.port, timeout=PATIENCE
        )
        headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {self.key}"} if self.key else {})}
        try:
            made.request(method, self.base + path, None if body is None else json.dumps(body), headers)
            answer = made.getresponse()
            if answer.status != 200:
                said = shortened_text(answer.read(4000).decode("utf-8", "replace"), 200)
                raise SessionError(f"{self.url} answers {self.base}{path} with {answer.status} ({said}): correct that")
        except (OSError, http.client.HTTPException) as error:
            made.close()
            reason = error or type(error).__name__
            raise SessionError(
                f"{self.url} cannot be reached ({reason}): start the server, or correct --url"
            ) from error
        except SessionError:
            made.close()
            raise
        return made, answer
