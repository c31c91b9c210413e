"""`arriero trend`: the page of a history of checks."""

import time
from pathlib import Path
from typing import Annotated

import typer

from . import options
from .terminal import Terminal


def trend(
    history: Annotated[list[Path], typer.Argument(help="File that `arriero check --history` wrote; several are one.")],
    output: options.Page,
    force: options.ForcePage = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
    debug: options.Debug = False,
) -> None:
    """Draw the trend of many checks: each metric with its interval and limit, run by run."""
    terminal = Terminal(extra="check", as_json=as_json, quiet=quiet, verbose=verbose, debug=debug)
    with terminal.errors_shown():
        from ..errors import printable
        from ..files.drawing import check_drawable
        from ..files.single import check_writable, write_file

        started = time.perf_counter()
        check_drawable()
        check_writable(output, force=force, start=options.PAGE_START)
        from ..pages.trend import trend_page

        write_file(output, printable(trend_page(history)).encode("utf-8"))
        terminal.report_written(output, time.perf_counter() - started, as_json)
