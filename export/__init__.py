"""From a checkpoint to the canonical ONNX graph."""

from ..errors import without_extra

try:
    from .model import export_checkpoint
except ModuleNotFoundError as error:
    raise without_extra(error, "export") from error

__all__ = ["export_checkpoint"]
