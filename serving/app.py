"""The application: each path with what it does, over ASGI.

Enters: HTTP. Leaves: HTTP. Invariant: whatever goes wrong is an answer in OpenAI's form, and no other request's.
"""

from collections.abc import Awaitable, Callable, Collection, Sequence
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from ..errors import SessionError
from .bodies import SHORT, CommonBound, read_body
from .chat import ChatWriter, whole_chat
from .completions import CompletionWriter, whole_completion
from .conversation import of_prompt
from .doors import OPEN, Doors
from .errors import RequestError
from .json_answers import JsonAnswer
from .logs import Log
from .page import page
from .protocol.answers import DetokenizeAnswer, Health, Model, ModelList, State, TokenizeAnswer
from .protocol.chat import ChatRequest
from .protocol.completions import CompletionRequest, DetokenizeRequest, TokenizeRequest
from .protocol.long_json import read_json
from .protocol.openapi import document
from .protocol.reading import plain, read
from .protocol.responses import ResponseRequest
from .responses import ResponseWriter, as_chat, own_fields, whole_response
from .rides import Ride
from .service import Service
from .streams import Writer, stream, watched

T = TypeVar("T")
MOST_TOKENS = 1 << 17
"""Tokens that are written as a text at most, where the session holds no more."""


class Endpoints:
    """The paths' functions.

    Args:
        service: The model.
        log: The log.
        opened: Paths that need no API key; None where none is asked for.
    """

    def __init__(self, service: Service, log: Log, opened: Collection[str] | None) -> None:
        self.service, self.log, self.opened = service, log, opened

    async def chat(self, request: HttpRequest) -> Response:
        """A conversation to be continued."""
        asked = await self._read(request, ChatRequest)
        ride = await self.service.chat(asked, request.state.caller, long=request.state.is_long)
        return await self._answer(request, asked, ride, whole_chat, ChatWriter)

    async def complete(self, request: HttpRequest) -> Response:
        """Prompts to be continued."""
        asked = await self._read(request, CompletionRequest)
        ride = await self.service.complete(asked, request.state.caller, long=request.state.is_long)
        return await self._answer(request, asked, ride, whole_completion, CompletionWriter)

    async def respond(self, request: HttpRequest) -> Response:
        """A conversation of items to be continued."""
        asked = await self._read(request, ResponseRequest)
        with own_fields():
            ride = await self.service.chat(as_chat(asked), request.state.caller, long=request.state.is_long)
        return await self._answer(request, asked, ride, whole_response, ResponseWriter)

    async def models(self, request: HttpRequest) -> Response:
        """The one model."""
        return JsonAnswer(plain(ModelList(object="list", data=[self._model()])))

    async def model(self, request: HttpRequest) -> Response:
        """The model of a name."""
        self.service.check_model(request.path_params["name"])
        return JsonAnswer(plain(self._model()))

    async def tokenize(self, request: HttpRequest) -> Response:
        """A text or a conversation as tokens."""
        asked = await self._read(request, TokenizeRequest)
        self.service.check_model(asked.model)
        ids = await self.service.work(self._tokens, asked, long=request.state.is_long)
        return JsonAnswer(plain(TokenizeAnswer(count=len(ids), max_model_len=self.service.longest, tokens=ids)))

    async def detokenize(self, request: HttpRequest) -> Response:
        """Tokens as a text."""
        asked = await self._read(request, DetokenizeRequest)
        self.service.check_model(asked.model)
        session = self.service.session

        def write() -> str:
            if len(asked.tokens) > (most := max(session.max_seq, MOST_TOKENS)):
                raise RequestError(f"tokens has {len(asked.tokens)} ids, this server writes {most} at most", "tokens")
            if asked.tokens:
                self.service.check_ids(asked.tokens, "tokens")
            return self.service.texts.whole(asked.tokens, special=True)

        return JsonAnswer(plain(DetokenizeAnswer(prompt=await self.service.work(write, long=request.state.is_long))))

    async def health(self, request: HttpRequest) -> Response:
        """Whether the process is alive, and its model not lost."""
        return self._state("ok", 200)

    async def ready(self, request: HttpRequest) -> Response:
        """Whether requests are taken."""
        state = self.service.state
        return self._state(state, 200 if state == "ready" else 503)

    def _state(self, status: State, code: int) -> Response:
        reason = self.service.fault
        if reason is None:
            return JsonAnswer(plain(Health(status=status)), code)
        return JsonAnswer(plain(Health(status="lost", reason=reason)), 503)

    async def metrics(self, request: HttpRequest) -> Response:
        """Counts, in Prometheus's text."""
        return Response(self.service.metrics.text(), media_type="text/plain; version=0.0.4")

    async def openapi(self, request: HttpRequest) -> Response:
        """The description of all this."""
        return JsonAnswer(document(self.service.name, self.opened))

    async def page(self, request: HttpRequest) -> Response:
        """The chat page."""
        return HTMLResponse(page())

    def _model(self) -> Model:
        service = self.service
        return Model(
            id=service.name,
            object="model",
            created=service.created,
            owned_by="arriero",
            max_model_len=service.longest,
            input_modalities=["text", "image"] if service.takes_images else ["text"],
            output_modalities=["text"],
        )

    def _tokens(self, asked: TokenizeRequest) -> list[int]:
        session = self.service.session
        try:
            if asked.messages is None:
                return session.text.encode(asked.prompt or "", special_tokens=asked.add_special_tokens is not False)
            turns, tools = self.service.conversation(asked.messages, asked.tools or ())
            asks = asked.add_generation_prompt is not False
            return session.read(turns, tools=tools, add_generation_prompt=asks).ids
        except SessionError as error:
            if (refusal := of_prompt(error, asked.messages)) is not None:
                raise refusal from error
            raise

    async def _answer(
        self,
        request: HttpRequest,
        asked: Any,
        ride: Ride,
        whole: Callable[[Service, Any, Ride], Awaitable[dict[str, Any]]],
        writer: Callable[[Service, Any, Ride], Writer],
    ) -> Response:
        """Answers with a whole, or with a stream."""
        about = request.state.about
        about["prompt_tokens"] = sum(len(party[0].prompt.ids) for party in ride.parties)
        about["user"] = asked.asker or None
        about["completion_tokens"] = lambda: sum(each.tokens for each in ride.timelines)
        about["first_token_seconds"] = ride.first_token_seconds
        if asked.stream:
            try:
                writes = writer(self.service, asked, ride)
            except BaseException:  # nobody would end it
                self.service.cancel(ride)
                raise
            return await stream(self.service, request, ride, writes)
        return JsonAnswer(await watched(self.service, request, ride, whole(self.service, asked, ride)))

    async def _read(self, request: HttpRequest, cls: type[T]) -> T:
        """Reads a request's body.

        Raises:
            RequestError: It is too large or slow, no JSON, or not as it must be.
        """
        body = await read_body(request, self.service.limits.body_bytes)
        is_long = request.state.is_long = len(body) > SHORT
        data, asked = await self.service.work(_read_body, cls, body, long=True) if is_long else _read_body(cls, body)
        if self.log.has_prompts:
            request.state.about["request"] = data
        return asked


def _read_body(cls: type[T], body: bytearray) -> tuple[Any, T]:
    """A body's data, and the request that it is.

    Raises:
        RequestError: It is no JSON, or not as it must be.
    """
    try:
        data = read_json(body)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the body is no JSON ({str(error)[:100]}): send a JSON object") from error
    return data, read(cls, data)


def routes(endpoints: Endpoints) -> list[Route]:
    """Each path, its method, and its function."""
    return [
        Route("/", endpoints.page, methods=["GET"]),
        Route("/v1/chat/completions", endpoints.chat, methods=["POST"]),
        Route("/v1/completions", endpoints.complete, methods=["POST"]),
        Route("/v1/responses", endpoints.respond, methods=["POST"]),
        Route("/v1/models", endpoints.models, methods=["GET"]),
        Route("/v1/models/{name:path}", endpoints.model, methods=["GET"]),
        Route("/tokenize", endpoints.tokenize, methods=["POST"]),
        Route("/detokenize", endpoints.detokenize, methods=["POST"]),
        Route("/health", endpoints.health, methods=["GET"]),
        Route("/ready", endpoints.ready, methods=["GET"]),
        Route("/metrics", endpoints.metrics, methods=["GET"]),
        Route("/openapi.json", endpoints.openapi, methods=["GET"]),
    ]


def make_app(
    service: Service,
    log: Log,
    *,
    keys: Sequence[bytes] = (),
    hosts: Sequence[str] = (),
    origins: Sequence[str] = (),
    opens_metrics: bool = False,
) -> Starlette:
    """Makes the application.

    Args:
        service: The model.
        log: The log.
        keys: Digests of API keys; empty asks for none.
        hosts: Names that the server is called by; empty takes any.
        origins: Origins whose pages may ask.
        opens_metrics: Whether `/metrics` asks for no key.
    """
    opened = (*OPEN, "/metrics") if opens_metrics else OPEN

    async def refuse(request: HttpRequest, error: Exception) -> Response:
        if isinstance(error, HTTPException):
            line = f"{request.method} {request.url.path[:100]}: {error.detail}"
            error = RequestError(line, status=error.status_code, headers=error.headers)
        elif isinstance(error, ClientDisconnect):
            error = RequestError("the client has gone", status=499)
        assert isinstance(error, RequestError)
        request.state.about["error"] = error.message[:300]
        return JsonAnswer(error.body, error.status, error.headers)

    middleware = [Middleware(Doors, keys=keys, hosts=hosts, log=log, opened=opened)]
    if origins:
        cors: dict[str, Any] = {
            "allow_methods": ["GET", "POST"],
            "allow_headers": ["*"],
            "expose_headers": ["x-request-id", "retry-after"],
        }
        middleware.insert(0, Middleware(CORSMiddleware, allow_origins=list(origins), **cors))
    middleware.append(Middleware(CommonBound, most=service.limits.all_bodies_bytes, metrics=service.metrics))
    handlers: dict[Any, Any] = dict.fromkeys((HTTPException, RequestError, ClientDisconnect), refuse)
    endpoints = Endpoints(service, log, opened if keys else None)
    return Starlette(routes=routes(endpoints), middleware=middleware, exception_handlers=handlers)
