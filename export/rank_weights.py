"""The ranks' portions of a model's weights: left in place where they are one run of bytes, else written.

Enters: where each tensor of the whole graph lies. Leaves: for each rank its weight files and the regions in them. A
file is read once for all ranks, a piece at a time.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import ml_dtypes  # noqa: F401 - makes its types known to numpy
import numpy as np

from ..errors import ExportError
from ..files.safetensors import Region, Shard, encode_header, identity, open_shard
from ..spec.types import FLOATS_BY_CODE, TYPES, DType, Progress
from .placement import PlacedWeights
from .portions import Array, write_portions
from .split import Portion, Split

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
SMALLEST_GROUP = 8
"""Divisor of the number of inputs that share a scale."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """A file of the whole model's weights.

    Attributes:
        path: Where it lies.
        stays: Whether ranks may read it there, since it outlives the export.
        fingerprint: Its identity.
        tensors: The regions in it, by the graph's name of a tensor.
        is_int4: Names of the tensors of 4-bit integers, which lie in bytes.
    """

    path: Path
    stays: bool
    fingerprint: str
    tensors: dict[str, Region] = field(default_factory=dict)
    is_int4: set[str] = field(default_factory=set)


@dataclass(frozen=True, kw_only=True, slots=True)
class Groups:
    """Scales of groups of inputs that a split cuts: each becomes `times` scales of smaller groups."""

    times: int


def place_ranks(
    sources: Sequence[Source],
    folders: Sequence[Path],
    split: Split,
    taken: Callable[[str, int], bool],
    dtype: DType,
    copy_weights: bool,
    progress: Progress,
) -> list[PlacedWeights]:
    """Finds each rank's portion of every tensor, and writes those that do not lie in one piece.

    Args:
        sources: The files of the whole model.
        folders: The ranks' folders.
        split: Layout over ranks.
        taken: Whether a rank reads the tensor of this name.
        dtype: Type of the graphs' floats; others of the weights are converted. Scales keep their type.
        copy_weights: Whether every portion is to lie in its rank's folder.
        progress: Called for each file.

    Raises:
        ExportError: The split cuts what cannot be cut, a value does not fit the type, or a file changed meanwhile.
    """
    regrouped = find_cut_groups(sources, split)
    placements = [PlacedWeights() for _ in folders]
    for index, source in enumerate(sources):
        progress("weights", index, len(sources))
        shard = Shard(source.path, source.path.stat().st_size, source.tensors, {})
        paths = [folder / f"rank-{rank}.{source.path.name}" for rank, folder in enumerate(folders)]
        written: dict[Path, dict[str, Portion]] = {}
        for rank, (path, placement) in enumerate(zip(paths, placements, strict=True)):
            in_place: dict[str, Region] = {}
            for name, stored in source.tensors.items():
                if name in regrouped or not taken(name, rank):
                    continue
                is_quantised = stored.dtype not in FLOATS_BY_CODE
                portion = split.portion(name, stored.shape, rank, is_quantised=is_quantised)
                is_moved = copy_weights or not source.stays or written_type(stored, dtype, name) != stored.dtype
                is_moved |= _is_tied_head(name, source.tensors)  # a file has one name for a tensor
                region = None if is_moved else portion.region(stored)
                if region is None:
                    written.setdefault(path, {})[name] = portion
                else:
                    in_place[name] = region
            if in_place:
                placement.add(shard, in_place, source.fingerprint, inside=False)
        if written:
            kinds = {name: written_type(stored, dtype, name) for name, stored in source.tensors.items()}
            write_portions(shard, written, kinds)
        for rank, (path, placement) in enumerate(zip(paths, placements, strict=True)):
            if path in written:
                part = open_shard(path)
                placement.add(part, part.tensors, identity(path), inside=True)
            scales = {name: regrouped[name] for name in source.tensors if name in regrouped and taken(name, rank)}
            if scales:
                part = _write_regrouped(source, scales, split, rank, path.with_name(f"{path.stem}.groups.safetensors"))
                placement.add(part, part.tensors, identity(part.path), inside=True)
        if identity(source.path) != source.fingerprint:
            raise ExportError(f"{source.path}: changed while it was read: export again")
    return placements


def _is_tied_head(name: str, tensors: Mapping[str, Region]) -> bool:
    """Whether this is the LM head that is the embedding."""
    embedding = tensors.get(name.removesuffix(HEAD) + EMBEDDING)
    return name.endswith(HEAD) and embedding is not None and embedding.offset == tensors[name].offset


def written_type(stored: Region, dtype: DType, name: str) -> str:
    """Safetensors' name of the type that a tensor has in the ranks' graphs."""
    if stored.dtype not in FLOATS_BY_CODE or name.endswith("_scale"):
        return stored.dtype
    return TYPES[dtype].safetensors


def find_cut_groups(sources: Sequence[Source], split: Split) -> dict[str, Groups]:
    """The scales whose groups of inputs a split cuts.

    Raises:
        ExportError: It cuts what lies in one byte, or leaves groups of fewer than eight inputs.
    """
    shapes = {name: region.shape for source in sources for name, region in source.tensors.items()}
    packed = {name for source in sources for name in source.is_int4}
    found: dict[str, Groups] = {}
    for name in packed:
        _check_bytes(name, shapes, split)
    for name, scale in shapes.items():
        weight = name.removesuffix("_scale")
        cuts = split.cuts(weight)
        if weight == name or cuts == 1 or len(scale) == 1 or scale[-1] == 1 or weight not in shapes:
            continue
        inputs = shapes[weight][-1] * (2 if weight in packed else 1)
        group, own = inputs // scale[-1], inputs // cuts
        if own % group:
            left = math.gcd(own, group)
            if left % SMALLEST_GROUP:
                raise ExportError(
                    f"{weight!r} has groups of {group} inputs, of which {cuts} ranks would leave {left}, fewer than "
                    f"{SMALLEST_GROUP}: {_instead(shapes, split.ranks)}"
                )
            found[name] = Groups(times=group // left)
    return found


def _check_bytes(name: str, shapes: Mapping[str, tuple[int, ...]], split: Split) -> None:
    """Refuses to cut a byte that holds two integers."""
    last, parts = shapes[name][-1], split.cuts(name)
    if last % parts:
        raise ExportError(
            f"{name!r} has two int4 values in a byte, and {parts} ranks would cut one of {last} bytes: "
            f"{_instead(shapes, split.ranks)}"
        )


def _instead(shapes: Mapping[str, tuple[int, ...]], ranks: int) -> str:
    """A split that works in its place: experts are whole, and floats are cut anywhere."""
    experts = [shape[0] for name, shape in shapes.items() if name.endswith(".experts.gate_up_proj")]
    if experts and not any(count % ranks for count in experts):
        return f"split the experts alone, with --tp 1 --ep {ranks}"
    return "split the model that it was quantised from"


def _write_regrouped(source: Source, scales: Mapping[str, Groups], split: Split, rank: int, path: Path) -> Shard:
    """Writes a rank's portions of scales, each repeated for the smaller groups."""
    arrays: dict[str, Array] = {}
    for name, groups in scales.items():
        region = source.tensors[name]
        kind = np.dtype(TYPES[FLOATS_BY_CODE[region.dtype]].numpy)
        with source.path.open("rb") as file:
            file.seek(region.offset)
            whole = np.fromfile(file, kind, region.size // kind.itemsize).reshape(region.shape)
        repeated = whole.repeat(groups.times, axis=-1)
        portion = split.portion(name, repeated.shape, rank)
        for axis, spans in enumerate(portion.spans):
            repeated = np.concatenate([repeated.take(range(*span), axis) for span in spans], axis)
        arrays[name] = np.ascontiguousarray(repeated)
    with path.open("xb") as file:
        file.write(encode_header({name: (source.tensors[name].dtype, array.shape) for name, array in arrays.items()}))
        for array in arrays.values():
            file.write(array.view(np.uint8).data)
    return open_shard(path)
