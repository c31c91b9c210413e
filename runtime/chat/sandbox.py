"""Chat templates run where they can be stopped: in a process of their own that is kept, within a budget.

Enters: what `environment.render` and `written_in` take. Leaves: what these give, or the same errors. Invariant: no
template computes longer than `SECONDS`, is waited for longer than `WAIT`, writes more than it is allowed to or, on
Linux, takes more than `MEMORY`; the process that does is killed, and the next template gets another.

Where no process can be started, as in a frozen program or a sandbox without `fork`, the template runs in a thread:
one that runs too long is given up there as well, but a single operation that takes long goes on in the background, and
its memory is not bounded.
"""

import ctypes
import functools
import queue
import signal
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from datetime import datetime
from pathlib import Path
from typing import Any

from ..kept_process import ENDED, OVERRUN, KeptProcess, Program, process_for
from .environment import BrokenTemplateError, CostlyTemplateError, FailedTemplateError, StandIns, answer

SECONDS = 3.0
"""Processor time that a template has; Llama 4's takes a thousandth of it for a hundred turns."""

WAIT = 30.0
"""Seconds that all of a conversation's templates are waited for, on a machine however busy."""

MEMORY = 1 << 30
"""Bytes of address space that the process may have; Linux alone keeps to it."""

BROKEN, FAILED, COSTLY = b"b", b"f", b"c"
"""Kinds of answers: a template that is no program; one that failed; one beyond its budget."""

TOO_LONG = f"it takes longer than {SECONDS:g} s"
BY_TIME = f"-{int(getattr(signal, 'SIGPROF', 0))}"
"""Exit code of a process that has computed longer than it may."""

ROOM, FACTOR, LARGEST = 1 << 20, 16, 1 << 28
"""Characters that a template may write: the first, and the second for each that it is given; the third at most."""

PROGRAM = Program(module=str(Path(__file__).with_name("environment.py")), memory=MEMORY, seconds=SECONDS)

_left: ContextVar[list[float]] = ContextVar("_left")
"""Seconds left to the templates of the conversation that is being read."""


@contextmanager
def one_budget() -> Iterator[None]:
    """All templates that run within share one budget of time."""
    token = _left.set([WAIT])
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
    left = _left.get([WAIT])
    kept = _kept()
    kept.wait_for_start()
    started = time.monotonic()
    most = max(0.01, left[0])
    kind, text = kept.ask(request, most) or _answer_in_thread(request, min(SECONDS, most))
    left[0] -= time.monotonic() - started
    if kind == BROKEN:
        raise BrokenTemplateError(text)
    if kind == FAILED:
        raise FailedTemplateError(text)
    if kind == COSTLY:
        raise CostlyTemplateError(text)
    if kind == OVERRUN or (kind == ENDED and text == BY_TIME):
        raise CostlyTemplateError(TOO_LONG)
    if kind == ENDED:
        raise CostlyTemplateError("the process that it runs in ended: it may need more memory than it has")
    return text


def _characters(value: Any) -> int:
    """Characters of the texts in plain data, and one for each other value."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(_characters(name) + _characters(each) for name, each in value.items())
    return sum(map(_characters, value)) if isinstance(value, list | tuple) else 1


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


def _kept() -> KeptProcess:
    return process_for(PROGRAM)
