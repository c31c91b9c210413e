"""A flight as a worker of NVIDIA Dynamo, whose frontend speaks HTTP, makes tokens of prompts, and routes.

Enters: requests in tokens, through Dynamo's Python interface of workers (1.6). Leaves: chunks of tokens, events of the
blocks of known beginnings that are kept and removed, by which the frontend routes, and load. Invariants: whoever
cancels has a row's place free at the next step; a worker that is to end takes no more and lets what flies land.

Dynamo is imported when a worker is started. Where it meets the others is said by its own variables: `DYN_NAMESPACE`,
`DYN_DISCOVERY_BACKEND`, `DYN_FILE_KV`, `DYN_REQUEST_PLANE`, `DYN_EVENT_PLANE`.
"""

import asyncio
import hashlib
import json
import os
import shutil
import signal
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ..errors import SessionError
from ..files.reading import read_bytes
from ..runtime import Generated, Request, Session
from .dynamo_requests import Asked, chunk, read_request, usage
from .errors import RequestError, of_session
from .logs import Log
from .pilot import FlightSettings
from .rides import Ride
from .server import POLL, ServerSettings, load_for
from .service import Service

LOAD_SECONDS = 0.25
"""Seconds between two reports of the load."""

FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja")
"""Files of a folder that the frontend reads."""

INSTALL = "docs/dynamo.md has the install that works"


def serve_dynamo(settings: ServerSettings, log: Log, on_ready: Callable[[dict[str, Any]], None]) -> None:
    """Serves a folder as a worker until a signal ends it.

    Args:
        settings: The server's; what concerns HTTP has no meaning here.
        log: The log.
        on_ready: Called with the model's name when requests are taken.

    Raises:
        ArrieroError: Dynamo is not installed, or the folder cannot be loaded.
    """
    dynamo = load_dynamo()
    name = settings.name or settings.folder.resolve().name
    session, flight = load_for(settings)
    card = write_card(settings.folder, session)
    engine_class: Any = type("ArrieroEngine", (FlightEngine, dynamo.LLMEngine), {})
    engine = engine_class(settings, name, card, session, flight, dynamo, log, on_ready)
    config = dynamo.WorkerConfig(
        namespace=os.environ.get("DYN_NAMESPACE", "dynamo"),
        model_name=str(card),
        served_model_name=name,
        discovery_backend=os.environ.get("DYN_DISCOVERY_BACKEND", "file"),
        request_plane=os.environ.get("DYN_REQUEST_PLANE", "tcp"),
        event_plane=os.environ.get("DYN_EVENT_PLANE", "zmq"),
        tool_call_parser=os.environ.get("DYN_TOOL_CALL_PARSER", "pythonic"),
    )
    for number in (signal.SIGTERM, signal.SIGINT):  # Dynamo's handlers call those of before, which end at once
        signal.signal(number, signal.SIG_DFL)
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as nohup has it
        signal.signal(signal.SIGHUP, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    asyncio.run(dynamo.Worker(engine, config).run())
    if engine.failure is not None:
        raise engine.failure


def load_dynamo() -> SimpleNamespace:
    """Dynamo's classes that are used here.

    Raises:
        SessionError: It is not installed.
    """
    try:
        from dynamo.common.backend.engine import EngineConfig, LLMEngine, LlmRegistration
        from dynamo.common.backend.publisher import ComponentSnapshot, PushSource
        from dynamo.common.backend.worker import Worker, WorkerConfig
        from dynamo.llm import exceptions
    except ModuleNotFoundError as error:
        raise SessionError(f"--dynamo needs ai-dynamo 1.6 ({error.name} is missing): {INSTALL}") from error
    return SimpleNamespace(
        EngineConfig=EngineConfig,
        LLMEngine=LLMEngine,
        LlmRegistration=LlmRegistration,
        ComponentSnapshot=ComponentSnapshot,
        PushSource=PushSource,
        Worker=Worker,
        WorkerConfig=WorkerConfig,
        exceptions=exceptions,
    )


class FlightEngine:
    """A worker as Dynamo calls it; the rest is as its class `LLMEngine` has it.

    Args:
        settings: The server's.
        name: The model's name.
        card: Folder of what the frontend reads of the model.
        session: The model.
        flight: The flight's settings.
        dynamo: Dynamo's classes.
        log: The log.
        on_ready: Called when requests are taken.
    """

    def __init__(
        self,
        settings: ServerSettings,
        name: str,
        card: Path,
        session: Session,
        flight: FlightSettings,
        dynamo: Any,
        log: Log,
        on_ready: Callable[[dict[str, Any]], None],
    ) -> None:
        self.settings, self.name, self.dynamo, self.log = settings, name, dynamo, log
        self.card, self.session, self.flight, self.on_ready = card, session, flight, on_ready
        self.service = Service(name, settings.limits, shares_prefixes=True, report=log.fault)
        self.rides: dict[str, Ride] = {}
        self.loads: Any = None
        self.events: BlockEvents | None = None
        self.blocks = 1
        self.failure: Exception | None = None
        self.task: asyncio.Task[None] | None = None

    @classmethod
    async def from_args(cls, argv: Sequence[str] | None = None) -> Any:
        """Dynamo's own way to start, which `arriero serve` stands for."""
        raise SessionError("start a worker by `arriero serve FOLDER --dynamo`")

    async def start(self, worker_id: int) -> Any:
        """Begins to fly. Returns what the worker is registered with."""
        loop, session, flight = asyncio.get_running_loop(), self.session, self.flight
        self.service.open(session, flight, loop)
        caches = self.service.pilot.flight.state.caches
        block = session.prefixes.block
        row = caches.row_bytes(caches.positions)
        whole = row * flight.slots if flight.cache_bytes is None else flight.cache_bytes
        self.blocks = max(1, whole * caches.positions // (row * block))
        self.task = loop.create_task(self._report())
        self.log.write("ready", model=self.name, worker=worker_id, slots=flight.slots, max_seq=session.max_seq)
        self.on_ready({"model": self.name, "worker": worker_id, "slots": flight.slots, "max_seq": session.max_seq})
        return self.dynamo.EngineConfig(
            model=str(self.card),
            served_model_name=self.name,
            llm=self.dynamo.LlmRegistration(
                context_length=session.max_seq,
                kv_cache_block_size=block,
                total_kv_blocks=self.blocks,
                max_num_seqs=flight.slots,
            ),
        )

    async def generate(self, request: Mapping[str, Any], context: Any) -> AsyncIterator[dict[str, Any]]:
        """Continues a prompt."""
        try:
            asked = read_request(request, self.service.pilot.settings.slots + self.service.pilot.settings.queue)
            self.service.pilot.check_queue()
            party = await self.service.work(self._party, asked)
            ride = Ride([party], "")
            self.service.pilot.submit(ride)
        except RequestError as error:
            raise self._refused(error) from error
        self.rides[context.id()] = ride
        try:
            async for each in self._chunks(ride, len(party[0].prompt.ids)):
                yield each
        finally:
            self.rides.pop(context.id(), None)
            is_left = bool(ride.riding) or context.is_stopped()
            self.service.cancel(ride)
            self._write_down(context.id(), ride, len(party[0].prompt.ids), is_left)

    async def abort(self, context: Any) -> None:
        """Ends a request that nobody waits for any more."""
        if (ride := self.rides.pop(context.id(), None)) is not None:
            self.service.cancel(ride)

    async def cleanup(self) -> None:
        """Lets what flies land, and ends the flight; may be called again."""
        end = time.monotonic() + self.settings.drain_seconds
        while self.rides and time.monotonic() < end:
            await asyncio.sleep(POLL)
        if self.task is not None:
            self.task.cancel()
        if self.events is not None:
            self.log.write("blocks", stored=self.events.stored_count, removed=self.events.removed_count)
            self.events = None
        self.service.close()

    async def kv_event_sources(self) -> list[Any]:
        """Where events of blocks come from; nowhere where none are kept."""
        return [self.dynamo.PushSource(on_ready=self._tell)] if self.settings.prefix_bytes != 0 else []

    def component_metrics_dp_ranks(self) -> list[int]:
        """Ranks that report a load: the one that there is."""
        return [0]

    def attach_snapshot_publisher(self, publisher: Any) -> None:
        """Takes what loads are reported to."""
        self.loads = publisher

    def _tell(self, publisher: Any) -> None:
        self.events = self.session.prefixes.watch = BlockEvents(publisher)

    def _write_down(self, name: str, ride: Ride, prompt: int, is_left: bool) -> None:
        """Logs a request that has ended, or been left."""
        new = sum(each.tokens for each in ride.timelines)
        self.log.write(
            "request",
            id=name,
            seconds=round(time.perf_counter() - ride.started, 4),
            prompt_tokens=prompt,
            completion_tokens=new,
            first_token_seconds=ride.first_token_seconds(),
            left=is_left or None,
        )

    def _party(self, asked: Asked) -> list[Request]:
        """The requests of a prompt, checked."""
        session, longest = self.session, self.service.pilot.longest
        first = session.request(asked.ids, asked.count, asked.images, **asked.of(0))
        if len(first.prompt.ids) + first.count > longest:
            raise RequestError(
                f"the prompt's {len(first.prompt.ids)} and {first.count} new tokens are more than the {longest} that "
                "this worker's memory holds: ask for less",
                code="context_length_exceeded",
            )
        others = [session.request(asked.ids, asked.count, asked.images, **asked.of(n)) for n in range(1, asked.choices)]
        return [first, *others]

    async def _chunks(self, ride: Ride, prompt: int) -> AsyncIterator[dict[str, Any]]:
        """A ride's pieces as chunks, each sequence's last with its counts."""
        new, known = [0] * len(ride.timelines), 0
        while pieces := await ride.next():
            for index, piece in pieces:
                if piece.finish == "error":
                    raise self._failed(piece)
                new[index] += len(piece.ids)
                known = max(known, piece.reused)
                found = chunk(index, piece, self.service.texts)
                if piece.finish is not None:
                    found["completion_usage"] = usage(prompt, new[index], known)
                yield found

    def _failed(self, piece: Generated) -> Exception:
        assert piece.error is not None
        if self.service.fault is not None:  # another worker carries on
            return self.dynamo.exceptions.EngineShutdown(self.service.fault)
        return self._refused(of_session(piece.error))

    def _refused(self, error: RequestError) -> Exception:
        """Dynamo's error for a refusal."""
        kinds = self.dynamo.exceptions
        kind = {429: kinds.WorkerUnavailable, 503: kinds.WorkerUnavailable, 500: kinds.Unknown}
        return kind.get(error.status, kinds.InvalidArgument)(error.message)

    async def _report(self) -> None:
        """Reports the load for as long as the worker is there; ends it where the model is lost."""
        metrics = self.service.metrics
        while True:
            await asyncio.sleep(LOAD_SECONDS)
            if (fault := self.service.fault) is not None and self.failure is None:
                self.failure = SessionError(fault)
                os.kill(os.getpid(), signal.SIGTERM)
            if self.loads is None:
                continue
            seen = metrics.prefix_queries
            snapshot = self.dynamo.ComponentSnapshot(
                kv_used_blocks=round(metrics.cache_usage * self.blocks),
                kv_total_blocks=self.blocks,
                gpu_cache_usage=metrics.cache_usage,
                dp_rank=0,
                kv_cache_hit_rate=metrics.prefix_hits / seen if seen else None,
            )
            self.loads.publish(0, snapshot)


class BlockEvents:
    """Tells a router's index which blocks are kept.

    Args:
        publisher: Dynamo's publisher of events.
    """

    def __init__(self, publisher: Any) -> None:
        self.publisher = publisher
        self.told: set[bytes] = set()
        self.stored_count = self.removed_count = 0

    def stored(self, parent: bytes | None, key: bytes, tokens: Sequence[int]) -> None:
        """A block is kept behind its parent."""
        behind = None if parent is None else number_of(parent)
        self.publisher.publish_stored(list(tokens), [len(tokens)], [number_of(key)], behind)
        self.told.add(key)
        self.stored_count += 1

    def removed(self, key: bytes) -> None:
        """A block is kept no more."""
        if key in self.told:
            self.told.remove(key)
            self.publisher.publish_removed([number_of(key)])
            self.removed_count += 1


def number_of(key: bytes) -> int:
    """A block's key as the number that Dynamo knows it by."""
    return int.from_bytes(key[:8], "little", signed=True)


def write_card(folder: Path, session: Session) -> Path:
    """Writes what the frontend reads of a model: tokenizer, template, defaults, and a configuration.

    Returns:
        The folder, the same for the same contents: the frontend takes workers for one model by their cards' paths too.

    Raises:
        SessionError: There is no tokenizer, or the folder is another user's.
    """
    if session.text.tokenizer is None:
        raise SessionError(f"{folder} has no tokenizer.json, and Dynamo's frontend needs it: export again with it")
    config = {
        "architectures": ["Llama4ForConditionalGeneration"],
        "model_type": "llama4",
        "vocab_size": session.spec.vocab_size,
        "max_position_embeddings": session.max_seq,
        "eos_token_id": list(session.defaults.eos_token_ids),
    }
    files = {name: read_bytes(folder / name, folder=folder) for name in FILES if (folder / name).exists()}
    files["config.json"] = json.dumps(config, indent=1).encode()
    digest = hashlib.sha256(b"".join(name.encode() + hashlib.sha256(files[name]).digest() for name in sorted(files)))
    cards = Path(tempfile.gettempdir()) / f"arriero-dynamo-{os.getuid()}"
    cards.mkdir(mode=0o700, exist_ok=True)
    if cards.is_symlink() or cards.stat().st_uid != os.getuid():
        raise SessionError(f"{cards} is another user's: remove it, or set TMPDIR to a folder of your own")
    card = cards / digest.hexdigest()[:32]
    if not card.exists():
        with tempfile.TemporaryDirectory(dir=cards) as made:
            for name, content in files.items():
                (Path(made) / name).write_bytes(content)
            with suppress(OSError):  # another worker was faster
                shutil.copytree(made, f"{made}.card")
                os.rename(f"{made}.card", card)
    return card
