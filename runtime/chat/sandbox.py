"""Chat templates run where they can be stopped: in a process of their own that is kept, within a budget.

Enters: what `environment.render` and `written_in` take. Leaves: what these give, or the same errors. Invariant: no
template runs longer than `SECONDS`, writes more than it is allowed to or, on Linux, takes more than `MEMORY`; the
process that does is killed, and the next template gets another.

Where no process can be started, as in a frozen program or a sandbox without `fork`, the template runs in a thread:
one that runs too long is given up there as well, but a single operation that takes long goes on in the background, and
its memory is not bounded.
"""

import atexit
import ctypes
import functools
import json
import marshal
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from datetime import datetime
from pathlib import Path
from typing import Any

from .environment import BrokenTemplateError, CostlyTemplateError, FailedTemplateError, StandIns, answer
from .template_process import BROKEN, COSTLY, FAILED, READY, read_block, write_block

SECONDS = 3.0
"""Time that a template has for one conversation; Llama 4's takes a thousandth of it for a hundred turns."""

START_SECONDS = 30.0
"""Time that a process has to start."""

TOO_LONG = f"it takes longer than {SECONDS:g} s"

ROOM, FACTOR, LARGEST = 1 << 20, 16, 1 << 28
"""Characters that a template may write: the first, and the second for each that it is given; the third at most."""


_left: ContextVar[list[float]] = ContextVar("_left")
"""Seconds left to the templates of the conversation that is being read."""


@contextmanager
def one_budget() -> Iterator[None]:
    """All templates that run within share one budget of time."""
    token = _left.set([SECONDS])
    try:
        yield
    finally:
        _left.reset(token)


def render(source: str, variables: Mapping[str, Any], now: datetime, stand_ins: StandIns | None = None) -> str:
    """Renders a chat template; the arguments and errors are those of `environment.render`.

    Raises:
        CostlyTemplateError: The template takes more time, memory or characters than it has.
    """
    said = len(source) + _characters(variables)
    most = min(LARGEST, ROOM + FACTOR * said)
    request = ("render", source, dict(variables), now.isoformat(), dict(stand_ins or {}), most)
    return _ask(request)


def written_in(source: str, texts: Iterable[str]) -> list[str]:
    """The texts, of some, that stand in what a template may write: its own text and its strings.

    Raises:
        BrokenTemplateError: The template does not compile.
        CostlyTemplateError: It takes too long to compile.
    """
    literals = _literals(source)
    return [text for text in texts if text in literals]


@functools.lru_cache(maxsize=16)
def _literals(source: str) -> str:
    return _ask(("literals", source))


def prepare() -> None:
    """Starts the process, so that the first conversation need not wait for it; where it cannot be started, nothing."""
    _kept().start()


def _ask(request: tuple[Any, ...]) -> str:
    left = _left.get([SECONDS])
    kept = _kept()
    kept.wait_for_start()
    started = time.monotonic()
    kind, text = kept.ask(request, max(0.01, left[0]))
    left[0] -= time.monotonic() - started
    if kind == BROKEN:
        raise BrokenTemplateError(text)
    if kind == FAILED:
        raise FailedTemplateError(text)
    if kind == COSTLY:
        raise CostlyTemplateError(text)
    return text


def _characters(value: Any) -> int:
    """Characters of the texts in plain data, and one for each other value."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(_characters(name) + _characters(each) for name, each in value.items())
    return sum(map(_characters, value)) if isinstance(value, list | tuple) else 1


class TemplateProcess:
    """A process that renders templates, started when it is needed and again after it was killed."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.process: subprocess.Popen[bytes] | None = None
        self.is_ready = self.is_impossible = False

    def start(self) -> None:
        """Starts the process, and does not wait for it."""
        with self.lock:
            self._start()

    def wait_for_start(self) -> None:
        """Starts the process where none is there, and waits until it answers."""
        with self.lock:
            self._is_there()

    def ask(self, request: tuple[Any, ...], seconds: float) -> tuple[bytes, str]:
        """Sends a request, and waits some time for its answer: its kind, and a text."""
        data = marshal.dumps(request)
        with self.lock:
            for _ in range(2):  # one that somebody else killed meanwhile gets a successor
                if not self._is_there():
                    return _answer_in_thread(request, seconds)
                found = self._exchange(data, seconds)
                if found is not None:
                    return found
        return COSTLY, "the process that it runs in ended: it may need more memory than it has"

    def _start(self) -> None:
        if self.is_impossible or (self.process is not None and self.process.poll() is None):
            return
        self.close()
        if not sys.executable or getattr(sys, "frozen", False):
            self.is_impossible = True
            return
        script = Path(__file__).with_name("template_process.py")
        command = [sys.executable, "-I", "-S", str(script), json.dumps([str(each) for each in sys.path])]
        extra: dict[str, Any] = {"start_new_session": True}  # Ctrl-C is the person's at the terminal, not the process's
        if sys.platform == "win32":
            extra = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP | subprocess.CREATE_NO_WINDOW}
        pipe = subprocess.PIPE
        try:
            self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, **extra)
        except OSError:
            self.is_impossible = True

    def _is_there(self) -> bool:
        """Whether the process runs and answers; it is started where it does not."""
        self._start()
        if self.process is not None and not self.is_ready:
            found = self._exchange(None, START_SECONDS)
            self.is_ready = found == (READY, "")
            self.is_impossible = not self.is_ready
            if self.is_impossible:
                self.close()
        return self.is_ready

    def _exchange(self, data: bytes | None, seconds: float) -> tuple[bytes, str] | None:
        """Sends data and reads the answer; None where the process ended. One that takes too long is killed."""
        process = self.process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        overrun = threading.Event()

        def stop() -> None:
            overrun.set()
            process.kill()

        timer = threading.Timer(seconds, stop)
        timer.daemon = True
        timer.start()
        try:
            if data is not None:
                write_block(process.stdin, data)
            block = read_block(process.stdout)
        except (OSError, EOFError):
            self.close()
            return (COSTLY, TOO_LONG) if overrun.is_set() else None
        except BaseException:  # an interrupt: the answer would be taken for the next one's
            self.close()
            raise
        finally:
            timer.cancel()
        return block[:1], block[1:].decode("utf-8", "surrogatepass")

    def close(self) -> None:
        """Ends the process."""
        process, self.process, self.is_ready = self.process, None, False
        if process is not None:
            process.kill()
            for stream in (process.stdin, process.stdout):
                try:
                    if stream is not None:
                        stream.close()
                except OSError:  # what was not written yet
                    pass
            process.wait()


def _answer_in_thread(request: tuple[Any, ...], seconds: float) -> tuple[bytes, str]:
    """Answers in a thread of this process, which is given up where it takes too long."""
    answers: queue.SimpleQueue[tuple[bytes, str]] = queue.SimpleQueue()

    def run() -> None:
        with suppress(SystemExit):  # it was given up
            answers.put(answer(request))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        return answers.get(timeout=seconds)
    except queue.Empty:
        if thread.ident is not None:  # ends it at its next step
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(SystemExit))
        return COSTLY, TOO_LONG


@functools.cache
def _process_of(pid: int) -> TemplateProcess:
    kept = TemplateProcess()
    atexit.register(kept.close)
    return kept


def _kept() -> TemplateProcess:
    """This process's; after a fork the parent's is not the child's."""
    return _process_of(os.getpid())
