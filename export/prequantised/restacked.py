"""The tensors of a quantised model that its checkpoint does not hold as the graph reads them, written anew.

Enters: `StoredWeight`s. Leaves: for each linear and each layer's experts the tensors that the graph reads, some in the
checkpoint as they lie there and others to be made; and files of the latter. Values are moved, turned and packed, never
rounded; scales are widened, but for those of int4 linears, which take the graph's type. No more than one expert or one
linear is held in memory.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import CheckpointError, ExportError
from ...files.safetensors import encode_header
from ...plugins.finite import all_finite
from ...spec.types import CODES, DType
from ..portions import FLOAT_DTYPES, converted
from .stored import CheckpointTensor, StoredWeight

Array = NDArray[Any]

PIECE = 64 << 20
"""Bytes of a tensor that is only copied, at a time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MadeTensor:
    """A tensor to be written: safetensors' type, its shape, and what yields its data in order."""

    dtype: str
    shape: tuple[int, ...]
    pieces: Callable[[], Iterator[Array]]


@dataclass(frozen=True, kw_only=True, slots=True)
class GraphTensors:
    """The tensors that a graph reads.

    Attributes:
        in_place: Tensors that lie in the checkpoint as they are.
        made: Tensors to be written.
    """

    in_place: dict[str, CheckpointTensor] = field(default_factory=dict)
    made: dict[str, MadeTensor] = field(default_factory=dict)

    def add_linear(self, stored: StoredWeight, dtype: DType) -> None:
        """A linear's weight [N, K], its scales [N] in float32 or [N, K / group] in the graph's type, its input's."""
        name = f"{stored.module}.weight"
        if stored.format == "int4":
            outputs, words = stored.weight.region.shape
            self.made[name] = MadeTensor(dtype="U8", shape=(outputs, words * 4), pieces=lambda: iter([packed(stored)]))
        else:
            self.in_place[name] = stored.weight
        if stored.scale is not None:
            shape = stored.scale.region.shape if stored.format == "int4" else (stored.outputs,)
            self._add_scales(f"{name}_scale", stored, shape, dtype if stored.format == "int4" else "float32")
        if stored.is_static:
            self.add_values(f"{stored.module}.input_scale", stored.input_scales().reshape(()))

    def add_stack(self, unit: str, gate_up: StoredWeight, down: StoredWeight) -> None:
        """Experts that are stacked with inputs in front: turned to [E, N, K], their scales [E, N, 1]."""
        check_alike(unit, [gate_up, down])
        for stored, activation in ((gate_up, "hidden_scale"), (down, "activated_scale")):
            experts, inputs, outputs = stored.weight.region.shape
            self.made[stored.module] = MadeTensor(
                dtype=stored.weight.region.dtype,
                shape=(experts, outputs, inputs),
                pieces=partial(turned_experts, stored),
            )
            self._add_scales(f"{stored.module}_scale", stored, (experts, outputs, 1))
            if stored.is_static:
                self.add_values(f"{unit}.{activation}", np.broadcast_to(stored.input_scales(), (experts,)))

    def add_experts(
        self,
        unit: str,
        gates: list[StoredWeight],
        ups: list[StoredWeight],
        downs: list[StoredWeight],
        dtype: DType,
    ) -> None:
        """Experts of three linears each, stacked: gate_up [E, 2I, H], down [E, H, I], and their scales.

        Gate and up projection read one input; where their scales of it differ, the larger serves both. Weights that
        are not quantised take the graph's type, and lie with inputs in front.
        """
        check_alike(unit, [*gates, *ups, *downs])
        pairs = [list(pair) for pair in zip(gates, ups, strict=True)]
        for part, activation, experts in (
            ("gate_up", "hidden_scale", pairs),
            ("down", "activated_scale", [[down] for down in downs]),
        ):
            name = f"{unit}.{part}_proj"
            if experts[0][0].format == "none":
                self._add_turned(name, experts, CODES[dtype])
            else:
                self._add_stacked(name, experts)
            if experts[0][0].is_static:
                scales = [max(float(stored.input_scales()[0]) for stored in parts) for parts in experts]
                self.add_values(f"{unit}.{activation}", np.array(scales, np.float32))

    def _add_turned(self, name: str, experts: list[list[StoredWeight]], code: str) -> None:
        """Each expert's linears side by side in the type of that code, not quantised, inputs in front."""
        outputs, inputs = sum(stored.outputs for stored in experts[0]), experts[0][0].weight.region.shape[1]
        self.made[name] = MadeTensor(
            dtype=code,
            shape=(len(experts), inputs, outputs),
            pieces=lambda: (np.concatenate([turned(each, code) for each in parts], axis=1) for parts in experts),
        )

    def _add_stacked(self, name: str, experts: list[list[StoredWeight]]) -> None:
        """Each expert's quantised linears one behind another, as they are stored, and their scales [E, N, groups]."""
        first = experts[0][0]
        outputs, inputs = sum(stored.outputs for stored in experts[0]), first.weight.region.shape[1]
        is_packed = first.format == "int4"
        self.made[name] = MadeTensor(
            dtype="U8" if is_packed else first.weight.region.dtype,
            shape=(len(experts), outputs, inputs * 4 if is_packed else inputs),
            pieces=lambda: (packed(each) if is_packed else as_stored(each) for parts in experts for each in parts),
        )
        assert first.scale is not None
        groups = first.scale.region.shape[1] if is_packed else 1
        self.made[f"{name}_scale"] = MadeTensor(
            dtype="F32",
            shape=(len(experts), outputs, groups),
            pieces=lambda: (each.scales() for parts in experts for each in parts),
        )

    def _add_scales(self, name: str, stored: StoredWeight, shape: tuple[int, ...], dtype: DType = "float32") -> None:
        """A weight's scales, read when they are written."""
        written = CODES[dtype]
        self.made[name] = MadeTensor(
            dtype=written, shape=shape, pieces=lambda: iter([converted_scales(stored, written)])
        )

    def add_converted(self, name: str, tensor: CheckpointTensor, dtype: DType) -> None:
        """A tensor that is not quantised, in the graph's type: where it is of that type, it stays in its place."""
        region = tensor.region
        if region.dtype == CODES[dtype]:
            self.in_place[name] = tensor
            return
        self.made[name] = MadeTensor(
            dtype=CODES[dtype],
            shape=region.shape,
            pieces=lambda: iter([converted(name, tensor.read(), region.dtype, CODES[dtype])]),
        )

    def add_values(self, name: str, values: NDArray[np.float32]) -> None:
        """A small tensor that is known already."""
        self.made[name] = MadeTensor(dtype="F32", shape=values.shape, pieces=lambda: iter([values]))

    def copied(self) -> "GraphTensors":
        """All of the tensors as copies, none of them in place."""
        copies = {
            name: MadeTensor(dtype=t.region.dtype, shape=t.region.shape, pieces=_copy(name, t))
            for name, t in self.in_place.items()
        }
        return GraphTensors(made={**copies, **self.made})


def check_alike(unit: str, experts: Sequence[StoredWeight]) -> None:
    """Refuses experts of one layer that are not quantised alike.

    Raises:
        CheckpointError: Two differ in format, group size or activations.
    """
    for stored in experts:
        found, first = ((each.format, each.is_static) for each in (stored, experts[0]))
        if found != first or stored.group != experts[0].group:
            raise CheckpointError(
                f"{stored.module!r} is {stored.format}, {experts[0].module!r} is {experts[0].format}: "
                f"all experts of {unit!r} must be quantised alike"
            )


def converted_scales(stored: StoredWeight, dtype: str) -> Array:
    """A weight's scales in another of safetensors' types.

    Raises:
        ExportError: One does not fit that type.
    """
    scales = stored.scales()
    with np.errstate(over="ignore"):
        converted: Array = scales.astype(FLOAT_DTYPES[dtype])
    if (bad := (converted == 0) | np.isinf(converted)).any():
        raise ExportError(
            f"{stored.module!r} has the scale {scales[bad][0]}, which does not fit {dtype}: scale the model"
        )
    return converted


def packed(stored: StoredWeight) -> Array:
    """int4 values [N, K / 2] as ONNX has them: two in a byte, the first in the low half, two's complement.

    compressed-tensors packs eight values plus 8 into an int32, the first in the lowest bits.
    """
    return stored.weight.read().view(np.uint8) ^ np.uint8(0x88)


def turned(stored: StoredWeight, code: str) -> Array:
    """A weight [N, K] that is not quantised as [K, N] in a type, its elements as integers of their size.

    Raises:
        ExportError: One is NaN or infinite, or does not fit the type.
    """
    values_NK = converted(f"{stored.module}.weight", stored.weight.read(), stored.weight.region.dtype, code)
    return transposed(values_NK.view(f"i{values_NK.itemsize}"))


def as_stored(stored: StoredWeight) -> Array:
    """A quantised weight [N, K] of 8 bits as it is stored.

    Raises:
        ExportError: One is NaN.
    """
    return checked(f"{stored.module}.weight", stored.weight.read(), stored.weight.region.dtype)


def turned_experts(stored: StoredWeight) -> Iterator[Array]:
    """The experts [K, N] of a stack in 8 bits, one by one as [N, K].

    Raises:
        ExportError: One is NaN.
    """
    region = stored.weight.region
    count, inputs, outputs = region.shape
    size = inputs * outputs
    for expert in range(count):
        values = stored.weight.read_bytes(expert * size, size).reshape(inputs, outputs)
        yield transposed(checked(stored.module, values, region.dtype))


def checked(name: str, values: Array, dtype: str) -> Array:
    """Values of 8 bits, none of them NaN.

    Raises:
        ExportError: One is.
    """
    if not all_finite(values, dtype):
        raise ExportError(f"tensor {name!r} holds NaN: its file is damaged, download it again")
    return values


def transposed(values: Array) -> Array:
    """A matrix laid out anew; torch does it several times as fast as numpy."""
    import torch  # here, since a checkpoint is refused without it

    laid_out: Array = torch.from_numpy(values).t().contiguous().numpy()
    return laid_out


def write_made(path: Path, tensors: Mapping[str, MadeTensor]) -> None:
    """Writes a safetensors file."""
    with path.open("xb") as file:
        file.write(encode_header({name: (made.dtype, made.shape) for name, made in tensors.items()}))
        for made in tensors.values():
            for piece in made.pieces():
                file.write(np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data)


def _copy(name: str, tensor: CheckpointTensor) -> Callable[[], Iterator[Array]]:
    """A function that yields a tensor's bytes."""

    def pieces() -> Iterator[Array]:
        region = tensor.region
        for start in range(0, region.size, PIECE):
            piece = tensor.read_bytes(start, min(PIECE, region.size - start))
            if not all_finite(piece, region.dtype):
                raise ExportError(f"tensor {name!r} holds NaN or infinity: its file is damaged, download it again")
            yield piece

    return pieces
