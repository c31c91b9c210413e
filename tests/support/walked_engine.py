"""A TensorRT engine without TensorRT: the lowered network walked node by node over the addresses that a session bound.

Custom ops are the real plugins, with all that TensorRT would ask of them; standard nodes are ONNX's reference operators
in float32, rounded to the type that the graph says. Invariant: a run allocates nothing; what lies between nodes is in
the memory that the session gave for activations, and what a node does is put into the session's stream.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import onnx
from engine_arrays import NUMPY, Array, at, dequantise, narrow, packed, quantise, read_data, to_numpy, unpacked
from executed_kernels import write_image
from executing_cuda import ExecutingCuda
from onnx import helper
from onnx.reference import ReferenceEvaluator

from arriero.plugins.gqa.plugin import PLUGIN as GQA
from arriero.plugins.launch import Kernel, round_up
from arriero.plugins.moe.plugin import PLUGIN as MOE
from arriero.plugins.shortlist import plan as shortlist
from arriero.plugins.tensorrt_plugin import register
from arriero.spec.built_engine import Binary

T = onnx.TensorProto
TRT = {T.FLOAT: "FLOAT", T.FLOAT16: "HALF", T.BFLOAT16: "BF16", T.INT8: "INT8", T.INT32: "INT32", T.INT64: "INT64"}
TRT |= {T.FLOAT8E4M3FN: "FP8", T.INT4: "INT4"}
PLUGINS = {op.name: op for op in (GQA, MOE)}
ACTIVATIONS = 8 << 20
ONNX = {np.dtype(kind): code for code, kind in NUMPY.items()}


class WalkedEngine:
    """The engine of a network.

    Args:
        trt: The module `tensorrt_rtx`.
        cuda: The driver.
        graph: The network, as the parser gets it.
        weights: Paths of the files of the weights that are inside, by name.
        profiles: Smallest, usual and largest shape of each input in each profile.
        capability: The GPU's.
    """

    def __init__(
        self,
        trt: Any,
        cuda: ExecutingCuda,
        graph: bytes,
        weights: Mapping[str, Path],
        profiles: Sequence[Any],
        capability: int,
    ) -> None:
        self.trt, self.cuda, self.profiles = trt, cuda, profiles
        model = onnx.load_from_string(graph)
        for each in model.graph.initializer:
            read_data(each, weights)
        self.graph = model.graph
        self.opset = {each.domain: each.version for each in model.opset_import}
        self.constants = {each.name: to_numpy(each) for each in self.graph.initializer}
        self.inputs = {each.name: each.type.tensor_type for each in self.graph.input}
        self.outputs = {each.name: each.type.tensor_type for each in self.graph.output}
        self.typed = {
            each.name: NUMPY[each.type.tensor_type.elem_type]
            for each in (*self.graph.value_info, *self.graph.output)
            if each.type.tensor_type.elem_type
        }
        self.creators = register(trt, tuple(PLUGINS.values()))
        for creator in self.creators.values():
            creator.capabilities, creator.needed, creator.kernels = (capability,), {}, None
        self.evaluators: dict[str, Any] = {}
        self.contexts: list[Context] = []
        self.places: dict[str, tuple[int, tuple[int, ...], Any]] = {}
        self.streamable_weights_size, self.weight_streaming_budget_v2 = 1 << 40, None
        self.built = {node.name: self._build(node) for node in self.graph.node if node.op_type in PLUGINS}

    def _build(self, node: Any) -> Any:
        """Makes a node's plugin, as TensorRT's parser does."""
        creator, op = self.creators[node.op_type], PLUGINS[node.op_type]
        values = {each.name: helper.get_attribute_value(each) for each in node.attribute}
        known = op.settings.__dataclass_fields__
        settings = op.settings(
            **{
                name: each.decode() if isinstance(each, bytes) else each
                for name, each in values.items()
                if name in known
            }
        )
        return creator.make(settings)

    def plan(self, capability: int, folder: Path, vocabulary: int) -> tuple[Binary, ...]:
        """Asks plugins for scratch memory and kernels; writes the kernels' images. Returns their records."""
        for profile in self.profiles:
            shapes = self.infer({name: largest for name, (_, _, largest) in profile.items()})
            for node in self.graph.node:
                if node.op_type in PLUGINS:
                    described = [self._described(name, shapes[name]) for name in node.input]
                    inputs = [SimpleNamespace(desc=each, max=each.dims) for each in described]
                    size = self.built[node.name].get_workspace_size(inputs, [])
                    assert size <= ACTIVATIONS // 2
        needed = [
            (PLUGINS[name].kernels, kernel)
            for name, creator in self.creators.items()
            for kernel in creator.needed.values()
        ] + [(shortlist.MODULE, kernel) for kernel in shortlist.Plan(vocabulary).kernels]
        return tuple(
            binary for module, kernel in needed for binary in write_images([kernel], module, capability, folder)
        )

    def _described(self, name: str, about: tuple[Sequence[int], Any]) -> Any:
        shape, dtype = about
        found = self.trt.PluginTensorDesc()
        found.type, found.dims = getattr(self.trt.DataType, TRT[self.code(name, dtype)]), self.trt.Dims(tuple(shape))
        return found

    def code(self, name: str, dtype: Any) -> int:
        return self.inputs[name].elem_type if name in self.inputs else ONNX[np.dtype(dtype)]

    def infer(self, given: dict[str, Sequence[int]]) -> dict[str, tuple[tuple[int, ...], Any]]:
        """Shape and type of every value, by a run over zeros."""
        values: dict[str, Array] = dict(self.constants)
        found = {name: (each.shape, each.dtype) for name, each in values.items()}
        for name, about in self.inputs.items():
            dims = tuple(given.get(name) or [dim.dim_value for dim in about.shape.dim])
            found[name] = (dims, NUMPY[about.elem_type])
            small = np.prod(dims) < 1 << 16
            values[name] = np.zeros(dims, NUMPY[about.elem_type]) if small else None  # type: ignore[assignment]
        for node in self.graph.node:
            if node.op_type in PLUGINS:
                made = [np.zeros(*found[node.input[index]]) for index in PLUGINS[node.op_type].like[: len(node.output)]]
                if width := PLUGINS[node.op_type].width(self.built[node.name].settings):
                    made[0] = made[0][..., :width]
            else:
                made = self.compute(node, [values[name] for name in node.input])
            for name, each in zip(node.output, made, strict=True):
                values[name], found[name] = each, (each.shape, each.dtype)
        return found

    def compute(self, node: Any, inputs: Sequence[Array]) -> list[Array]:
        """What a standard node gives: computed in float32, rounded once."""
        kind = node.op_type
        if kind in ("QuantizeLinear", "DequantizeLinear"):
            return [quantise(node, inputs) if kind[0] == "Q" else dequantise(node, inputs)]
        if kind == "Cast":
            target = NUMPY[node.attribute[0].i]
            return [inputs[0].astype(np.float32).astype(target) if narrow(target) else inputs[0].astype(target)]
        if node.output[0] not in self.evaluators:
            imports = [helper.make_opsetid(domain, version) for domain, version in self.opset.items() if not domain]
            graph = helper.make_graph(
                [node],
                "node",
                [helper.make_value_info(name, onnx.TypeProto()) for name in node.input if name],
                [helper.make_value_info(name, onnx.TypeProto()) for name in node.output],
            )
            self.evaluators[node.output[0]] = ReferenceEvaluator(helper.make_model(graph, opset_imports=imports))
        wide = [each.astype(np.float32) if narrow(each.dtype) else each for each in inputs]
        made = self.evaluators[node.output[0]].run(None, dict(zip(node.input, wide, strict=True)))
        types = [each.dtype for each in inputs if narrow(each.dtype)]
        return [
            each.astype(self.typed.get(name) or types[0]) if types and each.dtype == np.float32 else np.asarray(each)
            for name, each in zip(node.output, made, strict=True)
        ]

    def place_constant(self, name: str) -> tuple[int, tuple[int, ...], Any]:
        """Puts a constant into memory of its own, once: contexts share that of the activations."""
        if name not in self.places:
            each = np.ascontiguousarray(self.constants[name])
            shape, dtype = each.shape, each.dtype
            if dtype == ml_dtypes.int4:
                each = packed(each)
            address = self.cuda.device.allocate(each.nbytes)
            at(address, each.shape, each.dtype)[...] = each
            self.places[name] = address, shape, dtype
        return self.places[name]

    def create_runtime_config(self) -> Any:
        class Config:
            cuda_graph_strategy = dynamic_shapes_kernel_specialization_strategy = allocation = cache = None

            def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
                self.allocation = strategy

            def create_runtime_cache(self) -> Any:
                return SimpleNamespace(deserialize=lambda data: False, serialize=lambda: b"compiled")

            def set_runtime_cache(self, cache: Any) -> bool:
                self.cache = cache
                return True

        return Config()

    def get_device_memory_size_for_profile_v2(self, profile: int) -> int:
        return ACTIVATIONS

    def create_execution_context(self, config: Any) -> "Context":
        assert config.allocation == self.trt.ExecutionContextAllocationStrategy.USER_MANAGED
        self.contexts.append(Context(self, config))
        return self.contexts[-1]


class Told(NamedTuple):
    """A plugin of a context, and what it is told: its inputs and outputs, their addresses, and the scratch memory's."""

    plugin: Any
    inputs: list[Any]
    outputs: list[Any]
    input_addresses: list[int]
    output_addresses: list[int]
    workspace: int

    def enqueue(self, stream: int) -> None:
        self.plugin.enqueue(
            self.inputs, self.outputs, self.input_addresses, self.output_addresses, self.workspace, stream
        )


class Context:
    """One context of the engine."""

    def __init__(self, engine: WalkedEngine, config: Any) -> None:
        self.engine, self.config = engine, config
        self.addresses: dict[str, int] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.plugins = {}
        for name, built in engine.built.items():
            creator = built.creator
            again = creator.create_plugin(name, built.get_fields_to_serialize(), engine.trt.TensorRTPhase.RUNTIME)
            self.plugins[name] = again.attach_to_context(None)
        self.changed, self.memory, self.runs, self.profile, self.version = True, (0, 0), [], None, 0
        self.places: dict[str, tuple[int, tuple[int, ...], Any]] = {}

    def is_stream_capturable(self, stream: int) -> bool:
        return True

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        self.profile = profile
        return True

    def set_device_memory(self, address: int, size: int) -> None:
        self.engine.cuda.device.check(address, size)
        assert address % 256 == 0
        self.memory = address, size

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        smallest, _, largest = self.engine.profiles[self.profile][name]
        if len(shape) != len(largest) or not all(a <= b <= c for a, b, c in zip(smallest, shape, largest, strict=True)):
            return False
        self.shapes[name], self.changed, self.version = tuple(shape), True, self.version + 1
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        if address % 256 or not self.engine.cuda.device.holds(address, address + 1):
            return False
        self.addresses[name], self.changed, self.version = address, True, self.version + 1
        return True

    def execute_async_v3(self, stream: int) -> bool:
        cuda = self.engine.cuda
        if self.changed:
            if cuda.streams[stream].captured is not None:
                return False  # TensorRT wants a run of these shapes before it is captured
            self.place()
            for each in self.told.values():
                each.plugin.on_shape_change(each.inputs, each.outputs)
        cuda.watch(stream, lambda: self.version)
        self.runs.append(self.shapes["input_ids"])
        for node in self.engine.graph.node:
            if node.op_type in PLUGINS:
                self.told[node.name].enqueue(stream)
            elif node.op_type != "Constant":
                cuda.put(stream, lambda node=node: self._run(node))
        return True

    def place(self) -> None:
        """Finds shapes, gives values their places in the activations' memory, and notes what plugins are told."""
        engine = self.engine
        found = engine.infer(self.shapes)
        at_, end = self.memory[0], sum(self.memory)
        for node in engine.graph.node:
            for name in node.output:
                shape, dtype = found[name]
                if name in engine.outputs:
                    address = self.addresses[name]
                else:
                    address, at_ = at_, at_ + round_up(int(np.prod(shape)) * np.dtype(dtype).itemsize, 256)
                self.places[name] = address, shape, dtype
        for name in engine.inputs:
            shape, dtype = found[name]
            self.places[name] = self.addresses[name], shape, dtype
            size = int(np.prod(shape)) * np.dtype(dtype).itemsize // (2 if dtype == ml_dtypes.int4 else 1)
            engine.cuda.device.check(self.addresses[name], size)
        self.constants: dict[str, Array] = {}
        for name, each in engine.constants.items():  # plugins read the device's memory: so do they what is inside
            self.constants[name] = each
        for node in engine.graph.node:
            if node.op_type == "Constant":
                self.constants[node.output[0]] = engine.compute(node, [])[0]
            elif node.op_type in PLUGINS:
                self.places |= {name: engine.place_constant(name) for name in node.input if name in engine.constants}
        self.workspace = at_
        assert at_ + ACTIVATIONS // 2 <= end
        self.told = {node.name: self._tell(node) for node in engine.graph.node if node.op_type in PLUGINS}
        self.changed = False

    def _tell(self, node: Any) -> "Told":
        names = (node.input, node.output)
        described = [[self.engine._described(name, self.places[name][1:]) for name in side] for side in names]
        addresses = [[self.places[name][0] for name in side] for side in names]
        return Told(self.plugins[node.name], described[0], described[1], addresses[0], addresses[1], self.workspace)

    def _run(self, node: Any) -> None:
        values = [self.constants[name] if name in self.constants else self._read(name) for name in node.input]
        for name, made in zip(node.output, self.engine.compute(node, values), strict=True):
            at(*self.places[name])[...] = made

    def _read(self, name: str) -> Array:
        address, shape, dtype = self.places[name]
        if dtype == ml_dtypes.int4:
            return unpacked(at(address, (int(np.prod(shape)) // 2,), np.uint8), shape)
        return at(address, shape, dtype)


def write_images(kernels: Iterable[Kernel], module: str, capability: int, folder: Path) -> list[Binary]:
    """Writes kernels in place of cubins. Returns their records."""
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    for kernel in kernels:
        image = write_image(module, kernel)
        (folder / f"{kernel.name}.image").write_bytes(image)
        binary = Binary(
            kernel=kernel.name,
            capability=capability,
            file=f"{kernel.name}.image",
            entry=kernel.function,
            parameters=tuple(kernel.signature.values()),
            threads=kernel.warps * 32,
            shared=0,
            sha256=hashlib.sha256(image).hexdigest(),
            dependent=kernel.dependent,
        )
        found.append(binary)
    return found
