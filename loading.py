"""A folder as a running session, whichever stage wrote it.

The rooms are imported when they are needed, so that importing `arriero` is instant.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from .errors import FolderError, SessionError
from .files.folders import check_whole, find_files, read_spec
from .spec.built_engine import EngineSpec
from .spec.folder import FolderSpec, VisionPart
from .spec.stored_weights import Weight

if TYPE_CHECKING:
    from .runtime.backends.interface import Decoding
    from .runtime.images.tower import Vision
    from .runtime.session import Session
    from .runtime.text import Text


def load(
    folder: str | Path,
    *,
    max_seq: int | None = None,
    max_batch: int | None = None,
    threads: int | None = None,
    weights: str | Path | None = None,
    prefix_bytes: int = 0,
) -> "Session":
    """Loads a model or bundle folder. A model is lowered for the CPU in memory first, which needs onnx.

    Args:
        folder: What `arriero export` or `arriero build` wrote.
        max_seq: Positions that a sequence may hold; None takes the model's context, at most 16,384, or what an engine
            was built for.
        max_batch: Rows at once at most; None is no limit, or what an engine was built for.
        threads: Threads of one operator on the CPU; None takes the processors that this process may use.
        weights: Folder of the weight files, where they have moved.
        prefix_bytes: Keys and values of earlier prompts that may be kept, so that a prompt that begins alike has only
            its rest computed; 0 keeps none.

    Raises:
        ArrieroError: The folder, its weights or a setting is not as it must be.
    """
    from .runtime.session import Session
    from .runtime.state import Limits
    from .runtime.text import Text, read_defaults

    path = Path(folder)
    spec = read_spec(path)
    check_whole(path, spec)
    if spec.engine is not None:
        max_seq, max_batch = _engine_limits(spec.engine, max_seq, max_batch)
    if prefix_bytes < 0:
        raise SessionError(f"prefix_bytes is {prefix_bytes}, expected a whole number from 0 up")
    limits = Limits.of(spec.model, max_seq, max_batch)
    text, defaults = Text(path), read_defaults(path)  # small, and checked before weights are loaded
    files = find_files(path, spec.weight_files, None if weights is None else Path(weights))
    decoder = _decoder(path, spec, files, threads)
    vision = None if spec.vision is None else open_vision(path, spec, spec.vision, text, files, threads)
    return Session(decoder, text, defaults, limits, vision, prefix_bytes)


def _engine_limits(engine: EngineSpec, max_seq: int | None, max_batch: int | None) -> tuple[int, int]:
    """The limits asked for, within those that an engine was built with."""
    built = {"max_seq": engine.max_seq, "max_batch": min(profile.max_batch for profile in engine.profiles)}
    for name, asked in (("max_seq", max_seq), ("max_batch", max_batch)):
        if asked is not None and asked > built[name]:
            raise SessionError(f"{name} is {asked}, the engine was built for {built[name]}: build it for more")
    return max_seq or built["max_seq"], max_batch or built["max_batch"]


def _decoder(path: Path, spec: FolderSpec, files: dict[str, Path], threads: int | None) -> "Decoding":
    """The graph on the engine it was built for, its weights loaded."""
    if spec.engine is not None:
        from .runtime.backends.tensorrt import load_engine

        return load_engine(path, spec, files)
    from .runtime.backends.mapped_weights import map_weights
    from .runtime.backends.onnxruntime import Decoder

    graph, regions, flags = cpu_graph(path, spec)
    return Decoder(graph, map_weights(regions, files), path, spec.model, flags, threads)


def open_vision(
    path: Path, spec: FolderSpec, part: VisionPart, text: "Text", files: dict[str, Path], threads: int | None
) -> "Vision":
    """What of a multimodal folder takes images; its tower is loaded when there is one."""
    from .runtime.backends.mapped_weights import map_weights
    from .runtime.images.tower import Encoding, Vision, VisionTower

    def open_tower() -> Encoding:
        if part.engine is not None:
            from .runtime.backends.tensorrt_tower import load_tower

            return load_tower(path, spec, files)
        graph, regions, flags = cpu_vision_graph(path, spec, part)
        return VisionTower(graph, map_weights(regions, files), path, flags, threads)

    return Vision(part.spec, text, open_tower)


def cpu_graph(path: Path, spec: FolderSpec) -> tuple[bytes, tuple[Weight, ...], dict[str, str]]:
    """The graph for the CPU of a model or of a bundle for it, the weights it is given, and its session's flags."""
    if spec.kind == "bundle":
        return _read_graph(path / spec.graph), spec.weights, spec.session
    from .engine.cpu_lowering import lower_for_cpu

    lowered = lower_for_cpu(path, spec)
    return lowered.graph, lowered.weights, lowered.session


def cpu_vision_graph(
    path: Path, spec: FolderSpec, vision: VisionPart
) -> tuple[bytes, tuple[Weight, ...], dict[str, str]]:
    """The same of the vision tower."""
    if spec.kind == "bundle":
        return _read_graph(path / vision.graph), vision.weights, vision.session
    from .engine.cpu_lowering import lower_tower_for_cpu

    lowered = lower_tower_for_cpu(path, vision)
    return lowered.graph, lowered.weights, lowered.session


def _read_graph(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise FolderError(f"{path}: {error.strerror}: build the bundle again") from error
