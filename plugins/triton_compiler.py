"""Triton kernels compiled ahead of time, without a GPU, and what their machine code uses.

Enters: a `launch.Kernel` and the module whose Triton function it names. Leaves: a cubin with a `spec.Binary` that
says how to launch it.
"""

import contextlib
import hashlib
import inspect
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ..errors import BuildError
from ..files.output import unwritable
from ..spec.built_engine import Binary
from .launch import Kernel

CAPABILITIES = (80, 86, 89, 90, 100, 103, 120, 121)
"""Compute capabilities that kernels are compiled for; those from 90 on with architecture-specific instructions."""

SHARED = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 103: 227, 120: 99, 121: 99}
"""KiB of shared memory that a program may have (CUDA C++ Programming Guide, technical specifications)."""

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True, kw_only=True, slots=True)
class Compiled:
    """A compiled kernel: its record in a bundle, its machine code, and its PTX."""

    binary: Binary
    cubin: bytes
    ptx: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Usage:
    """Resources of a kernel's machine code: registers a thread, bytes spilled, and its matrix instructions."""

    registers: int
    spilled: int
    matrix_instructions: tuple[str, ...]


def compile_kernel(module: ModuleType, kernel: Kernel, capability: int) -> Compiled:
    """Compiles one kernel for one compute capability.

    Args:
        module: Where the Triton function is.
        kernel: The specialisation.
        capability: One of `CAPABILITIES`.

    Raises:
        BuildError: The kernel does not fit that GPU's shared memory.
    """
    function = getattr(module, kernel.function)
    order = list(inspect.signature(function.fn).parameters)
    types = {name: kernel.signature.get(name, "constexpr") for name in order}
    missing = [name for name in order if types[name] == "constexpr" and name not in kernel.constants]
    assert not missing, f"{kernel.name}: {missing} have neither type nor value"
    aligned = [name for name in order if types[name].startswith("*") or name in kernel.aligned]
    source = ASTSource(
        function,
        signature=types,
        constexprs=kernel.constants,
        attrs={(order.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    options = {"num_warps": kernel.warps, "num_stages": kernel.stages, "sanitize_overflow": False}
    options["launch_pdl"] = kernel.dependent
    with _cache():
        built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert built.metadata.global_scratch_size == 0
    if built.metadata.shared > SHARED[capability] * 1024:
        raise BuildError(
            f"{kernel.name} wants {built.metadata.shared} bytes of shared memory, sm{capability} has "
            f"{SHARED[capability] * 1024}: build for another GPU, or attention with --gqa native"
        )
    cubin = built.asm["cubin"]
    binary = Binary(
        kernel=kernel.name,
        capability=capability,
        file=f"{kernel.name}.sm{capability}.cubin",
        entry=built.metadata.name,
        parameters=tuple(types[name] for name in order if types[name] != "constexpr"),
        threads=built.metadata.num_warps * 32,
        shared=built.metadata.shared,
        sha256=hashlib.sha256(cubin).hexdigest(),
        dependent=kernel.dependent,
    )
    return Compiled(binary=binary, cubin=cubin, ptx=built.asm["ptx"])


@contextlib.contextmanager
def _cache() -> Iterator[None]:
    """Triton's cache of what it has compiled is a temporary folder where its own cannot be written."""
    if unwritable(Path(triton.knobs.cache.dir)) is None:
        yield
        return
    with triton.knobs.cache.scope(), tempfile.TemporaryDirectory(prefix="arriero-triton-") as folder:
        triton.knobs.cache.dir = folder
        yield


def usage(compiled: Compiled) -> Usage:
    """Reads registers and spills from the cubin, and the matrix instructions from the PTX."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.cubin)
        file.flush()
        command = [str(TOOLS / "cuobjdump"), "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    instructions = re.findall(r"\b(?:wgmma\.mma_async|tcgen05\.mma|mma\.sync)[\w.:]*", compiled.ptx)
    return Usage(
        registers=found["REG"],
        spilled=found["STACK"] + found["LOCAL"],
        matrix_instructions=tuple(sorted(set(instructions))),
    )
