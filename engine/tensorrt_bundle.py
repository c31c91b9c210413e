"""A model built into a TensorRT bundle: its engines, the plugins' kernels, and their description for a session.

Enters: a model folder and a temporary folder to fill. Leaves there: `decoder.engine`, `kernels/*.cubin`, `layers.json`
and TensorRT's warnings in `layers.log`, and of a multimodal model the same of `vision.engine`. Invariant: engines,
kernels and their description come from one build.
"""

import contextlib
import dataclasses
import hashlib
import importlib
import json
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..errors import BuildError, SessionError
from ..files.folders import KERNELS, LAYERS, TOWER_LAYERS, find_files
from ..plugins.gqa.plugin import PLUGIN as GQA
from ..plugins.moe.plugin import PLUGIN as MOE
from ..plugins.shortlist import plan as shortlist
from ..plugins.tensorrt_plugin import register
from ..spec.built_engine import Binary, EngineSpec, Profile, TowerEngine
from ..spec.folder import FolderSpec, VisionPart
from ..spec.fused_layers import read_layers
from ..spec.types import Progress
from .builder import Built, build_engine
from .model_agreement import check_model
from .profiles import Shapes, decoder_profiles, decoder_shapes, tower_shapes
from .target import Target, check_dtypes
from .tensorrt_library import cuda_version, open_library
from .tensorrt_lowering import Choices, Network, Placement, lower_for_tensorrt, lower_tower_for_tensorrt

ENGINE, TOWER_ENGINE = "decoder.engine", "vision.engine"
DEFAULT_MAX_SEQ = 16384
DEFAULT_MAX_BATCH = 8
DEFAULT_MAX_PREFILL = 2048
DEFAULT_MAX_TILES = 17
"""An image's tiles at most: sixteen, and the whole image once more."""

OPS = (GQA, MOE)


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """Sizes and choices of an engine; None takes the default.

    Attributes:
        max_batch: Rows at once at most (8).
        max_seq: Positions that a sequence may hold (the model's context, at most 16,384).
        max_prefill: Tokens of a row's piece at most (2,048); never more than a chunk.
        max_tiles: Tiles of images that the vision tower takes at once at most (17); more go in several runs.
        gqa: `plugin` or `native` (the plugin, where its kernels take the model's type).
        weights: `inside`, `experts` or `outside` of the engine (experts); the vision tower's are inside but for
            `outside`.
        workspace: Bytes of scratch memory that layers may use (no limit).
        weight_streaming: Whether the decoder's weights may stay in the host's memory (no).
        timing_cache: File of the timing cache, for `tensorrt` only.
        weights_from: Folder of the model's weight files, where they have moved.
    """

    max_batch: int | None = None
    max_seq: int | None = None
    max_prefill: int | None = None
    max_tiles: int | None = None
    gqa: Literal["plugin", "native"] | None = None
    weights: Placement | None = None
    workspace: int | None = None
    weight_streaming: bool = False
    timing_cache: Path | None = None
    weights_from: Path | None = None

    def __post_init__(self) -> None:
        for name in ("max_batch", "max_seq", "max_prefill", "max_tiles", "workspace"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise BuildError(f"{name} is {value}, expected a whole number from 1 up")
        for name, known in (("gqa", ("plugin", "native")), ("weights", ("inside", "experts", "outside"))):
            value = getattr(self, name)
            if value is not None and value not in known:
                elsewhere = "; a folder of weight files goes with --weights-from" if name == "weights" else ""
                raise BuildError(f"{name} is {value!r}, expected one of {', '.join(known)}{elsewhere}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """A build before it starts: its inputs, lowered and checked.

    Attributes:
        trt: The module `tensorrt_rtx` or `tensorrt`, fit for plugins.
        target: The target, with its GPUs.
        spec: The model's spec.
        network: The lowered decoder.
        tower: The lowered vision tower; None where there is none.
        placement: Where the weights are.
        profiles: The decoder's profiles, in the order that a session numbers them.
        max_seq: Positions that a sequence may hold.
        max_tiles: Tiles that the vision tower takes at once.
        creators: The plugins' creators, registered.
        files: The weight files, by the names that the graph knows.
    """

    trt: Any
    target: Target
    spec: FolderSpec
    network: Network
    tower: Network | None
    placement: Placement
    profiles: tuple[Profile, ...]
    max_seq: int
    max_tiles: int
    creators: dict[str, Any]
    files: dict[str, Path]

    @property
    def shapes(self) -> list[Shapes]:
        """The decoder's inputs in each of its profiles."""
        return [decoder_shapes(self.spec, profile, self.network.caches) for profile in self.profiles]

    @contextlib.contextmanager
    def weights(self) -> Iterator[Path]:
        """Yields a folder of links to the weight files: TensorRT reads one folder."""
        with tempfile.TemporaryDirectory(prefix="arriero-weights-") as folder:
            for name, path in self.files.items():
                (Path(folder) / name).symlink_to(path.absolute())
            yield Path(folder)


def prepare(source: Path, spec: FolderSpec, target: Target, options: Options) -> Prepared:
    """Lowers a model for a target and registers the plugins.

    Raises:
        BuildError: The target cannot run the model.
        FolderError: A weight file is missing or has changed, or a graph computes something else than the spec says.
    """
    trt = open_library(target.flavour)
    target = _resolved(trt, target)
    max_seq = _max_seq(spec, options)
    placement: Placement = options.weights or "experts"
    files = find_files(source, spec.weight_files, options.weights_from, option="--weights-from")
    network = lower_for_tensorrt(source, spec, Choices(gqa=options.gqa, placement=placement, max_seq=max_seq), files)
    tower = None
    if spec.vision is not None and spec.vision.graph:
        tower = lower_tower_for_tensorrt(source, spec, spec.vision, placement)
    files = find_files(source, spec.weight_files, options.weights_from, option="--weights-from")
    check_model(source, spec, files)
    check_dtypes(target, network.dtypes | (tower.dtypes if tower else frozenset()))
    creators = register(trt, OPS)
    for creator in creators.values():
        creator.capabilities, creator.needed = target.capabilities, {}
        creator.kernels = creator.failure = None
    return Prepared(
        trt=trt,
        target=target,
        spec=spec,
        network=network,
        tower=tower,
        placement=placement,
        profiles=decoder_profiles(
            network.caches, options.max_batch or DEFAULT_MAX_BATCH, options.max_prefill or DEFAULT_MAX_PREFILL
        ),
        max_seq=max_seq,
        max_tiles=options.max_tiles or DEFAULT_MAX_TILES,
        creators=creators,
        files=files,
    )


def build_tensorrt(
    source: Path, spec: FolderSpec, target: Target, options: Options, folder: Path, progress: Progress
) -> FolderSpec:
    """Builds a model's engines with all that belongs to them into `folder`.

    Returns:
        The model's spec with the engines' descriptions, and the weights that a session binds to them.

    Raises:
        BuildError: The target cannot run the model, or TensorRT refuses it.
        FolderError: A weight file is missing or has changed.
    """
    prepared = prepare(source, spec, target, options)
    network, target = prepared.network, prepared.target
    built = _build(prepared, network, prepared.shapes, options, folder / ENGINE, folder / LAYERS, progress)
    engine = EngineSpec(
        file=ENGINE,
        flavour=target.flavour,  # type: ignore[arg-type]
        version=prepared.trt.__version__,
        cuda=cuda_version(target.flavour),
        capabilities=target.capabilities,
        sha256=_sha256(folder / ENGINE),
        max_seq=prepared.max_seq,
        profiles=tuple(
            dataclasses.replace(profile, activations=size)
            # 0 where the log does not say.
            for profile, size in zip(prepared.profiles, (*built.activations, 0, 0), strict=False)
        ),
        caches=network.caches,
        attention=_way(network, "GroupedQueryAttention"),
        experts=_way(network, "MoeDispatch"),
        placement=prepared.placement,
        weight_streaming=options.weight_streaming,
        weights=built.weights,
        kernels=tuple(_compile(prepared, folder / KERNELS, progress)),
    )
    vision = spec.vision
    if vision is not None and vision.graph:
        vision = _build_tower(prepared, vision, options, folder, progress)
    return dataclasses.replace(
        spec, target=str(target), graph="", weights=network.weights, engine=engine, vision=vision
    )


def _build_tower(
    prepared: Prepared, vision: VisionPart, options: Options, folder: Path, progress: Progress
) -> VisionPart:
    """Builds the vision tower's engine."""
    network = prepared.tower
    assert network is not None
    whole = dataclasses.replace(options, weight_streaming=False)  # it is small beside the decoder
    shapes = tower_shapes(vision.spec, prepared.max_tiles)
    file = folder / TOWER_ENGINE
    built = _build(prepared, network, [shapes], whole, file, folder / TOWER_LAYERS, progress)
    engine = TowerEngine(
        file=TOWER_ENGINE,
        sha256=_sha256(file),
        max_tiles=prepared.max_tiles,
        activations=max(built.activations, default=0),
        weights=built.weights,
    )
    return dataclasses.replace(vision, graph="", weights=network.weights, engine=engine)


def _build(
    prepared: Prepared,
    network: Network,
    profiles: Sequence[Shapes],
    options: Options,
    out: Path,
    layers: Path,
    progress: Progress,
) -> Built:
    """Builds an engine, and lists its fused layers in a file beside it."""
    with prepared.weights() as weights:
        built = build_engine(
            prepared.trt,
            network,
            weights,
            prepared.target,
            profiles,
            out,
            creators=prepared.creators.values(),
            workspace=options.workspace,
            weight_streaming=options.weight_streaming,
            timing_cache=_timing_cache(prepared.target, options),
            progress=progress,
        )
    described = [dataclasses.asdict(layer) for layer in read_layers(built.layers)]
    layers.write_text(json.dumps(described) + "\n", "utf-8")
    layers.with_suffix(".log").write_text("".join(f"{warning}\n" for warning in built.warnings), "utf-8")
    return built


def _resolved(trt: Any, target: Target) -> Target:
    """The target with the GPU at hand, where `tensorrt` is given none: it builds for no other."""
    if target.flavour != "tensorrt":
        return target
    from ..plugins.launch import Driver

    try:
        present = Driver().capability()
    except SessionError as error:
        raise BuildError(
            "tensorrt builds on the GPU that will run it: build there, or use tensorrt-rtx:smNN"
        ) from error
    if target.capabilities not in ((), (present,)):
        raise BuildError(f"tensorrt builds for the GPU at hand, sm{present}, not for {target}: give --target tensorrt")
    return dataclasses.replace(target, capabilities=(present,))


def _max_seq(spec: FolderSpec, options: Options) -> int:
    longest = spec.model.max_positions
    if options.max_seq is not None and options.max_seq > longest:
        raise BuildError(f"max_seq is {options.max_seq}, the model's context holds {longest}: give at most that")
    return options.max_seq or min(longest, DEFAULT_MAX_SEQ)


def _timing_cache(target: Target, options: Options) -> Path | None:
    if options.timing_cache is not None and target.flavour != "tensorrt":
        raise BuildError("TensorRT-RTX times nothing when it builds: leave --timing-cache out")
    return options.timing_cache


def _way(network: Network, op: str) -> str:
    """The way that an op's nodes were lowered; empty where the model has none."""
    return next((way for name, way in network.ways.items() if name.endswith(op)), "")


def _compile(prepared: Prepared, folder: Path, progress: Progress) -> Iterable[Binary]:
    """Compiles the kernels that the engine's plugins asked for, and those that shorten logits. Yields their records."""
    wanted = [
        (op.kernels, capability, kernel)
        for op in OPS
        for (_, capability), kernel in sorted(prepared.creators[op.name].needed.items(), key=lambda item: item[0])
    ]
    shorten = shortlist.Plan(prepared.spec.model.vocab_size).kernels
    wanted += [
        (shortlist.MODULE, capability, kernel) for capability in prepared.target.capabilities for kernel in shorten
    ]
    from ..plugins.triton_compiler import compile_kernel

    folder.mkdir()
    for index, (module, capability, kernel) in enumerate(wanted):
        progress("kernels", index, len(wanted))
        compiled = compile_kernel(importlib.import_module(module), kernel, capability)
        (folder / compiled.binary.file).write_bytes(compiled.cubin)
        yield compiled.binary
    progress("kernels", len(wanted), len(wanted))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
