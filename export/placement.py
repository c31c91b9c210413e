"""Where a model's weights lie: in the checkpoint's shards, or rewritten in files beside the graph.

Enters: a checked checkpoint. Leaves: for each graph the weight files it reads and the region of each tensor. The
checkpoint is only read.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import ExportError
from ..files.output import copy_sparse
from ..files.safetensors import Region, Shard, identity, open_shard
from ..spec.stored_weights import WeightFile
from ..spec.types import FLOATS_BY_CODE, DType, Progress
from .checkpoint import Checkpoint
from .portions import convert_shard
from .prequantised.inventory import Prequantised
from .prequantised.restacked import GraphTensors, MadeTensor, write_made
from .single_experts import write_stacks


@dataclass(frozen=True, kw_only=True, slots=True)
class PlacedWeights:
    """The weights that one graph reads, and where they lie.

    Attributes:
        files: The weight files.
        regions: File name and region of each tensor, by checkpoint name.
    """

    files: list[WeightFile] = field(default_factory=list)
    regions: dict[str, tuple[str, Region]] = field(default_factory=dict)

    def add(self, shard: Shard, regions: dict[str, Region], fingerprint: str, *, inside: bool) -> None:
        """Takes tensors in one file, which lies in the model folder (`inside`) or where it was.

        Raises:
            ExportError: Another file has its name.
        """
        name, path = shard.path.name, "" if inside else str(shard.path)
        if any(file.name == name for file in self.files):
            raise ExportError(f"{shard.path}: a file of this name is written by the export: rename the shard")
        self.files.append(WeightFile(name=name, path=path, size=shard.size, identity=fingerprint))
        self.regions.update({tensor: (name, region) for tensor, region in regions.items()})


def place_whole(
    checkpoint: Checkpoint, folder: Path, dtype: DType, copy_weights: bool, progress: Progress
) -> PlacedWeights:
    """Leaves, copies or converts each shard's tensors, for a graph that reads all of them; writes experts' stacks.

    Args:
        checkpoint: Where the weights are.
        folder: The model folder, for what is copied, converted or stacked.
        dtype: Type of the graph's weights; tensors of that type stay where they are.
        copy_weights: Whether every file is to lie in the folder.
        progress: Called for each shard that is written.

    Raises:
        ExportError: A value does not fit the type, or a shard changed meanwhile.
    """
    placement = PlacedWeights()
    for index, shard in enumerate(checkpoint.shards):
        regions = checkpoint.regions(shard)
        others = {name for name, region in regions.items() if FLOATS_BY_CODE[region.dtype] != dtype}
        stay = {name: region for name, region in regions.items() if name not in others}
        if not regions:
            continue  # single experts alone
        if copy_weights or others:
            progress("weights", index, len(checkpoint.shards))
        if copy_weights and not others:
            path = folder / shard.path.name
            copy_sparse(shard.path, path)
            if identity(path) != identity(shard.path):
                raise ExportError(f"{shard.path}: its copy differs, the file changed meanwhile: export again")
            placement.add(open_shard(path), regions, identity(path), inside=True)
            continue
        if others:
            rewritten = set(regions) if copy_weights else others
            path = folder / (shard.path.name if rewritten == set(regions) else f"converted-{shard.path.name}")
            convert_shard(shard, path, rewritten, dtype)
            written = open_shard(path)
            placement.add(written, written.tensors, identity(path), inside=True)
            stay = {} if copy_weights else stay
        if stay:
            placement.add(shard, stay, identity(shard.path), inside=False)
    for path in write_stacks(checkpoint.stacks, folder, dtype, progress):
        written = open_shard(path)
        placement.add(written, written.tensors, identity(path), inside=True)
    return placement


def place_quantised(
    checkpoint: Checkpoint, quantised: Prequantised, folder: Path, copy_weights: bool, progress: Progress
) -> PlacedWeights:
    """Leaves what lies as the graph reads it, and writes the rest: a file a layer, and one of what is in no layer.

    Args:
        checkpoint: Where the weights are.
        quantised: The roles of its tensors.
        folder: The model folder.
        copy_weights: Whether every tensor is to lie in the folder.
        progress: Called for each file that is written.

    Raises:
        ExportError: A shard changed meanwhile.
    """
    tensors = GraphTensors()
    for name, plain in quantised.plain.items():
        tensors.add_converted(name, plain, checkpoint.spec.dtype)
    tensors.in_place.update(quantised.tensors.in_place)
    tensors.made.update(quantised.tensors.made)
    if copy_weights:
        tensors = tensors.copied()
    fingerprints = {shard.path: identity(shard.path) for shard in checkpoint.shards}
    placement = PlacedWeights()
    files: dict[str, dict[str, MadeTensor]] = {}
    for name, made in tensors.made.items():
        layer = re.search(r"layers\.(\d+)\.", name)
        files.setdefault(f"quantised-{int(layer[1]):05}" if layer else "quantised-rest", {})[name] = made
    for index, (file, part) in enumerate(files.items()):
        progress("weights", index, len(files))
        path = folder / f"{file}.safetensors"
        write_made(path, part)
        written = open_shard(path)
        placement.add(written, written.tensors, identity(path), inside=True)
    for path, fingerprint in fingerprints.items():
        if identity(path) != fingerprint:
            raise ExportError(f"{path}: changed while it was read: export again")
    in_place: dict[Path, dict[str, Region]] = {}
    for name, tensor in tensors.in_place.items():
        in_place.setdefault(tensor.shard.path, {})[name] = tensor.region
    for shard in checkpoint.shards:
        if shard.path in in_place:
            placement.add(shard, in_place[shard.path], fingerprints[shard.path], inside=False)
    return placement
