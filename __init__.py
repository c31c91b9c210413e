"""Arriero takes a Llama 4 checkpoint to the machines that serve it."""

from .errors import ArrieroError
from .loading import load

__all__ = ["ArrieroError", "__version__", "load"]
__version__ = "0.1.0"
