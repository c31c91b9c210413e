"""TensorRT-RTX and TensorRT as Python modules: imported, made fit for plugins, their log listened to.

Both have one API, which the rest of the room takes as `trt`. Invariant: every error that the library logs is a failure,
also where the call that logged it returns normally.
"""

import ctypes
import importlib
import importlib.metadata
import platform
import re
import struct
import tempfile
from pathlib import Path
from typing import Any

from ..errors import BuildError
from ..plugins.tensorrt_plugin import MODULES, REMEDIES

SONAME = "libtensorrt_rtx.so"
MACHINES = {"x86_64": 62, "aarch64": 183}
"""ELF's numbers of the processors for which there is a TensorRT."""


def open_library(flavour: str) -> Any:
    """Imports a TensorRT.

    Raises:
        BuildError: It is not installed, or does not load.
    """
    try:
        module = importlib.import_module(MODULES[flavour])
    except (ImportError, OSError) as error:
        raise BuildError(f"{flavour} does not load here ({error}): {REMEDIES[flavour]}") from error
    if flavour == "tensorrt-rtx":
        _provide_soname()
    return module


def cuda_version(flavour: str) -> int:
    """The major version of CUDA that an installed TensorRT needs, from the name of its package; 0 where none says."""
    start = f"{MODULES[flavour]}_cu"
    names = (str(each.name).replace("-", "_").lower() for each in importlib.metadata.distributions())
    found = {int(match[1]) for name in names if (match := re.match(rf"{start}(\d+)(_|$)", name))}
    return max(found, default=0)


def _provide_soname() -> None:
    """Gives TensorRT-RTX the library name that its parser looks for when it meets a plugin.

    The wheel carries `libtensorrt_rtx.so.1` only, and the process aborts where `libtensorrt_rtx.so` is not found. An
    empty library of that name which depends on the real one answers the lookup.
    """
    machine = MACHINES.get(platform.machine())
    if machine is None or platform.system() != "Linux":
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / SONAME
        path.write_bytes(_empty_library(SONAME, f"{SONAME}.1", machine))
        ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)


def _empty_library(name: str, needed: str, machine: int) -> bytes:
    """A 64-bit ELF shared library with a name, one dependency and no code (System V ABI, chapters 4 and 5)."""
    strings = b"\0" + name.encode() + b"\0" + needed.encode() + b"\0"
    file_header, program_headers, dynamic_entries, symbol = 64, 2 * 56, 8 * 16, 24
    dynamic = file_header + program_headers
    symbols = dynamic + dynamic_entries
    hashes = symbols + symbol
    names = hashes + 16
    end = names + len(strings)
    needed_tag, soname_tag, end_tag = (1, 2 + len(name)), (14, 1), (0, 0)
    tables = ((4, hashes), (5, names), (6, symbols), (10, len(strings)), (11, symbol))
    header = struct.pack(
        "<4sBBBB8xHHIQQQIHHHHHH",
        *(b"\x7fELF", 2, 1, 1, 0),
        *(3, machine, 1, 0, file_header, 0, 0, file_header, 56, 2, 64, 0, 0),
    )
    loaded = struct.pack("<IIQQQQQQ", 1, 6, 0, 0, 0, end, end, 0x1000)
    linked = struct.pack("<IIQQQQQQ", 2, 6, dynamic, dynamic, dynamic, dynamic_entries, dynamic_entries, 8)
    entries = b"".join(struct.pack("<qQ", *tag) for tag in (needed_tag, soname_tag, *tables, end_tag))
    no_symbols = struct.pack("<4I", 1, 1, 0, 0)
    return header + loaded + linked + entries + bytes(symbol) + no_symbols + strings


def make_log(trt: Any) -> Any:
    """A logger that keeps what matters: `errors`, `warnings`, and `lines` about layers and memory.

    TensorRT prints a line for each tactic it weighs; these go by.
    """

    class Log(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []
            self.warnings: list[str] = []
            self.lines: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.ERROR:
                self.errors.append(" ".join(message.split()))
            elif severity == trt.ILogger.WARNING:
                self.warnings.append(" ".join(message.split()))
            elif message.startswith(("Layers:", "Name: ", "Total Activation", "Total Weights")):
                self.lines.append(message)

        def check(self, doing: str) -> None:
            """Raises a `BuildError` if an error has been logged."""
            if self.errors:
                raise BuildError(f"TensorRT failed {doing}: {self.errors[0]}")

    return Log()
