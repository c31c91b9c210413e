"""Attention alone on a CPU, over caches of each form: a step, and a piece of a prompt, beside the memory's stream.

The op is called as a session calls it, its caches written in place, one row. `GB/s` is what a step must read of filled
caches; the stream is numpy's maximum of 1 GB, as in `cpu_peers.py`. A library of another commit takes turns with this
one's in the same process, and ratios are of the fastest of each.

    python benchmarks/cpu_attention.py [--threads 1,2] [--contexts 512,8000,32000] [--heads 12] [--kv-heads 4]
                                       [--before LIBRARY]
"""

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from rich.console import Console
from rich.table import Table
from support.workshop import numbers

from arriero.files.circumstances import machine, machine_text
from arriero.measuring.timing import Stream
from arriero.plugins.cpu.library import DOMAIN, library
from arriero.plugins.gqa import cpu_nodes, op
from arriero.plugins.nodes import OPSET, Nodes
from arriero.spec.stored_weights import slot_bytes

TYPE = ir.DataType
CACHES = {
    "float32": (TYPE.FLOAT, 0),
    "float16": (TYPE.FLOAT16, 0),
    "int8": (TYPE.INT8, 0),
    "groups of 8 bits": (TYPE.UINT8, 8),
    "groups of 4 bits": (TYPE.UINT8, 4),
}
FILLED = 64
"""Slots that the op fills itself; the others are their copies."""
PIECE = 512


class Attention:
    """One layer's op with caches of its own.

    Args:
        file: The library of ops.
        kind: The caches' form, of CACHES.
        shape: Query heads, kv heads, dims of a head.
        capacity: Slots.
        threads: Threads of ONNX Runtime.
    """

    def __init__(self, file: Path, kind: str, shape: tuple[int, int, int], capacity: int, threads: int) -> None:
        (self.dtype, self.bits), (heads, kv_heads, dims) = CACHES[kind], shape
        self.shape, self.is_scaled = shape, kind == "int8"
        self.session = self._session(file, threads)
        size = slot_bytes(dims, self.bits) if self.bits else dims
        rng = np.random.default_rng(0)
        self.arrays = {name: np.zeros((1, kv_heads, capacity, size), self.dtype.numpy()) for name in op.INPUTS[3:5]}
        self.values = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in self.arrays.items()}
        self.values["inv_freq"] = ort.OrtValue.ortvalue_from_numpy(
            (1 / 10000 ** (np.arange(dims // 2) / (dims // 2))).astype(np.float32)
        )
        for name in op.CACHE_SCALES if self.is_scaled else ():
            self.values[name] = ort.OrtValue.ortvalue_from_numpy(np.full((kv_heads, dims), 3 / 127, np.float32))
        self.pieces = {
            length: {
                name: ort.OrtValue.ortvalue_from_numpy(rng.standard_normal((1, length, count * dims), np.float32))
                for name, count in zip(op.INPUTS[:3], (heads, kv_heads, kv_heads), strict=True)
            }
            for length in (1, FILLED, PIECE)
        }
        self.seconds(0, FILLED)
        for array in self.arrays.values():
            for slot in range(FILLED, capacity, FILLED):
                array[:, :, slot : slot + FILLED] = array[:, :, : min(FILLED, capacity - slot)]

    def _session(self, file: Path, threads: int) -> ort.InferenceSession:
        heads, kv_heads, dims = self.shape
        names = [*op.INPUTS, *op.CACHE_SCALES]
        inputs = {
            name: ir.val(name, self.dtype if "cache" in name else TYPE.FLOAT, [None] * rank)
            for name, rank in zip(names, (3, 3, 3, 4, 4, 1, 1, 2, 2), strict=True)
            if self.is_scaled or name not in op.CACHE_SCALES
        }
        inputs["past_lengths"].dtype = TYPE.INT32
        outputs = [ir.val("output", TYPE.FLOAT, [None] * 3)]
        outputs += [ir.val(name, self.dtype, [None] * 4) for name in op.OUTPUTS[1:]]
        nodes, attributes = Nodes(), op.Attributes(heads=heads, kv_heads=kv_heads, scale=dims**-0.5)
        cpu_nodes.lower(nodes, [inputs.get(name) for name in names], outputs, attributes, self.bits)
        imports = {"": OPSET, DOMAIN: 1}
        graph = ir.Graph(list(inputs.values()), outputs, nodes=nodes.list, opset_imports=imports, name="attention")
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.register_custom_ops_library(str(file))
        data = ir.to_proto(ir.Model(graph, ir_version=11)).SerializeToString()
        return ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])

    def seconds(self, past: int, length: int) -> float:
        """Time of one call behind so many tokens."""
        binding = self.session.io_binding()
        for name, value in (self.values | self.pieces[length]).items():
            binding.bind_ortvalue_input(name, value)
        binding.bind_cpu_input("past_lengths", np.array([past], np.int32))
        binding.bind_output("output", "cpu")
        for present, cache in zip(op.OUTPUTS[1:], op.INPUTS[3:5], strict=True):
            binding.bind_ortvalue_output(present, self.values[cache])
        started = time.perf_counter()
        self.session.run_with_iobinding(binding)
        return time.perf_counter() - started

    def bytes_of(self, context: int) -> float:
        """Bytes of the caches that a step behind so many tokens reads."""
        return float(sum(array.nbytes / array.shape[2] * context for array in self.arrays.values()))


def fastest(each: list[Attention], past: int, length: int, runs: int) -> list[float]:
    """The fastest call of each, taken in turns."""
    times: list[list[float]] = [[] for _ in each]
    for _ in range(runs + 1):
        for attention, own in zip(each, times, strict=True):
            own.append(attention.seconds(past, length))
    return [min(own[1:]) for own in times]


def main() -> None:
    parser = argparse.ArgumentParser(description="Attention alone on a CPU, beside the memory's stream.")
    parser.add_argument("--threads", type=numbers, default=[1, 2])
    parser.add_argument("--contexts", type=numbers, default=[512, 8000, 32000])
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--kv-heads", type=int, default=4)
    parser.add_argument("--dims", type=int, default=128)
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--before", type=Path, help="Another library of ops, to compare with.")
    arguments = parser.parse_args()
    shape = arguments.heads, arguments.kv_heads, arguments.dims
    files = [library(), *([arguments.before] if arguments.before else [])]
    columns = ["caches", "threads", "context", "a step, ms", "GB/s", "of the stream", f"{PIECE} tokens, ms"]
    columns += ["a step, × before", "piece, × before"] if arguments.before else []
    table = Table(*columns, title=machine_text(machine()))
    for threads in arguments.threads:
        stream = Stream(threads)
        for kind in CACHES:
            each: list[Any] = [Attention(file, kind, shape, max(arguments.contexts) + 1, threads) for file in files]
            for context in arguments.contexts:
                speed = max(stream.read() for _ in range(3))
                steps = fastest(each, context, 1, arguments.runs)
                pieces = fastest(each, max(0, context - PIECE), PIECE, 2)
                rate = each[0].bytes_of(context + 1) / steps[0]
                ratios = [f"{times[1] / times[0]:.2f}" for times in (steps, pieces) if arguments.before]
                row = f"{steps[0] * 1e3:.3f}", f"{rate / 1e9:.1f}", f"{rate / speed:.0%}", f"{pieces[0] * 1e3:.1f}"
                table.add_row(kind, str(threads), str(context), *row, *ratios)
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
