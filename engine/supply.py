"""The initializers of a lowered graph: which regions of the weight files the runtime hands to it, and as what type."""

import math

import onnx_ir as ir

from ..spec import DType, Weight

FLOAT = ir.DataType.FLOAT
DTYPES: dict[ir.DataType | None, DType] = {
    ir.DataType.FLOAT: "float32",
    ir.DataType.FLOAT16: "float16",
    ir.DataType.BFLOAT16: "bfloat16",
}
PLACEHOLDER = "spec.json"
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
        """A weight in the type it is stored in."""
        tensor = source.const_value
        assert isinstance(tensor, ir.ExternalTensor)
        dtype = DTYPES[tensor.dtype]
        name = f"{source.name}" if dtype == "float32" else f"{source.name}:{dtype}"
        return self._region(name, tensor, 0, tensor.shape.numpy(), dtype)

    def slices(self, source: ir.Value) -> list[ir.Value]:
        """A stacked weight's matrices in float32, one an expert."""
        tensor = source.const_value
        assert isinstance(tensor, ir.ExternalTensor)
        count, *shape = tensor.shape.numpy()
        size = math.prod(shape) * tensor.dtype.itemsize
        return [
            self._region(f"{source.name}[{index}]", tensor, int(index * size), tuple(shape), "float32")
            for index in range(count)
        ]

    def _region(
        self, name: str, tensor: ir.ExternalTensor, start: int, shape: tuple[int, ...], convert: DType
    ) -> ir.Value:
        """The initializer for a part of a weight that begins `start` bytes into it."""
        if name not in self.weights:
            self.weights[name] = Weight(
                name=name,
                file=str(tensor.location),
                offset=(tensor.offset or 0) + start,
                shape=shape,
                dtype=DTYPES[tensor.dtype],
                convert=convert,
            )
            dtype = FLOAT if convert == "float32" else tensor.dtype
            placeholder = ir.ExternalTensor(
                PLACEHOLDER, 0, int(math.prod(shape) * dtype.itemsize), dtype, shape=ir.Shape(shape), name=name
            )
            self.initializers[name] = ir.Value(
                name=name, shape=placeholder.shape, type=ir.TensorType(dtype), const_value=placeholder
            )
        return self.initializers[name]
