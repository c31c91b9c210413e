"""Small Llama 4s for the GPU that is not there: one of each precision that is sure of its next token, and deep ones."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from logit_bounds import bound_logits
from sure_llama4 import sequences, sure_llama4

from arriero.calibration import calibrate_model
from arriero.export import export_checkpoint
from arriero.spec.recipe import Recipe

PRECISIONS = ("bf16", "fp16", "int8", "fp8", "int4")
RECIPES = {
    "int8": Recipe(format="int8", kv_cache="int8"),
    "fp8": Recipe(format="fp8", activations="dynamic", kv_cache="fp8"),
    "int4": Recipe(format="int4", group_size=32),
}


class Judged(NamedTuple):
    """A model's folder, and by how much its logits may differ where each op keeps within its table's errors.

    One logit by the bound, all of them in root mean square by the deviation.
    """

    folder: str
    bound: float
    deviation: float


def make_layers(count: int, folder: Path, llama4: Callable[..., Any]) -> Path:
    """Exports a random model of many layers, each with experts, every fourth of full attention."""
    kinds = [int((layer + 1) % 4 > 0) for layer in range(count)]
    made = llama4(num_hidden_layers=count, no_rope_layers=kinds, intermediate_size=32, dtype=torch.bfloat16)
    made.save_pretrained(folder / "checkpoint")
    return export_checkpoint(folder / "checkpoint", folder / "model")


def make_model(name: str, folder: Path, llama4: Callable[..., Any]) -> Judged:
    """Exports a model that knows its task, and quantises it; `llama4` is `conftest`'s."""
    made = sure_llama4(llama4)
    bounds = bound_logits(made, name, sequences(1, 16, 40))
    made.save_pretrained(folder / "checkpoint")
    model = export_checkpoint(
        folder / "checkpoint", folder / "model", dtype="float16" if name == "fp16" else "bfloat16"
    )
    if name in RECIPES:
        ids = np.array(sequences(2, 8, 20))
        model = calibrate_model(model, folder / "quantised", recipe=RECIPES[name], data=ids, floor=0)
    return Judged(str(model), *bounds)
