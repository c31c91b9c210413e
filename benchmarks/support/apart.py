"""A place apart for engines of others: an environment of their own beside this one, and a network of its own.

Linux; the network needs root. What listens on all addresses there is heard by nobody else.
"""

import fcntl
import json
import socket
import struct
import subprocess
import sys
import venv
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def environment(folder: Path, *installs: Sequence[str]) -> Path:
    """An environment with what is installed, which sees the packages of this one behind its own; returns its Python.

    Args:
        folder: Where it is made, if it is not there yet.
        *installs: Arguments of `pip install`, for each of its runs.
    """
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
        for wanted in installs:
            subprocess.run([str(python), "-m", "pip", "install", "-q", *wanted], check=True)
    packages = next((folder / "lib").glob("python*/site-packages"))
    beside = [f"import site; site.addsitedir({path!r})" for path in sys.path[1:] if path]  # heeds editable installs
    (packages / "beside.pth").write_text("\n".join(beside) + "\n")
    return python


def run_apart(python: Path, script: str, *arguments: str) -> dict[str, Any]:
    """Runs a script in a network of its own; returns the JSON that it prints last."""
    command = ["unshare", "--net", str(python), script, *arguments]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def raise_loopback() -> None:
    """Turns on the one interface of a new network."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        fcntl.ioctl(asked, 0x8914, struct.pack("16sh", b"lo", 1 | 0x40))  # SIOCSIFFLAGS: up, running
