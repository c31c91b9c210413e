"""`arriero build`: a model folder to a bundle for one target."""

import time
from pathlib import Path
from typing import Annotated

import typer

from . import options
from .terminal import Terminal


def build(
    model: Annotated[Path, typer.Argument(help="Model folder, or group of ranks, that `arriero export` wrote.")],
    output: options.Output,
    target: options.Target = "cpu",
    max_batch: options.MaxBatch = None,
    max_seq: options.MaxSeq = None,
    max_prefill: options.MaxPrefill = None,
    max_tiles: options.MaxTiles = None,
    gqa: options.Gqa = None,
    weights: options.PlacedWeights = None,
    kv_cache: options.RoundedCache = None,
    workspace: options.Workspace = None,
    weight_streaming: options.WeightStreaming = False,
    copy_weights: options.CopyBundleWeights = False,
    record_token: options.RecordToken = None,
    timing_cache: options.TimingCache = None,
    weights_from: options.MovedModelWeights = None,
    force: options.Force = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
    debug: options.Debug = False,
) -> None:
    """Build a model for one target: the bundle folder. Sizes shape a TensorRT engine alone."""
    extra = "tensorrt" if target.startswith("tensorrt") else "export"
    terminal = Terminal(extra=extra, as_json=as_json, quiet=quiet, verbose=verbose, debug=debug)
    with terminal.errors_shown(), terminal.progress_shown("Building") as progress:
        from ..engine import Options, build_bundle

        started = time.perf_counter()
        shape = Options(
            max_batch=max_batch,
            max_seq=max_seq,
            max_prefill=max_prefill,
            max_tiles=max_tiles,
            gqa=gqa,  # type: ignore[arg-type]
            weights=weights,  # type: ignore[arg-type]
            workspace=None if workspace is None else workspace << 20,
            weight_streaming=weight_streaming,
            timing_cache=timing_cache,
            weights_from=weights_from,
        )
        bundle = build_bundle(
            model,
            output,
            target=target,
            options=shape,
            kv_cache=kv_cache,  # type: ignore[arg-type]
            copy_weights=copy_weights,
            finish=lambda folder: _record(folder, model, weights_from, record_token, terminal),
            force=force,
            progress=progress,
        )
    with terminal.errors_shown():
        terminal.report_written(bundle, time.perf_counter() - started, as_json)


def _record(bundle: Path, model: Path, weights: Path | None, asked: bool | None, terminal: Terminal) -> None:
    """Records a greedy token where it is asked for, or costs little."""
    from ..errors import ArrieroError
    from ..files.folders import read_spec
    from ..measuring.greedy import record_greedy

    if asked is False or (asked is None and read_spec(bundle).target != "cpu"):
        return
    try:
        found = record_greedy(bundle, model, weights)
    except ArrieroError as error:
        if asked:
            raise
        terminal.detail(f"No greedy token is recorded: {error}")
    else:
        terminal.detail(f"Recorded greedy token {found.token}, by {found.margin:.3g} nats")
