"""Servers in processes of their own, at free ports, that end with their tests."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import OpenAI
from shared_folders import MakeOnce

import arriero
from arriero.runtime import Session
from arriero.spec.recipe import Recipe

SECONDS = 120

HELD = """
import sys, time
from pathlib import Path
from arriero.cli.app import app
from arriero.runtime import Flight
step, gate = Flight.step, Path(sys.argv.pop(1))
def step_where_open(flight):
    if not gate.exists():
        return step(flight)
    time.sleep(0.002)
    return flight._read_prompts(flight.session.decoder.longest)
Flight.step = step_where_open
app()
"""
"""A server whose sequences get a first token, and no second while a file is there."""


class Served:
    """A server's process.

    Args:
        folder: Bundle folder.
        *options: More of its options.
        gate: A file that holds its sequences while it is there.
    """

    def __init__(self, folder: Path, *options: str, gate: Path | None = None) -> None:
        python = ["-m", "arriero"] if gate is None else ["-c", HELD, str(gate)]
        command = [sys.executable, *python, "serve", str(folder), "--threads", "1", "--port", "0", "--json"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [*command, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )
        self.log: list[dict[str, Any]] = []
        self.thread = threading.Thread(target=self._read, daemon=True)
        self.thread.start()
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self.log
        self.about = json.loads(line)
        self.url = self.about["address"]

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log.append(json.loads(line) if line.startswith("{") else {"event": "text", "text": line})

    def gauge(self, name: str) -> float:
        """A metric's value."""
        text = httpx.get(f"{self.url}/metrics", timeout=SECONDS).text
        found = re.search(rf"^vllm:{name}{{[^}}]*}} (\S+)$", text, re.MULTILINE)
        assert found, text
        return float(found[1])

    def await_gauge(self, name: str, value: float) -> None:
        """Waits until a metric has a value."""
        end = time.monotonic() + SECONDS
        while (found := self.gauge(name)) != value:
            assert time.monotonic() < end, (name, found)
            time.sleep(0.02)

    def client(self, key: str = "none") -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=SECONDS)

    def http(self, **settings: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=SECONDS, **settings)

    def end(self, number: int = signal.SIGTERM) -> int:
        """Sends a signal. Returns the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        code = self.process.wait(SECONDS)
        self.thread.join(SECONDS)
        return code


@pytest.fixture(scope="session")
def bundle(quantised_tiny: Callable[[Recipe], Path], once: MakeOnce) -> Path:
    """The tiny Llama 4 in int8, whose texts do not depend on what runs beside them."""
    from arriero.calibration import int8
    from arriero.engine import build_bundle

    return once("served", lambda out: build_bundle(quantised_tiny(int8()), out, target="cpu"))


@pytest.fixture(scope="session")
def session(bundle: Path) -> Session:
    return arriero.load(bundle, threads=1, max_seq=1024)


@pytest.fixture(scope="session")
def served(bundle: Path) -> Iterator[Served]:
    server = Served(bundle, "--slots", "8", "--max-seq", "1024", "--model-name", "tiny", "--max-images", "1")
    yield server
    assert server.end() == 0
    assert not [line for line in server.log if line["event"] in ("fault", "text")], server.log


@pytest.fixture
def serve(bundle: Path) -> Iterator[Callable[..., Served]]:
    """Starts servers of a test's own."""
    servers: list[Served] = []

    def start(*options: str, folder: Path | None = None, gate: Path | None = None) -> Served:
        servers.append(Served(folder or bundle, *options, gate=gate))
        return servers[-1]

    yield start
    for server in servers:
        if server.process.poll() is None:
            server.process.kill()
            server.process.wait()


@pytest.fixture
def gate(tmp_path: Path) -> Path:
    """A file, there from the beginning, that holds a server's sequences."""
    path = tmp_path / "gate"
    path.touch()
    return path


@pytest.fixture
def client(served: Served) -> OpenAI:
    return served.client()


@pytest.fixture
def http(served: Served) -> Iterator[httpx.Client]:
    with served.http() as found:
        yield found
