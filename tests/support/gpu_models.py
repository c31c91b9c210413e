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
BOUNDS = {"bf16": 0.04, "fp16": 0.005, "int8": 0.16, "fp8": 0.16, "int4": 0.04}
"""Differences of logits that rounding explains, by the precision; logits here have a deviation of 0.6. In eight bits an
activation that is rounded to 16 bits first can move by a whole step."""


RECIPES = {
    "int8": Recipe(format="int8", kv_cache="int8"),
    "fp8": Recipe(format="fp8", activations="dynamic", kv_cache="fp8"),
    "int4": Recipe(format="int4", group_size=32),
}


def make_layers(count: int, folder: Path, llama4: Callable[..., Any]) -> Path:
    """Exports a model of many layers, each with experts, every fourth of full attention."""
    kinds = [int((layer + 1) % 4 > 0) for layer in range(count)]
    made = llama4(num_hidden_layers=count, no_rope_layers=kinds, intermediate_size=32, dtype=torch.bfloat16)
    made.save_pretrained(folder / "checkpoint")
    return export_checkpoint(folder / "checkpoint", folder / "model")


def make_model(name: str, folder: Path, llama4: Callable[..., Any]) -> Path:
    """Exports a model of two layers, one chunked and one full, and quantises it; `llama4` is `conftest`'s."""
    experts = {"num_local_experts": 2, "num_experts_per_tok": 2}  # a tie between experts cannot change a row
    sizes = {"hidden_size": 64 if name == "int4" else 32, "intermediate_size": 32}  # groups of 32: two, and one
    made = llama4(num_hidden_layers=2, no_rope_layers=[1, 0], dtype=torch.bfloat16, **sizes, **experts)
    made.save_pretrained(folder / "checkpoint")
    model = export_checkpoint(
        folder / "checkpoint", folder / "model", dtype="float16" if name == "fp16" else "bfloat16"
    )
    if name not in RECIPES:
        return model
    ids = np.random.default_rng(1).integers(3, VOCABULARY - 3, (8, 20))
    return calibrate_model(model, folder / "quantised", recipe=RECIPES[name], data=ids, floor=0)
