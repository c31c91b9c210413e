"""`arriero pack`: a bundle as one file, and back."""

import time
from pathlib import Path
from typing import Annotated

import typer

from . import options
from .terminal import Terminal


def pack(
    bundle: Annotated[Path, typer.Argument(help="Bundle folder, or group of bundles; with --unpack a packed one.")],
    output: options.PackedOutput,
    unpack: options.Unpack = False,
    weights: options.Moved = None,
    force: options.ForcePacked = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
    debug: options.Debug = False,
) -> None:
    """Pack a bundle with its weights into one file, with a hash of everything in it; or unpack such a file."""
    terminal = Terminal(as_json=as_json, quiet=quiet, verbose=verbose, debug=debug)
    with terminal.errors_shown(), terminal.progress_shown("Unpacking" if unpack else "Packing") as progress:
        from ..errors import FolderError
        from ..files.packing import pack_bundle, unpack_bundle

        started = time.perf_counter()
        if unpack:
            if weights is not None:
                raise FolderError("--weights is for packing, a packed bundle holds its weights: leave it out")
            written = unpack_bundle(bundle, output, force=force, progress=progress)
        else:
            written = pack_bundle(bundle, output, weights=weights, force=force, progress=progress)
    with terminal.errors_shown():
        terminal.report_written(written, time.perf_counter() - started, as_json)
