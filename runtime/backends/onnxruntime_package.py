"""ONNX Runtime, from the one of its packages that is installed; modules that need it import `ort` from here.

Several packages bring the module `onnxruntime`, each a build of its own. One that is installed over another replaces a
part of its files, and removing one of two leaves an empty module, so all of it is checked here, once a process.

Since 1.29 its builds for Linux and macOS send telemetry, and keep an identifier and a database in the home folder,
unless `ORT_DISABLE_TELEMETRY` is set before the import (onnxruntime pull request 27379). It is set here: nothing leaves
the machine, unless the variable was given another value.
"""

import os
from importlib.metadata import PackageNotFoundError, version

from ...errors import SessionError

PACKAGES = (
    "onnxruntime",
    "onnxruntime-gpu",
    "onnxruntime-directml",
    "onnxruntime-migraphx",
    "onnxruntime-openvino",
    "onnxruntime-qnn",
    "onnxruntime-rocm",
    "onnxruntime-silicon",
    "onnxruntime-training",
    "ort-nightly",
    "ort-nightly-gpu",
)
"""The packages that own the module `onnxruntime`."""

INSTALL = "pip install 'arriero[cpu]', or pip install 'arriero[gpu]' for ONNX Runtime's build with CUDA"


def installed() -> dict[str, str]:
    """The installed packages that own the module, and their versions; nothing is imported."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def check_installed() -> None:
    """Refuses an environment in which the files of two packages lie over one another.

    Raises:
        SessionError: More than one is installed.
    """
    found = installed()
    if len(found) > 1:
        named = " and ".join(f"{name} {number}" for name, number in found.items())
        raise SessionError(
            f"{named} are both installed and overwrite each other's files: "
            f"pip uninstall --yes {' '.join(found)}, then {INSTALL}"
        )


check_installed()
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
try:
    import onnxruntime as ort
except ModuleNotFoundError as error:
    if error.name != "onnxruntime":
        raise
    raise SessionError(f"ONNX Runtime is not installed: {INSTALL}") from error
except ImportError as error:
    raise SessionError(f"ONNX Runtime cannot be loaded here ({str(error)[:200]}): {INSTALL}") from error

if not hasattr(ort, "InferenceSession"):  # a folder that an uninstalled package left, or a half of one
    raise SessionError(
        "ONNX Runtime's module is incomplete, as it is where one of two packages of it was removed: "
        f"pip uninstall --yes {' '.join(installed()) or 'onnxruntime'}, then {INSTALL}"
    )

__all__ = ["ort"]
