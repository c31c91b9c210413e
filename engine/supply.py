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

    def widened(self, source: ir.Value, *, stacked: bool = False) -> ir.Value:
        """A weight in float32, or all experts', or a small constant as it is."""
        tensor = source.const_value
        if isinstance(tensor, ir.ExternalTensor):
            return self._region(f"{source.name}", tensor, tensor.shape.numpy(), "float32", stacked=stacked)
        name = f"{source.name}"
        if name not in self.initializers:
            self.initializers[name] = ir.Value(name=name, shape=source.shape, type=source.type, const_value=tensor)
        return self.initializers[name]

    def stored(self, source: ir.Value) -> ir.Value:
        """A weight, or all experts', in the type it is stored in."""
        tensor = source.const_value
        assert isinstance(tensor, ir.ExternalTensor)
        dtype = STORED[tensor.dtype]
        name = f"{source.name}" if dtype == "float32" else f"{source.name}:{dtype}"
        shape = tensor.shape.numpy()
        return self._region(name, tensor, shape, dtype, stacked=len(shape) == 3)

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
        return self._region(name, tensor, shape, convert, **how)

    def _region(
        self,
        name: str,
        tensor: ir.ExternalTensor,
        shape: tuple[int, ...],
        convert: Stored,
        **layout: Any,
    ) -> ir.Value:
        """The initializer, laid out so, for a weight."""
        if name not in self.weights:
            weight = Weight(
                name=name,
                file=str(tensor.location),
                offset=tensor.offset or 0,
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
