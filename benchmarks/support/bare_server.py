"""The least server that streams a flight: one raw ASGI application under uvicorn, httptools and uvloop.

Beside it `arriero serve` is measured: what it costs more is its own; what this costs already is Python's, the kernel's
and the caches', which the flight's step has emptied. It checks nothing, counts nothing, and takes no second prompt into
account: a request is the body that `server_speed.py` sends, an event has the fields of a completion's chunk.

    python -m support.bare_server FOLDER [--threads 2] [--slots 9]    # on a free port, printed as JSON
"""

import argparse
import asyncio
import json
import queue
import socket
import threading
from typing import Any

import uvicorn

import arriero
from arriero.runtime import Flight, Request, Session

CHUNK = (
    '{"id":"cmpl-0123456789abcdef","object":"text_completion","created":1790000000,"model":"bare",'
    '"system_fingerprint":"fp_0123456789","choices":[{"index":0,"text":%s,"logprobs":null,"finish_reason":null}]}'
)

Pieces = asyncio.Queue[tuple[str, bool]]
"""Texts of one stream, each with whether it is the last."""


class Stepper:
    """Steps a flight in a thread, and hands its texts to the event loop.

    Args:
        session: The model.
        slots: Sequences at once.
    """

    def __init__(self, session: Session, slots: int) -> None:
        self.session, self.flight = session, Flight(session, slots, cache_bytes=1 << 40)
        self.inbox: queue.SimpleQueue[tuple[Request, Pieces]] = queue.SimpleQueue()
        self.streams: dict[int, Pieces] = {}
        self.loop: asyncio.AbstractEventLoop | None = None

    def begin(self, loop: asyncio.AbstractEventLoop) -> None:
        """Starts the thread, once."""
        if self.loop is None:
            self.loop = loop
            threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        assert self.loop is not None
        while True:
            is_idle = not (self.flight.riding or self.flight.waiting)
            try:
                request, pieces = self.inbox.get(block=is_idle)
                self.streams[self.flight.join(request)] = pieces
                continue
            except queue.Empty:
                pass
            found = [(self.streams[number], each.text, each.finish is not None) for number, each in self.flight.step()]
            self.loop.call_soon_threadsafe(self._deliver, found)

    @staticmethod
    def _deliver(found: list[tuple[Pieces, str, bool]]) -> None:
        for pieces, text, is_last in found:
            pieces.put_nowait((text, is_last))


def application(stepper: Stepper) -> Any:
    """The ASGI application: whatever is asked is a completion."""

    async def answer(_: Any, receive: Any, send: Any) -> None:
        stepper.begin(asyncio.get_running_loop())
        body = json.loads((await receive())["body"])
        bias = {int(token): each for token, each in body["logit_bias"].items()}
        pieces: Pieces = asyncio.Queue()
        request = stepper.session.request(body["prompt"], body["max_tokens"], do_sample=False, logit_bias=bias)
        stepper.inbox.put((request, pieces))
        headers = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        is_last = False
        while not is_last:
            text, is_last = await pieces.get()
            if text:
                event = f"data: {CHUNK % json.dumps(text)}\n\n".encode()
                await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False})

    return answer


def main() -> None:
    parser = argparse.ArgumentParser(description="The least server that streams a flight.")
    parser.add_argument("folder")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--slots", type=int, default=9)
    asked = parser.parse_args()
    listener = socket.create_server(("127.0.0.1", 0))
    stepper = Stepper(arriero.load(asked.folder, threads=asked.threads), asked.slots)
    print(json.dumps({"address": f"http://127.0.0.1:{listener.getsockname()[1]}"}), flush=True)
    config = uvicorn.Config(
        application(stepper), http="httptools", loop="uvloop", log_level="error", access_log=False, lifespan="off"
    )
    uvicorn.Server(config).run([listener])


if __name__ == "__main__":
    main()
