"""Our PyTorch vision tower, projector and multimodal model against those of `transformers`."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Llama4ForConditionalGeneration

from arriero.errors import CheckpointError
from arriero.export.checkpoint import open_checkpoint
from arriero.export.config import model_spec, vision_spec
from arriero.export.llama4_tower import MultimodalLlama4
from arriero.walk.numbers import Weights
from arriero.walk.tower import encode_tiles

Make = Callable[..., Llama4ForConditionalGeneration]


def ours_of(reference: Llama4ForConditionalGeneration, dtype: str) -> MultimodalLlama4:
    reference.config.text_config.dtype = dtype
    config = json.loads(reference.config.to_json_string())
    model = MultimodalLlama4(model_spec(config), vision_spec(config)).to(getattr(torch, dtype)).eval()
    model.load_state_dict(reference.state_dict(), strict=True)
    return model


@pytest.mark.parametrize("seed", range(12))
def test_it_equals_transformers_over_random_geometries(
    make_multimodal: Make, draw_vision: Callable[[int], dict[str, Any]], seed: int
) -> None:
    reference = make_multimodal(seed, vision=draw_vision(seed))
    spec = vision_spec(json.loads(reference.config.to_json_string()))
    generator = torch.Generator().manual_seed(seed)
    tiles = 1 + seed % 3
    pixels = torch.randn(tiles, 3, spec.image_size, spec.image_size, generator=generator)
    ids = torch.randint(0, 90, (1, tiles * spec.features + 9), generator=generator)
    places = torch.randperm(ids.shape[1], generator=generator)[: tiles * spec.features]
    ids[0, places] = spec.image_token
    with torch.no_grad():
        expected, found = reference(ids, pixels).logits, ours_of(reference, "float32")(ids, pixels)
        assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()
        reference = reference.bfloat16()
        expected, found = reference(ids, pixels.bfloat16()).logits, ours_of(reference, "bfloat16")(ids, pixels)
        assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("intermediate_size", 100, r"vision_config.intermediate_size is 100, expected hidden_size over"),
        ("projector_output_dim", 24, r"vision_config.projector_output_dim is 24, expected projector_input_dim, 40"),
        ("pixel_shuffle_ratio", 0.3, r"vision_config.pixel_shuffle_ratio is 0.3, expected one over a divisor of"),
        ("num_attention_heads", 5, r"vision_config.hidden_size is 32, expected 5 heads of a multiple of 4"),
        ("hidden_act", "silu", r"vision_config.hidden_act is 'silu', expected 'gelu'"),
        ("image_size", [28, 20], r"vision_config.image_size is \[28, 20\], expected a whole number"),
    ],
)
def test_a_wrong_vision_config_is_named(make_multimodal: Make, field: str, value: object, expected: str) -> None:
    config = json.loads(make_multimodal().config.to_json_string())
    config["vision_config"][field] = value
    with pytest.raises(CheckpointError, match=expected):
        vision_spec(config)


def test_an_image_token_outside_the_vocabulary_is_named(make_multimodal: Make) -> None:
    config = json.loads(make_multimodal().config.to_json_string())
    config["image_token_index"] = 97
    with pytest.raises(CheckpointError, match="image_token_index is 97, expected a token of the vocabulary of 97"):
        vision_spec(config)


def test_the_walk_over_the_tower_equals_it(make_multimodal: Make, tmp_path: Path) -> None:
    reference = make_multimodal(5)
    reference.save_pretrained(tmp_path)
    opened = open_checkpoint(tmp_path)
    assert opened.vision is not None
    pixels = torch.randn(3, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = ours_of(reference, "float32").encode(pixels)
    found = encode_tiles(opened.vision, Weights({each.path.name: each.path for each in opened.shards}), pixels.numpy())
    assert np.abs(found - expected.numpy()).max() <= 1e-6 * expected.abs().max()
