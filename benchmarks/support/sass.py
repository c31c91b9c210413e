"""A kernel's machine code read: its main loop, its registers, programs a multiprocessor. For `machine_code`; no GPU.

The main loop is, of all stretches that end with a branch back to their beginning, the one with the most matrix
instructions, and of equals the shortest.
"""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from arriero.plugins import triton_compiler as kernels
from arriero.plugins.triton_compiler import Compiled

KINDS = {
    "matrix": r"[HQIO]GMMA|[HQIO]MMA|UTC[HQIO]MMA",
    "copies": r"LDGSTS|UTMALDG|UBLKCP",
    "loads": r"LDG|LD$",
    "to shared": r"STS|STSM",
    "from shared": r"LDS|LDSM|LDT|LDTM",
    "special": r"MUFU",
    "float": r"F(?:ADD|MUL|FMA|MNMX|SEL|SETP)2?|H(?:ADD|MUL|FMA|MNMX)2|I2F\w*|F2F\w*|F2I\w*",
    "waiting": r"BAR|WARPGROUP|DEPBAR|LDGDEPBAR|SYNCS|WARPSYNC|FENCE|ARRIVES|UTCBAR|NANOSLEEP",
}
"""Kinds of instructions by their opcodes; the others, addresses and branches mostly, are `other`."""

THREADS = {80: 2048, 86: 1536, 89: 1536, 90: 2048, 100: 2048, 103: 2048, 120: 1536, 121: 1536}
"""Threads of a multiprocessor (CUDA C++ Programming Guide, technical specifications)."""

SHARED = {80: 164, 86: 100, 89: 100, 90: 228, 100: 228, 103: 228, 120: 100, 121: 100}
"""KiB of shared memory of a multiprocessor, of which each program's share has 1 KiB more than it asks for."""

REGISTERS = 65536
"""Registers of a multiprocessor, given out to a warp 256 at a time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MachineCode:
    """One kernel's machine code in numbers.

    Attributes:
        loop: Instructions of the main loop, by kind.
        registers: Registers a thread.
        spilled: Bytes that a thread keeps in memory for want of registers.
        shared: Bytes of shared memory.
        warps: Warps of a program.
        resident: Programs that share a multiprocessor.
    """

    loop: Mapping[str, int]
    registers: int
    spilled: int
    shared: int
    warps: int
    resident: int


def read(compiled: Compiled) -> MachineCode:
    """Disassembles a kernel."""
    binary, used = compiled.binary, kernels.usage(compiled)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.cubin)
        file.flush()
        command = [str(kernels.TOOLS / "nvdisasm"), "-c", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    warps = binary.threads // 32
    registers = warps * (-(-used.registers * 32 // 256) * 256)
    resident = min(
        32,
        THREADS[binary.capability] // binary.threads,
        REGISTERS // registers,
        SHARED[binary.capability] * 1024 // (binary.shared + 1024),
    )
    return MachineCode(
        loop=main_loop(text),
        registers=used.registers,
        spilled=used.spilled,
        shared=binary.shared,
        warps=warps,
        resident=resident,
    )


def main_loop(text: str) -> dict[str, int]:
    """The instructions of the main loop of nvdisasm's listing, by kind."""
    opcodes, labels, loops = list[str](), dict[str, int](), list[tuple[int, int]]()
    for line in text.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = len(opcodes)
        elif found := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@\S+\s+)?([A-Z][A-Z0-9_]*)", line):
            opcodes.append(found[1])
            target = re.search(r"`\((\.L_x_\d+)\)", line)
            if found[1] == "BRA" and target and target[1] in labels:
                loops.append((labels[target[1]], len(opcodes)))
    bodies = [Counter(map(kind_of, opcodes[start:end])) for start, end in loops]
    return dict(max(bodies, key=lambda body: (body["matrix"], -body.total()), default={}))


def kind_of(opcode: str) -> str:
    """The kind of an instruction."""
    return next((kind for kind, pattern in KINDS.items() if re.fullmatch(pattern, opcode)), "other")
