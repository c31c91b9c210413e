"""The plugins' objects as an engine has them, over a device's memory and captured into graphs: no engine is needed.

Enter: a device, real or the one that executes, and a case of an op's table. Leaves: what a call gave at once and what
its graph gave for other inputs, beside the op's meaning. Each plugin is asked for its scratch memory, serialised, made
again, attached to a context and told its shapes, as TensorRT does.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gqa_calls
import moe_calls
import numpy as np
from walked_engine import ONNX, TRT

from arriero.engine.tensorrt_library import open_library
from arriero.plugins.gqa.cases import CASES as ATTENTION
from arriero.plugins.gqa.cases import QUANTISED_CASES as QUANTISED_ATTENTION
from arriero.plugins.gqa.plugin import PLUGIN as GQA
from arriero.plugins.gqa.plugin import Settings
from arriero.plugins.launch import Kernel
from arriero.plugins.moe.cases import CASES as EXPERTS
from arriero.plugins.moe.cases import QUANTISED_CASES as QUANTISED_EXPERTS
from arriero.plugins.moe.meaning import moe_dispatch
from arriero.plugins.moe.plugin import PLUGIN as MOE
from arriero.plugins.tensorrt_plugin import PluginOp, register
from arriero.runtime.backends.device import Device, DeviceMemory
from arriero.runtime.backends.execution import load_kernels
from arriero.spec.built_engine import Binary

Array = np.ndarray[Any, Any]
Arrays = dict[str, Array]
Compile = Callable[[Iterable[Kernel], str, int, Path], list[Binary]]
"""Writes kernels of a module for a compute capability into a folder. Returns their records."""

CASES = {case.name: case for case in (*ATTENTION, *QUANTISED_ATTENTION, *EXPERTS, *QUANTISED_EXPERTS)}


class Layer:
    """A plugin of a runtime's context, its tensors on the device.

    Args:
        op: The op.
        settings: The node's.
        inputs: By name, in the order of the node's inputs.
        device: Where all lies.
        compile_all: Makes the kernels.
        folder: Where they are written.
    """

    def __init__(
        self,
        op: PluginOp,
        settings: Any,
        inputs: Mapping[str, Array],
        device: Device,
        compile_all: Compile,
        folder: Path,
    ) -> None:
        trt = open_library("tensorrt-rtx")
        self.op, self.device, self.inputs = op, device, dict(inputs)
        capability = device.driver.capability(device.number)
        (creator,) = register(trt, (op,)).values()
        creator.capabilities, creator.needed, creator.kernels, creator.rows = (capability,), {}, None, 0
        built = creator.make(settings)
        self.described = []
        for each in inputs.values():
            self.described.append(trt.PluginTensorDesc())
            self.described[-1].type = getattr(trt.DataType, TRT[ONNX[each.dtype]])
            self.described[-1].dims = trt.Dims(each.shape)
        largest = [SimpleNamespace(desc=each, max=each.dims) for each in self.described]
        self.scratch = DeviceMemory(device, built.get_workspace_size(largest, []))
        creator.kernels = load_kernels(
            device, folder, compile_all(creator.needed.values(), op.kernels, capability, folder)
        )
        again = creator.create_plugin("again", built.get_fields_to_serialize(), trt.TensorRTPhase.RUNTIME)
        self.plugin = again.attach_to_context(None)
        creator.kernels = None
        self.held = {name: DeviceMemory(device, moe_calls.packed(each).nbytes) for name, each in inputs.items()}
        first = next(iter(inputs.values()))
        self.output = DeviceMemory(device, first.nbytes)
        self.results = {"output": np.empty_like(first)}
        names = tuple(inputs)
        places = [self.output, *[self.held[names[index]] for index in op.in_place[1:]]]
        self.results |= {names[index]: np.empty_like(inputs[names[index]]) for index in op.in_place[1:]}
        self.addresses = [each.address for each in self.held.values()], [each.address for each in places]
        self.plugin.on_shape_change(self.described, [])

    def fill(self, inputs: Mapping[str, Array]) -> None:
        """Gives the layer other inputs of the same shapes, and an output of rubbish."""
        for name, each in inputs.items():
            self.device.upload(self.held[name].address, moe_calls.packed(each))
        self.device.upload(self.output.address, np.full(self.output.size, 0xFF, np.uint8))

    def enqueue(self) -> None:
        self.plugin.enqueue(self.described, [], *self.addresses, self.scratch.address, self.device.stream)

    def read(self) -> Arrays:
        """Output and what was updated in place, in float64."""
        for name, array in self.results.items():
            self.device.download((self.output if name == "output" else self.held[name]).address, array)
        return {name: array.astype(np.float64) for name, array in self.results.items()}


def play(case: str, dtype: str, device: Device, compile_all: Compile, folder: Path) -> list[tuple[Arrays, Arrays]]:
    """A case's call made at once, then by its graph with half as large an input, which is exact.

    Returns what each gave, `output` and caches where there are some, and beside it the meaning's.
    """
    op, settings, inputs, meaning = described(case, dtype)
    layer = Layer(op, settings, inputs, device, compile_all, folder)
    layer.fill(inputs)
    layer.enqueue()
    found = [(layer.read(), meaning(inputs))]
    graph = device.capture(layer.enqueue)
    changed = "hidden" if op is MOE else "value"  # queries are perhaps normalised
    halved = {**inputs, changed: (inputs[changed] / 2).astype(inputs[changed].dtype)}
    layer.fill(halved)
    graph.launch()
    return [*found, (layer.read(), meaning(halved))]


def described(name: str, dtype: str) -> tuple[PluginOp, Any, Arrays, Callable[[Arrays], Arrays]]:
    """A case's op, its node's settings, its inputs in order, and its meaning."""
    case: Any = CASES[name]
    if case in (*EXPERTS, *QUANTISED_EXPERTS):
        inputs = moe_calls.inputs_of(case, moe_calls.TYPES[dtype])
        return MOE, case.attributes, inputs, lambda given: {
            "output": np.asarray(moe_dispatch(**given, attributes=case.attributes))
        }  # fmt: skip
    settings = Settings(**dataclasses.asdict(case.attributes), rope=int(case.rope))
    return GQA, settings, gqa_calls.inputs_of(case, dtype), lambda given: gqa_calls.meaning_of(case, given)


def executed(case: str, dtype: str) -> list[tuple[Arrays, Arrays]]:
    """`play` over the driver that executes; to be used in a process whose Triton interprets."""
    from tempfile import mkdtemp

    from executing_cuda import ExecutingCuda
    from walked_engine import write_images

    from arriero.plugins.launch import Driver

    return play(case, dtype, Device(Driver(ExecutingCuda(89))), write_images, Path(mkdtemp()))
