"""`arriero calibrate`: a model folder to a quantised one."""

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from . import options
from .terminal import Terminal

PACKAGE = __name__.partition(".")[0]


def calibrate(
    model: options.ModelFolder,
    output: options.Output,
    recipe: Annotated[str, typer.Option(help="int8, fp8 or int4.")],
    data: options.CalibrationData,
    activations: options.Activations = None,
    clip: options.Clip = None,
    percentile: options.Percentile = None,
    smoothing: options.Smoothing = None,
    strength: options.Strength = None,
    rounding: options.Rounding = None,
    group_size: options.GroupSize = None,
    kv_cache: options.CalibratedCache = None,
    override: options.Override = None,
    samples: options.CalibrationSamples = None,
    window: options.CalibrationWindow = None,
    floor: options.Floor = 32,
    floor_action: options.FloorAction = "fail",
    all_experts: options.AllExperts = False,
    device: options.Device = "cpu",
    weights: options.Moved = None,
    force: options.Force = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.EachWeight = False,
    debug: options.Debug = False,
) -> None:
    """Quantise a model with statistics of text and images: another model folder. A killed run goes on where it was."""
    terminal = Terminal(extra="calibration", as_json=as_json, quiet=quiet, verbose=verbose, debug=debug)
    changes = {"activations": activations, "clip": clip, "percentile": percentile, "smoothing": smoothing}
    changes |= {"strength": strength, "rounding": rounding, "group_size": group_size, "kv_cache": kv_cache}
    with (
        terminal.errors_shown(),
        keeping_shown(output, terminal),
        terminal.progress_shown("Calibrating", "tokens") as progress,
    ):
        from ..calibration import calibrate_model
        from ..calibration.presets import check_applies, parse_recipe

        started = time.perf_counter()
        parsed = parse_recipe(recipe, changes, override or ())
        check_applies(parsed, changes)
        folder = calibrate_model(
            model,
            output,
            recipe=parsed,
            data=data,
            samples=samples,
            window=window,
            floor=floor,
            floor_action=floor_action,  # type: ignore[arg-type]
            all_experts=all_experts,
            device=device,
            weights=weights,
            force=force,
            progress=progress,
            notice=terminal.say,
        )
    with terminal.errors_shown():
        show_report(folder, terminal, time.perf_counter() - started, as_json=as_json, every_weight=verbose)


def show_report(folder: Path, terminal: Terminal, seconds: float, *, as_json: bool, every_weight: bool) -> None:
    """Sums up on stderr what was done, or prints it as JSON."""
    report = json.loads((folder / "report.json").read_text("utf-8"))
    records = [record for layer in report["layers"] + report["tower"] for record in layer["records"]]
    records += report["head"]
    if not (as_json or terminal.quiet):
        from .tables import show_quantised, show_sizes

        show_quantised(records, report["kept"], folder / "report.html", every_weight=every_weight)
        show_sizes(report)
    sizes = {name: report[name] for name in ("bytes_before", "bytes_after", "experts_balance", "unmeasured")}
    terminal.report_written(folder, seconds, as_json, report=str(folder / "report.html"), **sizes, weights=records)


@contextmanager
def keeping_shown(output: Path, terminal: Terminal) -> Iterator[None]:
    """Says what is kept, and where, when Ctrl-C or a signal ends the block."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        module = sys.modules.get(f"{PACKAGE}.calibration.reached")  # there where anything was begun
        if module is not None and (said := module.kept(output)):
            terminal.say(f"Interrupted: {said}.")
        raise
