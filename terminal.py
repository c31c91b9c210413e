"""How the command line speaks on stderr: an error in one line, work as a progress bar."""

import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import typer

from .errors import ArrieroError


@contextmanager
def errors_shown(debug: bool) -> Iterator[None]:
    """Turns errors into one line on stderr and exit code 2; the traceback is shown where asked for."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that temporary folders are removed
    try:
        yield
    except KeyboardInterrupt:
        print(file=sys.stderr)
        raise typer.Exit(130) from None
    except BrokenPipeError:
        raise typer.Exit(0) from None
    except Exception as error:
        if debug:
            traceback.print_exc()
        print(f"arriero: {one_line(error)}", file=sys.stderr)
        raise typer.Exit(2) from None


def one_line(error: Exception) -> str:
    """An error's message in one line, with the remedy for those that are not Arriero's own."""
    text = " ".join(str(error).split())
    if isinstance(error, ArrieroError):
        return text
    if isinstance(error, ModuleNotFoundError):
        return f"{text}: this verb needs an extra, pip install 'arriero[accuracy,calibration]'"
    if isinstance(error, UnicodeDecodeError):
        return "the input is not UTF-8 text: convert it first"
    return f"internal error, {type(error).__name__}: {text} (--debug shows where)"


@contextmanager
def progress_shown(title: str, unit: str = "") -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar on stderr where that is a terminal. Yields what stages report to: phase, done, total.

    Args:
        title: What is being done.
        unit: What is counted, where its speed is worth showing.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=None)
        first: tuple[float, int] | None = None

        def report(phase: str, done: int, total: int) -> None:
            nonlocal first
            now = time.perf_counter()
            first = first or (now, done)
            seconds, counted = now - first[0], done - first[1]  # what an earlier run did is not this one's speed
            speed = f", {counted / seconds:,.0f} {unit}/s" if unit and seconds > 0 else ""
            bar.update(task, description=f"{title} {phase}{speed}", completed=done, total=total)

        yield report
