"""Sessions on a GPU that is not there, in a process of their own, whose Triton interprets.

`Gpu.run` calls a function there, of `gpu_scenes` where its name has no other module; what enters and leaves is
pickled.
"""

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from typing import Any


class Gpu:
    """The process. One serves a whole test session; see the fixture `gpu`."""

    def __init__(self) -> None:
        self.pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), start)

    def run(self, scene: str, **given: Any) -> Any:
        """Plays a scene. Returns what it returns."""
        return self.pool.submit(play, scene, given).result()

    def close(self) -> None:
        self.pool.shutdown()


def start() -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    import executed_kernels
    import interpreted_floats
    import patched_once

    patched_once.hasten()
    interpreted_floats.teach()
    executed_kernels.watch_accesses()


def play(scene: str, given: dict[str, Any]) -> Any:
    module, _, name = scene.rpartition(".")
    return getattr(import_module(module or "gpu_scenes"), name)(**given)
