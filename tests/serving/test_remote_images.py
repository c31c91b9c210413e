"""Images on other hosts: named ones only, and never this machine's or a private network's."""

import http.server
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from arriero.serving import remote_images
from arriero.serving.errors import RequestError
from arriero.serving.remote_images import fetch_image

HOSTS = {"images.example", "other.example", "127.0.0.1", "localhost", "[::1]", "::1"}


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        code, place, body = {
            "/image.png": (200, None, b"image"),
            "/large": (200, None, b"x" * 2000),
            "/moved": (302, "/image.png", b""),
            "/away": (302, "http://evil.example/a.png", b""),
            "/inside": (302, "http://private.example/a.png", b""),
            "/round": (302, "/round", b""),
            "/file": (302, "file:///etc/passwd", b""),
        }.get(self.path, (404, None, b""))
        self.send_response(code)
        if place is not None:
            self.send_header("Location", place)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """A host of a public address, which a connection to it finds here."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    addresses = {"images.example": "93.184.216.34", "private.example": "10.0.0.7", "other.example": "169.254.169.254"}
    known, connect = socket.getaddrinfo, socket.create_connection

    def look_up(host: Any, port: Any, *rest: Any, **more: Any) -> Any:
        if host in addresses:
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (addresses[host], port))]
        return known(host, port, *rest, **more)

    def go(address: Any, *rest: Any) -> socket.socket:
        assert address[0] == "93.184.216.34", address
        return connect(("127.0.0.1", address[1]), *rest)

    monkeypatch.setattr(remote_images.socket, "getaddrinfo", look_up)
    monkeypatch.setattr(remote_images.socket, "create_connection", go)
    yield server.server_address[1]
    server.shutdown()
    server.server_close()


def test_an_image_of_a_named_host_is_fetched_through_redirects(port: int) -> None:
    assert fetch_image(f"http://images.example:{port}/image.png", HOSTS) == b"image"
    assert fetch_image(f"http://IMAGES.example:{port}/moved", HOSTS) == b"image"


@pytest.mark.parametrize(
    "url",
    [
        "http://images.example:{port}/away",
        "http://images.example:{port}/inside",
        "http://images.example:{port}/round",
        "http://images.example:{port}/file",
        "http://images.example:{port}/absent",
        "http://images.example:{port}/large",
        "http://evil.example:{port}/image.png",
        "http://other.example:{port}/image.png",
        "http://127.0.0.1:{port}/image.png",
        "http://localhost:{port}/image.png",
        "http://[::1]:{port}/image.png",
        "http://images.example@127.0.0.1:{port}/image.png",
        "http://user:word@images.example:{port}/image.png",
        "http://images.example:99999/image.png",
        "https://images.example:{port}/image.png",
        "ftp://images.example/a.png",
        "http:///a.png",
        "images.example/a.png",
    ],
)
def test_other_hosts_private_addresses_and_odd_files_are_refused(
    port: int, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_images, "MOST_BYTES", 1000)
    hosts = HOSTS | ({"private.example"} if "inside" in url else set())
    with pytest.raises(RequestError) as caught:
        fetch_image(url.format(port=port), hosts)
    assert caught.value.status == 400
    assert len(caught.value.message) < 300
