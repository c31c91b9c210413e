"""From a checkpoint to the canonical ONNX graph."""

from ..errors import needing

with needing("export"):
    from .model import export_checkpoint

__all__ = ["export_checkpoint"]
