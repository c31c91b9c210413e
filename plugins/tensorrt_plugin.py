"""A custom op as a TensorRT plugin (`IPluginV3`), the same class for both ops and for both TensorRTs.

What an op has to say is small: which inputs its outputs look like, which of them it updates in place, and its plan of
kernels. This module turns that into shape rules, type rules, serialisation and launches. `trt` is the module
`tensorrt` or `tensorrt_rtx`; nothing here imports either.

Invariant: what `enqueue` launches depends on the sizes that vary: it is planned once for each, for all layers alike,
and a session that captures a step into a CUDA graph has Python off the path from then on.
"""

import ctypes
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

import numpy as np

from ..errors import SessionError
from .launch import Buffer, Kernel, Kernels, Launch, Packed, placed, total_size

NAMESPACE = "arriero"
VERSION = "1"

MODULES = {"tensorrt-rtx": "tensorrt_rtx", "tensorrt": "tensorrt"}
"""Python's names of the flavours."""

REMEDIES = {
    "tensorrt-rtx": "pip install 'arriero[rtx]'",
    "tensorrt": "pip install tensorrt on a machine that reaches NVIDIA's package index",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Tensor:
    """An input as a plan sees it: its type in Triton's words, its shape with -1 where it is not known yet."""

    dtype: str
    shape: tuple[int, ...]


class Call(Protocol):
    """An op over tensors of given types and shapes on one compute capability."""

    kernels: tuple[Kernel, ...]
    names: tuple[str, ...]

    def workspace(self, tensors: Sequence[Tensor]) -> dict[str, Buffer]:
        """Scratch memory for inputs of these shapes."""
        ...

    def largest_workspace(self, tensors: Sequence[Tensor]) -> dict[str, Buffer]:
        """Scratch memory that is enough for all inputs of up to these shapes."""
        ...

    def launches(self, pointers: Mapping[str, Any], tensors: Sequence[Tensor]) -> list[Launch]:
        """The launches of a call; pointers by the names of inputs, outputs and scratch buffers."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class PluginOp:
    """The description of an op by which it becomes a plugin.

    Attributes:
        name: The op's name, which is also the plugin's.
        settings: Frozen dataclass of the node's attributes: whole numbers, floats and texts.
        outputs: Names of the outputs.
        like: For each output, the input that it has shape and type of.
        in_place: For each output, the input whose memory it shares, or -1.
        accepts: Whether the op takes inputs of these types.
        call: Makes the plan.
        kernels: Full name of the module of the Triton functions; not imported here.
        varying: For each of the first inputs, the dimensions that vary between calls; of the others none does. Launches
            depend on those of the first input, and on what does not vary.
        width: The last dimension of the first output where it is not the input's; 0 where it is.
    """

    name: str
    settings: type[Any]
    outputs: tuple[str, ...]
    like: tuple[int, ...]
    in_place: tuple[int, ...]
    accepts: Callable[[Any, Sequence[str]], bool]
    call: Callable[[Any, Sequence[Tensor], int], Call]
    kernels: str
    varying: tuple[tuple[int, ...], ...]
    width: Callable[[Any], int] = lambda settings: 0


class ReadyCall:
    """A call over tensors of fixed sizes, its launches packed.

    Args:
        op: The op.
        call: Its plan.
        tensors: The inputs.
        kernels: Loaded.
    """

    def __init__(self, op: PluginOp, call: Call, tensors: Sequence[Tensor], kernels: Kernels) -> None:
        self.op, self.in_place = op, [(output, source) for output, source in enumerate(op.in_place) if source >= 0]
        scratch = placed(call.workspace(tensors), 0)
        self.offsets = tuple(scratch.values())
        names = (*call.names, *op.outputs, *scratch)
        given = {name: name for name in names} | {"counters": kernels.counters}
        self.packed = Packed(kernels, call.launches(given, tensors), names)

    def enqueue(self, inputs: Sequence[int], outputs: Sequence[int], workspace: int, stream: int) -> None:
        """Puts the call into a stream. Addresses are those of inputs, outputs and scratch memory."""
        for output, source in self.in_place:
            if outputs[output] != inputs[source]:
                raise SessionError(f"TensorRT moved a tensor that {self.op.name} updates in place: build --gqa native")
        self.packed.enqueue([*inputs, *outputs, *[workspace + offset for offset in self.offsets]], stream)


class Alike:
    """Nodes that differ in nothing that launches depend on, and their calls by the sizes that vary.

    Args:
        op: The op.
        settings: The nodes'.
        tensors: Their inputs, with -1 for what varies.
        kernels: Loaded.
        rows: Rows of a step over single tokens for which calls are made ready at once, up to this number.
    """

    def __init__(self, op: PluginOp, settings: Any, tensors: Sequence[Tensor], kernels: Kernels, rows: int) -> None:
        self.op, self.tensors, self.kernels = op, tensors, kernels
        self.call = op.call(settings, tensors, kernels.capability)
        self.ready: dict[tuple[int, ...], ReadyCall] = {}
        for count in range(1, rows + 1):
            self.prepare((count, 1)[: len(op.varying[0])])

    def prepare(self, sizes: tuple[int, ...]) -> ReadyCall:
        """Makes the call for these sizes of the first input ready, and keeps it."""
        if len(self.ready) >= MOST_READY:
            self.ready.clear()
        first, known = self.tensors[0], dict(zip(self.op.varying[0], sizes, strict=True))
        shape = tuple(known.get(dim, size) for dim, size in enumerate(first.shape))
        tensors = [Tensor(dtype=first.dtype, shape=shape), *self.tensors[1:]]
        self.ready[sizes] = ReadyCall(self.op, self.call, tensors, self.kernels)
        return self.ready[sizes]


MOST_AHEAD = 64
"""Rows up to which calls over single tokens are made ready before they come: a tenth of a millisecond each."""

MOST_READY = 512
"""Calls that are kept ready for nodes that are alike; a session knows a few lengths and batches, so there are fewer."""


def type_names(trt: Any) -> dict[Any, str]:
    """TensorRT's types in Triton's words."""
    return {
        trt.DataType.FLOAT: "fp32",
        trt.DataType.HALF: "fp16",
        trt.DataType.BF16: "bf16",
        trt.DataType.INT8: "i8",
        trt.DataType.FP8: "fp8e4nv",
        trt.DataType.INT4: "i4",
        trt.DataType.INT32: "i32",
        trt.DataType.INT64: "i64",
    }


def register(trt: Any, ops: Sequence[PluginOp]) -> dict[str, Any]:
    """Registers the ops' plugin creators once a process. Returns them by name.

    A creator's `capabilities` say for which GPUs scratch memory is computed, and its `needed` collects the kernels that
    plugins will launch there. Its `kernels` are what plugins made from an engine launch; there are none at build, and
    an engine is not made into plugins without. Its `rows` are those of the largest step over single tokens. Its
    `failure` is what a plugin raised at build: TensorRT would go on without it.
    """
    registry = trt.get_plugin_registry()
    for op in ops:
        if (trt.__name__, op.name) not in _REGISTERED:
            creator = _REGISTERED[trt.__name__, op.name] = _creator_class(trt, op)()
            registry.register_creator(creator, NAMESPACE)
    return {op.name: _REGISTERED[trt.__name__, op.name] for op in ops}


_REGISTERED: dict[tuple[str, str], Any] = {}
"""Creators, by TensorRT's module and op, that its process-wide registry refers to; they live as long as it does."""


def _creator_class(trt: Any, op: PluginOp) -> Any:
    plugin_class = _plugin_class(trt, op)

    class Creator(trt.IPluginCreatorV3One):
        def __init__(self) -> None:
            trt.IPluginCreatorV3One.__init__(self)
            self.name, self.plugin_version, self.plugin_namespace = op.name, VERSION, NAMESPACE
            self.field_names = trt.PluginFieldCollection(
                [trt.PluginField(field.name, np.array([]), _field_type(trt, field)) for field in fields(op.settings)]
            )
            self.capabilities: tuple[int, ...] = ()
            self.needed: dict[tuple[str, int], Kernel] = {}
            self.kernels: Kernels | None = None
            self.rows = 0
            self.alike: dict[Any, Alike] = {}
            self.failure: Exception | None = None

        def create_plugin(self, name: str, collection: Any, phase: Any) -> Any:
            if phase == trt.TensorRTPhase.RUNTIME and self.kernels is None:
                raise SessionError(f"{op.name} has no kernels loaded: run the engine's bundle with Arriero's session")
            values = {field.name: _read_field(field) for field in collection}
            known = {field.name for field in fields(op.settings)}
            settings = op.settings(**{key: value for key, value in values.items() if key in known})
            return self.make(settings)

        def make(self, settings: Any) -> Any:
            return plugin_class(settings, self)

        def find_alike(self, settings: Any, tensors: Sequence[Tensor], kernels: Kernels) -> Alike:
            varying = itertools.chain(op.varying, itertools.repeat(()))
            fixed = tuple(
                replace(each, shape=tuple(-1 if dim in dims else size for dim, size in enumerate(each.shape)))
                for each, dims in zip(tensors, varying, strict=False)
            )
            key = (kernels, settings, fixed)
            if key not in self.alike:
                self.alike[key] = Alike(op, settings, fixed, kernels, min(self.rows, MOST_AHEAD))
            return self.alike[key]

    return Creator


def _field_type(trt: Any, field: Any) -> Any:
    """The type of a dataclass field in TensorRT's words; annotations may be texts."""
    types = {"int": trt.PluginFieldType.INT32, "float": trt.PluginFieldType.FLOAT32}
    return types.get(getattr(field.type, "__name__", field.type), trt.PluginFieldType.CHAR)


def _read_field(field: Any) -> Any:
    data = np.asarray(field.data)
    if data.dtype.kind in "SU":
        return "".join(data.astype(str).ravel())
    if data.dtype in (np.int8, np.uint8):
        return data.tobytes().decode().rstrip("\0")
    return data.ravel()[0].item()


def _plugin_class(trt: Any, op: PluginOp) -> Any:
    names = type_names(trt)

    def tensors_of(descriptions: Sequence[Any]) -> list[Tensor]:
        return [Tensor(dtype=names[each.type], shape=tuple(each.dims)) for each in descriptions]

    def largest(descriptions: Sequence[Any]) -> list[Tensor]:
        return [Tensor(dtype=names[each.desc.type], shape=tuple(each.max)) for each in descriptions]

    class Plugin(trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuildV2, trt.IPluginV3OneRuntime):
        def __init__(self, settings: Any, creator: Any) -> None:
            trt.IPluginV3.__init__(self)
            trt.IPluginV3OneCore.__init__(self)
            trt.IPluginV3OneBuildV2.__init__(self)
            trt.IPluginV3OneRuntime.__init__(self)
            self.plugin_name, self.plugin_version, self.plugin_namespace = op.name, VERSION, NAMESPACE
            self.num_outputs = len(op.outputs)
            self.timing_cache_id = ""
            self.settings, self.creator, self.kernels = settings, creator, creator.kernels
            self.alike: list[Alike] = []  # of a node one, which its copies in all contexts share
            self.call: ReadyCall | None = None
            # TensorRT's bindings free a plugin twice when TensorRT drops it last, so Python keeps each one for good.
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(self))

        def get_capability_interface(self, kind: Any) -> Any:
            return self

        def clone(self) -> Any:
            copy = Plugin(self.settings, self.creator)
            copy.__dict__.update(self.__dict__)
            return copy

        # When the engine is built.

        def get_output_data_types(self, types: Sequence[Any]) -> list[Any]:
            return [types[index] for index in op.like]

        def get_output_shapes(self, inputs: Sequence[Any], shape_inputs: Sequence[Any], exprs: Any) -> list[Any]:
            shapes = [trt.DimsExprs(inputs[index]) for index in op.like]
            if width := op.width(self.settings):
                shapes[0][len(shapes[0]) - 1] = exprs.constant(width)
            return shapes

        def get_aliased_input(self, output: int) -> int:
            return op.in_place[output]

        def supports_format_combination(self, position: int, descriptions: Sequence[Any], inputs: int) -> bool:
            described = descriptions[position].desc
            if described.format != trt.TensorFormat.LINEAR or described.type not in names:
                return False
            if position >= inputs:
                return bool(described.type == descriptions[op.like[position - inputs]].desc.type)
            # TensorRT asks input by input: the types that follow are not fixed yet.
            known = [names[each.desc.type] for each in descriptions[: position + 1]]
            return op.accepts(self.settings, known)

        def configure_plugin(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
            pass

        def get_workspace_size(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
            tensors, sizes = largest(inputs), [0]
            try:
                for capability in self.creator.capabilities:
                    call = op.call(self.settings, tensors, capability)
                    self.creator.needed.update({(kernel.name, capability): kernel for kernel in call.kernels})
                    sizes.append(total_size(call.largest_workspace(tensors)))
            except Exception as error:
                self.creator.failure = self.creator.failure or error
                raise
            return max(sizes)

        def get_valid_tactics(self) -> list[int]:
            return []

        def get_fields_to_serialize(self) -> Any:
            values = []
            for field in fields(op.settings):
                value = getattr(self.settings, field.name)
                if isinstance(value, str):
                    data = np.frombuffer(value.encode(), dtype=np.int8)
                else:
                    data = np.array([value], dtype=np.int32 if isinstance(value, int) else np.float32)
                values.append(trt.PluginField(field.name, data, _field_type(trt, field)))
            self.serialised = values  # TensorRT reads the arrays after this returns
            return trt.PluginFieldCollection(values)

        # When it runs.

        def attach_to_context(self, context: Any) -> Any:
            attached = self.clone()
            attached.call = None
            return attached

        def set_tactic(self, tactic: int) -> None:
            pass

        def on_shape_change(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
            if self.kernels is None:  # TensorRT asks and times at build too, where there is nothing to choose
                return
            if not self.alike:
                self.alike.append(self.creator.find_alike(self.settings, tensors_of(inputs), self.kernels))
            (alike,), dims = self.alike, inputs[0].dims
            sizes = tuple([dims[dim] for dim in op.varying[0]])
            self.call = alike.ready.get(sizes) or alike.prepare(sizes)

        def enqueue(
            self,
            input_desc: Sequence[Any],
            output_desc: Sequence[Any],
            inputs: Sequence[int],
            outputs: Sequence[int],
            workspace: int,
            stream: int,
        ) -> None:
            if self.kernels is None:
                return
            if self.call is None:
                self.on_shape_change(input_desc, output_desc)
            assert self.call is not None
            self.call.enqueue(inputs, outputs, workspace, stream)

    return Plugin
