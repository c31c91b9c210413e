"""Triton kernels of the ops: what they use of each GPU, and how far they are from the ops' meaning. No GPU is needed.

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

import ml_dtypes
import numpy as np
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "support"))

import moe_calls
from gqa_calls import DTYPES, FORMS, inputs_of, interpret, meaning_of
from triton_interpreter import Interpreter

from arriero.errors import BuildError
from arriero.plugins.gqa import cases as gqa_cases
from arriero.plugins.gqa import op as gqa_op
from arriero.plugins.gqa import plan as gqa_plan
from arriero.plugins.launch import Kernel
from arriero.plugins.moe import cases as moe_cases
from arriero.plugins.moe import op as moe_op
from arriero.plugins.moe import plan as moe_plan
from arriero.plugins.moe.kernel_geometry import Geometry
from arriero.plugins.moe.meaning import moe_dispatch


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
    """An op as the table needs it: its kernels on a capability, their module, and its errors."""

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


def moe_kernels(capability: int) -> Iterator[Kernel]:
    for kind in ("none", "int8", "fp8", "int4"):
        if kind == "fp8" and capability < 89:
            continue  # no E4M3 there
        scale = "bf16" if kind == "int4" else "fp32"
        attributes = moe_op.Attributes(top_k=1, quantisation=kind)  # type: ignore[arg-type]
        group = 128 if kind == "int4" else 0
        sizes = {"hidden": 5120, "expert_size": 8192, "experts": 16}
        yield from moe_plan.Plan(Geometry(**sizes, attributes=attributes, group=group, scale=scale), capability).kernels


def moe_errors(interpreter: Interpreter) -> Iterator[Error]:
    for kind in ("none", "int8", "fp8", "int4"):
        cases = [case for case in moe_cases.CASES + moe_cases.QUANTISED_CASES if case.attributes.quantisation == kind]
        for way in moe_calls.WAYS:
            for name, dtype in (("fp32", np.float32), ("bf16", ml_dtypes.bfloat16), ("fp16", np.float16)):
                if kind == "int4" and name == "fp32":
                    continue  # its weights are unpacked into 16 bits
                largest = 0.0
                for case in cases:
                    if way not in moe_calls.ways_of(case) or case.tokens * case.hidden > 1 << 16:
                        continue
                    inputs = moe_calls.inputs_of(case, dtype)
                    narrow = "fp16" if name == "fp16" else "bf16"
                    found = moe_calls.interpret(interpreter, moe_calls.plan_of(case, way, narrow), inputs)
                    exact = {key: x.astype(np.float32) if x.dtype == dtype else x for key, x in inputs.items()}
                    expected = moe_dispatch(**exact, attributes=case.attributes)
                    largest = max(largest, float(abs(found - expected).max()))
                yield Error(op="moe", kind=f"{kind} experts", path=way, dtype=name, largest=largest)


OPS = (
    Op(module=gqa_plan.MODULE, kernels=gqa_kernels, errors=gqa_errors),
    Op(module=moe_plan.MODULE, kernels=moe_kernels, errors=moe_errors),
)


def usage(capabilities: Iterable[int]) -> list[dict[str, Any]]:
    # Imported here alone: the interpreter's process imports this script, and must not import Triton with it.
    from arriero.plugins import triton_compiler as kernels

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
