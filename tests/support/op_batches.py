"""Runs hostile calls on ONNX Runtime, a process a batch: one that dies or hangs is halved until its call is named.

python tests/support/op_batches.py table 0 100      (a line of JSON for each)
"""

import ctypes
import json
import os
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Sequence
from itertools import islice
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from hostile_calls import random_call, table
from onnx import TensorProto, helper
from op_calls import Array, OpCall
from op_meanings import (
    all_reduce,
    attention_faults,
    experts,
    fits,
    fp8_experts,
    fp8_linear,
    linear,
    plain_experts,
    plain_linear,
)

from arriero.plugins.cpu.library import DOMAIN, library

SECONDS = 5
"""Processor time that a call may take."""
MOST_MEMORY = 2 << 30
GUARD = 64
"""Bytes on each side of a tensor that nothing may write."""
ALIGNED = 128
"""Bytes that a tensor's address is a multiple of, as memory that ranks share must be."""
SAID = re.compile(r"arriero\.cpu (AllReduce|(Plain|Fp8)?Linear|(Plain|Fp8)?MoeDispatch|GroupedQueryAttention): .*")


def calls(kind: str, first: int, last: int) -> Sequence[OpCall]:
    """Those numbers of the `table`, or of a table thinned as in `table/8`, or the `random` ones of those seeds."""
    if kind == "random":
        return [random_call(seed) for seed in range(first, last)]
    return list(islice(table(int(kind.partition("/")[2] or 1)), first, last))


class Guarded:
    """A tensor's memory between guards.

    Attributes:
        array: The memory, of the tensor's bits.
        value: The same as ONNX Runtime takes it.
    """

    def __init__(self, array: Array, is_misaligned: bool = False) -> None:
        self.memory = np.full(array.nbytes + 2 * GUARD + ALIGNED, 0xFF, np.uint8)  # floats of these bytes are NaN
        start = GUARD + -(self.memory.ctypes.data + GUARD) % ALIGNED + is_misaligned
        self.inside = slice(start, start + array.nbytes)
        self.memory[self.inside] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        self.array = self.memory[self.inside].view(array.dtype).reshape(array.shape)
        kind = helper.np_dtype_to_tensor_dtype(array.dtype)
        held = self.array
        if array.dtype.kind == "V" or array.dtype.name.startswith(("bfloat", "float8")):
            held = self.array.view(np.uint8 if array.dtype.itemsize == 1 else np.uint16)
        if held is self.array:
            self.value = ort.OrtValue.ortvalue_from_numpy(held)
        else:
            self.value = ort.OrtValue.ortvalue_from_numpy_with_onnx_type(held, kind)

    def is_whole(self) -> bool:
        return bool(np.all(np.delete(self.memory, self.inside) == 0xFF))


def run(call: OpCall) -> str:
    """What became of a call: `refused`, `right`, or what is wrong about it."""
    has_meaning = fits(call)
    try:
        outputs, guarded = computed(call)
    except Exception as error:
        return judged_refusal(str(error), has_meaning)
    if not all(each.is_whole() for each in guarded):
        return "memory beside a tensor was written"
    if not has_meaning:
        return "answered, and has no meaning"
    if call.is_wild:
        return "right"
    if call.op == "GroupedQueryAttention":
        pasts = [call.tensors[name] for name in ("key_cache", "value_cache")]
        return attention_faults(call, outputs[0], outputs[1:], pasts) or "right"  # type: ignore[arg-type]
    meanings = {"AllReduce": all_reduce, "Linear": linear, "PlainLinear": plain_linear, "MoeDispatch": experts}
    meanings |= {"PlainMoeDispatch": plain_experts, "Fp8Linear": fp8_linear, "Fp8MoeDispatch": fp8_experts}
    expected = meanings[call.op](call)
    if outputs[0].shape != expected.shape:
        return f"the shape is {outputs[0].shape}, not {expected.shape}"
    error = np.abs(outputs[0] - expected)
    # A value on the border of two steps falls to either side, which a later product carries on.
    allowed = (0.05 if call.op in ("MoeDispatch", "Fp8MoeDispatch") else 1e-5) * max(
        1.0, np.abs(expected).max(initial=0)
    )
    return "right" if bool(np.all(error <= allowed)) else f"off by {error.max():.3g} of {np.abs(expected).max():.3g}"


def judged_refusal(message: str, has_meaning: bool) -> str:
    if has_meaning:
        return f"has a meaning, and was refused: {message[:300]}"
    said = SAID.search(message)
    if "arriero.cpu " in message and (said is None or len(said[0]) > 300 or "\n" in message.strip()):
        return f"not refused in one line: {message[:300]}"
    return f"refused: {said[0]}" if said else "refused by ONNX Runtime"


def computed(call: OpCall) -> tuple[list[Array], list[Guarded]]:
    """The outputs, and the memory of all that was given."""
    session_, names = session(call)
    binding = session_.io_binding()
    given = {
        name: Guarded(array, name == call.misaligned)
        for name, array in call.tensors.items()
        if name in names and array is not None
    }
    for name, each in given.items():
        binding.bind_ortvalue_input(name, each.value)
    written: dict[str, Guarded] = {}
    for output in filter(None, call.outputs):
        cache = output.replace("present_", "") + "_cache"
        if output == "output" or cache not in given:
            binding.bind_output(output, "cpu")
            continue
        target = given[cache] if call.in_place else Guarded(np.zeros_like(given[cache].array))
        written[output] = target
        binding.bind_ortvalue_output(output, target.value)
    session_.run_with_iobinding(binding)
    named = zip(filter(None, call.outputs), binding.get_outputs(), strict=True)
    outputs = [written[name].array.copy() if name in written else value_of(value) for name, value in named]
    return outputs, [*given.values(), *written.values()]


def value_of(value: ort.OrtValue) -> Array:
    if value.data_type() in ("tensor(bfloat16)", "tensor(float8e4m3fn)"):
        kind = helper.tensor_dtype_to_np_dtype(value.element_type())
        size = int(np.prod(value.shape())) * kind.itemsize
        stored = (
            np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(value.data_ptr()))
            if size
            else np.zeros(0, np.uint8)
        )
        return stored.copy().view(kind).reshape(value.shape())
    return np.array(value.numpy())


def session(call: OpCall) -> tuple[ort.InferenceSession, set[str]]:
    """A session of the call's graph, and the names of what it is fed."""
    inputs, constants, outputs = [], [], []
    for name, array in call.tensors.items():
        if array is None:
            continue
        kind = helper.np_dtype_to_tensor_dtype(array.dtype) if array.dtype != np.object_ else TensorProto.STRING
        if name in call.constants or kind in (TensorProto.STRING, TensorProto.INT4, TensorProto.UINT4):
            constants.append(constant(name, kind, array))
        else:
            inputs.append(helper.make_tensor_value_info(name, kind, [None] * array.ndim))
    for output in filter(None, call.outputs):
        past = call.given(output.replace("present_", "") + "_cache")
        kind = (
            TensorProto.FLOAT
            if past is None or past.dtype == np.object_
            else helper.np_dtype_to_tensor_dtype(past.dtype)
        )
        outputs.append(helper.make_tensor_value_info(output, kind, None))
    names = [name if array is not None else "" for name, array in call.tensors.items()]
    while names and not names[-1]:
        names.pop()
    node = helper.make_node(call.op, names, list(call.outputs), domain=DOMAIN)
    node.attribute.extend(helper.make_attribute(name, value) for name, value in call.attributes.items())
    graph = helper.make_graph([node], "case", inputs, outputs, constants)
    imports = [helper.make_opsetid("", 24), helper.make_opsetid(DOMAIN, 1)]
    model = helper.make_model(graph, opset_imports=imports, ir_version=11)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 2
    options.enable_cpu_mem_arena = options.enable_mem_pattern = False  # so that each tensor has memory of its own
    options.register_custom_ops_library(str(library()))
    made = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return made, {value.name for value in made.get_inputs()}


def constant(name: str, kind: int, array: Array) -> onnx.TensorProto:
    if kind == TensorProto.STRING:
        return helper.make_tensor(name, kind, array.shape, [b"text"] * array.size)
    if kind in (TensorProto.INT4, TensorProto.UINT4):
        return helper.make_tensor(name, kind, array.shape, bytes(-(-array.size // 2)), raw=True)
    return helper.make_tensor(name, kind, array.shape, np.ascontiguousarray(array).tobytes(), raw=True)


def batch(kind: str, first: int, last: int) -> dict[int, str]:
    """What became of each call, by its number; a process that dies names the only call that it was given."""
    command = [sys.executable, __file__, kind, str(first), str(last)]
    found: dict[int, str] = {}
    try:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=60 + SECONDS * (last - first))
        ending = f"died with {ran.returncode}: {ran.stderr[-2000:]}" if ran.returncode else ""
        found = dict(map(json.loads, ran.stdout.splitlines()))
    except subprocess.TimeoutExpired:
        ending = "hung"
    if not ending:
        return found
    if last - first == 1:
        return {first: ending}
    middle = (first + last) // 2
    halves = batch(kind, first, middle) | batch(kind, middle, last)
    if not any(outcome.startswith(("died", "hung")) for outcome in halves.values()):
        halves[first] = f"calls {first} to {last} together: {ending}"
    return halves


def peak_memory() -> int:
    """Bytes of memory that this program held at most; `getrusage` counts those of the process that started it too."""
    with open("/proc/self/status", encoding="utf-8") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM:"))


def main() -> int:
    """One batch in this process."""
    kind, first, last = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    is_sanitized = "LD_PRELOAD" in os.environ
    for number, call in enumerate(calls(kind, first, last), first):
        signal.setitimer(signal.ITIMER_PROF, SECONDS * (10 if is_sanitized else 1))  # ends the process
        with np.errstate(all="ignore"):
            outcome = run(call)
        memory = peak_memory()
        if memory > MOST_MEMORY and not is_sanitized:
            outcome = f"took {memory} bytes"
        print(
            json.dumps([number, outcome if not bad(outcome) else f"{outcome} ({call.op}, {call.changes})"]), flush=True
        )
    return 0


def bad(outcome: str) -> bool:
    return not outcome.startswith(("right", "refused"))


def summary(found: dict[int, str]) -> dict[str, Any]:
    """How many were right and refused, and by whom, and those that are neither."""
    by_us = sum(outcome.startswith("refused: ") for outcome in found.values())
    refused = sum(outcome.startswith("refused") for outcome in found.values())
    return {
        "calls": len(found),
        "right": sum(outcome == "right" for outcome in found.values()),
        "refused by the op": by_us,
        "refused by ONNX Runtime": refused - by_us,
        "bad": {number: outcome for number, outcome in found.items() if bad(outcome)},
    }


if __name__ == "__main__":
    sys.exit(main())
