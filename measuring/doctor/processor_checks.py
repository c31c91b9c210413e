"""The processor, its threads, and the libraries that compute on it."""

import importlib.metadata
import os
import platform
import sys
from pathlib import Path

from ...errors import SessionError
from ...files.circumstances import processor
from ...files.control_groups import legacy_groups, number, unified_groups
from ...files.processors import processor_quota, processors
from ...plugins.cpu.library import DOMAIN, library
from ...runtime.room import check_threads
from ...spec.folder import FolderSpec
from .finding import Finding, found, ok, seen, unchecked

FEATURES = Path("/proc/cpuinfo")
SETS = {
    "x86_64": (("AVX-512", {"avx512_vnni", "avx512dq", "avx2", "fma"}), ("AVX2", {"avx2", "fma"})),
    "aarch64": (("dot products", {"asimddp"}),),
}
"""Instruction sets that the kernels are compiled for, the best first, and the features that each needs: those that
`plugins/cpu/instruction_sets.h` asks the processor for."""

SPARE_THREADS = 24
"""Threads that a server has beside those that compute."""


def check_processor(spec: FolderSpec | None) -> list[Finding]:
    """Looks at processor, threads, ONNX Runtime and the kernels."""
    if spec is not None and spec.engine is not None:
        return [ok("processor", f"{processor()}, {platform.machine()}"), seen("threads", lambda: _threads(None))]
    return [_instructions(), seen("ONNX Runtime", _runtime), seen("kernels", _kernels)]


def _instructions() -> Finding:
    name, machine = processor(), {"amd64": "x86_64", "arm64": "aarch64"}.get(platform.machine().lower())
    sets = SETS.get(machine or platform.machine())
    features = _features()
    if sets is None or not features:
        return unchecked("processor", f"{name}, {platform.machine()}: its features cannot be read here")
    best = next((words for words, asked in sets if asked <= features), None)
    asked = os.environ.get("ARRIERO_INSTRUCTION_SET")
    if asked in ("avx2", "any") and best is not None:
        return found(
            "processor",
            f"{name} has {best}, and ARRIERO_INSTRUCTION_SET={asked} asks for less: unset it, unless you compare",
        )
    if best is None:
        words = sets[-1][0]
        return found(
            "processor",
            f"{name} has no {words}, without which models take many times as long: give a virtual machine "
            "the host's features (as -cpu host), or take a processor that has it",
        )
    return ok("processor", f"{name}, {platform.machine()}, kernels for {best or 'any processor'}")


def _features() -> set[str]:
    """The features that the kernel lists of the first processor; none where it lists none."""
    try:
        lines = FEATURES.read_text("utf-8").splitlines()
    except (OSError, ValueError):
        return set()
    named = (line.partition(":")[2].split() for line in lines if line.lower().startswith(("flags", "features")))
    return set(next(named, []))


def _runtime() -> str:
    from ...runtime.backends.onnxruntime_package import installed, ort

    name = next(iter(installed()), "onnxruntime")
    wanted = [each for each in importlib.metadata.requires("arriero") or () if each.startswith("onnxruntime==")]
    series = wanted[0].partition("==")[2].partition("*")[0] if wanted else ""
    if not str(ort.__version__).startswith(series):
        raise SessionError(
            f"{name} is {ort.__version__}, this Arriero is tested with {series}*: pip install 'arriero[cpu]'"
        )
    return f"{name} {ort.__version__}"


def _kernels() -> str:
    from ...runtime.backends.onnxruntime_package import ort

    path = library()
    try:
        ort.SessionOptions().register_custom_ops_library(str(path))
    except Exception as error:  # ONNX Runtime's own, of several classes
        said = str(error)[:200]
        raise SessionError(
            f"{path} does not load ({said}): install Arriero again on this machine: "
            "pip install --force-reinstall --no-deps arriero"
        ) from error
    return f"{path.name} loads, domain {DOMAIN}"


def check_thread_count(threads: int | None) -> Finding:
    """Looks at the threads that are asked for, and at what limits them."""
    return seen("threads", lambda: _threads(threads))


def _threads(threads: int | None) -> Finding:
    count, quota = check_threads(threads), processor_quota()
    most = _most_tasks()
    if most is not None and most < count + SPARE_THREADS:
        return found(
            "threads",
            f"{count} threads and {SPARE_THREADS} of a server are wanted, {most} are left of the container's limit of "
            "processes: raise it (--pids-limit, TasksMax)",
        )
    allowed = os.cpu_count() or 1
    limit = f", a quota of {quota:g} processors" if quota is not None else ""
    return ok("threads", f"{count} to compute with, of {processors()} processors allowed and {allowed} there{limit}")


def _most_tasks() -> int | None:
    """Threads that the control groups, or this user's own limit, leave; None where nothing limits them."""
    left = []
    for folder in (*unified_groups(), *legacy_groups("pids")):
        limit, used = number(folder / "pids.max"), number(folder / "pids.current")
        if limit is not None:
            left.append(limit - (used or 0))
    if sys.platform != "win32":
        import resource

        limit = resource.getrlimit(resource.RLIMIT_NPROC)[0]
        if limit != resource.RLIM_INFINITY and os.geteuid():
            left.append(limit)
    return min(left, default=None)
