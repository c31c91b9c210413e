"""The circumstances of a result: when it was made, by which command and versions, and on which machine.

Enters: nothing but this process. Leaves: plain values for JSON. With `SOURCE_DATE_EPOCH` set, the date is that.
"""

import importlib.metadata
import os
import platform
import shlex
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from .. import __version__
from .processors import processors

LIBRARIES = (
    "numpy",
    "onnxruntime",
    "onnxruntime-gpu",
    "tensorrt-rtx",
    "tensorrt",
    "tokenizers",
    "torch",
    "onnx",
)
"""Distributions whose versions may move a number."""


def circumstances() -> dict[str, Any]:
    """Date, command, machine and versions.

    Returns:
        `date`, UTC to the second; `command`, as typed, None where Python called; `machine`, with the processor's name,
        the processors allowed, bytes of memory (None where the system does not say) and the system; `versions`.
    """
    return {"date": now(), "command": command(), "machine": machine(), "versions": versions()}


def now() -> str:
    """The date and time in UTC, as in `2031-05-01T04:00:00Z`."""
    epoch = os.environ.get("SOURCE_DATE_EPOCH", "")
    when = datetime.fromtimestamp(int(epoch), UTC) if epoch.isdecimal() else datetime.now(UTC)
    return when.strftime("%Y-%m-%dT%H:%M:%SZ")


def command() -> str | None:
    """The command line that runs, as one types it; None where a program calls."""
    name = Path(sys.argv[0]).stem if sys.argv and sys.argv[0] else ""
    is_module = name == "__main__" and Path(sys.argv[0]).parent.name in ("arriero", Path(__file__).parent.parent.name)
    if name != "arriero" and not is_module:
        return None
    return shlex.join(["arriero", *sys.argv[1:]]).encode("utf-8", "replace").decode("utf-8")


def machine() -> dict[str, Any]:
    """The machine's processor, processors, memory and system."""
    return {
        "processor": processor(),
        "processors": processors(),
        "memory_bytes": memory(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def machine_text(found: dict[str, Any]) -> str:
    """A machine in words."""
    parts = [str(found.get("processor") or "an unknown processor")]
    if count := found.get("processors"):
        parts.append(f"{count} processor{'s' if count > 1 else ''}")
    if held := found.get("memory_bytes"):
        parts.append(f"{held / 1e9:.0f} GB")
    if system := found.get("system"):
        parts.append(str(system))
    return ", ".join(parts)


def versions() -> dict[str, str]:
    """Arriero's version, Python's, and those of the libraries that are installed."""
    found = {"arriero": __version__, "python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def processor() -> str:
    """The processor's name as the kernel gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except (OSError, ValueError):
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine() or "unknown")


def memory() -> int | None:
    """Bytes of memory; None where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None
