"""The part of a checkpoint's weights that an export writes anew: said before it is written.

Enters: a checked checkpoint and the type of the graph's weights. Leaves: a line for each reason why bytes are written,
and for a model that is split the experts' stacks as shards of their own.
"""

import contextlib
import dataclasses
import math
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from ..files.safetensors import open_shard
from ..spec.types import BITS, CODES, FLOATS_BY_CODE, DType, Progress
from .checkpoint import Checkpoint
from .prequantised.stored import CheckpointTensor
from .single_experts import write_stacks

SMALL = 1_000_000
"""Bytes up to which nothing is said of restacked quantised weights."""


def say_rewritten(checkpoint: Checkpoint, dtype: DType, notice: Callable[[str], None]) -> None:
    """Says what is written beside the graph, how much it is, and why.

    Args:
        checkpoint: The checkpoint.
        dtype: Type of the graph's weights.
        notice: Called with each line.
    """
    if checkpoint.quantised is not None:
        made = checkpoint.quantised.tensors.made.values()
        count = sum(math.prod(each.shape) * _bits(each.dtype) // 8 for each in made)
        if count > SMALL:
            notice(f"{_size(count)} of quantised weights and scales are written beside the graph, as it reads them.")
        return
    if checkpoint.stacks:
        count = sum(math.prod(stack.shape) for stack in checkpoint.stacks.values()) * BITS[dtype] // 8
        notice(f"The experts are stored one by one: {_size(count)} of them are written stacked, beside the graph.")
    found = Counter[str]()
    bits = 0
    for shard in checkpoint.shards:
        for region in checkpoint.regions(shard).values():
            if (stored := FLOATS_BY_CODE[region.dtype]) != dtype:
                found[stored] += 1
                bits += math.prod(region.shape) * BITS[dtype]
    if found:
        kinds = " and ".join(f"{count} in {stored}" for stored, count in found.items())
        notice(f"The graph is in {dtype}, {kinds} of the tensors are not: {_size(bits // 8)} are written converted.")


def say_missing(folder: Path, sees: bool, notice: Callable[[str], None]) -> None:
    """Says which of the small files that a model is used with are missing.

    Args:
        folder: The folder that they are taken from.
        sees: Whether the model takes images.
        notice: Called with each line.
    """
    give = "give with --tokenizer DIR a folder that has it, the model's base for one"
    if not (folder / "tokenizer.json").is_file():
        notice(f"{folder} has no tokenizer.json, so the model will take token ids and no text: {give}.")
    if sees and not any((folder / name).is_file() for name in ("processor_config.json", "preprocessor_config.json")):
        notice(f"{folder} has no preprocessor_config.json, so the model's vision tower gets no images: {give}.")


@contextlib.contextmanager
def scratch_folder(folder: Path) -> Iterator[Path]:
    """Yields a folder for files that go when the block ends."""
    scratch = folder / "scratch"
    scratch.mkdir()
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def with_stacks(checkpoint: Checkpoint, folder: Path, dtype: DType, progress: Progress) -> Checkpoint:
    """The checkpoint with its experts stacked in files of a folder, where they are stored one by one.

    Args:
        checkpoint: The checkpoint.
        folder: Folder that the files are written into.
        dtype: Type to write.
        progress: Called for each file.
    """
    if not checkpoint.stacks:
        return checkpoint
    single = {name for stack in checkpoint.stacks.values() for name in stack.names}
    tensors = {name: tensor for name, tensor in checkpoint.tensors.items() if name not in single}
    for path in write_stacks(checkpoint.stacks, folder, dtype, progress):
        shard = open_shard(path)
        tensors |= {name: CheckpointTensor(shard=shard, region=region) for name, region in shard.tensors.items()}
    return dataclasses.replace(checkpoint, tensors=tensors, stacks={})


def _bits(code: str) -> int:
    """Bits of an element, by safetensors' name of its type."""
    return {CODES[name]: BITS[name] for name in CODES if BITS[name] >= 8}[code]


def _size(count: int) -> str:
    """Bytes in words."""
    return f"{count / 1e9:.1f} GB" if count >= 50_000_000 else f"{count / 1e6:.1f} MB"
