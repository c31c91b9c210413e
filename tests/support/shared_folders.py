"""What is dear to make and only read: made once a test run, by whichever process asks first."""

import fcntl
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import pytest

MakeOnce: TypeAlias = Callable[[str, Callable[[Path], object]], Path]


def make_once(factory: pytest.TempPathFactory) -> MakeOnce:
    """A function that gives the folder or file of a name, making it where no process of this run has yet.

    A run's processes share the folder above their own (pytest-xdist); one that makes it keeps the others waiting.
    """
    own = factory.getbasetemp()
    room = (own.parent if os.environ.get("PYTEST_XDIST_WORKER") else own) / "once"
    room.mkdir(exist_ok=True)

    def make(name: str, maker: Callable[[Path], object]) -> Path:
        path, done = room / name, room / f"{name}.done"
        with (room / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not done.exists():
                maker(path)
                done.touch()
        return path

    return make
