"""The initializers of a lowered graph: which regions of the weight files the runtime hands to it, and as what type."""

import math
from typing import Any, Literal

import onnx_ir as ir

from ..plugins.nodes import onnx_type
from ..spec.folder import SPEC_NAME
from ..spec.stored_weights import Weight
from ..spec.types import FLOATS, MODEL_TYPES, DType, Stored

FLOAT = ir.DataType.FLOAT
DTYPES: dict[ir.DataType | None, DType] = {onnx_type(name): name for name in FLOATS}
STORED: dict[ir.DataType | None, Stored] = {onnx_type(name): name for name in MODEL_TYPES}
PLACEHOLDER = SPEC_NAME
"""External location of what the runtime supplies by name: ONNX Runtime wants the file to exist, and never reads it."""


class Supply:
    """Collects what a graph's nodes ask for.

    Attributes:
        weights: The regions to supply, by initializer name.
        initializers: The graph's initializers by name, small constants included.
    """

    def __init__(self) -> None:
        self.weights: dict[str, Weight] = {}
        self.initializers: dict[str, ir.Value] = {}

    def widened(self, source: ir.Value) -> ir.Value:
        """A weight in float32, or a small constant as it is."""
        tensor = source.const_value
        if isinstance(tensor, ir.ExternalTensor):
            return self._region(f"{source.name}", tensor, 0, tensor.shape.numpy(), "float32")
        name = f"{source.name}"
        if name not in self.initializers:
            self.initializers[name] = ir.Value(name=name, shape=source.shape, type=source.type, const_value=tensor)
        return self.initializers[name]

    def stored(self, source: ir.Value) -> ir.Value:
        """A weight, or all experts' [E, K, N], in the type it is stored in."""
        tensor = source.const_value
        assert isinstance(tensor, ir.ExternalTensor)
        dtype = DTYPES[tensor.dtype]
        name = f"{source.name}" if dtype == "float32" else f"{source.name}:{dtype}"
        shape = tensor.shape.numpy()
        return self._region(name, tensor, 0, shape, dtype, stacked=len(shape) == 3)

    def part(
        self,
        source: ir.Value,
        index: int | None = None,
        *,
        shape: tuple[int, ...] | None = None,
    ) -> ir.Value:
        """A weight in float32, or one expert's part of a stacked one.

        Args:
            source: The weight.
            index: The part's number; None is the whole.
            shape: Shape to read it in; None is its own.
        """
        tensor = source.const_value
        if not isinstance(tensor, ir.ExternalTensor):
            return self._small_part(source, index)
        own = tensor.shape.numpy()
        name, start = f"{source.name}", 0
        if index is not None:
            count, *rest = own
            name, start, own = f"{name}[{index}]", int(tensor.nbytes // count * index), tuple(rest)
        return self._region(name, tensor, start, own if shape is None else shape, "float32")

    def panels(self, source: ir.Value, *, convert: Stored, interleaved: bool = False) -> ir.Value:
        """A matrix [N, K], or all experts' [E, N, K], in the panels of the CPU's own kernels."""
        return self._matrix(f"{source.name}:panels", source, convert, "panels", interleaved=interleaved)

    def panel_scales(self, source: ir.Value, *, convert: Stored, interleaved: bool = False) -> ir.Value:
        """The scales [N, groups], or [E, N, groups], of such panels."""
        return self._matrix(f"{source.name}", source, convert, "scales", interleaved=interleaved)

    def _matrix(
        self,
        name: str,
        source: ir.Value,
        convert: Stored,
        layout: Literal["panels", "scales"],
        *,
        interleaved: bool,
    ) -> ir.Value:
        tensor = source.const_value
        assert isinstance(tensor, ir.ExternalTensor)
        shape = tensor.shape.numpy()
        how = {"layout": layout, "stacked": len(shape) == 3, "interleaved": interleaved}
        return self._region(name, tensor, 0, shape, convert, **how)

    def _small_part(self, source: ir.Value, index: int | None) -> ir.Value:
        """A constant that lies in the graph itself, or a part of it."""
        if index is None:
            return self.widened(source)
        name, tensor = f"{source.name}[{index}]", source.const_value
        assert tensor is not None
        if name not in self.initializers:
            part = ir.tensor(tensor.numpy()[index], name=name)
            kind = ir.TensorType(part.dtype)
            self.initializers[name] = ir.Value(
                name=name, shape=ir.Shape(part.shape.numpy()), type=kind, const_value=part
            )
        return self.initializers[name]

    def _region(
        self,
        name: str,
        tensor: ir.ExternalTensor,
        start: int,
        shape: tuple[int, ...],
        convert: Stored,
        **layout: Any,
    ) -> ir.Value:
        """The initializer, laid out so, for a part of a weight that begins `start` bytes into it."""
        if name not in self.weights:
            weight = Weight(
                name=name,
                file=str(tensor.location),
                offset=(tensor.offset or 0) + start,
                shape=shape,
                dtype=STORED[tensor.dtype],
                convert=convert,
                **layout,
            )
            self.weights[name] = weight
            given, dtype = weight.given_shape, onnx_type("uint8" if weight.layout == "panels" else convert)
            placeholder = ir.ExternalTensor(
                PLACEHOLDER, 0, int(math.prod(given) * dtype.itemsize), dtype, shape=ir.Shape(given), name=name
            )
            self.initializers[name] = ir.Value(
                name=name, shape=placeholder.shape, type=ir.TensorType(dtype), const_value=placeholder
            )
        return self.initializers[name]
