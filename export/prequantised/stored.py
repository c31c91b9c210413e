"""The weights of an already quantised checkpoint as its library stores them, found and checked.

Enters: a checkpoint's tensors and its `Scheme`. Leaves: a `StoredWeight` for each linear and each expert's or each
stack of experts' product: weight and scales of known shapes, every scale positive and finite. No data of the weights is
read.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import CheckpointError, ExportError
from ...files.safetensors import Region, Shard
from ...spec.recipe import Format
from ...spec.types import FLOATS_BY_CODE
from ..portions import FLOAT_DTYPES
from .scheme import Scheme, WeightGroup

FORMATS: dict[str, Format] = {
    "F8_E4M3": "fp8",
    "I8": "int8",
    "I32": "int4",
    **dict.fromkeys(FLOATS_BY_CODE, "none"),
}
"""Formats by the type that a weight is stored in; compressed-tensors packs eight int4 into an I32."""

READ = {
    **FLOAT_DTYPES,
    "F8_E4M3": np.dtype(np.uint8),
    "I8": np.dtype(np.uint8),
    "I32": np.dtype(np.int32),
    "I64": np.dtype(np.int64),
}
"""Numpy's type to read each type as: 8-bit values as bytes, since they are moved and not computed with."""

UNSUPPORTED = {
    "weight_g_idx": "act-order shuffles the inputs of groups: quantise without it, or with actorder weight",
    "weight_zero_point": "zero points are not taken: quantise symmetrically",
    "input_zero_point": "zero points are not taken: quantise symmetrically",
    "weight_scale_2": "Arriero takes 8-bit floats and integers: choose another checkpoint",
    "pre_quant_scale": "smoothed inputs are not taken: fold the scale into the weights before",
}
"""Tensors beside a weight that Arriero does not take."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointTensor:
    """A tensor of a checkpoint: the shard it lies in and where."""

    shard: Shard
    region: Region

    def read(self) -> NDArray[Any]:
        """Its data.

        Raises:
            ExportError: The file is shorter than when it was opened.
        """
        return self.read_bytes(0, self.region.size).view(READ[self.region.dtype]).reshape(self.region.shape)

    def read_bytes(self, start: int, count: int) -> NDArray[np.uint8]:
        """Some of its bytes.

        Raises:
            ExportError: The file is shorter than when it was opened.
        """
        values = np.fromfile(self.shard.path, np.uint8, count, offset=self.region.offset + start)
        if len(values) < count:
            raise ExportError(f"{self.shard.path}: shrank while it was read: export again")
        return values


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredWeight:
    """A weight as it is stored.

    Attributes:
        module: Its name without `.weight`.
        format: How it is stored.
        weight: Values [N, K], packed [N, K / 8] in `int4`; of stacked experts [E, K, N].
        outputs: N.
        scale: The weight's scales; None in `none`.
        input_scale: Scale of its input, where that is static.
        group: How it is quantised; None in `none`.
    """

    module: str
    format: Format
    weight: CheckpointTensor
    outputs: int
    scale: CheckpointTensor | None = None
    input_scale: CheckpointTensor | None = None
    group: WeightGroup | None = None

    @property
    def is_static(self) -> bool:
        """Whether its input has a static scale."""
        return self.input_scale is not None

    def scales(self) -> NDArray[np.float32]:
        """Its scales, one an output channel [N], in `int4` a group [N, K / group], of stacked experts [E, N]."""
        assert self.scale is not None
        values = self.scale.read().astype(np.float32)
        if self.format == "int4":
            return values
        experts = self.weight.region.shape[:-2]
        whole = (*experts, self.outputs)
        if values.size == math.prod(whole):
            return values.reshape(whole)
        return np.broadcast_to(values.reshape(-1, *[1] * len(experts)), whole)  # one for all, or one an expert

    def input_scales(self) -> NDArray[np.float32]:
        """The static scale of its input, flat: one, or one an expert."""
        assert self.input_scale is not None
        return self.input_scale.read().astype(np.float32).reshape(-1)


class Finder:
    """Takes a checkpoint's tensors one by one.

    Attributes:
        left: Tensors that nobody has taken.
    """

    def __init__(self, found: Mapping[str, CheckpointTensor], scheme: Scheme) -> None:
        self.left = dict(found)
        self.scheme = scheme

    def linear(self, module: str, outputs: int, inputs: int) -> StoredWeight | None:
        """A linear of any format, or None where it is missing.

        Args:
            module: Its name without `.weight`.
            outputs: N.
            inputs: K.

        Raises:
            CheckpointError: A part of it is missing, misshapen, or none that Arriero takes.
        """
        name = next((name for part in ("weight_packed", "weight") if (name := f"{module}.{part}") in self.left), None)
        if name is None:
            return None
        for part, remedy in UNSUPPORTED.items():
            if f"{module}.{part}" in self.left:
                raise CheckpointError(f"tensor {f'{module}.{part}'!r}: {remedy}")
        kind = self._format(name)
        packs = 8 if kind == "int4" else 1
        weight = self._take(name, [(outputs, inputs // packs)])
        if kind == "none":
            return StoredWeight(module=module, format=kind, weight=weight, outputs=outputs)
        group = self.scheme.group(module, kind)
        shapes: list[tuple[int, ...]] = [(), (1,), (outputs,), (outputs, 1)]
        if kind == "int4":
            if inputs % group.group_size:
                raise CheckpointError(
                    f"tensor {name!r}: its {inputs} inputs are no multiple of the group size {group.group_size}: "
                    "quantise with another, or leave this weight out"
                )
            shapes = [(outputs, inputs // group.group_size)]
            self._check_size(f"{module}.weight_shape", [outputs, inputs])
        return StoredWeight(
            module=module,
            format=kind,
            weight=weight,
            outputs=outputs,
            scale=self._scale(f"{module}.weight_scale", shapes),
            input_scale=self._input_scale(f"{module}.input_scale", group, [(), (1,)]),
            group=group,
        )

    def stack(self, name: str, shape: tuple[int, int, int]) -> StoredWeight | None:
        """Stacked experts' weights [E, K, N], or None where they are missing or not quantised.

        Raises:
            CheckpointError: A scale is missing, misshapen or none.
        """
        if name not in self.left or (kind := self._format(name)) == "none":
            return None
        if kind == "int4":
            raise CheckpointError(
                f"tensor {name!r} is I32: Arriero takes stacked experts in 8 bits, int4 ones unstacked"
            )
        experts, _, outputs = shape
        group = self.scheme.group(name, kind)
        weight = self._take(name, [shape])
        per_expert: list[tuple[int, ...]] = [(), (1,), (experts,), (experts, 1), (experts, 1, 1)]
        shapes = [*per_expert, (experts, outputs), (experts, 1, outputs), (experts, outputs, 1)]
        scale = f"{name}_weight_scale" if f"{name}_weight_scale" in self.left else f"{name}_scale"
        return StoredWeight(
            module=name,
            format=kind,
            weight=weight,
            outputs=outputs,
            scale=self._scale(scale, shapes),
            input_scale=self._input_scale(f"{name}_input_scale", group, per_expert),
            group=group,
        )

    def cache_scale(self, *names: str) -> float | None:
        """The scale of a layer's keys or values under one of several names, or None where there is none."""
        name = next((name for name in names if name in self.left), None)
        return None if name is None else float(self._scale(name, [(), (1,)]).read().astype(np.float32).reshape(()))

    def _format(self, name: str) -> Format:
        dtype = self.left[name].region.dtype
        if dtype not in FORMATS or (dtype == "I32") != name.endswith("_packed"):
            raise CheckpointError(f"tensor {name!r} is {dtype}, expected one of BF16, F16, F32, F8_E4M3 and I8")
        return FORMATS[dtype]

    def _take(self, name: str, shapes: list[tuple[int, ...]]) -> CheckpointTensor:
        tensor = self.left.pop(name, None)
        if tensor is None:
            raise CheckpointError(f"tensor {name!r} is missing, which the quantised weight needs: download it again")
        if tensor.region.shape not in shapes:
            expected = " or ".join(str(list(shape)) for shape in shapes)
            raise CheckpointError(f"tensor {name!r} has shape {list(tensor.region.shape)}, expected {expected}")
        return tensor

    def _scale(self, name: str, shapes: list[tuple[int, ...]]) -> CheckpointTensor:
        """A scale, its values checked."""
        tensor = self._take(name, shapes)
        if FORMATS.get(tensor.region.dtype) != "none":
            raise CheckpointError(f"tensor {name!r} is {tensor.region.dtype}, expected a scale in F32, BF16 or F16")
        values = tensor.read().astype(np.float32)
        if (bad := ~((values > 0) & np.isfinite(values))).any():
            raise CheckpointError(f"tensor {name!r} holds the scale {values[bad][0]}, expected numbers above 0")
        return tensor

    def _input_scale(self, name: str, group: WeightGroup, shapes: list[tuple[int, ...]]) -> CheckpointTensor | None:
        return self._scale(name, shapes) if group.format != "int4" and group.activations == "static" else None

    def _check_size(self, name: str, expected: list[int]) -> None:
        """Compares the shape that a packed weight is said to have."""
        tensor = self._take(name, [(2,)])
        if tensor.region.dtype not in ("I32", "I64") or (found := tensor.read().tolist()) != expected:
            found = found if tensor.region.dtype in ("I32", "I64") else tensor.region.dtype
            raise CheckpointError(f"tensor {name!r} is {found}, config.json makes it {expected}")
