"""What the plugins tell TensorRT: types, shapes, scratch memory, and what they launch."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from idle_driver import IdleDriver
from walked_engine import write_images

from arriero.engine.tensorrt_library import open_library
from arriero.errors import BuildError, SessionError
from arriero.plugins.gqa.op import Attributes as GqaAttributes
from arriero.plugins.gqa.plugin import PLUGIN as GQA
from arriero.plugins.gqa.plugin import Settings
from arriero.plugins.launch import Driver, Kernels, Launch, placed, total_size
from arriero.plugins.moe.op import Attributes
from arriero.plugins.moe.plugin import PLUGIN as MOE
from arriero.plugins.tensorrt_plugin import NAMESPACE, VERSION, Tensor, register

SETTINGS = Settings(heads=40, kv_heads=8, scale=128**-0.5, chunk=8192, qk_norm_eps=1e-5, rope=1)


def attention(batch: int, length: int, slots: int, cache: str = "bf16") -> list[Tensor]:
    query, key = (Tensor(dtype="bf16", shape=(batch, length, heads * 128)) for heads in (40, 8))
    caches = Tensor(dtype=cache, shape=(batch, 8, slots, 128))
    scales = [Tensor(dtype="fp32", shape=(8, 128))] * 2 if cache != "bf16" else []
    past, inv_freq = Tensor(dtype="i32", shape=(batch,)), Tensor(dtype="fp32", shape=(64,))
    return [query, key, key, caches, caches, past, inv_freq, *scales]


def experts(tokens: int, top_k: int = 1) -> list[Tensor]:
    shapes = ((tokens, 5120), (tokens, 16), (16, 5120, 16384), (16, 8192, 5120))
    return [Tensor(dtype="bf16", shape=shape) for shape in shapes]


def test_layers_that_are_alike_share_a_plan_and_each_sizes_launches(tmp_path: Path) -> None:
    trt = open_library("tensorrt-rtx")
    (creator,) = register(trt, (GQA,)).values()
    binaries = write_images(GQA.call(SETTINGS, attention(1, 1, 64), 89).kernels, GQA.kernels, 89, tmp_path)
    creator.kernels, creator.rows = Kernels(Driver(IdleDriver()), tmp_path, binaries), 3
    types = {
        name: getattr(trt.DataType, kind) for name, kind in (("bf16", "BF16"), ("i32", "INT32"), ("fp32", "FLOAT"))
    }

    def described(batch: int, length: int) -> list[Any]:
        found = []
        for each in attention(batch, length, 64):
            found.append(trt.PluginTensorDesc())
            found[-1].type, found[-1].dims = types[each.dtype], trt.Dims(each.shape)
        return found

    other = creator.make(dataclasses.replace(SETTINGS, chunk=0))
    layers = [creator.make(SETTINGS), creator.make(SETTINGS), creator.make(SETTINGS).attach_to_context(None)]
    calls = []
    layers[0].on_shape_change(described(1, 5), [])
    assert {*layers[0].alike[0].ready} == {(1, 1), (2, 1), (3, 1), (1, 5)}  # steps over single tokens, before they come
    for batch, length in ((1, 1), (2, 1), (1, 5), (1, 1)):
        for layer in (*layers, other):
            layer.on_shape_change(described(batch, length), [])
        assert all(layer.call is layers[0].call is not other.call for layer in layers)
        calls.append(layers[0].call)
    assert calls[0] is calls[3]  # as it was ready
    assert len(set(map(id, calls))) == 3
    assert all(layer.alike[0] is layers[0].alike[0] is not other.alike[0] for layer in layers)
    early = creator.make(SETTINGS)  # TensorRT may run it before it says the sizes again
    caches = [3 << 20, 4 << 20]
    early.enqueue(described(2, 1), [], [1 << 20] * 3 + caches + [1 << 20] * 2, [1 << 20, *caches], 1 << 20, 7)
    assert early.call is calls[1]
    with pytest.raises(SessionError, match="TensorRT moved a tensor that GroupedQueryAttention updates in place"):
        early.enqueue(described(2, 1), [], [1 << 20] * 3 + caches + [1 << 20] * 2, [1 << 20] * 3, 1 << 20, 7)
    creator.kernels, creator.rows = None, 0


@given(batch=st.integers(1, 9), length=st.integers(1, 300), less=st.floats(0, 1), shorter=st.floats(0, 1))
def test_scratch_memory_is_enough_for_every_smaller_call(batch: int, length: int, less: float, shorter: float) -> None:
    smaller = max(1, round(batch * less)), max(1, round(length * shorter))
    for largest, call in (
        (attention(batch, length, 8192), attention(*smaller, 8192)),
        (experts(batch * length), experts(smaller[0] * smaller[1])),
    ):
        op, settings = (GQA, SETTINGS) if len(largest) > 4 else (MOE, Attributes(top_k=1))
        plan = op.call(settings, largest, 89)
        assert total_size(plan.workspace(call)) <= total_size(plan.largest_workspace(largest))


@pytest.mark.parametrize(
    ("op", "settings", "tensors"),
    [
        (GQA, SETTINGS, attention(3, 1, 8192)),
        (GQA, SETTINGS, attention(2, 700, 8192, "i8")),
        (MOE, Attributes(top_k=1), experts(1)),
        (MOE, Attributes(top_k=1), experts(4096)),
    ],
    ids=["attention decodes", "attention prefills", "experts decode", "experts prefill"],
)
def test_launches_take_what_tensorrt_gives(op: Any, settings: Any, tensors: list[Tensor]) -> None:
    call = op.call(settings, tensors, 89)
    pointers = {name: 1000 + index for index, name in enumerate((*call.names, *op.outputs))}
    pointers.update(placed(call.workspace(tensors), 1 << 20), counters=4096)
    launches: list[Launch] = call.launches(pointers, tensors)
    kernels = {kernel.name: kernel for kernel in call.kernels}
    assert launches
    for launch in launches:
        assert len(launch.arguments) == len(kernels[launch.kernel].signature)
        assert all(size >= 1 for size in launch.grid)
        assert max(launch.grid[1:]) < 1 << 16  # CUDA's limit
        for (name, kind), argument in zip(kernels[launch.kernel].signature.items(), launch.arguments, strict=True):
            assert isinstance(argument, float if kind == "fp32" else int), name


def int4_experts(hidden: int, size: int, gate_up_scales: int, down_scales: int) -> list[Tensor]:
    tokens, logits = (Tensor(dtype="bf16", shape=(3, width)) for width in (hidden, 8))
    gate_up, down = (Tensor(dtype="i4", shape=shape) for shape in ((8, 2 * size, hidden), (8, hidden, size)))
    scales = ((8, 2 * size, gate_up_scales), (8, hidden, down_scales))
    return [tokens, logits, gate_up, down, *(Tensor(dtype="fp32", shape=shape) for shape in scales)]


def test_an_int4_layers_groups_are_those_of_both_weights() -> None:
    attributes = Attributes(top_k=1, quantisation="int4")
    for sizes, group in (
        ((256, 128, 2, 1), 128),
        ((128, 256, 1, 2), 128),
        ((128, 64, 1, 1), 0),
        ((128, 64, 16, 8), 8),
    ):
        assert MOE.call(attributes, int4_experts(*sizes), 89).plan.geometry.group == group  # type: ignore[attr-defined]
    for sizes in ((128, 96, 1, 3), (128, 64, 4, 1), (96, 96, 4, 4), (64, 64, 16, 16)):
        with pytest.raises(
            BuildError, match="the GPU kernels take one group size, a power of two from 8 on; calibrate"
        ):
            MOE.call(attributes, int4_experts(*sizes), 89)


@pytest.mark.parametrize(
    ("op", "settings", "types", "accepted"),
    [
        (GQA, SETTINGS, ["bf16"] * 5 + ["i32", "fp32"], True),
        (GQA, SETTINGS, ["fp16"] * 3 + ["i8"] * 2 + ["i32", "fp32", "fp32", "fp32"], True),
        (GQA, SETTINGS, ["fp16"] * 3 + ["i8", "fp16"] + ["i32", "fp32"], False),
        (GQA, SETTINGS, ["fp32"] * 5 + ["i32", "fp32"], False),
        (GQA, SETTINGS, ["bf16"] * 5 + ["i64"], False),
        (MOE, Attributes(top_k=1), ["bf16"] * 4, True),
        (MOE, Attributes(top_k=1, quantisation="int8"), ["bf16", "bf16", "i8", "i8", "fp32", "fp32"], True),
        (MOE, Attributes(top_k=1, quantisation="int8"), ["bf16"] * 4, False),
        (MOE, Attributes(top_k=1, quantisation="fp8"), ["fp16", "fp16", "fp8e4nv"], True),
        (MOE, Attributes(top_k=1, quantisation="int8"), ["bf16", "bf16", "i8", "i8", "bf16", "bf16"], False),
        (MOE, Attributes(top_k=1, quantisation="int4"), ["bf16", "bf16", "i4", "i4", "fp32", "fp32"], True),
        (MOE, Attributes(top_k=1, quantisation="int4"), ["bf16", "bf16", "i4", "i4", "bf16", "bf16"], True),
        (MOE, Attributes(top_k=1, quantisation="int4"), ["bf16", "bf16", "i4", "i4", "bf16", "fp32"], False),
        (MOE, Attributes(top_k=1, quantisation="int4"), ["bf16", "bf16", "i4", "i4", "fp16", "fp16"], False),
    ],
)
def test_types_that_the_kernels_do_not_take_are_refused(
    op: Any, settings: Any, types: list[str], accepted: bool
) -> None:
    assert op.accepts(settings, types) == accepted


@pytest.mark.parametrize(
    ("op", "settings"),
    [(GQA, SETTINGS), (MOE, Attributes(top_k=2, quantisation="int4")), (MOE, Attributes(top_k=1, first_expert=3))],
)
def test_a_plugin_is_the_same_after_it_was_serialised(op: Any, settings: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    trt = open_library("tensorrt-rtx")
    creator = register(trt, (GQA, MOE))[op.name]
    assert trt.get_plugin_registry().get_creator(op.name, VERSION, NAMESPACE) is not None
    plugin = creator.make(settings)
    monkeypatch.setattr(creator, "kernels", None)
    with pytest.raises(SessionError, match=f"{op.name} has no kernels loaded: run the engine's bundle with Arriero"):
        creator.create_plugin("again", plugin.get_fields_to_serialize(), trt.TensorRTPhase.RUNTIME)
    monkeypatch.setattr(creator, "kernels", "loaded")
    again = creator.create_plugin("again", plugin.get_fields_to_serialize(), trt.TensorRTPhase.RUNTIME)
    for name in settings.__dataclass_fields__:
        assert getattr(again.settings, name) == pytest.approx(getattr(settings, name))


def test_gqas_attributes_are_the_ops_and_what_its_inputs_are() -> None:
    assert set(Settings.__dataclass_fields__) == set(GqaAttributes.__dataclass_fields__) | {"rope", "width"}
