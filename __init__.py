"""Arriero takes a Llama 4 checkpoint to the machines that serve it."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .errors import ArrieroError, ArrieroWarning
    from .loading import load

__all__ = ["ArrieroError", "ArrieroWarning", "__version__", "load"]
__version__ = "0.1.0"

NAMES = {"ArrieroError": "errors", "ArrieroWarning": "errors", "load": "loading"}
ROOMS = (
    "accuracy",
    "calibration",
    "engine",
    "export",
    "files",
    "measuring",
    "plugins",
    "runtime",
    "serving",
    "spec",
    "walk",
)


def __getattr__(name: str) -> Any:
    """Imports a public name or a room when it is first used, as in `arriero.export.export_checkpoint(…)`."""
    if name in NAMES:
        return getattr(importlib.import_module(f".{NAMES[name]}", __name__), name)
    if name in ROOMS:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
