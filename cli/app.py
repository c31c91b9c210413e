"""The command line: one verb a stage, a thin skin over the Python interface.

Results go to stdout, progress and messages to stderr. Exit codes: 0 done, 1 regressed (`check` only), 2 could not, 3
not enough data to tell (`check` only), 130 interrupted.
"""

import sys
from typing import Annotated, Any

import typer

from .. import __version__
from .bench import bench
from .build import build
from .calibrate import calibrate
from .check import check
from .compare import compare
from .doctor import doctor
from .export import export
from .golden import golden
from .inspect import inspect
from .pack import pack
from .run import run
from .serve import serve
from .streams import end_of_output, open_streams, show_json
from .trend import trend

VERBS = (export, calibrate, build, pack, doctor, inspect, run, serve, bench, check, golden, trend, compare)
"""In the order of the help page."""

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Takes a Llama 4 checkpoint to the machines that serve it: export, calibrate, build, run, serve, check.",
)
for verb in VERBS:
    app.command()(verb)


def show_version(value: bool) -> None:
    """Prints the version and ends."""
    if value:
        print(f"arriero {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Options that stand before any verb; the help page's text is the application's."""


def main() -> None:
    """Runs the `arriero` command."""
    open_streams()
    try:
        if "--json" in sys.argv[1:]:
            _run_as_json()
        app(prog_name="arriero")  # with `python -m arriero` as well
    except SystemExit as end:
        code = end.code
        if (message := end_of_output()) is not None:
            print(f"arriero: {message}", file=sys.stderr)
            code = code or 2
        sys.exit(code)


def _run_as_json() -> None:
    """Runs the command so that a wrong option is JSON on stdout too, beside what typer shows of it on stderr."""
    try:
        sys.exit(app(prog_name="arriero", standalone_mode=False))
    except Exception as caught:  # typer's own, which it does not name in its interface
        error: Any = caught
        if not hasattr(error, "format_message"):
            raise
        show_json({"error": error.format_message(), "kind": "UsageError", "exit_code": 2})
        from typer import rich_utils

        rich_utils.rich_format_error(error)
        sys.exit(2)
