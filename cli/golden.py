"""`arriero golden`: a reference recorded in a file."""

import time
from pathlib import Path
from typing import Annotated

import typer

from . import options
from .terminal import Terminal


def golden(
    reference: Annotated[Path, typer.Argument(help="Checkpoint, model or bundle.")],
    data: options.GoldenData,
    output: options.GoldenFile,
    samples: options.Samples = 24,
    window: options.CheckedWindow = None,
    weights: options.Moved = None,
    threads: options.Threads = None,
    device: options.CheckpointDevice = "cpu",
    force: options.ForceGolden = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
    debug: options.Debug = False,
) -> None:
    """Record a reference once, so that checks against it need not run it again."""
    terminal = Terminal(extra="accuracy", as_json=as_json, quiet=quiet, verbose=verbose, debug=debug)
    with terminal.errors_shown(), terminal.progress_shown("Recording", "tokens") as progress:
        from ..accuracy import record_golden

        started = time.perf_counter()
        file = record_golden(
            reference,
            output,
            data=data,
            samples=samples,
            window=window,
            weights=weights,
            threads=threads,
            device=device,
            force=force,
            progress=progress,
        )
    with terminal.errors_shown():
        terminal.report_written(file, time.perf_counter() - started, as_json)
