"""`arriero compare`: bundles side by side on a page."""

import time
from pathlib import Path
from typing import Annotated

import typer

from . import options
from .terminal import Terminal


def compare(
    results: Annotated[list[Path], typer.Argument(help="verdict.json and bench.json files, or the folders with them.")],
    output: options.Page,
    force: options.ForcePage = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
    debug: options.Debug = False,
) -> None:
    """Compare bundles on one page: size, perplexity, KL, tokens a second and memory, joined by the bundle's hash."""
    terminal = Terminal(extra="check", as_json=as_json, quiet=quiet, verbose=verbose, debug=debug)
    with terminal.errors_shown():
        from ..errors import printable
        from ..files.drawing import check_drawable
        from ..files.single import check_writable, write_file

        started = time.perf_counter()
        check_drawable()
        check_writable(output, force=force, start=options.PAGE_START)
        from ..measuring.compare import compare_page

        write_file(output, printable(compare_page(results)).encode("utf-8"))
        terminal.report_written(output, time.perf_counter() - started, as_json)
