"""A folder as a running session, whichever stage wrote it.

The rooms are imported when they are needed, so that importing `arriero` is instant.
"""

import dataclasses
import os
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import ArrieroWarning, FolderError, SessionError
from .files.agreement import check_decoder, check_draft, check_tower
from .files.draft_tokens import read_tokens
from .files.folders import check_no_rank, find_files, rank_folder, read_spec
from .files.reading import read_bytes
from .files.trust import check_trusted
from .files.unheeded import unheeded
from .spec.built_engine import EngineSpec
from .spec.folder import DraftPart, FolderSpec, VisionPart
from .spec.stored_weights import Pages, Weight

if TYPE_CHECKING:
    from .runtime.backends.interface import DecoderBackend, TowerBackend
    from .runtime.draft import Draft
    from .runtime.images.tower import Tower
    from .runtime.ranks.group_decoder import GroupDecoder
    from .runtime.ranks.meeting import Meeting
    from .runtime.session import Session

LARGEST_GRAPH = 1 << 30
"""Bytes of a graph's file at most; protocol buffers end at twice this."""

CpuGraph = tuple[bytes, tuple[Weight, ...], dict[str, str]]
"""A serialized graph for the CPU, the weights that it is given, and its session's flags."""

PATIENCE = 120.0
"""Seconds that the ranks of a group wait for one that is alive and does not answer."""


def load(
    folder: str | Path,
    *,
    max_seq: int | None = None,
    max_batch: int | None = None,
    threads: int | None = None,
    weights: str | Path | None = None,
    prefix_bytes: int = 0,
    trust: bool = False,
    patience: float = PATIENCE,
    pages: Pages = "auto",
) -> "Session":
    """Loads a model or bundle folder. A model is lowered for the CPU in memory first, which needs onnx.

    Of a group of ranks this process becomes the first, and starts one for each of the others.

    Args:
        folder: A model, a bundle or a group, as `arriero export`, `calibrate` or `build` writes it.
        max_seq: Positions that a sequence may hold; None takes the model's context, at most 16,384, or an engine's own
            limit.
        max_batch: Rows at once at most; None is no limit, or an engine's own.
        threads: Threads of one operator on the CPU, of all ranks of a group together; None takes the processors that
            this process may use.
        weights: Folder of the weight files, where they have moved.
        prefix_bytes: Keys and values of earlier prompts that are kept at most for those that begin alike; 0 keeps none.
        trust: Whether an engine that this user has not built here is trusted, now and from now on: it is code.
        patience: Seconds that the ranks of a group wait for one that is alive and does not answer.
        pages: Weights that are copied into huge pages once the first token is there, as `Pages` says.

    Raises:
        ArrieroError: The folder is damaged or incomplete, its weights are missing, its engine is not trusted, a setting
            is out of range, or the session would take more memory than there is.

    Warns:
        ArrieroWarning: A file asks for something that is not done, as beams.
    """
    from .runtime.defaults import read_defaults
    from .runtime.session import Session
    from .runtime.state import Limits
    from .runtime.text import Text

    path, moved = Path(folder), None if weights is None else Path(weights)
    spec = read_spec(path)
    check_no_rank(path, spec)
    max_seq, max_batch, threads = _check_counts(max_seq, max_batch, threads, prefix_bytes)
    first, own = _check_ranks(path, spec, trust, pages)
    if own.engine is not None:
        max_seq, max_batch = _engine_limits(own.engine, max_seq, max_batch)
    limits = Limits.of(spec.model, max_seq, max_batch)
    text, defaults = Text(path), read_defaults(path, spec.model.vocab_size)  # small: checked before weights are loaded
    for line in unheeded(path):
        warnings.warn(line, ArrieroWarning, stacklevel=2)
    files, longest = find_files(first, own.weight_files, moved), limits.max_seq
    among, alone = (own, threads, moved, patience, longest), (files, threads, longest, None, pages)
    decoder = _open_group(path, spec, *among) if spec.kind == "group" else _open_decoder(path, spec, *alone)
    tower = None if own.vision is None else open_tower(first, own, own.vision, files, threads)
    draft = None if own.draft is None else open_draft(first, own, own.draft, files, threads)
    if text.tokenizer is not None and text.templates:
        text.prepare_chat()
    return Session(decoder, text, defaults, limits, tower, prefix_bytes, draft)


def _check_counts(
    max_seq: int | None, max_batch: int | None, threads: int | None, prefix_bytes: int
) -> tuple[int | None, int | None, int | None]:
    """Refuses numbers that are none, more threads than make sense, and more known beginnings than there is memory."""
    from .runtime.checks import whole
    from .runtime.room import check_fits, check_threads

    prefix_bytes = whole("prefix_bytes", prefix_bytes)
    counts = (("max_seq", max_seq), ("max_batch", max_batch), ("threads", threads))  # bounded below
    expected = "a whole number from 1 up"
    checked = [None if n is None else whole(name, n, expected, least=-sys.maxsize) for name, n in counts]
    check_threads(checked[2])
    check_fits(f"a prefix_bytes of {prefix_bytes}", prefix_bytes, "give less")
    return checked[0], checked[1], checked[2]


def _check_ranks(path: Path, spec: FolderSpec, trust: bool, pages: Pages) -> tuple[Path, FolderSpec]:
    """Refuses engines that are not trusted. Returns the folder that this process opens, and its spec."""
    if pages != "auto" and (spec.kind == "group" or spec.engine is not None):
        raise SessionError(f"pages are chosen for one process on a CPU, {path} is for others: leave them out")
    if spec.kind != "group":
        check_trusted(path, spec, trust=trust)
        return path, spec
    ranks = [rank_folder(path, spec, rank) for rank in range(spec.ranks)]
    for rank in ranks:
        check_trusted(*rank, trust=trust)
    return ranks[0]


def _open_group(
    path: Path,
    spec: FolderSpec,
    own: FolderSpec,
    threads: int | None,
    weights: str | Path | None,
    patience: float,
    max_seq: int,
) -> "GroupDecoder":
    """Opens a group's decoder: rank 0 here, the others in processes of their own."""
    from .files.processors import processors, share_processors
    from .runtime.ranks.followers import Followers
    from .runtime.ranks.group_decoder import GroupDecoder
    from .runtime.ranks.meeting import Meeting
    from .runtime.ranks.nccl import Nccl
    from .runtime.ranks.segment import SPINS, Segment

    if threads is not None and threads < spec.ranks:
        raise SessionError(f"threads is {threads} for a group of {spec.ranks} ranks: give {spec.ranks} or more")
    total = max(threads or processors(), spec.ranks)
    cores = share_processors(spec.ranks)
    spins = SPINS if total <= processors() else 0  # who shares a processor gives it up
    segment = Segment.create(spec.ranks, patience, spins=spins)
    segment.join(0)
    identifier = b"" if own.engine is None else Nccl().unique_id()
    meeting = Meeting(segment=segment, rank=0, ranks=spec.ranks, identifier=identifier)
    counts = [total * (rank + 1) // spec.ranks - total * rank // spec.ranks for rank in range(spec.ranks)]
    settings = [
        {
            "group": str(path.absolute()),
            "rank": rank,
            "segment": segment.descriptor,
            "identifier": identifier.hex(),
            "threads": counts[rank],
            "cores": None if cores is None else cores[rank],
            "weights": None if weights is None else str(Path(weights).absolute()),
            "max_seq": max_seq,
        }
        for rank in range(1, spec.ranks)
    ]

    return GroupDecoder(
        path,
        spec.model,
        splits_caches=spec.parts > 1,
        cores=None if cores is None else cores[0],
        start=lambda: Followers(path, settings, [segment.descriptor], patience, meeting.lost, meeting.silent),
        open_local=lambda: _open_rank(path, spec, meeting, weights, counts[0], max_seq),
        meeting=meeting,
    )


def _open_rank(
    group: Path, spec: FolderSpec, meeting: "Meeting", weights: str | Path | None, threads: int, max_seq: int
) -> "DecoderBackend":
    """Opens the decoder of one rank, once its folder is proven to be of the group."""
    folder, own = rank_folder(group, spec, meeting.rank)
    files = find_files(folder, own.weight_files, None if weights is None else Path(weights))
    return _open_decoder(folder, own, files, threads, max_seq, meeting)


def follow(
    *,
    group: str,
    rank: int,
    segment: int,
    identifier: str,
    threads: int,
    cores: list[int] | None,
    weights: str | None,
    max_seq: int,
    channel: int,
    parent: int,
) -> None:
    """Follows the leader of a group as one of its ranks; the program of the processes that `load` starts.

    Args:
        group: The group's folder.
        rank: This one.
        segment: File descriptor of the memory that the ranks share.
        identifier: Identifier of the GPUs' communicator, in hexadecimal; empty on the CPU.
        threads: Threads of one operator.
        cores: Processors that it is pinned to; None pins it nowhere.
        weights: Folder of the weight files, where they have moved.
        max_seq: Positions that a sequence may hold.
        channel: File descriptor of the connection to the leader.
        parent: The leader's process.
    """
    from multiprocessing.connection import Connection

    from .runtime.ranks.follower import bind_to_leader, follow_leader
    from .runtime.ranks.meeting import Meeting
    from .runtime.ranks.segment import Segment

    bind_to_leader(parent)
    if cores is not None:
        os.sched_setaffinity(0, cores)
    path, shared = Path(group), Segment(segment)
    shared.join(rank)
    spec = read_spec(path)
    meeting = Meeting(segment=shared, rank=rank, ranks=spec.ranks, identifier=bytes.fromhex(identifier))
    follow_leader(Connection(channel), lambda: _open_rank(path, spec, meeting, weights, threads, max_seq), meeting)


def _engine_limits(engine: EngineSpec, max_seq: int | None, max_batch: int | None) -> tuple[int, int]:
    """Checks the limits asked for against those that an engine was built with; None takes these."""
    built = {"max_seq": engine.max_seq, "max_batch": min(profile.max_batch for profile in engine.profiles)}
    for name, asked in (("max_seq", max_seq), ("max_batch", max_batch)):
        if asked is not None and asked > built[name]:
            raise SessionError(f"{name} is {asked}, the engine was built for {built[name]}: build it for more")
    return max_seq or built["max_seq"], max_batch or built["max_batch"]


def _open_decoder(
    path: Path,
    spec: FolderSpec,
    files: dict[str, Path],
    threads: int | None,
    max_seq: int,
    meeting: "Meeting | None" = None,
    pages: Pages = "auto",
) -> "DecoderBackend":
    """Opens a folder's decoder on the back end that it was built for, its weights loaded."""
    if spec.engine is not None:
        from .runtime.backends.tensorrt_decoder import load_decoder

        return load_decoder(path, spec, files, None if meeting is None else meeting.join)
    from .runtime.backends.mapped_weights import map_weights
    from .runtime.backends.onnxruntime_decoder import OnnxRuntimeDecoder
    from .runtime.backends.pages import check_pages
    from .runtime.memory import session_memory
    from .runtime.room import check_fits

    graph, weights, flags = cpu_decoder_graph(path, spec)
    alone = dataclasses.replace(spec, model=spec.rank_model, weights=weights, vision=None, draft=None)
    memory = session_memory(alone, len(graph), 0, max_seq, 1)
    what = f"{path} with one sequence of {max_seq} tokens"
    check_fits(what, memory.total - memory.mapped - memory.process, "load it with a smaller max_seq (--max-seq)")
    shared = None if meeting is None else meeting.segment.bytes
    check_pages(weights, pages)
    mapped = map_weights(weights, files, of_rank=spec.ranks > 1, pages=pages)
    return OnnxRuntimeDecoder(graph, mapped, path, spec.rank_model, flags, threads, group=shared)


def open_tower(path: Path, spec: FolderSpec, part: VisionPart, files: dict[str, Path], threads: int | None) -> "Tower":
    """Opens a multimodal folder's vision tower; its back end is loaded with the first image.

    Args:
        path: The folder.
        spec: Its spec.
        part: The spec's part that is the tower's.
        files: The paths of its weight files, by name.
        threads: Threads of one operator on the CPU; None takes the processors that this process may use.
    """
    from .runtime.backends.mapped_weights import map_weights
    from .runtime.backends.onnxruntime_tower import OnnxRuntimeTower
    from .runtime.images.tower import Tower

    def open_backend() -> "TowerBackend":
        if part.engine is not None:
            from .runtime.backends.tensorrt_tower import load_tower

            return load_tower(path, spec, files)
        graph, weights, flags = cpu_tower_graph(path, spec, part)
        return OnnxRuntimeTower(graph, map_weights(weights, files), path, flags, threads)

    return Tower(part.spec, open_backend)


def open_draft(path: Path, spec: FolderSpec, part: DraftPart, files: dict[str, Path], threads: int | None) -> "Draft":
    """Opens a folder's draft, its weights mapped; the arguments are those of `open_tower`."""
    import numpy as np

    from .runtime.backends.mapped_weights import map_weights
    from .runtime.backends.onnxruntime_draft import OnnxRuntimeDraft
    from .runtime.draft import Draft

    graph, weights, flags = cpu_draft_graph(path, spec, part)
    count, vocabulary = part.spec.vocab_size, spec.model.vocab_size
    tokens = None if count == vocabulary else np.array(read_tokens(path, count, vocabulary), np.int64)
    mapped = map_weights(weights, files)
    return Draft(backend=OnnxRuntimeDraft(graph, mapped, path, part.spec, spec.model, flags, threads), tokens=tokens)


def cpu_decoder_graph(path: Path, spec: FolderSpec) -> CpuGraph:
    """Reads the decoder's graph for the CPU from a bundle, or lowers a model's."""
    found = _cpu_graph(path, spec, spec)
    check_decoder(found[0], found[1], spec, path / spec.graph)
    return found


def cpu_tower_graph(path: Path, spec: FolderSpec, part: VisionPart) -> CpuGraph:
    """Reads the vision tower's graph for the CPU from a bundle, or lowers a model's."""
    found = _cpu_graph(path, spec, part)
    check_tower(found[0], found[1], spec, path / part.graph)
    return found


def cpu_draft_graph(path: Path, spec: FolderSpec, part: DraftPart) -> CpuGraph:
    """Reads the draft's graph for the CPU from a bundle, or lowers a model's."""
    found = _cpu_graph(path, spec, part)
    check_draft(found[0], found[1], part, spec.model, path / part.graph)
    return found


def _cpu_graph(path: Path, spec: FolderSpec, part: FolderSpec | VisionPart | DraftPart) -> CpuGraph:
    """A part's graph as a bundle holds it, or lowered."""
    if spec.kind == "bundle":
        return _read_graph(path / part.graph), part.weights, part.session
    from .engine.cpu_lowering import lower_for_cpu, lower_part_for_cpu

    lowered = lower_for_cpu(path, part) if isinstance(part, FolderSpec) else lower_part_for_cpu(path, part)
    return lowered.graph, lowered.weights, lowered.session


def _read_graph(path: Path) -> bytes:
    try:
        return read_bytes(path, remedy="build the bundle again", folder=path.parent, most=LARGEST_GRAPH)
    except FileNotFoundError as error:
        raise FolderError(f"{path}: {error.strerror}: build the bundle again") from error
