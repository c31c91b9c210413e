"""A network built into a TensorRT engine, with no GPU at hand where the library can.

Enters: a lowered network. Leaves: the engine, written to its file as it comes out of the builder, and what the build
log says of its layers and its memory. Types are those of the graph, strongly; an error in the log is a failure.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import BuildError
from ..files.reading import read_bytes
from ..plugins.all_reduce.native import add_collectives
from ..spec.types import Progress
from .profiles import Shapes
from .target import Target
from .tensorrt_library import make_log
from .tensorrt_lowering import Network

COPIES = re.compile(r"alias.*cop(y|ie)|cop(y|ie).*alias", re.IGNORECASE)
"""Warnings that a tensor which is updated in place would be copied: the kernels would write the copy."""

LARGEST_TIMINGS = 1 << 30
"""Bytes of a timing cache at most."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Built:
    """Layers and sizes of an engine, from the log of its build.

    Attributes:
        layers: The build log's description of each fused layer, in order, one text a layer.
        warnings: The build log's warnings, each once.
        activations: Bytes of activations and scratch memory that each profile needs.
        weights: Bytes of the weights inside.
    """

    layers: tuple[str, ...]
    warnings: tuple[str, ...]
    activations: tuple[int, ...]
    weights: int


def build_engine(
    trt: Any,
    network: Network,
    weights: Path,
    target: Target,
    profiles: Sequence[Shapes],
    out: Path,
    *,
    creators: Iterable[Any] = (),
    workspace: int | None = None,
    weight_streaming: bool = False,
    timing_cache: Path | None = None,
    progress: Progress = lambda phase, done, total: None,
) -> Built:
    """Builds an engine and writes it to `out`.

    Args:
        trt: The module `tensorrt_rtx` or `tensorrt`.
        network: The lowered decoder or tower.
        weights: Folder that holds the weight files by the names that the graph knows.
        target: The GPUs to build for.
        profiles: Ranges of shapes, in the order that the session numbers them.
        out: The engine's file.
        creators: The plugins' creators, whose failures are the build's.
        workspace: Bytes of scratch memory that layers may use; None is no limit.
        weight_streaming: Whether weights may stay in the host's memory and be streamed to the GPU.
        timing_cache: File of the timing cache, read if it exists and written after; TensorRT only.
        progress: Called with each of the build's phases, the steps done and the steps in all.

    Raises:
        BuildError: The library refuses the network, or logs any error.
    """
    log = make_log(trt)
    builder = trt.Builder(log)
    log.check("to start")
    progress("parsing", 0, 1)
    definition, _ = define(trt, builder, network, weights, log)
    log.check("to read the graph")
    config = configure(trt, builder, target, profiles, workspace=workspace, weight_streaming=weight_streaming)
    timings = None if timing_cache is None else _read_timings(config, timing_cache)
    monitor = config.progress_monitor = _monitor(trt, progress)
    writer = _writer(trt, out)
    try:
        done = builder.build_serialized_network_to_stream(definition, config, writer)
    finally:
        writer.close()
    if monitor.interruption is not None:
        raise monitor.interruption
    if writer.failure is not None:
        raise BuildError(f"{out}: {writer.failure.strerror}: free some space") from writer.failure
    _check_build(log, creators, workspace, is_done=bool(done))
    if timings is not None and timing_cache is not None:
        timing_cache.write_bytes(timings.serialize())
    return _read_log(log)


def _read_log(log: Any) -> Built:
    """The record of a build, from its log."""
    sizes = _sizes(log.lines)
    return Built(
        layers=_layers(log.lines),
        warnings=tuple(dict.fromkeys(log.warnings)),
        activations=sizes["Activation"],
        weights=sum(sizes["Weights"]),
    )


def _check_build(log: Any, creators: Iterable[Any], workspace: int | None, *, is_done: bool) -> None:
    """Raises the first failure of a plugin, or of what the log holds, or that there is no engine."""
    for creator in creators:
        if creator.failure is not None:
            raise creator.failure
    if any("workspace limit" in error for error in log.errors) and workspace is not None:
        given = f"{workspace / 2**20:.1f} MB"
        raise BuildError(f"a layer needs more scratch memory than the {given} given: give a larger --workspace")
    log.check("to build the engine")
    if copies := [warning for warning in log.warnings if COPIES.search(warning)]:
        raise BuildError(f"TensorRT would copy caches that are updated in place: {copies[0]}")
    if not is_done:
        raise BuildError("TensorRT built nothing and did not say why: build with --debug")


def define(trt: Any, builder: Any, network: Network, weights: Path, log: Any) -> tuple[Any, Any]:
    """A network as TensorRT's definition of it, strongly typed. Returns it and its parser.

    Args:
        trt: The module `tensorrt_rtx` or `tensorrt`.
        builder: TensorRT's builder.
        network: The lowered graph.
        weights: Folder that holds the weight files by the names that the graph knows; read now.
        log: TensorRT's logger.

    Raises:
        BuildError: The parser refuses the graph.
    """
    definition = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(definition, log)
    # The parser takes the folder of external data from the path of a model that need not exist.
    parsed = parser.parse(network.graph, str(weights / "graph.onnx"))
    if not parsed:
        errors = [parser.get_error(index) for index in range(parser.num_errors)]
        named = [f"{error.node_name()}: {' '.join(error.desc().split())}" for error in errors]
        raise BuildError(f"TensorRT does not take the graph: {named[0] if named else 'no reason given'}")
    if network.sums:
        add_collectives(trt, definition, network.sums)
    return definition, parser


def configure(
    trt: Any,
    builder: Any,
    target: Target,
    profiles: Sequence[Shapes],
    *,
    workspace: int | None = None,
    weight_streaming: bool = False,
) -> Any:
    """TensorRT's configuration of a build: GPUs, ranges of shapes, memory, and caches updated in place."""
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if target.flavour == "tensorrt-rtx":
        config.num_compute_capabilities = len(target.capabilities)
        for index, capability in enumerate(target.capabilities):
            config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{capability}"), index)
    config.set_preview_feature(trt.PreviewFeature.ALIASED_PLUGIN_IO_10_03, True)
    for shapes in profiles:
        profile = builder.create_optimization_profile()
        for name, (smallest, usual, largest) in shapes.items():
            profile.set_shape(name, smallest, usual, largest)
        config.add_optimization_profile(profile)
    if workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace)
    if weight_streaming:
        config.set_flag(trt.BuilderFlag.WEIGHT_STREAMING)
    elif target.flavour == "tensorrt-rtx":  # a step can be captured into a graph; TensorRT needs no such flag
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
    return config


def _writer(trt: Any, path: Path) -> Any:
    """A stream that TensorRT writes the engine to; an error of the file system is kept for afterwards."""

    class Writer(trt.IStreamWriter):
        def __init__(self) -> None:
            trt.IStreamWriter.__init__(self)
            self.file = path.open("wb")
            self.failure: OSError | None = None

        def write(self, data: bytes, *_: Any) -> int:
            try:
                return self.file.write(data)
            except OSError as error:
                self.failure = error
                return 0

        def close(self) -> None:
            self.file.close()

    return Writer()


def _monitor(trt: Any, progress: Progress) -> Any:
    """Passes the builder's phases on. An interruption (Ctrl-C, say) ends the build, and is kept for afterwards."""

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.steps: dict[str, int] = {}
            self.interruption: BaseException | None = None

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.steps[phase_name] = num_steps
            self._report(phase_name, 0)

        def step_complete(self, phase_name: str, step: int) -> bool:
            self._report(phase_name, step + 1)
            return self.interruption is None

        def phase_finish(self, phase_name: str) -> None:
            self._report(phase_name, self.steps.get(phase_name, 1))

        def _report(self, phase: str, done: int) -> None:
            try:
                progress(phase, done, self.steps.get(phase, done))
            except BaseException as error:  # TensorRT would swallow it
                self.interruption = self.interruption or error

    return Monitor()


def _read_timings(config: Any, path: Path) -> Any:
    try:
        known = read_bytes(path, BuildError, "delete it", most=LARGEST_TIMINGS)
    except FileNotFoundError:
        known = b""
    cache = config.create_timing_cache(known)
    if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
        raise BuildError(f"{path} is no timing cache of this TensorRT and GPU: delete it")
    return cache


def _layers(lines: Sequence[str]) -> tuple[str, ...]:
    """The descriptions of fused layers, of all the log's tables."""
    text = "\n".join(line for line in lines if line.startswith(("Layers:", "Name: ")))
    return tuple(line for line in text.splitlines() if line.startswith("Name: "))


def _sizes(lines: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """The sizes that the log states: activations, a line a profile, and weights."""
    pattern = "Total {} Memory: (\\d+) bytes"
    return {
        kind: tuple(int(match[1]) for line in lines if (match := re.match(pattern.format(kind), line)))
        for kind in ("Activation", "Weights")
    }
