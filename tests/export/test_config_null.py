"""Null in every field: what `transformers` makes of it, none, or refused by the field's name."""

import copy
import dataclasses
from typing import Any

import pytest
from config_mutations import SCOUT, VISION, WHOLE
from config_oracle import WITHOUT_EFFECT, outcome
from transformers import Llama4Config, Llama4TextConfig, Llama4VisionConfig

from arriero.errors import CheckpointError
from arriero.export.config import model_spec, vision_spec

PARTS = {"": Llama4Config, "text_config": Llama4TextConfig, "vision_config": Llama4VisionConfig}
EVERY = [(part, field.name) for part, kind in PARTS.items() for field in dataclasses.fields(kind)] + [
    *(("text_config", name) for name in ("rope_theta", "rope_scaling", "original_max_position_embeddings")),
    *(("text_config", name) for name in ("partial_rotary_factor", "torch_dtype", "per_layer_config", "is_causal")),
    *(("vision_config", name) for name in ("rope_theta", "rope_scaling")),
    *(("", name) for name in ("image_token_id", "torch_dtype", "quantization_config", "rope_scaling")),
]
DERIVED = {"head_dim", "num_key_value_heads"}
"""Null derives them, as in `transformers` 4; 5 refuses it."""


def config_with_null(part: str, name: str) -> dict[str, Any]:
    config: dict[str, Any] = copy.deepcopy({**WHOLE, "vision_config": VISION, "text_config": SCOUT, "dtype": "float32"})
    (config[part] if part else config)[name] = None
    return config


@pytest.mark.parametrize(("part", "name"), EVERY)
def test_null_is_read_as_transformers_reads_it_or_refused_by_name(part: str, name: str) -> None:
    found = outcome(config_with_null(part, name), {name})
    assert found.kind in ("equal", "refused", "refused here"), found.said
    if name in WITHOUT_EFFECT | DERIVED:
        assert found.kind == "equal"


def test_null_is_no_default() -> None:
    spec = model_spec(config_with_null("text_config", "attention_chunk_size"))
    assert {layer.chunk for layer in spec.layers} == {0}
    for part, name in (("text_config", "no_rope_layer_interval"), ("text_config", "num_local_experts")):
        with pytest.raises(CheckpointError, match=f"{name} is None, expected a whole number"):
            model_spec(config_with_null(part, name))
    with pytest.raises(CheckpointError, match="image_token_index is None"):
        vision_spec(config_with_null("", "image_token_index"))
    with pytest.raises(CheckpointError, match=r"vision_config\.hidden_size is None"):
        vision_spec(config_with_null("vision_config", "hidden_size"))
