"""`arriero doctor`: whether a bundle can run on this machine, and what to do where it cannot."""

from pathlib import Path
from typing import Annotated

import typer

from . import options
from .streams import show_json
from .terminal import Terminal


def doctor(
    bundle: options.Examined = None,
    slots: options.ExaminedSlots = None,
    max_seq: options.MaxSeq = None,
    threads: options.Threads = None,
    weights: options.Moved = None,
    host: options.Host = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port that a server is to listen on.")] = 8000,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
    debug: options.Debug = False,
) -> None:
    """Look at this machine, and at a bundle on it: a line each, ok, or what was found and what to do; 2 if any was."""
    terminal = Terminal(extra="cpu", as_json=as_json, quiet=quiet, verbose=verbose, debug=debug)
    with terminal.errors_shown(), terminal.progress_shown("Looking") as progress:
        from ..files.circumstances import circumstances
        from ..measuring.doctor.examination import Plan, examine
        from .serve import at_least

        plan = Plan(
            slots=at_least("--slots", slots, 1), max_seq=max_seq, threads=threads, weights=weights, host=host, port=port
        )
        findings = examine(bundle, plan, progress=progress)
    is_ok = all(each.state != "found" for each in findings)
    if as_json:
        checks = [{"check": each.check, "state": each.state, "text": each.text} for each in findings]
        show_json(
            {"folder": None if bundle is None else str(Path(bundle)), "ok": is_ok, "checks": checks, **circumstances()}
        )
    else:
        width = max(len(each.check) for each in findings)
        for each in findings:
            print(f"{each.state:<11}  {each.check:<{width}}  {each.text}")
    if not is_ok:
        raise typer.Exit(2)
