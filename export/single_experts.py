"""Experts that a checkpoint stores one by one and not quantised, as the stacks that the graph reads.

Enters: a checkpoint's tensors. Leaves: for each stack an `ExpertStack`, which is written without holding more than one
expert in memory. Some layers may be stacked already; one layer is one or the other.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import CheckpointError, ExportError
from ..files.safetensors import identity
from ..spec.geometry import ModelSpec
from ..spec.types import CODES, FLOATS_BY_CODE, DType, Progress
from .portions import Array, converted
from .prequantised.restacked import MadeTensor, transposed, write_made
from .prequantised.stored import CheckpointTensor

PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
"""The linears of one expert that a stack's part holds side by side."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertStack:
    """All experts' weights [E, K, N] of one stack.

    Attributes:
        shape: E, K, N.
        names: The checkpoint's names of the linears, expert by expert.
        experts: For each expert its linears [N, K], which stand side by side in the stack.
    """

    shape: tuple[int, ...]
    names: tuple[str, ...]
    experts: tuple[tuple[CheckpointTensor, ...], ...]

    def made(self, dtype: DType) -> MadeTensor:
        """The stack as a tensor to be written, in a type."""
        return MadeTensor(dtype=CODES[dtype], shape=self.shape, pieces=lambda: self._pieces(CODES[dtype]))

    def _pieces(self, code: str) -> Iterator[Array]:
        names = iter(self.names)
        for linears in self.experts:
            turned = []
            for linear in linears:
                values_NK = converted(next(names), linear.read(), linear.region.dtype, code)
                turned.append(transposed(values_NK.view(f"i{values_NK.itemsize}")))
            yield np.concatenate(turned, axis=1)


def find_stacks(
    found: Mapping[str, CheckpointTensor], expected: Mapping[str, tuple[int, ...]], spec: ModelSpec, prefix: str
) -> tuple[dict[str, ExpertStack], dict[str, CheckpointTensor]]:
    """Finds the experts that are stored one by one.

    Args:
        found: A checkpoint's tensors.
        expected: Names and shapes that they have with experts stacked.
        spec: Geometry.
        prefix: Beginning of the names.

    Returns:
        The stacks by name, and the other tensors.

    Raises:
        CheckpointError: A linear is missing, misshapen or no float, or a layer has both forms.
    """
    rest, stacks = dict(found), {}
    firsts: dict[str, str] = {}
    for name in found:
        if single := re.match(r"(.*\.experts)\.\d+\.\w+_proj\.weight$", name):
            firsts.setdefault(single[1], name)
    for index, layer in enumerate(spec.layers):
        unit = f"{prefix}model.layers.{index}.feed_forward.experts"
        first = firsts.get(unit)
        if not layer.experts or first is None:
            continue
        for part, linears in PARTS.items():
            name = f"{unit}.{part}"
            if name in found:
                raise CheckpointError(f"tensors {name!r} and {first!r} hold the same experts: remove one of the two")
            count, inputs, outputs = expected[name]
            names = [f"{unit}.{expert}.{linear}.weight" for expert in range(count) for linear in linears]
            tensors = [_take(rest, each, (outputs // len(linears), inputs)) for each in names]
            experts = zip(*[iter(tensors)] * len(linears), strict=True)
            stacks[name] = ExpertStack(shape=expected[name], names=tuple(names), experts=tuple(experts))
    return stacks, rest


def _take(rest: dict[str, CheckpointTensor], name: str, shape: tuple[int, ...]) -> CheckpointTensor:
    """Takes one expert's linear out of the tensors.

    Raises:
        CheckpointError: It is missing, misshapen or no float.
    """
    tensor = rest.pop(name, None)
    if tensor is None:
        raise CheckpointError(f"tensor {name!r} is missing, other experts have it: download the weights again")
    if tensor.region.shape != shape:
        found = list(tensor.region.shape)
        raise CheckpointError(f"tensor {name!r} has shape {found}, config.json makes it {list(shape)}")
    if tensor.region.dtype not in FLOATS_BY_CODE:
        raise CheckpointError(f"tensor {name!r} is {tensor.region.dtype}, expected a float: save it as BF16")
    return tensor


def write_stacks(stacks: Mapping[str, ExpertStack], folder: Path, dtype: DType, progress: Progress) -> list[Path]:
    """Writes stacks, a file a layer.

    Args:
        stacks: The stacks by name.
        folder: Where the files go.
        dtype: Type to write, rounded to nearest even.
        progress: Called for each file.

    Returns:
        The files.

    Raises:
        ExportError: A value is none or does not fit the type, or a shard changed meanwhile.
    """
    shards = {t.shard.path for stack in stacks.values() for linears in stack.experts for t in linears}
    fingerprints = {path: identity(path) for path in sorted(shards)}
    layers: dict[int, dict[str, MadeTensor]] = {}
    for name, stack in stacks.items():
        layer = re.search(r"layers\.(\d+)\.", name)
        assert layer is not None
        layers.setdefault(int(layer[1]), {})[name] = stack.made(dtype)
    paths = []
    for done, (layer_index, made) in enumerate(layers.items()):
        progress("experts", done, len(layers))
        paths.append(folder / f"experts-{layer_index:05}.safetensors")
        write_made(paths[-1], made)
    for path, fingerprint in fingerprints.items():
        if identity(path) != fingerprint:
            raise ExportError(f"{path}: changed while it was read: export again")
    return paths
