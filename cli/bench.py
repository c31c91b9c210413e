"""`arriero bench`: a folder timed."""

from . import options
from .streams import show_json
from .terminal import Terminal


def bench(
    folder: options.Folder,
    output: options.BenchOutput = None,
    prefill: options.Prefill = None,
    batch: options.Batches = None,
    decode_tokens: options.DecodeTokens = 32,
    runs: options.Runs = 3,
    threads: options.Threads = None,
    weights: options.Moved = None,
    force: options.ForceOutput = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
    debug: options.Debug = False,
) -> None:
    """Time a model: first token, prefill, decode, and the bandwidth beside what this machine's memory gives."""
    terminal = Terminal(extra="check", as_json=as_json, quiet=quiet, verbose=verbose, debug=debug)
    with terminal.errors_shown(), terminal.progress_shown("Timing") as progress:
        from ..measuring.bench import check_output, measure_folder, parse_sizes, write_measured

        if output is not None:
            check_output(output, force=force)
        found = measure_folder(
            folder,
            prefill=parse_sizes(prefill, "--prefill"),
            batch=parse_sizes(batch, "--batch"),
            decode_tokens=decode_tokens,
            runs=runs,
            threads=threads,
            weights=weights,
            progress=progress,
        )
        if output is not None:
            write_measured(found, output, force=force)
    with terminal.errors_shown():
        if as_json:
            show_json(found)
        else:
            from .tables import show_measured

            show_measured(found, output)
