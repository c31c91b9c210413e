"""`arriero bench`: a folder timed, or a server under load."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import SessionError
from . import options
from .streams import read_option, show_json
from .terminal import Terminal

if TYPE_CHECKING:
    from ..spec.types import Progress


def bench(
    folder: options.MeasuredFolder = None,
    url: options.Url = None,
    model: options.ServedModel = None,
    endpoint: options.EndpointKind = "completions",
    api_key_file: options.KeyFile = None,
    output: options.BenchOutput = None,
    prefill: options.Prefill = None,
    shared: options.SharedTokens = 0,
    batch: options.Batches = None,
    decode_tokens: options.DecodeTokens = 32,
    runs: options.Runs = 3,
    threads: options.Threads = None,
    pages: options.Pages = "auto",
    weights: options.Moved = None,
    force: options.ForceOutput = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
    debug: options.Debug = False,
) -> None:
    """Time a model: first token, prefill, decode, bandwidth; or, with --url, a server with several clients at once."""
    terminal = Terminal(extra="check", as_json=as_json, quiet=quiet, verbose=verbose, debug=debug)
    asked: dict[str, Any] = {"decode_tokens": decode_tokens, "runs": runs}
    with terminal.errors_shown(), terminal.progress_shown("Timing") as progress:
        from ..measuring.bench import check_output, measure_folder, parse_sizes, write_measured

        if (folder is None) == (url is None):
            raise SessionError("give a FOLDER to time, or --url and the address of a server, one of the two")
        of_server = {"--model": model, "--endpoint": endpoint != "completions", "--api-key-file": api_key_file}
        of_folder = {"--threads": threads, "--pages": pages != "auto", "--weights": weights}
        check_given({**of_server, "--shared": shared} if url is None else of_folder, "a folder" if url is None else url)
        if output is not None:
            check_output(output, force=force)
        asked["prefill"], rows = parse_sizes(prefill, "--prefill"), parse_sizes(batch, "--batch")
        if folder is not None:
            asked |= {"threads": threads, "weights": weights, "pages": pages}
            found = measure_folder(folder, batch=rows, progress=progress, **asked)
        elif url is not None:
            asked |= {"clients": rows, "shared": shared}
            found = measure_server(url, endpoint, model, api_key_file, asked, progress)
        if output is not None:
            from ..measuring.load import draw_load

            write_measured(found, output, force=force, draw=None if url is None else draw_load)
    with terminal.errors_shown():
        if as_json:
            show_json(found)
        else:
            from .tables_of_speed import show_load, show_measured

            (show_measured if url is None else show_load)(found, output)


def check_given(others: dict[str, Any], measured: str) -> None:
    """Refuses options that say nothing of what is measured.

    Raises:
        SessionError: One is given.
    """
    if given := next((option for option, value in others.items() if value), None):
        kind = "a server, by --url" if measured == "a folder" else "a folder"
        raise SessionError(f"{given} is for {kind}, and {measured} is measured: leave it out")


def measure_server(
    url: str, kind: str, model: str | None, key: Path | None, asked: dict[str, Any], progress: "Progress"
) -> dict[str, Any]:
    """Measures a server; its key is the first line of a file."""
    from ..measuring.endpoint import Endpoint
    from ..measuring.load import measure_url

    lines = (read_option(key, "--api-key-file") or "").split()
    if key is not None and not lines:
        raise SessionError(f"--api-key-file {key} is empty: write the key into its first line")
    return measure_url(Endpoint(url, kind, model, lines[0] if lines else None), progress=progress, **asked)
