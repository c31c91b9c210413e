"""`arriero check`: a candidate held against a reference."""

from pathlib import Path
from typing import Any

import typer

from . import options
from .streams import show_json
from .terminal import Terminal

EXIT_CODES = {"pass": 0, "regressed": 1, "undecided": 3}


def check(
    candidate: options.Candidate,
    against: options.Against,
    data: options.CheckedData = None,
    output: options.CheckOutput = None,
    locate: options.Locate = False,
    max_perplexity_ratio: options.MaxPerplexityRatio = None,
    max_kl: options.MaxKl = None,
    min_top1: options.MinTop1 = None,
    max_flips: options.MaxFlips = None,
    max_router_flips: options.MaxRouterFlips = None,
    min_greedy: options.MinGreedy = None,
    limits_file: options.LimitsFile = None,
    history: options.History = None,
    samples: options.CheckedSamples = None,
    window: options.CheckedWindow = None,
    weights: options.CandidateWeights = None,
    against_weights: options.ReferenceWeights = None,
    threads: options.Threads = None,
    device: options.CheckpointDevice = "cpu",
    force: options.ForceReport = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
    debug: options.Debug = False,
) -> None:
    """Hold a candidate against a reference: by how much accuracy moved, where, and whether that is allowed.

    Exits with 0 where all limits are kept, 1 where one is broken, 2 where it could not run, and 3 where there is not
    enough data to tell.
    """
    limits = {"perplexity_ratio": max_perplexity_ratio, "kl": max_kl, "top1": min_top1, "flips": max_flips}
    limits |= {"router_flips": max_router_flips, "greedy": min_greedy}
    terminal = Terminal(extra="accuracy", as_json=as_json, quiet=quiet, verbose=verbose, debug=debug)
    with terminal.errors_shown(), terminal.progress_shown("Checking", "tokens") as progress:
        from ..accuracy import check as hold

        check_outputs(output, history, force=force)
        verdict = hold(
            candidate,
            against,
            data=data,
            samples=samples,
            window=window,
            limits=limits,
            limits_file=limits_file,
            locate_fault=locate,
            weights=weights,
            reference_weights=against_weights,
            threads=threads,
            device=device,
            progress=progress,
        )
        write_outputs(verdict, output, history, force=force)
    with terminal.errors_shown():
        show(verdict.as_fields(), output, as_json)
    raise typer.Exit(EXIT_CODES[verdict.outcome])


def check_outputs(output: Path | None, history: Path | None, *, force: bool) -> None:
    """Refuses, before anything is computed, a report that cannot be written, and a history that cannot be read."""
    from ..files.drawing import check_drawable
    from ..files.output import check_free
    from ..pages.history import check_appendable, read_history

    if output is not None:
        check_drawable()
        check_free(output, force=force, mark="verdict.json")
    if history is not None:
        check_appendable(history)
        read_history(history, missing_ok=True)


def write_outputs(verdict: Any, output: Path | None, history: Path | None, *, force: bool) -> None:
    """Appends the run to the history, and writes the report with the trend of runs like it."""
    from ..pages.history import append_run, read_history

    runs = []
    if history is not None:
        append_run(history, verdict.as_fields())
        runs = read_history(history)
        runs = [run for run in runs if run.series == runs[-1].series]
    if output is not None:
        from ..accuracy.report import write_report

        write_report(verdict, output, force=force, history=runs)


def show(found: dict[str, Any], report: Path | None, as_json: bool) -> None:
    """Prints a verdict on stdout, as JSON or as a table."""
    if as_json:
        show_json(found)
    else:
        from .tables import show_verdict

        show_verdict(found, report)
