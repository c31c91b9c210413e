"""A quantised layer on ONNX Runtime's CPU against numpy: the same layer, plainly, from its stored tensors."""

import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file

import arriero
from arriero.calibration import calibrate_model, fp8, int4, int8
from arriero.engine import build_bundle
from arriero.engine.cpu_lowering import lower_for_cpu
from arriero.export import export_checkpoint
from arriero.files.folders import find_files, read_spec
from arriero.loading import cpu_decoder_graph
from arriero.plugins.gqa.meaning import grouped_query_attention
from arriero.plugins.gqa.op import Attributes as AttentionAttributes
from arriero.plugins.moe.meaning import moe_dispatch, silu
from arriero.plugins.moe.op import Attributes
from arriero.plugins.narrow_types import unpack_int4
from arriero.plugins.quantisation import fake_quantise
from arriero.spec.recipe import Recipe
from arriero.spec.stored_weights import Weight
from arriero.walk.numbers import FolderWeights

Array = np.ndarray[Any, Any]
IDS = np.random.default_rng(0).integers(3, 97, (4, 40))
LENGTH = 14

RECIPES = {
    "int8 dynamic": int8(),
    "int8 static": int8(activations="static"),
    "fp8": fp8(),
    "fp8 dynamic": fp8(activations="dynamic"),
    "int4": int4(group_size=32),
    "int8, int8 cache": int8(kv_cache="int8"),
}


@pytest.fixture(scope="module")
def model(make_llama4: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One layer, with experts."""
    folder = tmp_path_factory.mktemp("one-layer")
    sizes = {"hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 1, "num_experts_per_tok": 2}
    make_llama4(**sizes).save_pretrained(folder / "checkpoint")
    return export_checkpoint(folder / "checkpoint", folder / "model")


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_lowered_model_equals_numpy(model: Path, tmp_path: Path, recipe: str) -> None:
    quantised = calibrate_model(model, tmp_path / "quantised", recipe=RECIPES[recipe], data=IDS, floor=0)
    found = arriero.load(quantised).logits(IDS[:1, :LENGTH])[0]
    expected = Emulation(quantised, RECIPES[recipe]).logits(IDS[0, :LENGTH])
    error = np.abs(found - expected) / np.abs(expected).max()
    # float32 sums put a few activations on the other side of a rounding border than float64 does, and the kernels round
    # by 32 what recipes round by tokens, or leave as it is
    by_blocks = recipe in ("int8 dynamic", "int8, int8 cache", "int4")
    assert np.median(error) < (4e-3 if by_blocks else 2e-3)
    assert error.max() < 5e-2
    bundle = build_bundle(quantised, tmp_path / "bundle")
    of_both = [FolderWeights(*regions(folder)) for folder in (quantised, bundle)]
    for name, index in (("layers.0.self_attn.o_proj.weight", None), ("layers.0.feed_forward.experts.gate_up_proj", 3)):
        assert torch.equal(*(weights.wide(name, index) for weights in of_both))
    if RECIPES[recipe].format != "fp8":  # what is computed in float32 stays where it is
        shutil.rmtree(quantised)
    assert np.array_equal(arriero.load(bundle).logits(IDS[:1, :LENGTH])[0], found)


def regions(folder: Path) -> tuple[tuple[Weight, ...], dict[str, Path]]:
    """A folder's weights as the graph for the CPU is given them, and its files."""
    spec = read_spec(folder)
    return cpu_decoder_graph(folder, spec)[1], find_files(folder, spec.weight_files, None)


@pytest.mark.parametrize("recipe", ["int8 dynamic", "int8 static", "int4"])
def test_integers_run_on_kernels_of_their_own(model: Path, tmp_path: Path, recipe: str) -> None:
    quantised = calibrate_model(model, tmp_path / "quantised", recipe=RECIPES[recipe], data=IDS, floor=0)
    graph = onnx.ModelProto.FromString(lower_for_cpu(quantised, read_spec(quantised)).graph).graph
    own = Counter(node.op_type for node in graph.node if node.domain == "arriero.cpu")
    # attention's four and the shared expert's three, then the router and the head
    assert own == {"Linear": 4 + 3, "PlainLinear": 2, "MoeDispatch": 1, "GroupedQueryAttention": 1}
    assert not {"QuantizeLinear", "Abs", "If", "MatMul", "FusedMatMul"} & {node.op_type for node in graph.node}


class Emulation:
    """The quantised model in float64, from its tensors and the ops' meanings."""

    def __init__(self, folder: Path, recipe: Recipe) -> None:
        self.spec, self.recipe = read_spec(folder).model, recipe
        self.tensors = {}
        for path in folder.glob("*.safetensors"):
            for name, tensor in load_file(path).items():
                self.tensors[name.removeprefix("model.")] = tensor

    def tensor(self, name: str) -> Array:
        tensor = self.tensors[name]
        if tensor.dtype.itemsize == 1 and not tensor.dtype.is_floating_point and not tensor.dtype.is_signed:
            packed = tensor.numpy()
            tensor = torch.from_numpy(unpack_int4(packed).reshape(*packed.shape[:-1], -1))
        array: Array = tensor.double().numpy()
        return array

    def linear(self, x: Array, name: str) -> Array:
        weight = self.tensor(f"{name}.weight")
        if f"{name}.weight_scale" in self.tensors:
            scale = self.tensor(f"{name}.weight_scale").reshape(len(weight), -1)
            weight = weight * np.repeat(scale, weight.shape[1] // scale.shape[1], axis=1)
            static = f"{name}.input_scale"
            x = fake_quantise(x, float(self.tensor(static)) if static in self.tensors else None, self.recipe.format)
        product: Array = x @ weight.T
        return product

    def norm(self, x: Array, name: str) -> Array:
        normed: Array = x / np.sqrt(np.mean(x**2, -1, keepdims=True) + self.spec.norm_eps)
        return normed * self.tensor(f"{name}.weight")

    def logits(self, ids: Array) -> Array:
        x = self.tensor("embed_tokens.weight")[ids]
        normed = self.norm(x, "layers.0.input_layernorm")
        x = x + self.linear(self.attend(normed), "layers.0.self_attn.o_proj")
        normed = self.norm(x, "layers.0.post_attention_layernorm")
        feed = "layers.0.feed_forward"
        gate, up = (self.linear(normed, f"{feed}.shared_expert.{part}_proj") for part in ("gate", "up"))
        x = x + self.linear(up * silu(gate), f"{feed}.shared_expert.down_proj") + self.experts(normed, feed)
        head: Array = self.norm(x, "norm") @ self.tensors["lm_head.weight"].double().numpy().T
        return head

    def attend(self, normed: Array) -> Array:
        spec, attention = self.spec, "layers.0.self_attn"
        query, key, value = (self.linear(normed, f"{attention}.{part}_proj")[None] for part in "qkv")
        exponent = np.arange(0, spec.head_dim, 2) / spec.head_dim
        inv_freq = 1 / spec.rope_theta**exponent
        scaling = spec.rope_scaling
        assert scaling is not None
        long = 2 * np.pi / inv_freq > scaling.original_max_positions
        inv_freq = np.where(long, inv_freq / scaling.factor, inv_freq)
        has_scales = self.recipe.kv_cache != "none"
        caches = [np.zeros((1, spec.kv_heads, 16, spec.head_dim), np.int8 if has_scales else np.float64)] * 2
        scales = [self.tensor(f"{attention}.{part}_scale") for part in ("key", "value")] if has_scales else []
        attributes = AttentionAttributes(
            heads=spec.heads,
            kv_heads=spec.kv_heads,
            scale=spec.head_dim**-0.5,
            chunk=16,
            qk_norm_eps=spec.norm_eps,
        )
        past = np.zeros(1, dtype=np.int32)
        output, _, _ = grouped_query_attention(
            query, key, value, *caches, past, inv_freq, *scales, attributes=attributes
        )
        return output[0]

    def experts(self, normed: Array, feed: str) -> Array:
        logits = normed @ self.tensor(f"{feed}.router.weight").T
        names = ("gate_up_proj", "down_proj", "gate_up_proj_scale", "down_proj_scale")
        tensors = [self.tensor(f"{feed}.experts.{name}") for name in names]
        statics = [f"{feed}.experts.{name}" for name in ("hidden_scale", "activated_scale")]
        tensors += [self.tensor(name) for name in statics if name in self.tensors]
        attributes = Attributes(top_k=self.spec.experts_per_token, quantisation=self.recipe.format)
        return moe_dispatch(normed, logits, *tensors, attributes=attributes)
