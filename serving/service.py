"""One model behind the interfaces: requests checked, made ready and let on board.

Enters: requests of the protocol, with the caller's tenant. Leaves: rides. Invariants: whatever takes long happens in a
worker thread, so that streams go on; a request is checked whole before it is queued.
"""

import asyncio
import dataclasses
import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from .. import __version__
from ..errors import ArrieroError, SessionError
from ..runtime import Request, Session
from ..runtime.grammars.compiler import prepare
from ..runtime.prompt_logprobs import prompt_logprobs
from .conversation import image_fields, of_prompt, template_messages
from .errors import RequestError, is_requests_own, lost_model, of_session
from .message_images import message_image
from .metrics import Metrics
from .pilot import FlightSettings, Pilot
from .protocol.chat import ChatRequest, ImageAddress, Message, NamedTool, Tool
from .protocol.completions import DEFAULT_TOKENS, CompletionRequest
from .rides import Ride
from .texts import TokenTexts

T = TypeVar("T")
BRIEF = 1000
"""Characters or tokens of a prompt that takes less than handing it to a thread and back."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """Bounds of a request, and of all that are under way.

    Attributes:
        body_bytes: Bytes of a request's body.
        all_bodies_bytes: Bytes of the bodies of all requests under way.
        prompt_tokens: Tokens of a prompt; None is as the session holds.
        new_tokens: New tokens of a sequence; None is as the session holds.
        images: Images of a request.
        first_token_seconds: From a request to its first token; 0 is no limit.
        total_seconds: From a request to its end; 0 is no limit.
        image_hosts: Hosts that images are fetched from.
    """

    body_bytes: int = 32 << 20
    all_bodies_bytes: int = 256 << 20
    prompt_tokens: int | None = None
    new_tokens: int | None = None
    images: int = 16
    first_token_seconds: float = 0.0
    total_seconds: float = 0.0
    image_hosts: frozenset[str] = frozenset()


@dataclass(frozen=True, kw_only=True, slots=True)
class Caller:
    """Who asks.

    Attributes:
        tenant: A digest of the API key, or of nothing where there are no keys.
        address: The client's address, for turns where nobody has a name.
    """

    tenant: bytes = b""
    address: str = ""


class Service:
    """A model that is being loaded, serves, or drains.

    Args:
        name: The model's name.
        limits: What it takes at most.
        shares_prefixes: Whether callers of different keys share known beginnings.
        report: Called with an error that is not a request's own.
    """

    def __init__(
        self, name: str, limits: Limits, *, shares_prefixes: bool, report: Callable[[BaseException], None]
    ) -> None:
        self.name, self.limits, self.shares_prefixes, self.report = name, limits, shares_prefixes, report
        self.state: Literal["loading", "ready", "draining"] = "loading"
        self.metrics = Metrics(name)
        self.created = int(time.time())
        self.fingerprint = f"arriero-{__version__}"
        self.workers = ThreadPoolExecutor(2, thread_name_prefix="reader")
        self.slow_workers = ThreadPoolExecutor(2, thread_name_prefix="slow reader")
        self._session: Session | None = None
        self._pilot: Pilot | None = None

    def open(self, session: Session, settings: FlightSettings, loop: asyncio.AbstractEventLoop) -> None:
        """Begins to serve a session."""
        pilot = Pilot(session, settings, loop, self.metrics, self.report)
        caches = pilot.flight.state.caches
        row = caches.row_bytes(caches.positions)
        whole = row * settings.slots if settings.cache_bytes is None else settings.cache_bytes
        self.metrics.describe_cache(session.prefixes.block, whole, max(1, row // caches.positions))
        self.texts = TokenTexts(session.text.tokenizer)
        template = session.text.templates.get("default")
        self.template = "" if template is None else template.source
        self._session, self._pilot = session, pilot
        pilot.start()
        self.workers.submit(_ready_grammars, session)
        if self.state == "loading":
            self.state = "ready"

    def close(self) -> bool:
        """Ends the pilot and the workers. Returns whether the pilot has ended, whose step may hang."""
        for workers in (self.workers, self.slow_workers):
            workers.shutdown(wait=False, cancel_futures=True)
        return self._pilot is None or self._pilot.stop()

    @property
    def session(self) -> Session:
        """The session.

        Raises:
            RequestError: It is not ready, takes no more requests, or is lost.
        """
        if self.fault is not None:
            raise lost_model(self.fault)
        if self.state != "ready" or self._session is None:
            seconds = {"Retry-After": "5"}
            raise RequestError(
                f"the server is {self.state}: try again later", status=503, code=self.state, headers=seconds
            )
        return self._session

    @property
    def pilot(self) -> Pilot:
        """The pilot, once there is one."""
        assert self._pilot is not None
        return self._pilot

    @property
    def longest(self) -> int:
        """Tokens of a prompt and its continuation at most.

        Raises:
            RequestError: As `session` does.
        """
        return min(self.session.max_seq, self.pilot.longest)

    @property
    def takes_images(self) -> bool:
        """Whether messages may have images.

        Raises:
            RequestError: As `session` does.
        """
        return self.session.tower is not None and self.limits.images > 0

    @property
    def fault(self) -> str | None:
        """Why the model is lost for good, in one line for clients; None while it is not."""
        return None if self._pilot is None else self._pilot.fault

    def steps_within(self, seconds: float) -> bool:
        """Whether the flight's thread lives, and has been in one step for less than so long."""
        return self._pilot is not None and self._pilot.steps_within(seconds)

    @property
    def active(self) -> int:
        """Sequences that wait or have a row."""
        return 0 if self._pilot is None else self._pilot.active

    def check_model(self, name: str | None) -> None:
        """Refuses a request for another model."""
        if name not in (None, "", self.name):
            raise RequestError(
                f"this server has the model {self.name} alone", "model", status=404, code="model_not_found"
            )

    async def work(self, function: Callable[..., T], *arguments: Any, long: bool = False) -> T:
        """Calls a function in a worker thread; errors of sessions become refusals.

        Args:
            function: The function.
            *arguments: Its arguments.
            long: Whether it may take seconds, and is not to stand before what takes milliseconds.
        """
        workers = self.slow_workers if long else self.workers
        with self._refusing():
            return await asyncio.get_running_loop().run_in_executor(workers, function, *arguments)

    @contextmanager
    def _refusing(self) -> Iterator[None]:
        """Makes refusals of errors of sessions."""
        try:
            yield
        except RecursionError as error:
            raise RequestError("the request is nested too deeply: flatten it") from error
        except (ArrieroError, RequestError) as error:
            if not is_requests_own(error):
                self.report(error)
            folder = None if self._session is None else self._session.text.folder
            raise of_session(error, folder, self.name) from error

    async def chat(self, request: ChatRequest, caller: Caller, *, long: bool = False) -> Ride:
        """Lets a conversation on board; a long one is made ready beside others."""
        long = long or request.response_format is not None or request.binds_calls
        long = long or request.tool_choice not in (None, "auto", "none")
        long = long or any(image_fields(request.messages))  # a few bytes may be a picture of seconds
        return await self._board(self._chat_parties, request, caller, long)

    async def complete(self, request: CompletionRequest, caller: Caller, *, long: bool = False) -> Ride:
        """Lets prompts on board; long ones are made ready beside others, and brief ones at once."""
        brief = self.session.text.is_quick and all(len(prompt) <= BRIEF for prompt in request.prompts)
        ride = await self._board(self._completion_parties, request, caller, long, brief=brief)
        if request.echo and request.logprobs is not None:
            try:
                prompts, top = [party[0].prompt.ids for party in ride.parties], request.logprobs
                ride.prompt_logprobs = await self.work(prompt_logprobs, self.session, prompts, top, long=True)
            except BaseException:
                self.cancel(ride)
                raise
        return ride

    def cancel(self, ride: Ride) -> None:
        """Ends a ride that nobody waits for any more."""
        self.pilot.cancel(ride)

    def conversation(
        self, messages: Sequence[Message], tools: Sequence[Tool]
    ) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None]:
        """A request's messages and tools for the chat template, images read."""
        tower, limits = self.session.tower, self.limits
        side = tower.spec.image_size if tower else 0

        def read(address: ImageAddress, where: str) -> Any:
            return message_image(address, where, limits.image_hosts, side)

        found = template_messages(messages, tools, self.template, limits.images, read)
        if not side and (field := next(image_fields(messages), None)) is not None:
            raise RequestError(f"{self.name}: the model takes text only, leave the images out", field)
        return found

    def check_ids(self, ids: Sequence[int], field: str) -> None:
        """Refuses token ids of a field that the vocabulary does not have."""
        try:
            self.session.check_ids(ids)
        except SessionError as error:
            raise RequestError(str(error), field) from error

    async def _board(
        self,
        make: Callable[..., list[list[Request]]],
        request: Any,
        caller: Caller,
        long: bool,
        *,
        brief: bool = False,
    ) -> Ride:
        self.check_model(request.model)
        session, pilot = self.session, self.pilot
        most, count = (
            pilot.settings.slots + pilot.settings.queue,
            (request.n or 1) * len(getattr(request, "prompts", " ")),
        )
        if count > most:
            raise RequestError(f"{count} continuations are asked for, this server takes at most {most} at once", "n")
        self._refuse_load(pilot.check_queue)
        long = long or not (request.grammar is None and request.regex is None)  # which is compiled
        if brief and not long and count == 1:
            with self._refusing():
                parties = make(session, request, self._scope(caller))
        else:
            parties = await self.work(make, session, request, self._scope(caller), long=long)
        self.session  # noqa: B018 # it may drain by now
        ride = Ride(parties, f"{caller.tenant.hex() or caller.address}/{request.asker}")
        self._refuse_load(pilot.submit, ride)
        self._time(ride)
        return ride

    def _refuse_load(self, act: Callable[..., None], *arguments: Any) -> None:
        try:
            act(*arguments)
        except RequestError:
            self.metrics.refused += 1
            raise

    def _time(self, ride: Ride) -> None:
        """Ends a ride when its time is over."""
        loop, limits = asyncio.get_running_loop(), self.limits
        if limits.first_token_seconds:
            ride.timers.append(
                loop.call_later(limits.first_token_seconds, self._expire, ride, True, limits.first_token_seconds)
            )
        if limits.total_seconds:
            ride.timers.append(loop.call_later(limits.total_seconds, self._expire, ride, False, limits.total_seconds))

    def _expire(self, ride: Ride, first: bool, seconds: float) -> None:
        if first and any(each.first for each in ride.timelines):
            return
        what = "first token did not come" if first else "request did not end"
        self.pilot.cancel(ride, RequestError(f"the {what} within {seconds:g} s", status=504, code="timeout"))

    def _scope(self, caller: Caller) -> bytes:
        """The scope of a caller's beginnings."""
        return b"" if self.shares_prefixes else caller.tenant

    def _chat_parties(self, session: Session, request: ChatRequest, scope: bytes) -> list[list[Request]]:
        tools = request.tools if request.tools and request.tool_choice != "none" else []
        turns, described = self.conversation(request.messages, tools)
        settings = request.settings()
        settings["add_generation_prompt"] = True  # after an earlier answer as well
        if request.logprobs:
            settings |= {"logprobs": True, "top_logprobs": request.top_logprobs or 0}
        if request.json_schema is not None:
            settings["json_schema"] = request.json_schema
            if request.binds_calls:  # its own refusal, before it is a part of another grammar
                session.grammars.compile("json_schema", settings.pop("json_schema"))
        if tools and (grammar := self._call_grammar(request, tools)) is not None:
            settings["grammar"] = grammar
        if described:
            settings["tools"] = described
        party = self._party(session, turns, request.limit, settings, request, request.n or 1, scope)
        return [[dataclasses.replace(each, shown=self.texts.marks) for each in party] if tools else party]

    def _call_grammar(self, request: ChatRequest, tools: Sequence[Tool]) -> str | None:
        """The grammar of an answer that must be a call, or whose calls are bound; None where it is free."""
        from .bound_calls import bound_grammar
        from .tools import END, START, tool_grammar

        chosen, parallel = request.tool_choice, request.parallel_tool_calls is not False
        given = [{"type": "function", "function": dataclasses.asdict(tool.function)} for tool in tools]
        if chosen in (None, "auto"):
            if not request.binds_calls:
                return None
            marked = {START, END} <= set(self.texts.marks.values())
            return bound_grammar(given, parallel=parallel, marked=marked, answer=request.json_schema)
        name = chosen.function.name if isinstance(chosen, NamedTool) else "required"
        choice: Any = {"type": "function", "function": {"name": name}} if isinstance(chosen, NamedTool) else name
        return tool_grammar(given, choice, parallel)

    def _completion_parties(self, session: Session, request: CompletionRequest, scope: bytes) -> list[list[Request]]:
        settings = request.settings()
        if request.logprobs is not None:
            settings |= {"logprobs": True, "top_logprobs": request.logprobs}
        most = DEFAULT_TOKENS if request.max_tokens is None else request.max_tokens
        for prompt in request.prompts:
            if not isinstance(prompt, str):
                self.check_ids(prompt, "prompt")
        return [
            self._party(session, prompt, most, settings, request, request.n or 1, scope) for prompt in request.prompts
        ]

    def _party(
        self,
        session: Session,
        prompt: Any,
        most: int | None,
        settings: dict[str, Any],
        request: ChatRequest | CompletionRequest,
        count: int,
        scope: bytes,
    ) -> list[Request]:
        """The requests of one prompt, checked."""
        limit, longest, too_long = self.limits.new_tokens, self.pilot.longest, "context_length_exceeded"
        field = "messages" if isinstance(request, ChatRequest) else "prompt"
        if limit is not None and most is not None and most > limit:
            name = request.limit_field if isinstance(request, ChatRequest) else "max_tokens"
            raise RequestError(f"{name} is {most}, this server gives at most {limit}", name)
        try:
            first = session.request(prompt, most, **(settings | request.seeded(0)))
        except SessionError as error:
            if request.grammar is None and str(error).startswith("grammar "):  # it was made of the tools
                raise RequestError(f"tools: their {error}", "tools") from error
            if (refusal := of_prompt(error, getattr(request, "messages", None))) is not None:
                raise refusal from error
            raise
        tokens, prompts = len(first.prompt.ids), self.limits.prompt_tokens
        if prompts is not None and tokens > prompts:
            line = f"the prompt has {tokens} tokens, this server takes at most {prompts}: shorten it"
            raise RequestError(line, field, code=too_long)
        if tokens >= longest and first.count:
            line = f"the prompt has {tokens} tokens, this server's memory holds {longest}: shorten it"
            raise RequestError(line, field, code=too_long)
        allowed = min(first.count, longest - tokens, longest if limit is None else limit)
        first = dataclasses.replace(first, count=allowed, scope=hashlib.sha256(scope).digest() if scope else b"")
        requests = [first]
        for index in range(1, count):
            seed = request.seeded(index).get("seed", first.sampling.seed)
            requests.append(dataclasses.replace(first, sampling=dataclasses.replace(first.sampling, seed=seed)))
        return requests


def _ready_grammars(session: Session) -> None:
    """Makes ready what the first grammar needs, seconds with a large vocabulary, where it can be."""
    prepare()
    with suppress(SessionError):
        session.grammars.tokens  # noqa: B018 # computed once
