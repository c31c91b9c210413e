"""A server under a service manager: ready when it takes requests, alive while its steps end, stopping at a signal."""

import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from arriero.serving.pilot import Pilot
from arriero.serving.service_manager import ServiceManager


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> socket.socket:
    """The manager's socket, and the variables that name it."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    listener.bind(str(tmp_path / "notify"))
    listener.settimeout(60)
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    return listener


def test_a_server_tells_its_manager_how_it_is(
    manager: socket.socket, serve: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "900000")
    server = serve("--slots", "2", "--max-seq", "512")
    said = [manager.recv(100) for _ in range(4)]
    assert said == [b"READY=1", b"WATCHDOG=1", b"WATCHDOG=1", b"WATCHDOG=1"]
    assert server.end() == 0
    manager.settimeout(5)
    while (word := manager.recv(100)) == b"WATCHDOG=1":
        pass
    assert word == b"STOPPING=1"
    manager.close()


def test_a_step_that_hangs_is_not_called_alive() -> None:
    pilot = Pilot.__new__(Pilot)
    pilot.lost, pilot.session = None, SimpleNamespace(fault=None)  # type: ignore[assignment]
    pilot.stepped, pilot.thread = 0.0, threading.Thread(target=time.sleep, args=(0.5,))
    assert not pilot.steps_within(10)  # not started
    pilot.thread.start()
    assert pilot.steps_within(10)
    pilot.stepped = time.perf_counter() - 11
    assert not pilot.steps_within(10)
    assert pilot.steps_within(20)
    pilot.thread.join()
    assert not pilot.steps_within(20)


def test_nothing_is_said_where_nobody_listens(tmp_path: Path) -> None:
    for address in ("", "relative", str(tmp_path / "nobody"), "@" + "x" * 500, "/" + "x" * 500, "/\0x"):
        ServiceManager({"NOTIFY_SOCKET": address}).say("READY=1")


@pytest.mark.parametrize(
    ("given", "seconds"),
    [
        ({}, 0),
        ({"WATCHDOG_USEC": "3000000"}, 3),
        ({"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": str(os.getpid())}, 3),
        ({"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": "1"}, 0),
        ({"WATCHDOG_USEC": "soon"}, 0),
        ({"WATCHDOG_USEC": "-3"}, 0),
    ],
)
def test_the_watchdog_s_time_is_the_one_that_this_process_is_given(given: dict[str, str], seconds: float) -> None:
    assert ServiceManager({"NOTIFY_SOCKET": "/run/x", **given}).seconds == seconds
    assert ServiceManager(given).seconds == 0


def test_an_abstract_socket_is_reached() -> None:
    name = f"arriero-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(f"\0{name}")
        listener.settimeout(5)
        ServiceManager({"NOTIFY_SOCKET": f"@{name}"}).say("READY=1")
        assert listener.recv(100) == b"READY=1"
