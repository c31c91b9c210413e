"""From a checkpoint to the canonical ONNX graph."""
