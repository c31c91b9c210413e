"""Small random Llama 4s for the GPU that is not there, one of each precision."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from arriero.calibration import calibrate_model
from arriero.export import export_checkpoint
from arriero.spec.recipe import Recipe

VOCABULARY = 97
BOUNDS = {"bf16": 0.05, "fp16": 0.006, "int8": 0.08, "fp8": 0.12, "int4": 0.06}
"""Differences of logits that rounding explains, by the precision: logits here have a deviation of 0.6."""


RECIPES = {
    "int8": Recipe(format="int8", kv_cache="int8"),
    "fp8": Recipe(format="fp8", activations="dynamic", kv_cache="fp8"),
    "int4": Recipe(format="int4", group_size=32),
}


def make_model(name: str, folder: Path, llama4: Callable[..., Any]) -> Path:
    """Exports a model of two layers, one chunked and one full, and quantises it; `llama4` is `conftest`'s."""
    made = llama4(num_hidden_layers=2, no_rope_layers=[1, 0], intermediate_size=32, dtype=torch.bfloat16)
    with torch.no_grad():
        for layer in made.model.layers:
            layer.feed_forward.router.weight *= 8  # so that experts are seldom as good as equal
    made.save_pretrained(folder / "checkpoint")
    model = export_checkpoint(
        folder / "checkpoint", folder / "model", dtype="float16" if name == "fp16" else "bfloat16"
    )
    if name not in RECIPES:
        return model
    ids = np.random.default_rng(1).integers(3, VOCABULARY - 3, (8, 20))
    return calibrate_model(model, folder / "quantised", recipe=RECIPES[name], data=ids, floor=0)
