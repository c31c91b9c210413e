"""`arriero inspect`: a folder's contents in numbers."""

from . import options
from .streams import show_json
from .terminal import Terminal


def inspect(
    folder: options.Folder,
    layers: options.Layers = False,
    max_seq: options.MemorySeq = None,
    batch: options.MemoryBatch = 1,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
    debug: options.Debug = False,
) -> None:
    """Show what a folder is: geometry, KV cache, the memory it will take, and an engine's profiles and fused layers."""
    terminal = Terminal(extra="export", as_json=as_json, quiet=quiet, verbose=verbose, debug=debug)
    with terminal.errors_shown():
        from ..files.folders import read_spec
        from ..measuring.summary import summarise
        from .tables import show_summary, size

        found = summarise(folder, every_layer=layers, max_seq=max_seq, batch=batch)
        for file in read_spec(folder).weight_files:
            terminal.detail(f"{file.path or folder / file.name} ({size(file.size)})")
        if as_json:
            show_json(found)
        else:
            show_summary(found)
