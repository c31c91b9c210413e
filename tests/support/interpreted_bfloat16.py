"""bfloat16 as a GPU has it, in Triton's interpreter.

The interpreter (3.7.1) keeps bfloat16 as its bits. It multiplies those bits in `tl.dot`, converts integers to them, and
truncates where a GPU rounds to nearest even. Here each goes by way of float32, which holds every bfloat16.
"""

from typing import Any

import ml_dtypes
import numpy as np


def teach() -> None:
    """Changes the interpreter of this process."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    dot, cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl

    def widened(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return TensorHandle(handle.data.view(ml_dtypes.bfloat16).astype(np.float32), tl.float32)

    def create_dot(self: Any, a: Any, b: Any, *others: Any) -> Any:
        return dot(self, widened(a), widened(b), *others)

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        wide = widened(source)
        if target.scalar != tl.bfloat16:
            return cast(self, wide, target)
        rounded = wide.data.astype(np.float32).astype(ml_dtypes.bfloat16)
        return TensorHandle(rounded.view(np.uint16), tl.bfloat16)

    InterpreterBuilder.create_dot = create_dot
    InterpreterBuilder.cast_impl = cast_impl  # every create_… of a conversion calls it
