"""A Ray Serve application: replicas of one bundle behind one address, each asked what it knows the beginning of.

    pip install "ray[serve]==2.60.0"
    python examples/ray_serve.py BUNDLE --replicas 2

A replica is Arriero's whole server without its socket, on a machine or GPU that Ray finds for it, so chats, streams,
tools, schemas and images are as under `arriero serve`. Routing is Ray's own prefix-aware router: the replica whose
questions begin most alike, while none has `SPREAD` questions more than another. A replica takes as many questions at
once as it has slots; `--queue` more wait, and others are answered with 503 and `Retry-After`.

The router lies in a part of Ray that is its own (`ray.llm._internal`), whose public name wants vLLM: hence the version.
"""

import argparse
import asyncio
import json
import sys
import time
import uuid
from collections.abc import AsyncIterator, MutableMapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.serve.config import RequestRouterConfig
from ray.serve.exceptions import BackPressureError
from ray.serve.handle import DeploymentHandle
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

import arriero
from arriero.serving.app import make_app
from arriero.serving.logs import Log
from arriero.serving.pilot import FlightSettings
from arriero.serving.service import Limits, Service

ROUTERS = {
    "prefix": "ray.llm._internal.serve.routing_policies.prefix_aware.prefix_aware_router.PrefixCacheAffinityRouter",
    "round-robin": "ray.serve.experimental.round_robin_router.RoundRobinRouter",
    "load": "ray.serve._private.request_router.PowerOfTwoChoicesRequestRouter",
}
SPREAD = 4
"""Questions by which replicas may differ before load comes first."""

BEGINNING = 8000
"""Characters of a prompt that are compared with others."""

Event = MutableMapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """A request on its way to a replica.

    Attributes:
        method: Its method.
        path: Its path.
        headers: Its headers.
        body: Its body.
        prompt: The beginning of its text, which the router looks at.
    """

    method: str
    path: str
    headers: list[tuple[bytes, bytes]]
    body: bytes
    prompt: str


class Replica:
    """A flight behind Arriero's endpoints, asked through Ray instead of a socket.

    Args:
        folder: Bundle folder.
        slots: Sequences at once.
        options: Of `arriero.load`.
    """

    async def __init__(self, folder: str, slots: int, options: dict[str, Any]) -> None:
        log = Log(sys.stderr)
        session = await asyncio.to_thread(arriero.load, folder, **options)
        self.service = Service(Path(folder).name, Limits(), shares_prefixes=True, report=log.fault)
        settings = FlightSettings(slots=slots, prefill_budget=None, cache_bytes=None, queue=2 * slots)
        self.service.open(session, settings, asyncio.get_running_loop())
        self.app = make_app(self.service, log)
        self.name = serve.get_replica_context().replica_id.unique_id.encode()

    async def ask(self, asked: Asked) -> AsyncIterator[Event]:
        """The events of an answer, as ASGI has them; a caller that goes frees its row."""
        events: asyncio.Queue[Event | None] = asyncio.Queue()
        bodies, gone = [asked.body], asyncio.Event()

        async def receive() -> Event:
            if bodies:
                return {"type": "http.request", "body": bodies.pop(), "more_body": False}
            await gone.wait()
            return {"type": "http.disconnect"}

        scope = {"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "scheme": "http", "root_path": ""}
        scope |= {"method": asked.method, "path": asked.path, "raw_path": asked.path.encode(), "query_string": b""}
        scope |= {"headers": asked.headers, "client": ("127.0.0.1", 0), "server": ("127.0.0.1", 80)}
        answering = asyncio.create_task(self.app(scope, receive, events.put))
        answering.add_done_callback(lambda _: events.put_nowait(None))
        try:
            while (event := await events.get()) is not None:
                if event["type"] == "http.response.start":
                    event["headers"] = [*event["headers"], (b"x-replica", self.name)]
                yield event
        finally:
            gone.set()
            with suppress(asyncio.CancelledError):
                await asyncio.wait_for(answering, 10)

    def check_health(self) -> None:
        """Asked by Ray, which replaces a replica that fails.

        Raises:
            RuntimeError: The model is lost.
        """
        if self.service.fault is not None:
            raise RuntimeError(self.service.fault)


class Front:
    """The address that clients know."""

    def __init__(self, replicas: DeploymentHandle) -> None:
        self.replicas = replicas.options(method_name="ask", stream=True)

    async def __call__(self, request: Request) -> Response:
        """Hands a request to a replica, and its answer back as it comes."""
        body = await request.body()
        headers = [(name, value) for name, value in request.scope["headers"] if name != b"connection"]
        asked = Asked(
            method=request.method, path=request.url.path, headers=headers, body=body, prompt=beginning_of(body)
        )
        events = self.replicas.remote(asked)
        try:
            start = await anext(events)
        except BackPressureError:
            error = {"message": "all replicas are busy and the queue is full", "type": "server_error", "code": "full"}
            return JSONResponse({"error": error}, 503, {"Retry-After": "1"})
        answer = StreamingResponse(pieces(events), start["status"])
        answer.raw_headers = list(start["headers"])
        return answer


async def pieces(events: Any) -> AsyncIterator[bytes]:
    """The bodies of an answer's events."""
    async for event in events:
        if event["type"] == "http.response.body":
            yield event.get("body", b"")


def beginning_of(body: bytes) -> str:
    """The text that a request begins with, of a conversation or a prompt.

    Where there is none it is a word that nobody said before: Ray's router divides by the length of what it is given.
    """
    try:
        found = json.loads(body)
        said = found.get("prompt") or [each["content"] for each in found.get("messages") or found.get("input") or ()]
    except (ValueError, AttributeError, TypeError, KeyError):  # its endpoint refuses it
        said = ""
    return (said if isinstance(said, str) else "\n".join(map(str, said)))[:BEGINNING] or uuid.uuid4().hex


def application(arguments: argparse.Namespace) -> serve.Application:
    """Front and replicas, bound together."""
    eviction = {"do_eviction": True, "eviction_threshold_chars": 4_000_000, "eviction_target_chars": 3_000_000}
    is_prefix = arguments.router == "prefix"
    router = RequestRouterConfig(
        request_router_class=ROUTERS[arguments.router],
        request_router_kwargs={"imbalanced_threshold": SPREAD, **eviction} if is_prefix else {},
    )
    replicas = serve.deployment(
        Replica,
        num_replicas=arguments.replicas,
        max_ongoing_requests=arguments.slots,
        max_queued_requests=arguments.queue,
        request_router_config=router,
        ray_actor_options={"num_cpus": arguments.threads, "num_gpus": arguments.gpus},
    )
    options = {"max_seq": arguments.max_seq, "threads": arguments.threads, "prefix_bytes": arguments.prefix_bytes}
    bound = replicas.bind(str(arguments.bundle.resolve()), arguments.slots, options)
    return serve.deployment(Front, max_ongoing_requests=1000, ray_actor_options={"num_cpus": 0}).bind(bound)


def main() -> None:
    """Serves until Ctrl-C, on this machine's own address; under `ray start` on the cluster that is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--router", choices=ROUTERS, default="prefix")
    parser.add_argument("--slots", type=int, default=8, help="questions of a replica at once")
    parser.add_argument("--queue", type=int, default=64, help="questions that wait")
    parser.add_argument("--threads", type=int, default=1, help="of a replica")
    parser.add_argument("--gpus", type=int, default=0, help="of a replica")
    parser.add_argument("--max-seq", type=int, default=1024)
    parser.add_argument("--prefix-bytes", type=int, default=256 << 20, help="known beginnings of a replica")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    arguments = parser.parse_args()
    ray.init(include_dashboard=False, configure_logging=False)
    serve.start(http_options={"host": arguments.host, "port": arguments.port})
    serve.run(application(arguments))
    print(
        json.dumps({"address": f"http://{arguments.host}:{arguments.port}", "model": arguments.bundle.name}), flush=True
    )
    while True:
        time.sleep(60)


if __name__ == "__main__":
    main()
