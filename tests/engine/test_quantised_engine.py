"""Quantised models as TensorRT engines: the GEMMs are of the type that the recipe says, and so are the experts."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tables import sampled

from arriero.calibration import calibrate_model
from arriero.calibration.presets import fp8, int4, int8
from arriero.engine import Options, build_bundle
from arriero.files.folders import read_spec
from arriero.spec.recipe import Recipe

SMALL = Options(max_batch=2, max_seq=256, max_prefill=32)
PLAIN: dict[str, Any] = {"smoothing": "none", "rounding": "nearest", "weight_clip": "absmax"}
"""The quickest methods: types are what is looked at here."""

LINEARS = 8 * 4 + 4 * 3 + 4 * 3  # attention; dense layers; shared experts


@pytest.mark.parametrize(
    ("recipe", "name", "kinds"),
    [
        (int8(**PLAIN, activations="static"), "Int8", {"gemm"}),
        (int8(**PLAIN, activations="dynamic", kv_cache="int8"), "Int8", {"gemm"}),
        (fp8(**PLAIN, kv_cache="fp8"), "FP8", {"gemm"}),
        (int4(**PLAIN, group_size=32), "Int4", {"runtime_fusion", "gemm"}),
    ],
    ids=["int8", "dynamic int8 with int8 caches", "fp8 with fp8 caches", "int4"],
)
def test_products_and_experts_have_the_recipes_type(
    recipe: Recipe, name: str, kinds: set[str], tiny_model: Path, tmp_path: Path
) -> None:
    """For one GPU, as kernels of each take seconds to compile; for two it is `make tables`."""
    ids = np.random.default_rng(0).integers(10, 2000, (4, 160))
    model = calibrate_model(tiny_model, tmp_path / "model", recipe=recipe, data=ids, floor=1)
    gpus = sampled(["sm89", "sm120"], ["sm89"])
    bundle = build_bundle(model, tmp_path / "bundle", target=f"tensorrt-rtx:{','.join(gpus)}", options=SMALL)
    layers: list[dict[str, Any]] = json.loads((bundle / "layers.json").read_text())

    products = [layer for layer in layers if layer["kind"] in kinds and types(layer, "inputs") & {name}]
    fused = {node for layer in products for node in layer["nodes"] if "_proj" in node and "/MatMul" in node}
    assert len(fused) == LINEARS
    if name != "Int4":  # both operands, and no dequantised product beside it
        assert all(types(layer, "inputs") == {name} for layer in products)
    others = [layer for layer in layers if layer["kind"] == "gemm" and layer not in products]
    assert {node for layer in others for node in layer["nodes"] if "_proj/" in node} == set()

    experts = [layer for layer in layers if any("MoeDispatch" in node for node in layer["nodes"])]
    assert len(experts) == 2 * 4
    assert all([each["dtype"] for each in layer["inputs"][2:4]] == [name, name] for layer in experts)
    scales = "BFloat16" if name == "Int4" else "Float"
    assert all([each["dtype"] for each in layer["inputs"][4:6]] == [scales] * 2 for layer in experts)

    engine = read_spec(bundle).engine
    assert engine is not None
    cache = recipe.kv_cache if recipe.kv_cache != "none" else "bfloat16"
    assert {each.dtype for each in engine.caches} == {cache}
    attention = [layer for layer in layers if any("GroupedQueryAttention_0" in node for node in layer["nodes"])]
    stored = {"int8": "Int8", "fp8": "FP8", "bfloat16": "BFloat16"}[cache]
    assert all([each["dtype"] for each in layer["inputs"][3:5]] == [stored, stored] for layer in attention)


def types(layer: dict[str, Any], side: str) -> set[str]:
    """The types of a layer's tensors that are more than scales."""
    return {each["dtype"] for each in layer[side] if len(each["dims"]) > 1}
