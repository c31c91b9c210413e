"""The cost of what the CPU's own ops look at before they compute, beside a step of a model of 1.4 billion parameters.

A bundle's nodes of domain `arriero.cpu` are put into a graph of their own and called with no token to compute: each
call then reads its inputs, checks types, shapes, lengths and scales, makes its outputs, and ends. The time of a graph
that has all of them nine times, less that of one that has them once, is eight times the cost of one step's calls, of
which checks are a part: so the share that is printed bounds theirs from above. It is set against one decode step of
the same bundle, in the same process and in turns, on one thread, in seconds of its processor, the fastest of each.

    python benchmarks/op_checks.py [BUNDLE …] [--folder DIR] [--runs 15]

Without a bundle those of the CPU race in Scout's shape are made: int8, int4 and bfloat16; `--folder` keeps what was
made.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper
from rich.console import Console
from rich.table import Table
from support.dense import peer
from support.workshop import ENTRIES, Workshop

import arriero
from arriero.files.circumstances import machine
from arriero.files.folders import read_spec
from arriero.plugins.cpu.library import DOMAIN, library

TIMES = 9
"""How often the larger graph has all nodes."""
CONTEXT = 512
STORED = {TensorProto.BFLOAT16: np.uint16, TensorProto.FLOAT8E4M3FN: np.uint8}
"""Types in which numpy holds what it has no type for."""


class Idle:
    """A bundle's own nodes, some times over, to be called without a token.

    Args:
        bundle: The bundle.
        times: How often the graph has all of them.
    """

    def __init__(self, bundle: Path, times: int) -> None:
        whole = onnx.load(bundle / read_spec(bundle).graph, load_external_data=False).graph
        shapes = {each.name: shape_of(each) for each in whole.input}
        shapes |= {each.name: (each.data_type, tuple(each.dims)) for each in whole.initializer}
        self.nodes = [node for node in whole.node if node.domain == DOMAIN]
        for node in self.nodes:
            shapes |= {name: (TensorProto.FLOAT, shape) for name, shape in activations(node, shapes)}
        names = dict.fromkeys(name for node in self.nodes for name in node.input if name)
        nodes, outputs = [], []
        for time_ in range(times):
            for node in self.nodes:
                made = onnx.NodeProto()
                made.CopyFrom(node)
                made.name, made.output[:] = f"{node.name}/{time_}", [f"{name}/{time_}" for name in node.output]
                nodes.append(made)
                kinds = [TensorProto.FLOAT, *(shapes[name][0] for name in node.input[3:5])]
                outputs += map(helper.make_tensor_value_info, made.output, kinds, [None] * len(made.output))
        inputs = [helper.make_tensor_value_info(name, shapes[name][0], [None] * len(shapes[name][1])) for name in names]
        opsets = [helper.make_opsetid("", 24), helper.make_opsetid(DOMAIN, 1)]
        model = helper.make_model(
            helper.make_graph(nodes, "idle", inputs, outputs), opset_imports=opsets, ir_version=11
        )
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.register_custom_ops_library(str(library()))
        self.session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        self.binding = self.session.io_binding()
        values = {name: empty(*shapes[name]) for name in names}
        for name, value in values.items():
            self.binding.bind_ortvalue_input(name, value)
        for node in nodes:
            caches = dict(zip(node.output[1:], node.input[3:5], strict=True)) if len(node.output) > 1 else {}
            for name in node.output:
                if name in caches:  # written where it is read, as in a session
                    self.binding.bind_ortvalue_output(name, values[caches[name]])
                else:
                    self.binding.bind_output(name, "cpu")

    def run(self) -> None:
        """Calls every node."""
        self.session.run_with_iobinding(self.binding)


def shape_of(info: onnx.ValueInfoProto) -> tuple[int, tuple[int, ...]]:
    """A value's type and dimensions: one row, without tokens; caches for `CONTEXT` of them."""
    tensor, sizes = info.type.tensor_type, []
    for dim in tensor.shape.dim:
        named = 1 if dim.dim_param == "batch" else CONTEXT if dim.dim_param.endswith("slots") else 0
        sizes.append(named if dim.dim_param else dim.dim_value)
    return tensor.elem_type, tuple(sizes)


def activations(node: onnx.NodeProto, shapes: dict[str, Any]) -> list[tuple[str, tuple[int, ...]]]:
    """A node's activations without a token: names, and shapes as its weights or caches ask for."""
    given = {each.name: helper.get_attribute_value(each) for each in node.attribute}

    def inputs(weight: str) -> int:
        return shapes[weight][1][-1] * 8 // (32 * given["bits"])

    match node.op_type:
        case "Linear":
            return [(node.input[0], (1, 0, inputs(node.input[1])))]
        case "PlainLinear" | "Fp8Linear":
            return [(node.input[0], (1, 0, shapes[node.input[1]][1][1]))]
        case "MoeDispatch":
            return [(node.input[0], (0, inputs(node.input[2]))), (node.input[1], (0, given["experts"]))]
        case "PlainMoeDispatch":
            held, _, size = shapes[node.input[3]][1]
            return [(node.input[0], (0, size)), (node.input[1], (0, held))]
        case "Fp8MoeDispatch":
            held, _, size = shapes[node.input[2]][1]
            return [(node.input[0], (0, size)), (node.input[1], (0, held))]
        case "GroupedQueryAttention" if not given["cache_bits"]:
            sizes = [count * shapes[node.input[3]][1][-1] for count in (given["heads"], *[given["kv_heads"]] * 2)]
            return [(name, (1, 0, size)) for name, size in zip(node.input[:3], sizes, strict=True)]
    raise SystemExit(f"op_checks.py: {node.op_type} with {given} is none that a bundle of one rank has by default")


def empty(kind: int, shape: tuple[int, ...]) -> ort.OrtValue:
    """A tensor of zeros, which takes no memory until it is read; scales are one."""
    stored = STORED.get(kind) or helper.tensor_dtype_to_np_dtype(kind)
    array = np.ones(shape, stored) if np.prod(shape) < 1 << 12 else np.zeros(shape, stored)
    if kind == TensorProto.INT32:
        array[:] = 0
    if kind in STORED:
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array, kind)
    return ort.OrtValue.ortvalue_from_numpy(array)


def seconds(work: Callable[[], Any]) -> float:
    """Seconds of the processor."""
    started = time.process_time()
    work()
    return time.process_time() - started


def measure(bundle: Path, runs: int) -> tuple[int, float, float]:
    """Nodes of a step, and the least seconds of their calls without tokens and of a decode step."""
    session = arriero.load(bundle, max_seq=CONTEXT + 1 + runs, threads=1)
    state = session.start(1, CONTEXT + 1 + runs)
    session.prefill(state, [list(range(10, 10 + CONTEXT))])
    once, often = Idle(bundle, 1), Idle(bundle, TIMES)
    for each in (once.run, often.run, lambda: session.decode(state, [10])):
        each()
    times: dict[str, list[float]] = {"step": [], "once": [], "often": []}
    for _ in range(runs):
        times["step"].append(seconds(lambda: session.decode(state, [10])))
        for name, idle in (("once", once), ("often", often)):
            times[name] += [seconds(idle.run) for _ in range(5)]
    fastest = {name: min(each) for name, each in times.items()}
    return len(once.nodes), (fastest["often"] - fastest["once"]) / (TIMES - 1), fastest["step"]


def made_bundles(folder: Path) -> list[Path]:
    """The bundles of the CPU race in Scout's shape."""
    workshop = Workshop(folder, folder / "bundles", peer("scout"), 32)
    ours = {entry.form: entry for entry in ENTRIES if entry.engine == "arriero"}
    return [workshop.make(ours[form]) for form in ("int8", "int4", "bfloat16")]


def main() -> None:
    parser = argparse.ArgumentParser(description="The cost of the checks of the CPU's own ops.")
    parser.add_argument("bundle", type=Path, nargs="*")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--runs", type=int, default=15)
    arguments = parser.parse_args()
    table = Table("bundle", "own ops a step", "calls without tokens, µs", "decode step, ms", "share at most, %")
    with tempfile.TemporaryDirectory() as scratch:
        for bundle in arguments.bundle or made_bundles(arguments.folder or Path(scratch)):
            count, cost, step = measure(bundle, arguments.runs)
            table.add_row(bundle.name, f"{count}", f"{cost * 1e6:.1f}", f"{step * 1e3:.2f}", f"{cost / step:.2%}"[:-1])
    console = Console()
    console.print(table)
    console.print(machine()["processor"], highlight=False)


if __name__ == "__main__":
    main()
