"""From a bundle to tokens and text. Imports no torch, no onnx and no transformers."""

from .session import Generated, Session
from .state import State

__all__ = ["Generated", "Session", "State"]
