"""A model that is lost while it is served: who is on board, who comes, and who looks after the server learn so."""

import asyncio
import io
import json
import threading
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import httpx
import pytest
from endless import ENDLESS

import arriero
from arriero.errors import SessionError
from arriero.runtime import Session
from arriero.serving.app import make_app
from arriero.serving.logs import Log
from arriero.serving.pilot import FlightSettings
from arriero.serving.service import Limits, Service

SETTINGS = FlightSettings(slots=2, prefill_budget=None, cache_bytes=None, queue=8)
BODY: dict[str, Any] = {"prompt": "The list type", "max_tokens": 200, **ENDLESS}
REASON = "group: rank 1 was ended by SIGKILL; the group has ended, load it again"

INSIDE = f"/srv/our models/{REASON}"
"""The reason as it is known inside, with a folder that is no client's business."""


class Scene:
    """A server's application in this process."""

    def __init__(self, session: Session) -> None:
        self.session, self.lines = session, io.StringIO()
        log = Log(self.lines)
        self.service = Service("tiny", Limits(), shares_prefixes=False, report=log.fault)
        transport = httpx.ASGITransport(make_app(self.service, log))
        self.http = httpx.AsyncClient(transport=transport, base_url="http://localhost")
        self.is_held, self.gate = threading.Event(), threading.Event()

    def run(self, act: Callable[["Scene"], Coroutine[Any, Any, None]]) -> None:
        async def whole() -> None:
            self.service.open(self.session, SETTINGS, asyncio.get_running_loop())
            async with asyncio.timeout(60):
                await act(self)

        try:
            asyncio.run(whole())
        finally:
            self.gate.set()
            self.service.close()

    async def ask(self, **settings: Any) -> httpx.Response:
        return await self.http.post("/v1/completions", json={**BODY, **settings})

    async def fly(self, count: int) -> list["asyncio.Task[httpx.Response]"]:
        """Asks for answers. Returns once all are asked for, and a step with all rows waits for the gate."""
        step = self.session.decode_rows

        def hold(*given: Any, **named: Any) -> Any:
            pilot = self.service.pilot
            if len(pilot.flight.rows) == SETTINGS.slots and pilot.active == count:
                self.is_held.set()
                self.gate.wait(60)
            return step(*given, **named)

        self.session.decode_rows = hold  # type: ignore[method-assign]
        asked = [asyncio.create_task(self.ask()) for _ in range(count)]
        await asyncio.to_thread(self.is_held.wait, 60)
        return asked

    def faults(self) -> list[dict[str, Any]]:
        return [line for line in map(json.loads, self.lines.getvalue().splitlines()) if line["event"] == "fault"]


@pytest.fixture
def scene(bundle: Path) -> Scene:
    return Scene(arriero.load(bundle, threads=1, max_seq=512))


def fail(*_: Any, **__: Any) -> Any:
    raise SessionError(INSIDE)


async def assert_lost(scene: Scene) -> None:
    """Asserts that whoever comes or looks learns it."""
    for path in ("/health", "/ready"):
        found = await scene.http.get(path)
        assert found.status_code == 503
        assert found.json() == {"status": "lost", "reason": REASON}
    refused = await scene.ask()
    assert refused.status_code == 503
    assert refused.json()["error"]["code"] == "model_lost"
    assert REASON in refused.json()["error"]["message"]
    assert not scene.service.steps_within(60)


@pytest.mark.parametrize("part", ["decode_rows", "state"])
def test_who_is_on_board_and_who_waits_end_with_the_model(
    scene: Scene, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def act(scene: Scene) -> None:
        asked = await scene.fly(4)  # two wait for a row
        if part == "state":  # as where a sequence that ends cannot be moved
            monkeypatch.setattr(scene.service.pilot.flight, "step", fail)
        else:
            monkeypatch.setattr(type(scene.session.decoder), "fault", INSIDE)
            monkeypatch.setattr(scene.session, "decode_rows", fail)
        monkeypatch.setattr(scene.session, "start", fail)
        scene.gate.set()
        for answer in await asyncio.gather(*asked):
            assert answer.status_code == 503, answer.text
            assert answer.json()["error"]["code"] == "model_lost"
            assert "/srv" not in answer.text
        assert scene.service.active == 0
        await assert_lost(scene)

    scene.run(act)
    assert [INSIDE in fault["message"] for fault in scene.faults()] == [True, True]  # the step's, and the model's


def test_an_idle_model_that_is_lost_is_known_to_be_so_at_once(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    async def act(scene: Scene) -> None:
        assert (await scene.http.get("/health")).json() == {"status": "ok"}
        assert (await scene.http.get("/ready")).json() == {"status": "ready"}
        monkeypatch.setattr(type(scene.session.decoder), "fault", INSIDE)
        await assert_lost(scene)

    scene.run(act)


def test_a_step_that_fails_for_all_ends_them_and_a_new_flight_takes_the_next(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def act(scene: Scene) -> None:
        asked = await scene.fly(2)
        monkeypatch.setattr(scene.service.pilot.flight, "leave", fail)  # whoever leaves, leaves rows in no known state
        asked[0].cancel()
        while scene.service.pilot.inbox.empty():  # the pilot, which is in a step, is not told yet
            await asyncio.sleep(0.001)
        scene.gate.set()
        assert (await asked[1]).status_code == 500
        assert (await scene.ask(max_tokens=3)).status_code == 200
        assert (await scene.http.get("/health")).status_code == 200
        assert scene.service.active == 0

    scene.run(act)


def test_requests_that_fail_one_after_another_lose_no_model(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    async def act(scene: Scene) -> None:
        flight = scene.service.pilot.flight
        monkeypatch.setattr(scene.session, "decode_rows", fail)
        for _ in range(3):
            failed = await scene.ask()
            assert failed.status_code == 500
            assert "SessionError; its log says more" in failed.text
            assert "rank 1" not in failed.text
        monkeypatch.undo()
        assert (await scene.ask(max_tokens=3)).status_code == 200
        assert scene.service.pilot.flight is not flight
        assert [INSIDE in fault["message"] for fault in scene.faults()] == [True]
        assert (await scene.http.get("/health")).status_code == 200

    scene.run(act)
