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
        is_whole = "ranks" not in found
        if is_whole and "memory" not in found and (max_seq is not None or batch != 1):
            terminal.say(f"No memory is estimated: {folder} is no bundle for a CPU.")
        if is_whole and layers and "every_layer" not in found:
            terminal.say(f"No fused layers are listed: {folder} holds no engine.")
        if as_json:
            show_json(found)
        else:
            show_contents(found)
