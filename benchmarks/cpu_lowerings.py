"""Products, layers of experts and attention on a CPU: ONNX Runtime's ops beside `arriero.cpu`'s.

All forms of a case take turns in one process, so that what else the machine does falls on all alike. The fastest and
the median run are given. Weights and caches are random, and larger than the processor's by far; results are not
compared. Contrib ops prepack their weights, as they do by default; ours read them where they lie, and so does
`FusedMatMul`, which took [N, K] weights of other types widened before there was `PlainLinear`. No attention rotates or
normalises, and all write their caches in place; a layer's output is the next one's query.

    python benchmarks/cpu_lowerings.py --threads 1 --seconds 5
"""

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from arriero.plugins.cpu import kernel_nodes as kernels
from arriero.plugins.cpu.kernel_nodes import Panels
from arriero.plugins.cpu.library import DOMAIN, library
from arriero.plugins.gqa import cpu_nodes as gqa_cpu
from arriero.plugins.gqa import op as gqa
from arriero.plugins.moe import op as moe
from arriero.plugins.moe.body import route
from arriero.plugins.nodes import OPSET, Nodes, ints
from arriero.spec.stored_weights import PANEL

MICROSOFT = "com.microsoft"
FLOAT = ir.DataType.FLOAT
INT8_ACTIVATIONS = 4
"""The `accuracy_level` that lets contrib ops round activations to int8, block by block."""
HEADS, KV_HEADS, HEAD_DIM = 12, 4, 128
CACHES = {"fp32": np.float32, "fp16": np.float16, "int8": np.int8}
FLOATS = {"fp32": np.float32, "fp16": np.float16, "bf16": ml_dtypes.bfloat16}
RNG = np.random.default_rng(0)
Array = np.ndarray[Any, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Form:
    """An op and how what it reads is stored.

    Attributes:
        op: Its name, with our domain in front where it is ours.
        stored: Type of the weights, or of the caches.
        group: Inputs that share a scale; 0 where all of an output do.
        is_static: Whether ours rounds activations by one given scale, not a block by its own largest.
    """

    op: str
    stored: str
    group: int = 0
    is_static: bool = False

    @property
    def bits(self) -> int:
        return int(self.stored.removeprefix("int"))

    @property
    def is_ours(self) -> bool:
        return self.op.startswith(DOMAIN)

    @property
    def is_in_place(self) -> bool:
        """Whether weights are used where they lie."""
        return self.is_ours or self.op == "FusedMatMul"

    def __str__(self) -> str:
        groups = f", {'groups' if self.is_ours else 'blocks'} of {self.group}" if self.group else ""
        return f"`{self.op}` {self.stored}{groups}{', static' if self.is_static else ''}"


PRODUCTS = (
    Form(op="MatMul", stored="fp32"),
    Form(op="MatMulNBits", stored="int4", group=32),
    Form(op=f"{DOMAIN}.Linear", stored="int4", group=32),
    Form(op="MatMulNBits", stored="int8", group=128),
    Form(op=f"{DOMAIN}.Linear", stored="int8"),
    Form(op=f"{DOMAIN}.Linear", stored="int8", is_static=True),
)
PLAIN_PRODUCTS = (
    Form(op="FusedMatMul", stored="fp32"),
    *(Form(op=f"{DOMAIN}.PlainLinear", stored=stored) for stored in FLOATS),
)
EXPERTS = (
    Form(op="QMoE", stored="int4", group=32),
    Form(op=f"{DOMAIN}.MoeDispatch", stored="int4", group=32),
    Form(op="QMoE", stored="int8", group=128),
    Form(op=f"{DOMAIN}.MoeDispatch", stored="int8"),
    Form(op=f"{DOMAIN}.MoeDispatch", stored="int8", is_static=True),
    Form(op=f"{DOMAIN}.PlainMoeDispatch", stored="bf16"),
)
ATTENTION = (
    Form(op="GroupQueryAttention", stored="fp32"),
    *(Form(op=f"{DOMAIN}.{gqa.NAME}", stored=stored) for stored in CACHES),
)


class Weights:
    """Random weights as initializers."""

    def __init__(self) -> None:
        self.values: list[ir.Value] = []

    def add(self, array: Array) -> ir.Value:
        """An initializer of this array."""
        name, dtype = f"w{len(self.values)}", ir.DataType.from_numpy(array.dtype)
        value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(dtype))
        value.const_value = ir.tensor(array, name=name)
        self.values.append(value)
        return value

    def floats(self, *shape: int, dtype: Any = np.float32) -> ir.Value:
        """Floats from 0 to 0.01."""
        return self.add((RNG.random(shape, dtype=np.float32) / 100).astype(dtype))

    def stored(self, *shape: int) -> ir.Value:
        """Bytes."""
        return self.add(RNG.integers(0, 256, shape, dtype=np.uint8))

    def panels(self, form: Form, inputs: int, outputs: int, *experts: int) -> Panels:
        """A matrix as our ops take it, or all experts'; scales are of the type that models in bfloat16 have."""
        panels, groups = outputs // PANEL, inputs // form.group if form.group else 1
        dtype = ml_dtypes.bfloat16 if form.stored == "int4" else np.float32
        return Panels(
            weight=self.stored(*experts, panels, inputs * PANEL * form.bits // 8),
            scale=self.floats(*experts, panels, groups, PANEL, dtype=dtype),
            bits=form.bits,
            group=form.group,
            input_scale=self.floats(*(experts or (1,))) if form.is_static else None,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Cache:
    """A cache that a graph writes in place: its input, its output and what both lie in."""

    past: ir.Value
    present: ir.Value
    array: Array


@dataclass(frozen=True, kw_only=True, slots=True)
class Graph:
    """A graph to time.

    Attributes:
        inputs: Inputs drawn anew for each run; `tokens` is among the dimensions.
        outputs: Outputs besides caches.
        nodes: The graph's.
        weights: Its initializers.
        caches: Caches that it reads and writes.
    """

    inputs: list[ir.Value]
    outputs: list[ir.Value]
    nodes: Nodes
    weights: Weights
    caches: list[Cache] = field(default_factory=list)


def linear(form: Form, inputs: int, outputs: int, count: int) -> Graph:
    """Products of one input, `count` of them, that together are far above the caches."""
    x, nodes, weights = ir.val("x", FLOAT, ["tokens", inputs]), Nodes(), Weights()
    found = []
    for index in range(count):
        y = ir.val(f"y{index}", FLOAT, ["tokens", 1])
        product = multiply(form, nodes, weights, x, inputs, outputs)
        nodes.node("ReduceMax", [product, nodes.constant(ints(1))], outputs=[y])
        found.append(y)
    return Graph(inputs=[x], outputs=found, nodes=nodes, weights=weights)


def multiply(form: Form, nodes: Nodes, weights: Weights, x: ir.Value, inputs: int, outputs: int) -> ir.Value:
    """Writes one product in one of the forms."""
    product = ir.val(f"product{len(nodes.list)}", FLOAT, ["tokens", outputs])
    if form.op == f"{DOMAIN}.PlainLinear":
        kernels.multiply_plain(nodes, x, weights.floats(outputs, inputs, dtype=FLOATS[form.stored]), product)
    elif form.op == "FusedMatMul":
        given = [x, weights.floats(outputs, inputs)]
        nodes.node("FusedMatMul", given, outputs=[product], domain=MICROSOFT, attributes={"transB": 1})
    elif form.is_ours:
        kernels.multiply(nodes, x, weights.panels(form, inputs, outputs), outputs, product)
    elif form.op == "MatMul":
        nodes.node("MatMul", [x, weights.floats(inputs, outputs)], outputs=[product])
    else:
        blocks = inputs // form.group
        stored = weights.stored(outputs, blocks, form.group * form.bits // 8)
        settings = {
            "K": inputs,
            "N": outputs,
            "bits": form.bits,
            "block_size": form.group,
            "accuracy_level": INT8_ACTIVATIONS,
        }
        given = [x, stored, weights.floats(outputs, blocks)]
        nodes.node("MatMulNBits", given, outputs=[product], domain=MICROSOFT, attributes=settings)
    return product


def experts(form: Form, hidden: int, width: int, count: int) -> Graph:
    """A layer of experts, one an input of each token."""
    x, logits = ir.val("x", FLOAT, ["tokens", hidden]), ir.val("logits", FLOAT, ["tokens", count])
    y, nodes, weights = ir.val("y", FLOAT, ["tokens", hidden]), Nodes("experts/"), Weights()
    settings = moe.Attributes(top_k=1, quantisation="int4" if form.stored == "int4" else "int8")
    if form.op == f"{DOMAIN}.PlainMoeDispatch":
        sizes, dtype = ((hidden, 2 * width), (width, hidden)), FLOATS[form.stored]
        into, back = (weights.floats(count, *size, dtype=dtype) for size in sizes)
        kernels.dispatch_plain(nodes, x, logits, into, back, y, settings)
    elif form.is_ours:
        gate_up, down = weights.panels(form, hidden, 2 * width, count), weights.panels(form, width, hidden, count)
        kernels.dispatch(nodes, x, logits, gate_up, down, y, settings, experts=count, width=width)
    else:
        scores, _ = route(nodes, logits, settings, FLOAT)
        given = [nodes.Mul(x, scores), logits]
        for inputs, outputs in ((hidden, 2 * width), (width, hidden)):
            stored = weights.stored(count, outputs, inputs * form.bits // 8)
            given += [stored, weights.floats(count, outputs, inputs // form.group), None]
        nodes.node("QMoE", given[:-1], outputs=[y], domain=MICROSOFT, attributes=qmoe_settings(form))
    return Graph(inputs=[x, logits], outputs=[y], nodes=nodes, weights=weights)


def qmoe_settings(form: Form) -> dict[str, Any]:
    """Attributes of a `QMoE` whose own softmax, over the one chosen logit, is 1."""
    return {
        "k": 1,
        "normalize_routing_weights": 1,
        "activation_type": "swiglu",
        "swiglu_fusion": 1,
        "activation_alpha": 1.0,
        "activation_beta": 0.0,
        "expert_weight_bits": form.bits,
        "block_size": form.group,
        "accuracy_level": INT8_ACTIVATIONS,
    }


def attention(form: Form, past: int, tokens: int, layers: int) -> Graph:
    """Attention in several layers, over caches of their own that have room for just these tokens."""
    query = ir.val("query", FLOAT, [1, "tokens", HEADS * HEAD_DIM])
    key, value = (ir.val(name, FLOAT, [1, "tokens", KV_HEADS * HEAD_DIM]) for name in ("key", "value"))
    nodes, weights, x = Nodes(), Weights(), query
    caches: list[Cache] = []
    for layer in range(layers):
        own = [drawn_cache(form, f"{kind}.{layer}", past + tokens) for kind in ("key", "value")]
        y = ir.val(f"y{layer}", FLOAT, [1, "tokens", HEADS * HEAD_DIM])
        given, made = [x, key, value, *(cache.past for cache in own)], [y, *(cache.present for cache in own)]
        attend(form, nodes, weights, given, made, past, tokens)
        caches, x = caches + own, y
    return Graph(inputs=[query, key, value], outputs=[x], nodes=nodes, weights=weights, caches=caches)


def drawn_cache(form: Form, name: str, slots: int) -> Cache:
    """A cache of random keys or values."""
    shape = (1, KV_HEADS, slots, HEAD_DIM)
    if form.stored == "int8":
        array: Array = RNG.integers(-127, 128, shape, dtype=np.int8)
    else:
        array = (RNG.random(shape, dtype=np.float32) - np.float32(0.5)).astype(CACHES[form.stored])
    dtype = ir.DataType.from_numpy(array.dtype)
    return Cache(
        past=ir.val(f"past.{name}", dtype, shape), present=ir.val(f"present.{name}", dtype, shape), array=array
    )


def attend(
    form: Form,
    nodes: Nodes,
    weights: Weights,
    inputs: Sequence[ir.Value],
    outputs: Sequence[ir.Value],
    past: int,
    tokens: int,
) -> None:
    """Writes one layer of attention in one of the forms."""
    settings = gqa.Attributes(heads=HEADS, kv_heads=KV_HEADS, scale=HEAD_DIM**-0.5)
    if form.is_ours:
        scales = [weights.floats(KV_HEADS, HEAD_DIM) for _ in range(2)] if form.stored == "int8" else []
        past_lengths, no_rotation = weights.add(np.array([past], dtype=np.int32)), None
        gqa_cpu.lower(nodes, [*inputs, past_lengths, no_rotation, *scales], outputs, settings)
        return
    last, total = (weights.add(np.array(value, dtype=np.int32)) for value in ([past + tokens - 1], past + tokens))
    attributes = {"num_heads": HEADS, "kv_num_heads": KV_HEADS, "scale": settings.scale, "do_rotary": 0}
    nodes.node(form.op, [*inputs, last, total], outputs=outputs, domain=MICROSOFT, attributes=attributes)


class Contender:
    """A session of one form."""

    def __init__(self, form: Form, graph: Graph, threads: int) -> None:
        self.session = open_session(form, graph, threads)
        self.binding = self.session.io_binding()
        self.caches = [ort.OrtValue.ortvalue_from_numpy(cache.array) for cache in graph.caches]
        for cache, value in zip(graph.caches, self.caches, strict=True):
            self.binding.bind_ortvalue_input(cache.past.name, value)
            self.binding.bind_ortvalue_output(cache.present.name, value)
        drawn, self.outputs = {value.name for value in graph.inputs}, [value.name for value in graph.outputs]
        self.shapes = {each.name: each.shape for each in self.session.get_inputs() if each.name in drawn}

    def draw(self, tokens: int) -> dict[str, Array]:
        """Random inputs of a number of tokens."""
        feeds = {}
        for name, shape in self.shapes.items():
            sizes = [tokens if size == "tokens" else size for size in shape]
            feeds[name] = RNG.random(sizes, dtype=np.float32) - np.float32(0.5)
        return feeds

    def run(self, feeds: dict[str, Array]) -> float:
        """Seconds of one run."""
        for name, array in feeds.items():
            self.binding.bind_cpu_input(name, array)
        for output in self.outputs:
            self.binding.bind_output(output, "cpu")
        started = time.perf_counter()
        self.session.run_with_iobinding(self.binding)
        return time.perf_counter() - started


def open_session(form: Form, graph: Graph, threads: int) -> ort.InferenceSession:
    made = ir.Graph(
        [*graph.inputs, *(cache.past for cache in graph.caches)],
        [*graph.outputs, *(cache.present for cache in graph.caches)],
        nodes=graph.nodes.list,
        initializers=graph.weights.values,
        opset_imports={"": OPSET, DOMAIN if form.is_ours else MICROSOFT: 1},
        name="forms",
    )
    model = ir.to_proto(ir.Model(made, ir_version=11)).SerializeToString()
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    if form.is_ours:
        options.register_custom_ops_library(str(library()))
    if form.is_in_place:
        options.add_session_config_entry("session.disable_prepacking", "1")
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def race(
    title: str,
    forms: Sequence[Form],
    make: Callable[[Form], Graph],
    counts: Sequence[int],
    options: argparse.Namespace,
) -> None:
    """Times the forms for several numbers of tokens."""
    contenders = {form: Contender(form, make(form), options.threads) for form in forms}
    for tokens in counts:
        seconds: dict[Form, list[float]] = {form: [] for form in forms}
        end = time.perf_counter() + options.seconds
        while time.perf_counter() < end or len(seconds[forms[0]]) < 3:
            feeds = contenders[forms[0]].draw(tokens)
            for form, contender in contenders.items():
                seconds[form].append(contender.run(feeds))
        for form, taken in seconds.items():
            print(f"| {title} | {tokens} | {form} | {min(taken) * 1e3:.2f} | {median(taken) * 1e3:.2f} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each case")
    arguments = parser.parse_args()
    print("| case | tokens | form | fastest, ms | median, ms |\n|---|--:|---|--:|--:|")
    race("16 of 2048 × 4096", PRODUCTS, partial(linear, inputs=2048, outputs=4096, count=16), (1, 8, 512), arguments)
    floats = partial(linear, inputs=2048, outputs=4096, count=8)
    race("8 of 2048 × 4096", PLAIN_PRODUCTS, floats, (1, 8, 64, 512), arguments)
    for count, width in ((16, 2048), (128, 1024)):
        layer = partial(experts, hidden=1024, width=width, count=count)
        race(f"{count} experts, 1024 × {width}", EXPERTS, layer, (1, 8, 64, 512), arguments)
    for past, tokens, layers in ((512, 1, 128), (8192, 1, 8), (0, 512, 16)):
        stack = partial(attention, past=past, tokens=tokens, layers=layers)
        race(f"attention of {layers} layers, {past} slots filled", ATTENTION, stack, (tokens,), arguments)
