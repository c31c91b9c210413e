"""The CPU's attention over caches that are read in several spans: a token's bits are the same in any company."""

from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from arriero.plugins.cpu.library import DOMAIN, library
from arriero.plugins.gqa import cpu_nodes, op
from arriero.plugins.gqa.meaning import grouped_query_attention
from arriero.plugins.nodes import OPSET, Nodes
from arriero.spec.stored_weights import slot_bytes

Array = np.ndarray[Any, Any]
TYPE = ir.DataType
CACHES = {
    "float32": (TYPE.FLOAT, 0),
    "float16": (TYPE.FLOAT16, 0),
    "int8": (TYPE.INT8, 0),
    "fp8": (TYPE.FLOAT8E4M3FN, 0),
    "groups of 8 bits": (TYPE.UINT8, 8),
    "groups of 4 bits": (TYPE.UINT8, 4),
}
CAPACITY = 1200
"""Slots: more than a span of 1,024."""
LENGTH = 1150


class Layer:
    """The op over two rows of caches of one kind, which begin empty."""

    def __init__(self, kind: str, heads: int, kv_heads: int, head_dim: int) -> None:
        self.attributes = op.Attributes(heads=heads, kv_heads=kv_heads, scale=0.3, qk_norm_eps=1e-5)
        dtype, self.bits = CACHES[kind]
        self.is_scaled = kind in ("int8", "fp8")
        rng = np.random.default_rng(0)
        self.data = {
            name: rng.standard_normal((2, LENGTH, count * head_dim)).astype(np.float32)
            for name, count in (("query", heads), ("key", kv_heads), ("value", kv_heads))
        }
        self.inv_freq = (1 / 10000 ** (np.arange(head_dim // 2) / head_dim)).astype(np.float32)
        scale = np.full((kv_heads, head_dim), 3 / 127 if kind == "int8" else 1 / 64, np.float32)
        self.fixed: dict[str, Any] = {"inv_freq": ort.OrtValue.ortvalue_from_numpy(self.inv_freq)}
        if self.is_scaled:
            self.fixed |= {name: ort.OrtValue.ortvalue_from_numpy(scale) for name in op.CACHE_SCALES}
        size = slot_bytes(head_dim, self.bits) if self.bits else head_dim
        empty = np.zeros(
            (2, kv_heads, CAPACITY, size), np.uint8 if dtype in (TYPE.UINT8, TYPE.FLOAT8E4M3FN) else dtype.numpy()
        )
        caches = [ort.OrtValue.ortvalue_from_numpy_with_onnx_type(empty, dtype) for _ in range(2)]
        self.session = self._session(dtype)
        self.output, *self.caches = self._call(np.zeros(2, np.int32), self.data, caches)

    def _session(self, dtype: ir.DataType) -> ort.InferenceSession:
        names = [*op.INPUTS, *op.CACHE_SCALES]
        inputs = {
            name: ir.val(name, dtype if "cache" in name else TYPE.FLOAT, [None] * rank)
            for name, rank in zip(names, (3, 3, 3, 4, 4, 1, 1, 2, 2), strict=True)
            if self.is_scaled or name not in op.CACHE_SCALES
        }
        inputs["past_lengths"].dtype = TYPE.INT32
        outputs = [ir.val("output", TYPE.FLOAT, [None] * 3)]
        outputs += [ir.val(name, dtype, [None] * 4) for name in op.OUTPUTS[1:]]
        nodes = Nodes()
        cpu_nodes.lower(nodes, [inputs.get(name) for name in names], outputs, self.attributes, self.bits)
        graph = ir.Graph(
            list(inputs.values()), outputs, nodes=nodes.list, opset_imports={"": OPSET, DOMAIN: 1}, name="g"
        )
        options = ort.SessionOptions()
        options.intra_op_num_threads = 2
        options.register_custom_ops_library(str(library()))
        return ort.InferenceSession(
            ir.to_proto(ir.Model(graph, ir_version=11)).SerializeToString(), options, providers=["CPUExecutionProvider"]
        )

    def _call(self, past: Array, data: dict[str, Array], caches: list[ort.OrtValue]) -> list[Any]:
        feeds = {name: ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(data[name])) for name in data}
        feeds |= dict(zip(("key_cache", "value_cache"), caches, strict=True)) | self.fixed
        feeds["past_lengths"] = ort.OrtValue.ortvalue_from_numpy(past)
        output, *presents = self.session.run_with_ort_values(op.OUTPUTS, feeds)
        return [output.numpy(), *presents]

    def again(self, *past: int, length: int = 1) -> tuple[Array, Array]:
        """Some tokens of each row from a past of its own on, as once more computed, and as in the whole."""
        rows = [slice(start, start + length) for start in past]
        data = {name: np.stack([array[i, some] for i, some in enumerate(rows)]) for name, array in self.data.items()}
        found = self._call(np.array(past, np.int32), data, self.caches)[0]
        return found, np.stack([self.output[i, some] for i, some in enumerate(rows)])


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(3, 1, 32), (5, 1, 40), (8, 8, 16)], ids=str)
def test_a_token_behind_many_others_knows_of_no_company(kind: str, heads: int, kv_heads: int, head_dim: int) -> None:
    layer = Layer(kind, heads, kv_heads, head_dim)
    assert np.isfinite(layer.output).all()
    for past in ((0, 1), (62, 63), (64, 1023), (1024, 1025), (1088, 1149), (5, 1100)):
        found, expected = layer.again(*past)
        assert np.array_equal(found, expected), past
    for length in (2, 3, 4, 13):
        found, expected = layer.again(1022, 1087, length=length)
        assert np.array_equal(found, expected), length
    found, expected = layer.again(1000, 70, length=70)
    assert np.array_equal(found, expected)


def test_spans_are_joined_as_the_meaning_says() -> None:
    layer = Layer("float32", 6, 2, 32)
    caches = [cache.numpy() for cache in layer.caches]
    last = {name: array[:, -1:] for name, array in layer.data.items()}
    expected, *_ = grouped_query_attention(
        last["query"], last["key"], last["value"], *caches, np.full(2, LENGTH - 1, np.int32), layer.inv_freq,
        attributes=layer.attributes,
    )  # fmt: skip
    assert np.abs(layer.output[:, -1:] - expected).max() < 1e-5


def test_a_value_that_is_no_number_in_one_span_stays_none() -> None:
    layer = Layer("float16", 3, 1, 32)
    bad = layer.caches[0].numpy().copy()
    bad[0, 0, 1100, 3] = np.nan
    layer.caches[0] = ort.OrtValue.ortvalue_from_numpy(bad)
    found, _ = layer.again(1130, 1130)
    assert np.isnan(found[0]).all()
    assert np.isfinite(found[1]).all()
    assert np.isfinite(layer.again(1099, 1099)[0]).all()
