"""Arriero takes a Llama 4 checkpoint to the machines that serve it."""

import importlib
from types import ModuleType

from .errors import ArrieroError
from .loading import load

__all__ = ["ArrieroError", "__version__", "load"]
__version__ = "0.1.0"

ROOMS = ("accuracy", "calibration", "engine", "export", "measuring", "plugins", "runtime", "walk")


def __getattr__(name: str) -> ModuleType:
    """The rooms, imported when they are first used: `arriero.export.export_checkpoint(…)`."""
    if name in ROOMS:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
