"""The expert kernels' launches over the op's cases, in Triton's interpreter: for tests, and for the table of errors."""

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
from triton_interpreter import Interpreter

from arriero.plugins.launch import COUNTERS
from arriero.plugins.moe import plan
from arriero.plugins.moe.cases import Case
from arriero.plugins.moe.kernel_geometry import Geometry
from arriero.plugins.moe.plan import Plan

Array = np.ndarray[Any, Any]

TYPES: dict[str, Any] = {
    "bf16": ml_dtypes.bfloat16,
    "fp16": np.float16,
    "fp32": np.float32,
    "i32": np.int32,
    "i8": np.int8,
    "u8": np.uint8,
    "fp8e4nv": ml_dtypes.float8_e4m3fn,
}

WAYS: dict[str, tuple[int, int]] = {"few": (16, 16), "some": (0, 10**6), "many": (0, 0)}
"""The thresholds that send a call each way."""


def plan_of(case: Case, way: str, dtype: str = "bf16", capability: int = 90, **others: Any) -> Plan:
    """A plan that sends the case that way."""
    geometry = Geometry(
        **{name: getattr(case, name) for name in ("hidden", "expert_size", "experts", "attributes", "group", "static")},
        dtype=dtype,
        **{"local_experts": case.weights, "first_expert": case.attributes.first_expert, **others},
    )
    few, some = WAYS[way]
    return Plan(geometry, capability, few=few, some=some)


def inputs_of(case: Case, dtype: Any) -> dict[str, Array]:
    """The case's inputs with the floats that a graph of that type has: all but scales and quantised weights."""
    return {
        name: array.astype(dtype) if array.dtype == np.float32 and not name.endswith("_scale") else array
        for name, array in case.inputs().items()
    }


def packed(array: Array) -> Array:
    """Four-bit weights as ONNX packs them; others as they are."""
    if array.dtype != ml_dtypes.int4:
        return array
    halves = array.astype(np.int8).view(np.uint8) & 15
    return halves[..., 0::2] | halves[..., 1::2] << 4


def interpret(interpreter: Interpreter, moe: Plan, inputs: Mapping[str, Array], order: int | None = None) -> Array:
    """The output of the plan's launches, from scratch memory that is full of rubbish; in float32 where inputs are."""
    tokens, hidden = inputs["hidden"].shape
    types = {**TYPES, moe.geometry.dtype: inputs["hidden"].dtype}
    arrays = {name: packed(array) for name, array in inputs.items()}
    for name, buffer in moe.workspace(tokens).items():
        arrays[name] = np.full(buffer.shape, 77, types[buffer.dtype])
    arrays["counters"] = np.zeros(COUNTERS, np.int32)
    arrays["output"] = np.full((tokens, hidden), np.nan, inputs["hidden"].dtype)
    launches = moe.launches({name: name for name in arrays}, tokens)
    after = interpreter.run(plan.MODULE, moe.kernels, launches, arrays, order)
    assert not after["counters"].any(), "the next launch would take these for its own"
    return after["output"].astype(np.float64)


def ways_of(case: Case) -> list[str]:
    """The ways that a case goes here: each that it can go if it is small, for the interpreter is slow."""
    pairs = case.tokens * case.attributes.top_k
    if pairs > 100:
        return ["many"]
    if case.experts > 100:
        return ["few"] if case.attributes.quantisation == "int8" else ["few", "some"]
    return ["few", "some", "many"] if pairs <= 16 else ["some", "many"]
