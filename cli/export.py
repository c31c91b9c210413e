"""`arriero export`: a checkpoint to a model folder, or a model to a group of ranks."""

import time
from pathlib import Path
from typing import Annotated

import typer

from . import options
from .terminal import Terminal


def export(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            help="Hugging Face Llama 4 checkpoint, its name in the hub's local cache, or a model folder to be split."
        ),
    ],
    output: options.Output,
    dtype: options.ConvertedType = None,
    copy_weights: options.CopyWeights = False,
    tp: options.TensorParallel = 1,
    ep: options.ExpertParallel = None,
    weights: options.MovedSplit = None,
    tokenizer: options.Tokenizer = None,
    draft: options.Draft = None,
    force: options.Force = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
    debug: options.Debug = False,
) -> None:
    """Export a checkpoint to ONNX, or split a model over ranks. The weights stay where they are."""
    terminal = Terminal(extra="export", as_json=as_json, quiet=quiet, verbose=verbose, debug=debug)
    with terminal.errors_shown(), terminal.progress_shown("Exporting") as progress:
        from ..export import export_checkpoint

        started = time.perf_counter()
        model = export_checkpoint(
            checkpoint,
            output,
            dtype=dtype,  # type: ignore[arg-type]
            copy_weights=copy_weights,
            tp=tp,
            ep=ep,
            weights=weights,
            tokenizer=tokenizer,
            draft=draft,
            force=force,
            progress=progress,
            notice=terminal.say,
        )
    with terminal.errors_shown():
        terminal.report_written(model, time.perf_counter() - started, as_json)
