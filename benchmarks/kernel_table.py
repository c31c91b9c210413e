"""What the ops' Triton kernels use of each GPU, and how far they are from the ops' meaning. No GPU is needed.

Kernels are compiled ahead of time for Llama 4's geometry; registers and spills are read from the machine code, matrix
instructions from the PTX. Errors are the largest over the op's cases against float64, in Triton's interpreter, where
`fp32` is the kernels' arithmetic without the rounding of bf16 and fp16.

    python benchmarks/kernel_table.py [--capabilities 90 100] [--json FILE]
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "support"))

from gqa_calls import DTYPES, FORMS, inputs_of, interpret, meaning_of
from triton_interpreter import Interpreter

from arriero.errors import BuildError
from arriero.plugins.gqa import cases as gqa_cases
from arriero.plugins.gqa import op as gqa_op
from arriero.plugins.gqa import plan as gqa_plan
from arriero.plugins.launch import Kernel


@dataclass(frozen=True, kw_only=True, slots=True)
class Error:
    """The largest difference of an output from the meaning, over the cases of one kind, by one path, in one type."""

    op: str
    kind: str
    path: str
    dtype: str
    largest: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Op:
    """What the table needs of an op: its kernels on a capability, their module, and its errors."""

    module: str
    kernels: Callable[[int], Iterator[Kernel]]
    errors: Callable[[Interpreter], Iterator[Error]]


def gqa_kernels(capability: int) -> Iterator[Kernel]:
    sizes = {"heads": 40, "kv_heads": 8, "scale": 128**-0.5}
    layers = (
        gqa_op.Attributes(**sizes, chunk=8192, qk_norm_eps=1e-5),
        gqa_op.Attributes(**sizes, temperature_scale=0.1, temperature_floor=8192.0),
    )
    for cache in ("none", "int8", "fp8"):
        for layer in layers:
            geometry = gqa_plan.Geometry(
                attributes=layer, head_dim=128, rope=layer.chunk > 0, dtype="bf16", cache=cache
            )
            try:
                yield from gqa_plan.Plan(geometry, capability).kernels
            except BuildError:
                continue  # no E4M3 there


def gqa_errors(interpreter: Interpreter) -> Iterator[Error]:
    for cache in ("none", "int8", "fp8"):
        cases = [case for case in gqa_cases.CASES + gqa_cases.QUANTISED_CASES if case.cache == cache]
        for schedule in FORMS:
            for dtype in DTYPES:
                largest = 0.0
                for case in cases:
                    inputs = inputs_of(case, dtype)
                    found = interpret(interpreter, case, inputs, dtype, schedule)["output"]
                    largest = max(largest, float(abs(found - meaning_of(case, inputs)["output"]).max()))
                yield Error(op="gqa", kind=f"{cache} cache", path=schedule.form, dtype=dtype, largest=largest)


OPS = (Op(module=gqa_plan.MODULE, kernels=gqa_kernels, errors=gqa_errors),)


def usage(capabilities: Iterable[int]) -> list[dict[str, Any]]:
    # Imported here alone: the interpreter's process imports this script, and must not import Triton with it.
    from arriero.plugins import kernels

    rows = []
    for op in OPS:
        for capability in capabilities or kernels.CAPABILITIES:
            for kernel in {kernel.name: kernel for kernel in op.kernels(capability)}.values():
                compiled = kernels.compile_kernel(import_module(op.module), kernel, capability)
                used = asdict(kernels.usage(compiled))
                rows.append({"kernel": kernel.name, "capability": capability, "shared": compiled.binary.shared, **used})
    return rows


def usage_table(rows: list[dict[str, Any]]) -> Table:
    table = Table("kernel", "sm", "registers", "shared, KiB", "spilled, B", "matrix instruction")
    for row in rows:
        instructions = sorted({name.split(".")[0] for name in row["matrix_instructions"]})
        table.add_row(
            row["kernel"],
            str(row["capability"]),
            str(row["registers"]),
            f"{row['shared'] / 1024:.1f}",
            str(row["spilled"]),
            ", ".join(instructions),
        )
    return table


def error_table(errors: list[Error]) -> Table:
    table = Table("op", "cases", "path", "type", "largest error")
    for error in errors:
        table.add_row(error.op, error.kind, error.path, error.dtype, f"{error.largest:.1e}")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description="What the kernels use, and their errors.")
    parser.add_argument("--capabilities", type=int, nargs="*", default=())
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    console = Console()
    used = usage(arguments.capabilities)
    console.print(usage_table(used))

    interpreter = Interpreter()
    errors = [error for op in OPS for error in op.errors(interpreter)]
    interpreter.close()
    console.print(error_table(errors))
    if arguments.json:
        arguments.json.write_text(json.dumps({"usage": used, "errors": [asdict(error) for error in errors]}, indent=1))


if __name__ == "__main__":
    main()
