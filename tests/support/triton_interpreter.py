"""Triton kernels run on the CPU by Triton's interpreter, in a process of its own.

Triton decides when it is imported whether its functions are compiled or interpreted, and other tests compile them. What
an op's plan launches goes to that process with its arrays; pointers are names of arrays.
"""

import importlib
import multiprocessing
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import numpy as np

from arriero.plugins.launch import Kernel, Launch

Array = np.ndarray[Any, Any]


class Interpreter:
    """The process. One serves a whole test session; see the fixture `interpreter`."""

    def __init__(self) -> None:
        self.pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), start)

    def run(
        self, module: str, kernels: Iterable[Kernel], launches: Iterable[Launch], arrays: Mapping[str, Array]
    ) -> dict[str, Array]:
        """Runs the launches in order, on copies of the arrays.

        Args:
            module: Full name of the module of the Triton functions.
            kernels: Those launched, and perhaps others.
            launches: Arguments that are texts name arrays.
            arrays: By name; bfloat16 and E4M3 in ml_dtypes' types. Float32 ones may stand for bfloat16 and float16:
                the interpreter takes types from its arguments.

        Returns:
            All arrays as the launches left them.
        """
        return self.pool.submit(execute, module, list(kernels), list(launches), dict(arrays)).result()

    def close(self) -> None:
        self.pool.shutdown()


def start() -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    correct()


def correct() -> None:
    """Makes the interpreter round as a GPU does.

    Of its own it truncates to bfloat16, rounds wrongly to E4M3, and computes with bfloat16's bits as with integers.
    """
    import ml_dtypes
    import triton.language as tl
    from triton.runtime import interpreter
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    narrow = {tl.bfloat16: ml_dtypes.bfloat16, tl.float8e4nv: ml_dtypes.float8_e4m3fn}
    binary_op = InterpreterBuilder.binary_op

    def convert(array: Array, source: Any, target: Any, _: Any) -> Array:
        floats = array.view(narrow[source]) if source in narrow else array
        if target in narrow:
            return floats.astype(np.float32).astype(narrow[target]).view(interpreter._get_np_dtype(target))
        return floats.astype(interpreter._get_np_dtype(target)).view(f"u{target.primitive_bitwidth // 8}")

    def floats(x: Any) -> Array:
        return x.data.view(narrow[x.dtype.scalar]).astype(np.float32) if x.dtype.scalar in narrow else x.data

    def dot(_: Any, a: Any, b: Any, total: Any, *__: Any) -> Any:
        return TensorHandle(np.matmul(floats(a), floats(b), dtype=total.data.dtype) + total.data, total.dtype.scalar)

    def binary(builder: Any, a: Any, b: Any, function: Any) -> Any:
        if a.dtype.scalar != tl.bfloat16:
            return binary_op(builder, a, b, function)
        result = function(floats(a), floats(b))
        return TensorHandle(result, tl.int1) if result.dtype == bool else bfloat16(result)

    def bfloat16(array: Array) -> Any:
        return TensorHandle(array.astype(ml_dtypes.bfloat16).view(np.uint16), tl.bfloat16)

    interpreter._convert_float = convert
    InterpreterBuilder.create_dot = dot
    InterpreterBuilder.binary_op = binary
    InterpreterBuilder.get_bf16 = lambda _, value: bfloat16(np.array([value]))


def execute(module: str, kernels: list[Kernel], launches: list[Launch], arrays: dict[str, Array]) -> dict[str, Array]:
    functions = importlib.import_module(module)
    by_name = {kernel.name: kernel for kernel in kernels}
    tensors = {name: to_torch(array) for name, array in arrays.items()}
    for launch in launches:
        kernel = by_name[launch.kernel]
        arguments = [tensors[each] if isinstance(each, str) else each for each in launch.arguments]
        named = dict(zip(kernel.signature, arguments, strict=True))
        getattr(functions, kernel.function)[launch.grid](**named, **kernel.constants)
    return {name: to_numpy(tensors[name], array.dtype) for name, array in arrays.items()}


def to_torch(array: Array) -> Any:
    import torch

    types = {"bfloat16": (np.int16, torch.bfloat16), "float8_e4m3fn": (np.uint8, torch.float8_e4m3fn)}
    if array.dtype.name in types:
        view, dtype = types[array.dtype.name]
        return torch.from_numpy(array.view(view).copy()).view(dtype)
    return torch.from_numpy(array.copy())


def to_numpy(tensor: Any, dtype: np.dtype[Any]) -> Array:
    import torch

    views = {torch.bfloat16: torch.int16, torch.float8_e4m3fn: torch.uint8}
    return tensor.view(views[tensor.dtype]).numpy().view(dtype) if tensor.dtype in views else tensor.numpy()
