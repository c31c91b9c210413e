"""A stream's pieces are written as they come, in their order, however the client reads."""

import asyncio
import itertools
import logging
import time
from types import SimpleNamespace
from typing import Any

import pytest
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from arriero.runtime import Generated
from arriero.runtime.pace import Pace
from arriero.serving import pilot, streams
from arriero.serving.connections import PromptWriter
from arriero.serving.errors import RequestError
from arriero.serving.metrics import Metrics
from arriero.serving.rides import Ride
from arriero.serving.streams import EventStream, stream


class Transport:
    """Takes bytes, as a client's connection does."""

    def __init__(self) -> None:
        self.written: list[bytes] = []

    def write(self, data: bytes) -> None:
        self.written.append(data)

    def close(self) -> None:
        pass

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass


class Writer:
    """Writes a piece's text; a piece without text changes nothing, one of "!" cannot be written."""

    def begin(self) -> bytes:
        return b"<"

    def write(self, index: int, piece: Generated) -> bytes:
        if piece.text == "!":
            raise RuntimeError("broken")
        return piece.text.encode()

    def end(self) -> bytes:
        return b">"

    def fail(self, error: RequestError) -> bytes:
        return b"failed"


class Connection:
    """A request under way in uvicorn's own cycle, over a transport that is a list."""

    def __init__(self) -> None:
        self.transport: Any = Transport()
        self.flow = FlowControl(self.transport)
        self.cycle = RequestResponseCycle(
            scope={"type": "http", "method": "POST", "state": {}},  # type: ignore[typeddict-item]
            transport=self.transport,
            flow=self.flow,
            logger=logging.getLogger(),
            access_logger=logging.getLogger(),
            access_log=False,
            default_headers=[],
            message_event=asyncio.Event(),
            expect_100_continue=False,
            keep_alive=True,
            on_response=lambda: None,
        )
        self.cycle.scope["state"]["writer"] = PromptWriter(self.cycle)
        party: Any = [SimpleNamespace(prompt=SimpleNamespace(ids=[1]))]
        self.ride = Ride([party], "someone")
        self.faults: list[BaseException] = []
        self.service: Any = SimpleNamespace(cancel=lambda ride: None, report=self.faults.append)

    async def stream(self) -> None:
        """Opens the stream when a first piece is there, and sends it."""
        request: Any = SimpleNamespace(receive=self.cycle.receive)
        answer = await stream(self.service, request, self.ride, Writer())
        scope: Any = self.cycle.scope
        await answer(scope, self.cycle.receive, self.cycle.send)

    async def open(self) -> "asyncio.Task[None]":
        """Begins the stream with a first piece."""
        stream = EventStream(self.service, self.ride, Writer(), [(0, Generated([1], "a", None))])
        scope: Any = self.cycle.scope
        task = asyncio.create_task(stream(scope, self.cycle.receive, self.cycle.send))
        await rest()
        return task

    def put(self, text: str, finish: Any = None) -> None:
        self.ride.put(0, Generated([1], text, finish))

    def body(self) -> str:
        """What was written behind the head, out of its chunks."""
        data, found = b"".join(self.transport.written).partition(b"\r\n\r\n")[2], b""
        while data:
            size, _, data = data.partition(b"\r\n")
            part, data = data[: int(size, 16)], data[int(size, 16) :]
            assert data.startswith(b"\r\n")
            found, data = found + part, data[2:]
        return found.decode()


async def rest() -> None:
    """Lets all that can go on do so."""
    for _ in range(10):
        await asyncio.sleep(0)


def test_pieces_are_written_in_the_call_that_brings_them() -> None:
    async def go() -> None:
        connection = Connection()
        task = await connection.open()
        for text in "bcd":
            connection.put(text)
            assert connection.body().endswith(text)  # nothing was awaited between
        connection.put("")
        connection.put("e", "stop")
        await task
        assert connection.body() == "<abcde>"

    asyncio.run(go())


@pytest.mark.parametrize("paused", list(itertools.combinations(range(6), 2)))
def test_a_client_that_reads_slowly_gets_all_in_order(paused: tuple[int, int]) -> None:
    async def go() -> None:
        connection = Connection()
        task = await connection.open()
        for place, text in enumerate("bcdefg"):
            if place == paused[0]:
                connection.flow.pause_writing()
            if place == paused[1]:
                connection.flow.resume_writing()
            connection.put(text)
            if paused[0] <= place < paused[1]:
                assert text not in connection.body()
            if place % 2:
                await rest()
        connection.put("h", "stop")
        await task
        assert connection.body() == "<abcdefgh>"

    asyncio.run(go())


def test_a_client_that_leaves_before_its_stream_begins_gives_up_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "PATIENCE", 120.0)

    async def go() -> None:
        connection = Connection()
        connection.service.cancel = lambda ride: ride.end(None)
        task = asyncio.create_task(connection.stream())
        await rest()
        connection.cycle.disconnected = True
        connection.cycle.message_event.set()
        with pytest.raises(RequestError) as caught:
            await asyncio.wait_for(task, 60)
        assert caught.value.status == 499
        assert not connection.ride.riding
        assert not connection.transport.written

    asyncio.run(go())


def test_a_piece_that_cannot_be_written_ends_its_stream_alone() -> None:
    async def go() -> None:
        connection = Connection()
        task = await connection.open()
        connection.put("!")
        connection.put("b")
        await task
        assert connection.body() == "<afailed"
        assert [str(each) for each in connection.faults] == ["broken"]

    asyncio.run(go())


def test_a_stream_that_writes_nothing_for_a_while_says_that_more_will_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "PATIENCE", 0.3)

    async def go() -> None:
        held, busy = Connection(), Connection()
        tasks = [await each.open() for each in (held, busy)]
        for _ in range(20):
            held.put("")  # as the text of a call that is not whole yet
            busy.put("b")
            await asyncio.sleep(0.05)
        for each in (held, busy):
            each.put("c", "stop")
        await asyncio.gather(*tasks)
        assert held.body().count(streams.KEEP_ALIVE.decode()) in (1, 2)
        assert held.body().replace(streams.KEEP_ALIVE.decode(), "") == "<ac>"
        assert busy.body() == f"<a{'b' * 20}c>"

    asyncio.run(go())


def test_the_step_after_a_first_token_waits_until_that_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pilot, "MOST_WAIT", 60.0)

    async def go() -> None:
        settings = pilot.FlightSettings(slots=2, prefill_budget=None, cache_bytes=None, queue=2)
        flown = pilot.Pilot.__new__(pilot.Pilot)
        flown.loop, flown.metrics, flown.settings = asyncio.get_running_loop(), Metrics("tiny"), settings
        flown.flight, flown.lost = SimpleNamespace(pace=Pace(step=300.0), used=0.0), None  # type: ignore[assignment]
        flown.waiting = flown.active = 2
        connections = Connection(), Connection()
        tasks = [asyncio.create_task(each.stream()) for each in connections]

        def step(text: str) -> list[str]:
            flown._hand_over(pilot.Batch(pieces=[(each.ride, 0, Generated([1], text, None)) for each in connections]))
            return [each.body() for each in connections]

        flown.loop.call_soon(time.sleep, 0.2)  # the loop is busy
        assert await asyncio.to_thread(step, "a") == ["<a", "<a"]
        await asyncio.to_thread(step, "b")  # of a second token nobody waits
        for each in connections:
            each.put("c", "stop")
        await asyncio.gather(*tasks)
        assert [each.body() for each in connections] == ["<abc>", "<abc>"]

    asyncio.run(go())


def test_what_comes_after_the_client_left_is_written_nowhere() -> None:
    async def go() -> None:
        connection = Connection()
        task = await connection.open()
        before = connection.body()
        connection.cycle.disconnected = True
        connection.put("b")
        connection.ride.end(None)
        await task
        assert connection.body() == before

    asyncio.run(go())
