"""A server's life: it listens, loads its model, serves, drains, and ends.

Enters: a folder and settings. Leaves: what clients get. Invariants: the socket is there before the model, so that
whoever asks learns that it is being loaded; a signal to end lets what flies land; a second ends at once.
"""

import asyncio
import gc
import logging
import os
import signal
import socket
import sys
import threading
import warnings
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn

from ..files.machine_memory import find_room
from ..loading import load
from ..runtime import Session
from ..runtime.room import usual_prefix_bytes
from ..spec.stored_weights import Pages
from .app import make_app
from .doors import LOCAL, check_certificate, read_keys
from .errors import stopped
from .listening import listen
from .logs import Handler, Log
from .pilot import FlightSettings
from .service import Limits, Service
from .service_manager import ServiceManager

DEFAULT_SLOTS = 16
"""Sequences at once where the user names no number; an engine's own limit if that is less."""

POLL = 0.02
"""Seconds between two looks at whether all has landed."""

SWITCH = 0.0005
"""Seconds that one thread may hold the interpreter while another, as the pilot after its step, waits for it."""

LANDING = 5
"""Seconds that answers have to be written after their sequences have ended."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerSettings:
    """A server's settings; those of the model are as `load` has them.

    Attributes:
        folder: Model or bundle folder.
        name: The model's name; None takes the folder's.
        host: Address to listen on.
        port: Port; 0 takes a free one.
        unix_socket: Socket file to listen on instead.
        api_key_file: File of API keys, one a line.
        opens_metrics: Whether `/metrics` asks for none of them.
        tls_certificate: Certificate file; TLS is spoken where there is one.
        tls_key: Its key's file.
        origins: Origins whose pages may ask.
        hosts: Names that the server is called by, beside this machine's own.
        max_seq: Tokens that a sequence may hold.
        threads: Threads of one operator.
        pages: Which weights lie in huge pages, as in `load`.
        weights: Folder of the weight files, where they have moved.
        trust: Whether an engine that this user has not built here is trusted from now on.
        slots: Sequences at once.
        prefill_budget: Tokens of prompts that a step reads beside decoding rows.
        prefix_bytes: Keys and values of known beginnings at most; None takes what `usual_prefix_bytes` gives.
        cache_bytes: Keys and values of running sequences at most.
        shares_prefixes: Whether callers of different keys share known beginnings.
        queue: Sequences that wait at most.
        draft_tokens: Tokens at most that the model's draft guesses at a time; None as `Session.stream` takes it.
        drain_seconds: Seconds that running requests have to end after a signal.
        limits: What a request may be at most.
    """

    folder: Path
    name: str | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    unix_socket: Path | None = None
    api_key_file: Path | None = None
    opens_metrics: bool = False
    tls_certificate: Path | None = None
    tls_key: Path | None = None
    origins: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    max_seq: int | None = None
    threads: int | None = None
    pages: Pages = "auto"
    weights: Path | None = None
    trust: bool = False
    slots: int | None = None
    prefill_budget: int | None = None
    prefix_bytes: int | None = None
    cache_bytes: int | None = None
    shares_prefixes: bool = False
    queue: int = 128
    draft_tokens: int | None = None
    drain_seconds: float = 30.0
    limits: Limits = field(default_factory=Limits)


def serve(settings: ServerSettings, log: Log, on_ready: Callable[[dict[str, Any]], None] = lambda about: None) -> None:
    """Serves a folder until a signal ends it.

    Args:
        settings: The server's.
        log: The log.
        on_ready: Called with the address and the model's name when requests are taken.

    Raises:
        ArrieroError: The folder cannot be loaded, the address is taken, or a file cannot be read.
    """
    warnings.showwarning = lambda message, *_: log.write("warning", "warning", message=" ".join(str(message).split()))
    sys.setswitchinterval(SWITCH)
    keys = [] if settings.api_key_file is None else read_keys(settings.api_key_file)
    check_certificate(settings.tls_certificate, settings.tls_key)
    is_local = settings.unix_socket is not None or settings.host in LOCAL
    name = settings.name or settings.folder.resolve().name
    service = Service(name, settings.limits, shares_prefixes=settings.shares_prefixes, report=log.fault)
    hosts = (*LOCAL, *settings.hosts) if is_local and not keys and settings.unix_socket is None else ()
    opened = settings.opens_metrics
    app = make_app(service, log, keys=keys, hosts=hosts, origins=settings.origins, opens_metrics=opened)
    listeners = listen(settings.host, settings.port, settings.unix_socket)
    try:
        address = _address(settings, listeners)
        if not is_local and not keys:
            message = "no API key is asked for: whoever reaches the address may use it; --api-key-file closes it"
            log.write("open", "warning", address=address, message=message)
        server = Server(settings, app, service, log)
        app.router.lifespan_context = server.lifespan(address, on_ready)
        server.run(sockets=listeners)
    finally:
        for each in listeners:
            each.close()
        if not service.close():
            server.leave("a step was still under way")
        if settings.unix_socket is not None:
            settings.unix_socket.unlink(missing_ok=True)
    if server.failure is not None:
        raise server.failure


class Server(uvicorn.Server):
    """uvicorn's server, which loads a model when it listens, and drains before it ends.

    Args:
        settings: The server's.
        app: The application.
        service: The model's service.
        log: The log.
    """

    def __init__(self, settings: ServerSettings, app: Any, service: Service, log: Log) -> None:
        for name in ("uvicorn.error", "asyncio"):
            logger = logging.getLogger(name)
            logger.handlers, logger.propagate = [Handler(log)], False
        super().__init__(
            uvicorn.Config(
                app,
                http=_connection(),
                log_config=None,
                access_log=False,
                server_header=False,
                ws="none",
                lifespan="on",
                ssl_certfile=settings.tls_certificate,
                ssl_keyfile=settings.tls_key,
                timeout_keep_alive=75,
                timeout_graceful_shutdown=LANDING,
            )
        )
        self.settings, self.service, self.log = settings, service, log
        self.manager = ServiceManager()
        self.failure: BaseException | None = None
        self.loop: asyncio.AbstractEventLoop | None = None
        self.tasks: set[asyncio.Task[None]] = set()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Heeds a terminal's end as SIGTERM, unless it is ignored, as `nohup` has it."""
        number = getattr(signal, "SIGHUP", None)
        if number is None or signal.getsignal(number) == signal.SIG_IGN:
            number = None
        with super().capture_signals():
            before = None if number is None else signal.signal(number, self.handle_exit)
            try:
                yield
            finally:
                if number is not None:
                    signal.signal(number, before)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Drains at the first signal, and ends at once at the second."""
        if self.service.state == "draining" or self.loop is None:
            self.should_exit = self.force_exit = True
            return
        was_loading, self.service.state = self.service.state == "loading", "draining"
        self.manager.say("STOPPING=1")
        if was_loading:
            self.loop.call_soon_threadsafe(self.leave, "the model was still being loaded")
        else:
            self.loop.call_soon_threadsafe(self._begin, self._drain)

    def leave(self, reason: str) -> None:
        """Ends the process at once: libraries that a thread is in don't bear the interpreter's end."""
        self.log.write("stopped", message=reason)
        if self.settings.unix_socket is not None:
            self.settings.unix_socket.unlink(missing_ok=True)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)

    def lifespan(self, address: str, on_ready: Callable[[dict[str, Any]], None]) -> Callable[[Any], Any]:
        """Begins to load the model with the application."""

        @asynccontextmanager
        async def live(app: Any) -> AsyncIterator[None]:
            self.loop = asyncio.get_running_loop()
            self._begin(lambda: self._load(address, on_ready))
            yield

        return live

    def _begin(self, work: Callable[[], Any]) -> None:
        task = asyncio.get_running_loop().create_task(work())
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def _load(self, address: str, on_ready: Callable[[dict[str, Any]], None]) -> None:
        """Loads the model in a thread of its own, and begins to serve it."""
        assert self.loop is not None
        loop, loaded = self.loop, self.loop.create_future()

        def work() -> None:
            try:
                found: Any = load_for(self.settings)
            except BaseException as error:
                found = error
            with suppress(RuntimeError):  # the loop has ended meanwhile
                loop.call_soon_threadsafe(_settle, loaded, found)

        threading.Thread(target=work, name="loader", daemon=True).start()
        found = await loaded
        try:
            if isinstance(found, BaseException):
                raise found
            session, flight = found
            self.service.open(session, flight, loop)
            gc.collect()
            gc.freeze()  # what the model and the modules hold stays; no collection looks at it between tokens
        except BaseException as error:  # said when the server has ended
            self.failure, self.should_exit = error, True
            return
        about = {"address": address, "model": self.service.name, "slots": flight.slots, "max_seq": session.max_seq}
        self.log.write("ready", **about)
        on_ready(about)
        self.manager.say("READY=1")
        if self.manager.seconds:
            self._begin(self._watch)

    async def _watch(self) -> None:
        """Tells the manager's watchdog that all is well, as long as steps end within its time."""
        seconds = self.manager.seconds
        while True:
            if self.service.steps_within(seconds):
                self.manager.say("WATCHDOG=1")
            await asyncio.sleep(seconds / 3)

    async def _drain(self) -> None:
        """Waits for what flies to land, and ends the server."""
        self.log.write("draining", active=self.service.active)
        end = asyncio.get_running_loop().time() + self.settings.drain_seconds
        while self.service.active and asyncio.get_running_loop().time() < end:
            await asyncio.sleep(POLL)
        if self.service.active:
            error = stopped()
            for ride in list(self.service.pilot.rides):
                self.service.pilot.cancel(ride, error)
        self.should_exit = True


def _connection() -> Any:
    """The class of connections; without httptools uvicorn's own, whose heads h11 bounds in bytes."""
    try:
        from .connections import BoundedConnection
    except ModuleNotFoundError:
        return "h11"
    return BoundedConnection


def _settle(future: "asyncio.Future[Any]", value: Any) -> None:
    if not future.done():
        future.set_result(value)


def load_for(settings: ServerSettings) -> tuple[Session, FlightSettings]:
    """Loads the model. Returns its session, and the settings of the flight that fit it.

    Raises:
        ArrieroError: It cannot be loaded, or a setting is out of range.
    """
    prefix_bytes = settings.prefix_bytes
    session = load(
        settings.folder,
        max_seq=settings.max_seq,
        threads=settings.threads,
        pages=settings.pages,
        weights=settings.weights,
        trust=settings.trust,
        prefix_bytes=usual_prefix_bytes(find_room()) if prefix_bytes is None else prefix_bytes,
    )
    slots = settings.slots or min(DEFAULT_SLOTS, session.max_batch or DEFAULT_SLOTS)
    cache_bytes, guessing = settings.cache_bytes, session.guessing(None, settings.draft_tokens)
    if cache_bytes is None:
        row = session.start(1, None, sparse=True, drafted=guessing.draft > 0).caches.row_bytes(session.max_seq)
        cache_bytes = max(row, min(slots * row, find_room().free // 2))
    queue = settings.queue
    return session, FlightSettings(
        slots=slots,
        prefill_budget=settings.prefill_budget,
        cache_bytes=cache_bytes,
        queue=queue,
        guessing=guessing,
    )


def _address(settings: ServerSettings, listeners: Sequence[socket.socket]) -> str:
    """The address that clients ask: a name where it has several."""
    if settings.unix_socket is not None:
        return f"unix:{settings.unix_socket}"
    host, port = listeners[0].getsockname()[:2]
    if len(listeners) > 1:
        host = settings.host
    scheme = "http" if settings.tls_certificate is None else "https"
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"
