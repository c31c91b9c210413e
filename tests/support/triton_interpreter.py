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

import interpreted_floats
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
            arrays: By name; bfloat16 and E4M3 in ml_dtypes' types. Float32 ones may stand for bfloat16 and float16,
                for errors of rounding aside: the interpreter takes types from its arguments.

        Returns:
            All arrays as the launches left them.
        """
        return self.pool.submit(execute, module, list(kernels), list(launches), dict(arrays)).result()

    def close(self) -> None:
        self.pool.shutdown()


def start() -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    interpreted_floats.teach()


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
