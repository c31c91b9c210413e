"""The user's terminal on stderr: errors in one line, messages, and progress, as much of each as the user asks for."""

import errno
import re
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from ..errors import ArrieroError, ArrieroWarning, extra_of
from ..files.disks import full_disk
from ..spec.types import Progress
from .streams import show_json
from .words import place, size


@dataclass(frozen=True, kw_only=True, slots=True)
class Terminal:
    """The amount that a verb says on stderr.

    Attributes:
        extra: The package's extra that brings what the verb imports; empty where the package alone does.
        quiet: Whether nothing but errors is shown.
        verbose: Whether details are shown, among them each phase and its seconds.
        debug: Whether an error's traceback is shown.
        as_json: Whether an error is a line of JSON on stdout as well.

    Raises:
        typer.BadParameter: Both more and nothing is asked for.
    """

    extra: str = ""
    quiet: bool = False
    verbose: bool = False
    debug: bool = False
    as_json: bool = False

    def __post_init__(self) -> None:
        if self.quiet and self.verbose:
            raise typer.BadParameter("--quiet and --verbose contradict each other: give one of them")

    def say(self, line: str) -> None:
        """Shows a message."""
        if not self.quiet:
            print(line, file=sys.stderr)

    def detail(self, line: str) -> None:
        """Shows a message that only --verbose asks for."""
        if self.verbose:
            print(line, file=sys.stderr)

    @contextmanager
    def errors_shown(self) -> Iterator[None]:
        """Turns errors into one line and exit code 2; the traceback is shown where asked for."""
        for name in ("SIGTERM", "SIGHUP"):  # so that temporary folders are removed
            number = getattr(signal, name, None)
            if number is not None and (name == "SIGTERM" or signal.getsignal(number) != signal.SIG_IGN):  # by nohup
                signal.signal(number, lambda number, _: sys.exit(128 + number))
        with warnings.catch_warnings():
            warnings.simplefilter("always", ArrieroWarning)
            if self.quiet:
                warnings.simplefilter("ignore")
            warnings.showwarning = self._warner(warnings.showwarning)
            try:
                yield
            except KeyboardInterrupt:
                print(file=sys.stderr)
                raise typer.Exit(130) from None
            except Exception as error:
                self.show_error(error)
                raise typer.Exit(2) from None

    def _warner(self, usual: Callable[..., None]) -> Callable[..., None]:
        """Shows our own warnings in a line, each once, and others as usual."""
        shown: set[str] = set()

        def warn(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
            if not issubclass(category, ArrieroWarning):
                usual(message, category, *where, **more)
            elif str(message) not in shown:
                shown.add(str(message))
                self.say(f"arriero: {' '.join(str(message).split())}")

        return warn

    def show_error(self, error: BaseException) -> None:
        """Shows an error in one line, --quiet or not; where asked for, its traceback before that."""
        if self.debug:
            traceback.print_exception(error)
        line = one_line(error, self.extra)
        print(f"arriero: {line}", file=sys.stderr)
        if self.as_json:
            show_json({"error": line, "kind": type(error).__name__, "exit_code": 2})

    @contextmanager
    def progress_shown(self, title: str, unit: str = "") -> Iterator[Progress]:
        """A progress bar where stderr is a terminal. Yields what stages report to: phase, done, total.

        Args:
            title: Name of the work.
            unit: Unit that is counted, where its speed is worth showing.
        """
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        console = Console(stderr=True)
        with Bar(*columns, console=console, transient=True, disable=self.quiet or not console.is_terminal) as bar:
            task = bar.add_task(title, total=None)
            speed, lines = Speed(unit), Lines(title, self.say)
            phases = Phases(title, lambda line: console.print(line, highlight=False, markup=False, soft_wrap=True))

            def report(phase: str, done: int, total: int) -> None:
                if self.verbose:
                    phases.enter(phase)
                said = f"{phase}{speed.of(done)}"
                bar.update(task, description=f"{title} {said}", completed=done, total=total)
                if not console.is_terminal:
                    lines.report(said, done, total)

            yield report
            phases.enter("")

    def report_written(self, path: Path, seconds: float, as_json: bool, **more: Any) -> None:
        """Says what was written, a folder or a file; as JSON on stdout with `more` beside it."""
        files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
        sizes = {file: file.stat().st_size for file in files}
        if self.verbose:
            for file, count in sizes.items():
                self.detail(f"{file} ({size(count)})")
        total = sum(sizes.values())
        if as_json:
            show_json({"folder": str(path), "bytes": total, "seconds": round(seconds, 3), **more})
        else:
            self.say(f"Wrote {place(path)} ({total / 1e6:.1f} MB) in {seconds:.1f} s")


class Speed:
    """Units a second since the first report.

    Args:
        unit: Unit that is counted; empty shows no speed.
    """

    def __init__(self, unit: str) -> None:
        self.unit = unit
        self.first: tuple[float, int] | None = None

    def of(self, done: int) -> str:
        """The speed in words, empty while there is none."""
        now = time.perf_counter()
        self.first = self.first or (now, done)
        seconds, counted = now - self.first[0], done - self.first[1]  # what an earlier run did is not this one's speed
        return f", {counted / seconds:,.0f} {self.unit}/s" if self.unit and seconds > 0 else ""


class Lines:
    """Progress in a line now and then, where there is no terminal for a bar.

    Args:
        title: Name of the work.
        show: Called with a line.
    """

    def __init__(self, title: str, show: Callable[[str], None]) -> None:
        self.title, self.show = title, show
        self.started = self.last = time.monotonic()
        self.first: int | None = None

    def report(self, said: str, done: int, total: int) -> None:
        """Shows a line where the last one is `EVERY` seconds old: how far it is, and how long it may take."""
        now = time.monotonic()
        self.first = done if self.first is None else self.first
        if now - self.last < EVERY or not total:
            return
        self.last = now
        gained, spent = done - self.first, now - self.started
        left = f", about {duration((total - done) * spent / gained)} left" if gained > 0 else ""
        self.show(f"{self.title} {said}: {done / total:.0%}{left}")


EVERY = 30.0
"""Seconds between two lines of progress."""


def duration(seconds: float) -> str:
    """A time for a person."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


class Phases:
    """The phases of a stage, each with its seconds once it has ended.

    Args:
        title: Name of the work.
        show: Called with a line.
    """

    def __init__(self, title: str, show: Callable[[str], None]) -> None:
        self.title, self.show = title, show
        self.phase, self.started = "", time.perf_counter()

    def enter(self, phase: str) -> None:
        """Begins a phase where it is another than before; the empty one ends the last."""
        if phase == self.phase:
            return
        now = time.perf_counter()
        if self.phase:
            self.show(f"{self.title} {self.phase}: {now - self.started:.1f} s")
        self.phase, self.started = phase, now


def one_line(error: BaseException, extra: str) -> str:
    """An error's message in one line, with the remedy for those that are not Arriero's own.

    Args:
        error: The error.
        extra: The package's extra that a missing module comes with; empty where none does.
    """
    text = " ".join(str(error).split())
    if is_lack_of_memory(error):
        return (
            f"there is not enough memory{f' ({text[:200]})' if text else ''}: end other programs, ask for less with "
            "--max-seq or a smaller batch, or raise this process's limit (ulimit -v, the container's)"
        )
    if isinstance(error, ArrieroError):
        return text
    if isinstance(error, ModuleNotFoundError):
        extra = extra_of(error.name, extra)
        package = f"arriero[{extra}]" if extra else "arriero"
        return f"{text}: this verb needs it, pip install '{package}'"
    if isinstance(error, UnicodeDecodeError | UnicodeEncodeError):
        return "the input is not UTF-8 text: convert it first"
    if (full := full_disk(error)) is not None:
        return full
    return f"internal error, {type(error).__name__}: {text[:300]} (--debug shows where)"


LACK_OF_MEMORY = re.compile(
    r"bad_alloc|bad allocation|Failed to allocate memory|can't allocate memory|Cannot allocate memory"
    r"|failed to map segment|can't start new thread|Unable to allocate"
)
"""Words of libraries that had too little memory, and have no error of their own for it."""


def is_lack_of_memory(error: BaseException) -> bool:
    """Whether an error, or one that it was raised from, is that of too little memory."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, MemoryError) or (isinstance(seen, OSError) and seen.errno == errno.ENOMEM):
            return True
        if not isinstance(seen, ModuleNotFoundError | FileNotFoundError) and LACK_OF_MEMORY.search(str(seen)):
            return True
        seen = seen.__cause__
    return False
