"""How the command line speaks: errors in one line and progress on stderr, a model's words on stdout."""

import json
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ..errors import ArrieroError, SessionError

if TYPE_CHECKING:
    from ..runtime import Generated, Session


IMAGE_LINE = "/image "
"""How a line of a conversation begins that names an image for the next."""


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


def answer(session: "Session", prompt: Any, settings: dict[str, Any], as_json: bool, measured: dict[str, float]) -> str:
    """Streams one continuation to stdout, or prints it as JSON. Returns its text."""
    from ..runtime.continuation import joined

    started = time.perf_counter()
    pieces: list[Generated] = []
    first = None
    for piece in session.stream(prompt, **settings):
        first = first or time.perf_counter() - started
        pieces.append(piece)
        if not as_json:
            print(piece.text, end="", flush=True)
    seconds = time.perf_counter() - started
    whole, count = joined(pieces), len(pieces)
    rate = (count - 1) / (seconds - first) if first and count > 1 else 0.0
    accepted = whole.accepted / whole.drafted if whole.drafted else None
    if as_json:
        result = {
            "text": whole.text,
            "ids": whole.ids,
            "finish": whole.finish,
            **measured,
            "first_token_seconds": first,
            "tokens_per_second": rate,
            "reused_tokens": whole.reused,
            "drafted_tokens": whole.drafted,
            "accepted_tokens": whole.accepted,
            "acceptance_rate": accepted,
        }
        print(json.dumps(result, ensure_ascii=False))
    else:
        print()
        if first is not None:
            known = f" ({whole.reused} of the prompt's tokens were known)" if whole.reused else ""
            guessed = (
                "" if accepted is None else f", {whole.accepted} of {whole.drafted} guesses right ({accepted:.0%})"
            )
            said = f"{count} tokens, the first after {first:.2f} s{known}, then {rate:.0f} tokens/s{guessed}"
            print(f"[{said}]", file=sys.stderr)
    return whole.text


def converse(
    session: "Session",
    system: str | None,
    first: str | None,
    images: Sequence[Path],
    settings: dict[str, Any],
    as_json: bool,
) -> None:
    """Takes a line a turn from stdin and answers in the conversation so far, until stdin ends.

    The images belong to the first turn; a line `/image FILE` adds one to the next. A turn whose image cannot be taken
    is told of and forgotten.
    """
    messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system is not None else []
    waiting = list(images)
    for line in turns(first):
        if line.startswith(IMAGE_LINE):
            waiting.append(Path(line.removeprefix(IMAGE_LINE).strip()).expanduser())
            continue
        parts = [{"type": "image", "path": str(path)} for path in waiting]
        messages.append({"role": "user", "content": [*parts, {"type": "text", "text": line}] if parts else line})
        waiting = []
        try:
            text = answer(session, messages, settings, as_json, {})
        except SessionError as error:
            if not parts or not sys.stdin.isatty():
                raise
            print(f"arriero: {one_line(error)}", file=sys.stderr)
            messages.pop()
        else:
            messages.append({"role": "assistant", "content": text})


def turns(first: str | None) -> Iterator[str]:
    """The user's lines: the one given, then those typed."""
    if first is not None:
        yield first
    interactive = sys.stdin.isatty()
    while True:
        if interactive:
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.strip()
