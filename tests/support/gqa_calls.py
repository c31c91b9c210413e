"""Calls of grouped-query attention's kernels over the op's cases, for tests and for the table of kernels."""

from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
from triton_interpreter import Interpreter

from arriero.plugins.gqa.cases import Case
from arriero.plugins.gqa.meaning import grouped_query_attention
from arriero.plugins.gqa.plan import MODULE, Geometry, Plan, Schedule
from arriero.plugins.launch import COUNTERS

Array = np.ndarray[Any, Any]
Arrays = dict[str, Array]

FORMS = (Schedule(form="few", splits=3), Schedule(form="some", splits=2), Schedule(form="many"))
"""Every form of `attend`, for calls too small to get it from the plan."""

ONE = Schedule(form="one", splits=3)
"""The way of a token a row."""


def forms_of(case: Case) -> tuple[Schedule, ...]:
    """The forms that a case can take."""
    return (ONE, *FORMS) if case.length == 1 else FORMS


DTYPES: dict[str, Any] = {"bf16": ml_dtypes.bfloat16, "fp16": np.float16, "fp32": np.float32}
"""Numpy's types by the plan's names; in the interpreter, `fp32` is the kernels' arithmetic without their rounding."""


def geometry_of(case: Case, dtype: Any) -> Geometry:
    a = case.attributes
    return Geometry(attributes=a, head_dim=case.head_dim, rope=case.rope, dtype=dtype, cache=case.cache)


def inputs_of(case: Case, dtype: str) -> Arrays:
    """The op's inputs; activations, and caches that are not quantised, rounded to that type."""
    names = ("query", "key", "value", "key_cache", "value_cache")
    return {
        name: array.astype(DTYPES[dtype]) if name in names and array.dtype == np.float32 else array
        for name, array in case.inputs().items()
        if array is not None
    }


def meaning_of(case: Case, inputs: Arrays) -> Arrays:
    given: dict[str, Any] = {"inv_freq": None, **inputs}
    outputs = grouped_query_attention(**given, attributes=case.attributes)
    return dict(zip(("output", "key_cache", "value_cache"), outputs, strict=True))


def shapes_of(case: Case) -> tuple[int, int, int]:
    return len(case.past), case.length, case.capacity


def interpret(
    interpreter: Interpreter,
    case: Case,
    inputs: Arrays,
    dtype: str,
    schedule: Schedule | None = None,
    order: int | None = None,
    *,
    fused: bool = False,
) -> Arrays:
    """Output and caches as the kernels leave them, in float64; what they must write is NaN before."""
    plan = Plan(replace(geometry_of(case, "bf16" if dtype == "fp32" else dtype), fused=fused), 90)
    buffers = plan.workspace(*shapes_of(case), schedule)
    arrays = {
        **inputs,
        "output": np.full_like(inputs["query"], np.nan),
        "counters": np.zeros(COUNTERS, np.int32),
        **{
            name: np.full(buffer.shape, np.nan, DTYPES[dtype] if name == "queries" else np.float32)
            for name, buffer in buffers.items()
        },
    }
    if fused:
        arrays["query"] = np.concatenate([arrays.pop(name) for name in ("query", "key", "value")], 2)
        arrays |= dict.fromkeys(("key", "value"), arrays["query"])
    launches = plan.launches({name: name for name in arrays}, *shapes_of(case), schedule)
    after = interpreter.run(MODULE, plan.kernels, launches, arrays, order)
    assert not after["counters"].any(), "the next launch would take these for its own"
    return {name: after[name].astype(np.float64) for name in ("output", "key_cache", "value_cache")}
