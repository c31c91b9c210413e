"""One layer of each kind, traced from PyTorch into ONNX with the custom ops as single nodes.

The layer lives on the meta device: its weights have shapes and no bytes, so the cost does not depend on their size.
"""

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from typing import Any, TypeVar

import onnx_ir as ir
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass
from onnxscript import opset23 as onnx_ops
from onnxscript.values import Opset
from torch import Tensor, nn

from ..plugins import schemas
from ..plugins.gqa.op import DOMAIN, VERSION
from ..spec.geometry import LayerSpec, ModelSpec, VisionSpec
from ..spec.types import DType
from .llama4 import Cache, DecoderLayer
from .llama4_tower import TowerLayer

INPUTS = ("x", "past_lengths", "key_cache", "value_cache")
OUTPUTS = ("y", "present_key", "present_value")
TOWER_INPUTS = ("x", "cos", "sin")

Module = TypeVar("Module", bound=nn.Module)


class CachedLayer(nn.Module):
    """A layer's cached step with plain tensors in and out."""

    def __init__(self, layer: DecoderLayer) -> None:
        super().__init__()
        self.layer = layer

    def forward(
        self, x: Tensor, past_lengths: Tensor, key_cache: Tensor, value_cache: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Takes x [B, S, H], past_lengths [B] and caches [B, K, C, D]; returns y and the caches."""
        y, cache = self.layer(x, Cache(key_cache, value_cache, past_lengths))
        return y, cache.key, cache.value


def trace_layer(spec: ModelSpec, layer: LayerSpec) -> ir.Graph:
    """Traces one kind of layer, or gives what was traced of such a layer before; it is to be cloned, not changed.

    Returns:
        A graph of inputs `INPUTS` and outputs `OUTPUTS` whose initializers are named `layer.<parameter>` and hold no
        data.
    """
    return _trace_layer(replace(spec, vocab_size=1, layers=(layer,)))


@lru_cache(maxsize=16)
def _trace_layer(spec: ModelSpec) -> ir.Graph:
    """Traces the only layer of a model."""
    (layer,) = spec.layers
    schemas.register()
    dtype = getattr(torch, spec.dtype)
    module = on_meta(spec.dtype, lambda: DecoderLayer(spec, layer))
    with torch.device("meta"):
        cache = torch.empty(2, spec.kv_heads, 4, spec.head_dim, dtype=dtype)
        arguments = (
            torch.empty(2, 3, spec.hidden_size, dtype=dtype),
            torch.empty(2, dtype=torch.int32),
            cache,
            torch.empty_like(cache),
        )
    batch, sequence, slots = (torch.export.Dim(name) for name in ("batch", "sequence", "slots"))
    of_cache = {0: batch, 2: slots}
    graph = _trace(
        CachedLayer(module), arguments, ({0: batch, 1: sequence}, {0: batch}, of_cache, of_cache), INPUTS, OUTPUTS
    )
    simplify_reshapes(graph)
    return graph


@lru_cache(maxsize=4)
def trace_tower_layer(vision: VisionSpec, dtype: DType) -> ir.Graph:
    """Traces a layer of the vision tower.

    Returns:
        A graph of inputs `TOWER_INPUTS` and one output, whose initializers are named `<parameter>` and hold no data.
    """
    module = on_meta(dtype, lambda: TowerLayer(vision))
    with torch.device("meta"):
        x = torch.empty(2, vision.positions, vision.hidden_size, dtype=getattr(torch, dtype))
        cos, sin = (torch.empty(vision.positions, vision.head_dim // 2) for _ in range(2))
    graph = _trace(module, (x, cos, sin), ({0: torch.export.Dim("tiles")}, None, None), TOWER_INPUTS, ("y",))
    for node in graph:
        if node.op_type == "Attention":
            node.resize_outputs(1)  # the exporter names all that the operator may give
    return graph


def _trace(
    module: nn.Module,
    arguments: tuple[Tensor, ...],
    dynamic_shapes: tuple[Any, ...],
    inputs: Sequence[str],
    outputs: Sequence[str],
) -> ir.Graph:
    """A module's graph, each of its custom ops a node."""
    with quiet():
        program = torch.export.export(module, arguments, dynamic_shapes=dynamic_shapes)
        exported = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=23,
            input_names=list(inputs),
            output_names=list(outputs),
            custom_translation_table=translations(),
            optimize=False,
            verbose=False,
        )
    assert exported is not None
    graph: ir.Graph = exported.model.graph
    return graph


def on_meta(dtype: DType, make: Callable[[], Module]) -> Module:
    """A module in a type, whose parameters have no bytes."""
    previous = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        with torch.device("meta"):
            return make().eval()
    finally:
        torch.set_default_dtype(previous)


def translations() -> dict[Any, Any]:
    """Translations of Arriero's PyTorch ops into ONNX, and of those whose own translation is less readable."""
    arriero = Opset(DOMAIN, VERSION)

    def grouped_query_attention(  # type: ignore[no-untyped-def]
        query, key, value, key_cache, value_cache, past_lengths, inv_freq,
        heads, kv_heads, scale, chunk, qk_norm_eps, temperature_scale, temperature_floor,
    ):  # fmt: skip
        inputs = [query, key, value, key_cache, value_cache, past_lengths]
        return arriero.GroupedQueryAttention(
            *(inputs if inv_freq is None else [*inputs, inv_freq]),
            heads=heads,
            kv_heads=kv_heads,
            scale=scale,
            chunk=chunk,
            qk_norm_eps=qk_norm_eps,
            temperature_scale=temperature_scale,
            temperature_floor=temperature_floor,
        )

    def moe_dispatch(hidden, router_logits, gate_up, down, top_k, activation):  # type: ignore[no-untyped-def]
        return arriero.MoeDispatch(hidden, router_logits, gate_up, down, top_k=top_k, activation=activation)

    def rms_norm(x, weight, eps):  # type: ignore[no-untyped-def]
        return onnx_ops.RMSNormalization(x, weight, epsilon=eps)

    def linear(x, weight, bias=None):  # type: ignore[no-untyped-def]
        product = onnx_ops.MatMul(x, onnx_ops.Transpose(weight, perm=[1, 0]))
        return product if bias is None else onnx_ops.Add(product, bias)

    def rotate_patches(x, cos, sin, heads):  # type: ignore[no-untyped-def]
        wide = onnx_ops.Cast(x, to=ir.DataType.FLOAT)
        turned = onnx_ops.RotaryEmbedding(wide, cos, sin, interleaved=1, num_heads=heads)
        return onnx_ops.Cast(turned, to=x.dtype)

    def attend_patches(query, key, value, heads):  # type: ignore[no-untyped-def]
        attended, *_ = onnx_ops.Attention(query, key, value, q_num_heads=heads, kv_num_heads=heads)
        return attended

    ops = torch.ops
    return {
        ops.arriero.grouped_query_attention.default: grouped_query_attention,
        ops.arriero.moe_dispatch.default: moe_dispatch,
        ops.arriero.rms_norm.default: rms_norm,
        ops.arriero.rotate_patches.default: rotate_patches,
        ops.arriero.attend_patches.default: attend_patches,
        ops.aten.linear.default: linear,
    }


def simplify_reshapes(graph: ir.Graph) -> None:
    """Gives each Reshape the plainest shape input: the exporter computes every dimension by itself.

    A flattening to tokens [B·S, H] takes the constant [-1, H]; the way back takes the shape of the layer's input.
    """
    x = graph.inputs[0]
    for node in [node for node in graph if node.op_type == "Reshape" and node.outputs[0].shape is not None]:
        shape = node.outputs[0].shape
        if shape is not None and len(shape) == 2 and isinstance(hidden := shape[1], int):
            plain = ir.node("Constant", [], {"value_ints": [-1, hidden]})
        elif shape == x.shape:
            plain = ir.node("Shape", [x])
        else:
            continue
        graph.insert_before(node, plain)
        node.replace_input_with(1, plain.outputs[0])
        node.attributes.pop("allowzero", None)
    RemoveUnusedNodesPass()(ir.Model(graph, ir_version=11))


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps the exporter's remarks about packages that are not needed here off the terminal."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
