"""A lowered graph opened on ONNX Runtime, a decoder's or a vision tower's.

Enters: a serialized graph and its initializers. Leaves: an inference session on the CPU. Invariant: the initializers
are not copied; the session reads the memory that their values own.
"""

import contextlib
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from ...errors import SessionError, shortened_text
from ...files.folders import SPEC
from ...plugins.cpu.library import DOMAIN, REMEDY, library
from ..room import check_threads
from .onnxruntime_package import ort

PROVIDER = "CPUExecutionProvider"


@contextlib.contextmanager
def _placeholder() -> Iterator[str]:
    """Yields a folder that holds an empty file where the graph says that its initializers lie.

    ONNX Runtime wants a plain file there, though it never reads it: a model's folder may hold links into a hub's
    cache, or have a path that is no text.
    """
    with tempfile.TemporaryDirectory(prefix="arriero-") as folder:
        path = Path(folder).resolve()
        (path / SPEC).touch()
        yield str(path)


def open_graph(
    graph: bytes,
    weights: Mapping[str, ort.OrtValue],
    folder: Path,
    session: Mapping[str, str],
    threads: int | None = None,
    *,
    has_arena: bool = True,
    is_rank: bool = False,
) -> ort.InferenceSession:
    """Opens a lowered graph.

    Args:
        graph: Serialized ONNX.
        weights: Initializers by name.
        folder: The model's or bundle's folder.
        session: Session configuration entries that the graph needs.
        threads: Threads of one operator; None takes the processors that this process may use.
        has_arena: Whether ONNX Runtime keeps the memory of activations. It keeps a block of each shape that has come
            twice, which adds up where lengths and batches change; without it malloc takes back each step's memory.
        is_rank: Whether it is one of a group's, whose steps may fail for another rank's sake: the leader says so once,
            and ONNX Runtime not at all.

    Raises:
        SessionError: ONNX Runtime does not accept the graph, there are no threads, or the kernels that the graph
            needs were not compiled, or from other sources.
    """
    count = check_threads(threads)
    options = ort.SessionOptions()
    options.intra_op_num_threads = count
    options.inter_op_num_threads = 1
    options.log_severity_level = 4 if is_rank else 3
    options.enable_cpu_mem_arena = has_arena
    for name, value in session.items():
        options.add_session_config_entry(name, value)
    for name, weight in weights.items():
        options.add_initializer(name, weight)
    kernels = str(library()) if DOMAIN.encode() in graph else None
    try:
        if kernels is not None:
            options.register_custom_ops_library(kernels)
        with _placeholder() as place:
            options.add_session_config_entry("session.model_external_initializers_file_folder_path", place)
            return ort.InferenceSession(graph, options, providers=[PROVIDER])
    except Exception as error:  # ONNX Runtime raises its own kinds, none of them public
        said = shortened_text(str(error))
        if f"{DOMAIN}:" in said and "is not a registered" in said:
            raise SessionError(f"{folder}: the compiled kernels are of another version ({said}): {REMEDY}") from error
        raise SessionError(f"{folder}: ONNX Runtime refuses the graph ({said}): export the model again") from error
