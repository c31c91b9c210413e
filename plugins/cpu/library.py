"""The library of the CPU's own kernels, compiled when the package is installed, and the domain of its ops."""

from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

from ...errors import SessionError

DOMAIN = "arriero.cpu"
"""The ops' domain; a graph imports it where it has any."""
GROUP_INPUT = "group"
"""Name of a rank's graph's input that is the memory which the ranks of a group share."""
REMEDY = (
    "install a C++ compiler (GCC 12 or later, or Clang), and then Arriero again: "
    "pip install --force-reinstall --no-deps arriero"
)


def library() -> Path:
    """The library's file.

    Raises:
        SessionError: There was no compiler when the package was installed.
    """
    folder = Path(__file__).parent
    found = next((path for suffix in EXTENSION_SUFFIXES if (path := folder / f"kernels{suffix}").exists()), None)
    if found is None:
        raise SessionError(f"the kernels that sessions on a CPU run on were not compiled: {REMEDY}")
    return found
