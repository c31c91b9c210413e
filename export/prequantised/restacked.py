"""The tensors of a quantised model that its checkpoint does not hold as the graph reads them, written anew.

Enters: `StoredWeight`s. Leaves: for each linear and each layer's experts the tensors that the graph reads, some in the
checkpoint as they lie there and others to be made; and files of the latter. Values are moved, turned and packed, never
rounded; scales are widened, but for those of int4 linears, which take the graph's type. No more than one expert or one
linear is held in memory.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
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
        """Experts that are stacked as the graph has them: their scales [E, 1, N]."""
        check_alike(unit, [gate_up, down])
        for stored, activation in ((gate_up, "hidden_scale"), (down, "activated_scale")):
            self.in_place[stored.module] = stored.weight
            experts = stored.weight.region.shape[0]
            self._add_scales(f"{stored.module}_scale", stored, (experts, 1, stored.outputs))
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
        """Experts of three linears each, stacked: gate_up [E, H, 2I], down [E, I, H], and their scales.

        Gate and up projection read one input; where their scales of it differ, the larger serves both. Weights that
        are not quantised take the graph's type.
        """
        check_alike(unit, [*gates, *ups, *downs])
        pairs = [list(pair) for pair in zip(gates, ups, strict=True)]
        for part, activation, experts in (
            ("gate_up", "hidden_scale", pairs),
            ("down", "activated_scale", [[down] for down in downs]),
        ):
            name = f"{unit}.{part}_proj"
            self._add_turned(name, experts, CODES[dtype])
            if experts[0][0].is_static:
                scales = [max(float(stored.input_scales()[0]) for stored in parts) for parts in experts]
                self.add_values(f"{unit}.{activation}", np.array(scales, np.float32))

    def _add_turned(self, name: str, experts: list[list[StoredWeight]], code: str) -> None:
        """Each expert's linears side by side, inputs first; those that are not quantised in the type of that code."""
        first = experts[0][0]
        outputs, inputs = sum(stored.outputs for stored in experts[0]), first.weight.region.shape[1]
        is_packed = first.format == "int4"
        written = "U8" if is_packed else code if first.format == "none" else first.weight.region.dtype

        def turn(stored: StoredWeight) -> Array:
            return turned_int4(stored) if is_packed else turned(stored, written)

        self.made[name] = MadeTensor(
            dtype=written,
            shape=(len(experts), inputs * 8, outputs // 2) if is_packed else (len(experts), inputs, outputs),
            pieces=lambda: (np.concatenate([turn(each) for each in parts], axis=1) for parts in experts),
        )
        if first.scale is None:
            return
        groups = first.scale.region.shape[1] if first.format == "int4" else 1
        self.made[f"{name}_scale"] = MadeTensor(
            dtype="F32",
            shape=(len(experts), groups, outputs),
            pieces=lambda: (
                np.concatenate([each.scales().reshape(each.outputs, -1).T for each in parts], axis=1)
                for parts in experts
            ),
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
    """A weight [N, K] as [K, N] in a type, its elements as integers of their size.

    Raises:
        ExportError: One is NaN or infinite, or does not fit the type.
    """
    values_NK, found = stored.weight.read(), stored.weight.region.dtype
    if stored.format == "none":
        values_NK = converted(f"{stored.module}.weight", values_NK, found, code)
    elif not all_finite(values_NK, found):
        raise ExportError(f"tensor {f'{stored.module}.weight'!r} holds NaN: its file is damaged, download it again")
    return transposed(values_NK.view(f"i{values_NK.itemsize}"))


def turned_int4(stored: StoredWeight) -> Array:
    """Packed int4 values [N, K / 2] with inputs in front, [K, N / 2]: rows of even inputs and of odd ones by turns."""
    bytes_JN = transposed(packed(stored))  # J pairs of inputs
    first, second = bytes_JN[:, 0::2], bytes_JN[:, 1::2]
    rows_J2M = np.stack([first & 0xF | second << 4, first >> 4 | second & 0xF0], axis=1)
    return rows_J2M.reshape(-1, rows_J2M.shape[-1])


def transposed(values: Array) -> Array:
    """A matrix laid out anew; torch does it several times as fast as numpy."""
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
