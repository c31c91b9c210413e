"""The CPU's own kernels: products with quantised matrices, as ops that ONNX Runtime loads from a small library."""
