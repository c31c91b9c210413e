"""From a checkpoint to the canonical ONNX graph."""

from .model import export_checkpoint

__all__ = ["export_checkpoint"]
