"""Triton kernels run on the CPU by Triton's interpreter, in a process of its own.

Triton decides when it is imported whether its functions are compiled or interpreted, and other tests compile them. What
an op's plan launches goes to that process with its arrays; pointers are names of arrays.
"""

import contextlib
import importlib
import multiprocessing
import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import interpreted_floats
import numpy as np
import patched_once

from arriero.plugins.launch import Kernel, Launch

Array = np.ndarray[Any, Any]


class Interpreter:
    """The process. One serves a whole test session; see the fixture `interpreter`."""

    def __init__(self) -> None:
        self.pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), start)

    def run(
        self,
        module: str,
        kernels: Iterable[Kernel],
        launches: Iterable[Launch],
        arrays: Mapping[str, Array],
        order: int | None = None,
    ) -> dict[str, Array]:
        """Runs the launches in order, on copies of the arrays.

        Args:
            module: Full name of the module of the Triton functions.
            kernels: Those launched, and perhaps others.
            launches: Arguments that are texts name arrays.
            arrays: By name; bfloat16 and E4M3 in ml_dtypes' types. Float32 ones may stand for bfloat16 and float16,
                for errors of rounding aside: the interpreter takes types from its arguments.
            order: Draws the order in which a launch's programs run; None takes them by their numbers.

        Returns:
            All arrays as the launches left them.
        """
        return self.pool.submit(execute, module, list(kernels), list(launches), dict(arrays), order).result()

    def close(self) -> None:
        self.pool.shutdown()


def start() -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    patched_once.hasten()
    interpreted_floats.teach()


def execute(
    module: str, kernels: list[Kernel], launches: list[Launch], arrays: dict[str, Array], order: int | None
) -> dict[str, Array]:
    functions = importlib.import_module(module)
    by_name = {kernel.name: kernel for kernel in kernels}
    tensors = {name: to_torch(array) for name, array in arrays.items()}
    for launch in launches:
        kernel = by_name[launch.kernel]
        arguments = [tensors[each] if isinstance(each, str) else each for each in launch.arguments]
        named = dict(zip(kernel.signature, arguments, strict=True))
        with programs_in_order(launch.grid, order):
            getattr(functions, kernel.function)[launch.grid](**named, **kernel.constants)
    return {name: to_numpy(tensors[name], array.dtype) for name, array in arrays.items()}


@contextlib.contextmanager
def programs_in_order(grid: tuple[int, int, int], order: int | None) -> Iterator[None]:
    """Has the interpreter run programs in a drawn order: it is told other numbers than those it counts up."""
    from triton.runtime.interpreter import InterpreterBuilder

    tell = InterpreterBuilder.set_grid_idx
    if order is not None:
        drawn = np.random.default_rng(order).permutation(int(np.prod(grid)))

        def told(self: Any, *place: int) -> None:
            tell(self, *(int(each) for each in np.unravel_index(drawn[np.ravel_multi_index(place, grid)], grid)))

        InterpreterBuilder.set_grid_idx = told
    try:
        yield
    finally:
        InterpreterBuilder.set_grid_idx = tell


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
