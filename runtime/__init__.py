"""From a bundle to tokens and text. Imports no torch, no onnx and no transformers."""

from .continuation import Generated, Request
from .flight import Flight
from .session import Session
from .state import State
from .token_session import TokenSession

__all__ = ["Flight", "Generated", "Request", "Session", "State", "TokenSession"]
