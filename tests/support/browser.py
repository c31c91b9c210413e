"""A headless Chromium, driven through its own protocol, and a server for pages with answers written beforehand."""

import base64
import json
import os
import shutil
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Page:
    """A page in a browser.

    Args:
        address: The address of its web socket, `ws://127.0.0.1:PORT/PATH`.
    """

    def __init__(self, address: str) -> None:
        host, _, path = address.removeprefix("ws://").partition("/")
        name, _, port = host.partition(":")
        self.socket = socket.create_connection((name, int(port)), timeout=60)
        key = base64.b64encode(os.urandom(16)).decode()
        self.socket.sendall(
            f"GET /{path} HTTP/1.1\r\nHost: {host}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            f"Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
        )
        self.stream = self.socket.makefile("rb")
        while self.stream.readline().strip():
            pass
        self.number, self.events = 0, list[dict[str, Any]]()

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Calls a method of the protocol. Returns its result."""
        self.number += 1
        self._send(json.dumps({"id": self.number, "method": method, "params": parameters}).encode())
        while (message := json.loads(self._receive())).get("id") != self.number:
            self.events.append(message)
        if "error" in message:
            raise RuntimeError(f"{method}: {message['error']}")
        result: dict[str, Any] = message["result"]
        return result

    def run(self, script: str) -> Any:
        """Runs a script in the page. Returns the value of its last expression, a promise's once it is kept."""
        found = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in found:
            raise RuntimeError(json.dumps(found["exceptionDetails"])[:2000])
        return found["result"].get("value")

    def wait(self, script: str, seconds: float = 30) -> Any:
        """Waits until an expression is true. Returns its value."""
        until = time.monotonic() + seconds
        while not (value := self.run(script)):
            assert time.monotonic() < until, f"{script} is {value!r}"
            time.sleep(0.03)
        return value

    def press(self, key: str, code: int, text: str = "") -> None:
        """Presses a key."""
        for kind in ("keyDown", "keyUp"):
            named = {"text": text} if kind == "keyDown" and text else {}
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, **named)

    def size(self, width: int, height: int, *, dark: bool = False) -> None:
        """Gives the page a size, and a scheme of colours."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=2, mobile=width < 640
        )
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", features=scheme)

    def shoot(self, file: Path) -> None:
        """Writes a picture of the page."""
        file.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    def _send(self, data: bytes) -> None:
        size, mask = len(data), os.urandom(4)
        head = bytes([0x81, 0x80 | size]) if size < 126 else b"\x81\xfe" + struct.pack(">H", size)
        if size >= 1 << 16:
            head = b"\x81\xff" + struct.pack(">Q", size)
        masked = bytes(byte ^ mask[at % 4] for at, byte in enumerate(data))
        self.socket.sendall(head + mask + masked)

    def _receive(self) -> bytes:
        data, last = b"", False
        while not last:
            first, size = self.stream.read(2)
            size &= 0x7F
            if size >= 126:
                size = int.from_bytes(self.stream.read(2 if size == 126 else 8), "big")
            last = bool(first & 0x80)
            payload = self.stream.read(size)
            data += payload if first & 0x0F in (0, 1) else b""
            last = last and first & 0x0F in (0, 1)
        return data


@contextmanager
def opened(folder: Path) -> Iterator[Page]:
    """A headless browser with one empty page; its files lie in the folder."""
    assert CHROMIUM is not None
    command = [
        CHROMIUM,
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--hide-scrollbars",
    ]
    command += ["--no-first-run", "--disable-background-networking", "--remote-debugging-port=0"]
    with subprocess.Popen(
        [*command, f"--user-data-dir={folder}", "about:blank"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        try:
            yield Page(_address(folder / "DevToolsActivePort"))
        finally:
            process.terminate()


def _address(file: Path) -> str:
    """The address of the first page's web socket."""
    import urllib.request

    until = time.monotonic() + 90
    while time.monotonic() < until:
        if file.is_file() and (lines := file.read_text().split()):
            with urllib.request.urlopen(f"http://127.0.0.1:{lines[0]}/json", timeout=60) as answer:
                pages = [each for each in json.load(answer) if each["type"] == "page"]
            if pages:
                address: str = pages[0]["webSocketDebuggerUrl"]
                return address
        time.sleep(0.1)
    raise TimeoutError("the browser did not start")


class Answers(ThreadingHTTPServer):
    """A server of one page, whose answers stand beforehand.

    Attributes:
        pieces: The texts of the next answer.
        pause: Seconds between two of them.
        status: The status of the next answer; others than 200 come with an error.
        inputs: The kinds of contents that the model takes.
        asked: The bodies of the requests, and the paths of all.
    """

    daemon_threads = True

    def __init__(self, page: bytes) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.page, self.pieces, self.pause, self.status = page, ["Hello."], 0.0, 200
        self.inputs = ["text", "image"]
        self.asked: list[dict[str, Any]] = []
        self.paths: list[str] = []
        self.is_cut = threading.Event()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        """Its address."""
        return f"http://127.0.0.1:{self.server_port}/"


class Handler(BaseHTTPRequestHandler):
    """Answers one request."""

    server: Answers

    def log_message(self, format: str, *rest: Any) -> None:
        """Says nothing."""

    def do_GET(self) -> None:
        """The page, or the models."""
        self.server.paths.append(self.path)
        is_page = self.path == "/"
        model = {"id": "tiny-llama4", "input_modalities": self.server.inputs}
        body = self.server.page if is_page else json.dumps({"data": [model]}).encode()
        self._head(200, "text/html; charset=utf-8" if is_page else "application/json", len(body))
        self.wfile.write(body)

    def do_POST(self) -> None:
        """An answer, piece by piece."""
        server = self.server
        server.paths.append(self.path)
        server.asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        if server.status != 200:
            body = json.dumps({"error": {"message": "too many <b>requests</b>", "type": "rate", "code": None}}).encode()
            self._head(server.status, "application/json", len(body))
            self.wfile.write(body)
            return
        self._head(200, "text/event-stream", None)
        try:
            for number, piece in enumerate(server.pieces):
                last = number + 1 == len(server.pieces)
                choice = {"index": 0, "delta": {"content": piece}, "finish_reason": "stop" if last else None}
                self._event({"choices": [choice]})
                time.sleep(server.pause)
            usage = {"prompt_tokens": 530, "completion_tokens": len(server.pieces), "total_tokens": 0}
            self._event({"choices": [], "usage": {**usage, "prompt_tokens_details": {"cached_tokens": 512}}})
            self.wfile.write(b"data: [DONE]\n\n")
        except OSError:
            server.is_cut.set()

    def _event(self, value: Any) -> None:
        self.wfile.write(f"data: {json.dumps(value)}\n\n".encode())
        self.wfile.flush()

    def _head(self, status: int, kind: str, size: int | None) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        if size is not None:
            self.send_header("Content-Length", str(size))
        if status == 429:
            self.send_header("Retry-After", "7")
        self.end_headers()
