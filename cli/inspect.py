"""`arriero inspect`: a folder's contents in numbers."""

from . import options
from .streams import show_json
from .terminal import Terminal


def inspect(
    folder: options.Inspected,
    layers: options.Layers = False,
    max_seq: options.MemorySeq = None,
    batch: options.MemoryBatch = 1,
    weights: options.Moved = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
    debug: options.Debug = False,
) -> None:
    """Show what lies there: geometry, how it is quantised, memory, weight files; of an engine its fused layers."""
    terminal = Terminal(extra="export", as_json=as_json, quiet=quiet, verbose=verbose, debug=debug)
    with terminal.errors_shown():
        from ..files.folders import SPEC, read_spec
        from ..measuring.contents import describe, weight_files
        from .tables_of_contents import show_contents
        from .words import size

        found = describe(folder, every_layer=layers, max_seq=max_seq, batch=batch)
        if (folder / SPEC).exists():
            found["files"] = weight_files(folder, read_spec(folder), weights)
        for file in found.get("files", ()):
            terminal.detail(f"{file['path']} ({size(file['bytes'])}, {file['state']})")
        if as_json:
            show_json(found)
        else:
            show_contents(found)
