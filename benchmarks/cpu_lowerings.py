"""The forms that ONNX Runtime's CPU has for a quantised product and for a layer of experts, side by side.

All forms of a case take turns in one process, so that what else the machine does falls on all alike. The fastest and
the median run are given. These figures chose the lowerings in `plugins/product.py` and `plugins/moe/cpu.py`.

    python benchmarks/cpu_lowerings.py --threads 1 --seconds 5
"""

import argparse
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from arriero.plugins.moe import cpu as moe_cpu
from arriero.plugins.moe.op import Attributes
from arriero.plugins.nodes import OPSET, Nodes, ints
from arriero.plugins.product import MICROSOFT, Matrix, multiply

FLOAT = ir.DataType.FLOAT
RNG = np.random.default_rng(0)
Graph = tuple[list[ir.Value], list[ir.Value], Nodes, list[ir.Value]]


class Weights:
    """Random weights as initializers."""

    def __init__(self) -> None:
        self.values: list[ir.Value] = []

    def add(self, array: np.ndarray) -> ir.Value:
        """An initializer of this array."""
        name, dtype = f"w{len(self.values)}", ir.DataType.from_numpy(array.dtype)
        value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(dtype))
        value.const_value = ir.tensor(array, name=name)
        self.values.append(value)
        return value

    def matrix(self, form: str, inputs: int, outputs: int) -> Matrix:
        """A weight in one of the forms."""
        scale = RNG.random
        if form == "fp32":
            return Matrix(kind="none", weight=self.add(scale((inputs, outputs), dtype=np.float32)))
        if form == "int8 by tokens":
            stored = RNG.integers(-127, 128, (inputs, outputs), dtype=np.int8)
            return Matrix(kind="int8", weight=self.add(stored), scale=self.add(scale(outputs, dtype=np.float32)))
        bits, block = (int(part) for part in form.removeprefix("int").split(" blocks "))
        stored = RNG.integers(0, 256, (outputs, inputs // block, block * bits // 8), dtype=np.uint8)
        scales = self.add(scale((outputs, inputs // block), dtype=np.float32))
        return Matrix(kind=f"int{bits}", weight=self.add(stored), scale=scales, has_blocks=bits == 8)


def linear(form: str, inputs: int, outputs: int, count: int) -> Graph:
    """So many products of one input, that together are far above the caches."""
    x, nodes, weights = ir.val("x", FLOAT, ["tokens", inputs]), Nodes(), Weights()
    found = []
    for index in range(count):
        y = ir.val(f"y{index}", FLOAT, ["tokens", 1])
        product = multiply(nodes, x, weights.matrix(form, inputs, outputs))
        nodes.node("ReduceMax", [product, nodes.constant(ints(1))], outputs=[y])
        found.append(y)
    return [x], found, nodes, weights.values


def experts(form: str, hidden: int, size: int, count: int) -> Graph:
    """A layer of experts, one an input of each token."""
    x, logits = ir.val("x", FLOAT, ["tokens", hidden]), ir.val("logits", FLOAT, ["tokens", count])
    y, nodes, weights = ir.val("y", FLOAT, ["tokens", hidden]), Nodes("experts/"), Weights()
    kind, _, rest = form.partition(": ")
    settings = Attributes(top_k=1, quantisation="int4" if "int4" in rest else "int8" if "int8" in rest else "none")
    if kind == "If":
        pairs = [(weights.matrix(rest, hidden, 2 * size), weights.matrix(rest, size, hidden)) for _ in range(count)]
        moe_cpu.lower(nodes, x, logits, pairs, hidden, y, settings)
        return [x, logits], [y], nodes, weights.values
    bits, block = (int(part) for part in rest.removeprefix("int").split(" blocks "))
    stacked = []
    for inputs, outputs in ((hidden, 2 * size), (size, hidden)):
        stored = RNG.integers(0, 256, (count, outputs, inputs * bits // 8), dtype=np.uint8)
        scales = RNG.random((count, outputs, inputs // block), dtype=np.float32) / 100
        stacked.append(moe_cpu.Stacked(weight=weights.add(stored), scale=weights.add(scales)))
    moe_cpu.lower_stacked(nodes, x, logits, stacked[0], stacked[1], block, y, settings)
    return [x, logits], [y], nodes, weights.values


def open_session(graph: Graph, threads: int) -> ort.InferenceSession:
    inputs, outputs, nodes, weights = graph
    imports = {"": OPSET, MICROSOFT: 1}
    made = ir.Graph(inputs, outputs, nodes=nodes.list, initializers=weights, opset_imports=imports, name="forms")
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    model = ir.to_proto(ir.Model(made, ir_version=11)).SerializeToString()
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def race(title: str, make: Callable[[str], Graph], forms: list[str], options: argparse.Namespace) -> None:
    """Times the forms for several numbers of tokens."""
    sessions = {form: open_session(make(form), options.threads) for form in forms}
    for tokens in (1, 8, 64, 512):
        seconds: dict[str, list[float]] = {form: [] for form in forms}
        end = time.perf_counter() + options.seconds
        while time.perf_counter() < end or len(seconds[forms[0]]) < 3:
            feeds: dict[str, Any] = {}
            for value in next(iter(sessions.values())).get_inputs():
                feeds[value.name] = RNG.random((tokens, value.shape[1]), dtype=np.float32) - np.float32(0.5)
            for form, session in sessions.items():
                started = time.perf_counter()
                session.run(None, feeds)
                seconds[form].append(time.perf_counter() - started)
        for form, taken in seconds.items():
            print(f"| {title} | {tokens} | {form} | {min(taken) * 1e3:.2f} | {median(taken) * 1e3:.2f} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each case")
    arguments = parser.parse_args()
    print("| case | tokens | form | fastest, ms | median, ms |\n|---|--:|---|--:|--:|")
    dense = ["fp32", "int8 by tokens", "int8 blocks 256", "int8 blocks 64", "int4 blocks 128", "int4 blocks 64"]
    race("16 of 2048 × 4096", lambda form: linear(form, 2048, 4096, 16), [*dense, "int4 blocks 32"], arguments)
    for number, width in ((16, 2048), (128, 1024)):
        kinds = ["If: int8 by tokens", "QMoE: int8 blocks 256", "If: int4 blocks 64", "QMoE: int4 blocks 64"]
        title = f"{number} experts, 1024 × {width}"
        race(title, lambda form, n=number, w=width: experts(form, 1024, w, n), kinds, arguments)  # type: ignore[misc]
