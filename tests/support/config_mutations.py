"""Seeded changes of small configurations: several fields at once, to sensible values and to junk."""

import copy
import dataclasses
import random
from collections.abc import Iterator
from typing import Any

from transformers import Llama4Config, Llama4TextConfig, Llama4VisionConfig

TEXT: dict[str, Any] = {
    "model_type": "llama4_text",
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "intermediate_size_mlp": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_local_experts": 4,
    "num_experts_per_tok": 1,
    "max_position_embeddings": 512,
    "attention_chunk_size": 16,
    "floor_scale": 4,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
SCOUT = {**TEXT, "interleave_moe_layer_step": 1, "use_qk_norm": True, "rope_scaling": LLAMA3, "rope_theta": 500000.0}
MAVERICK = {**TEXT, "interleave_moe_layer_step": 2, "use_qk_norm": False, "rope_parameters": {"rope_theta": 10000.0}}
DENSE = {
    **TEXT,
    "interleave_moe_layer_step": 0,
    "moe_layers": [],
    "num_local_experts": 0,
    "num_experts_per_tok": 0,
    "attention_chunk_size": None,
    "use_qk_norm": False,
    "rope_scaling": None,
}
"""As Llama Guard 4 is."""

VISION: dict[str, Any] = {
    "model_type": "llama4_vision_model",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "image_size": 28,
    "patch_size": 7,
    "pixel_shuffle_ratio": 0.5,
    "projector_input_dim": 40,
    "projector_output_dim": 40,
    "vision_output_dim": 40,
}
WHOLE = {"model_type": "llama4", "image_token_index": 96, "vision_config": VISION}
BASES = {
    "scout": SCOUT,
    "maverick": MAVERICK,
    "dense": DENSE,
    "multimodal": {**WHOLE, "torch_dtype": "bfloat16", "text_config": SCOUT},
    "dense multimodal": {**WHOLE, "text_config": DENSE},
}

JUNK: tuple[Any, ...] = (
    *(None, True, False, 0, 1, 2, 3, -1, 2**31, 10**30, 2.0, 0.5, -0.5, 1e-8, 1e30, float("nan"), float("inf")),
    *("4", "", "auto", [], [1], [0, 1, 2], ["full_attention"], {}, {"a": 1}, {"rope_type": "default"}),
)

ROPES: tuple[Any, ...] = (
    None,
    {},
    LLAMA3,
    {**LLAMA3, "rope_theta": 777.0},
    {"type": "llama3", **{name: value for name, value in LLAMA3.items() if name != "rope_type"}},
    {**LLAMA3, "factor": 2, "low_freq_factor": 4.0, "high_freq_factor": 4.0},
    {**LLAMA3, "low_freq_factor": 8.0},
    {name: value for name, value in LLAMA3.items() if name != "original_max_position_embeddings"},
    {name: value for name, value in LLAMA3.items() if name != "factor"},
    {**LLAMA3, "rope_theta": None},
    {**LLAMA3, "factor": None},
    {**LLAMA3, "factor": "8"},
    {**LLAMA3, "partial_rotary_factor": 0.5},
    {**LLAMA3, "partial_rotary_factor": 1.0},
    {"rope_type": "default"},
    {"rope_type": "default", "rope_theta": 1234.0},
    {"rope_theta": 99},
    {"rope_type": None},
    {"rope_type": "default", "partial_rotary_factor": 0.5},
    *({"rope_type": kind, "factor": 2.0} for kind in ("linear", "dynamic", "yarn", "longrope", "proportional", "su")),
    {"full_attention": {"rope_type": "default"}, "chunked_attention": {"rope_type": "default"}},
    {"full_attention": None},
    {"sliding_attention": {"rope_type": "default"}},
)

LIKELY: dict[str, tuple[Any, ...]] = {
    "rope_scaling": ROPES,
    "rope_parameters": ROPES,
    "rope_theta": (10000.0, 1, 5e5, None, 0, -1.0, "1e4"),
    "original_max_position_embeddings": (64, 64.0, None, 0),
    "partial_rotary_factor": (0.5, 1.0, None),
    "max_position_embeddings": (128, 2048),
    "layer_types": (
        ["full_attention"] * 4,
        ["chunked_attention"] * 4,
        ["attention", "chunked_attention"] * 2,
        ["full_attention"] * 3,
        ["full_attention"] * 5,
        ["sliding_attention"] * 4,
        [None] * 4,
    ),
    "no_rope_layers": ([1, 0, 1, 0], [0] * 4, [1] * 3, [1] * 5, [True] * 4, [2] * 4, [1.0] * 4, [1, 0, 1, 0, 1]),
    "no_rope_layer_interval": (1, 2, 3, 5, 0, -2),
    "moe_layers": ([0], [0, 3], [99], [-1], [1, 99, -3], [True], [1.0], ["0"], []),
    "interleave_moe_layer_step": (1, 2, 3, 9, 0, -1),
    "attention_chunk_size": (8, 16, 64, None, 0, -4),
    "num_hidden_layers": (1, 2, 3, 4, 5, 0, -1, 3.0),
    "num_attention_heads": (2, 8, 6, 0),
    "num_key_value_heads": (1, 2, 4, 3, 8),
    "head_dim": (8, 7, 3, 12),
    "num_local_experts": (1, 2, 8, 0),
    "num_experts_per_tok": (1, 2, 4, 5, 0),
    "attn_temperature_tuning": (4, 0, True, False, "true", 4.0),
    "attn_scale": (0.5, 1, 0.0, -0.1),
    "floor_scale": (1, 8, 0, 4.0),
    "rms_norm_eps": (1e-6, 1e-3, 1),
    "use_qk_norm": (True, False, 1),
    "tie_word_embeddings": (True, False, 1),
    "hidden_act": ("silu", "swish", "gelu"),
    "dtype": ("bfloat16", "float16", "float32", "torch.bfloat16", "half", "float64", "float8_e4m3fn", 16),
    "torch_dtype": ("bfloat16", "float16", "float32", "torch.float16", "double"),
    "image_token_id": (5, 96, 97, -1),
    "image_token_index": (5, 96, 97, -1),
    "pad_token_id": (0, -1, 96, 97),
    "bos_token_id": (0, 96, [1]),
    "eos_token_id": (0, [1, 2], "2", [1, "2"]),
    "attention_bias": (True, False, 0),
    "pixel_shuffle_ratio": (1.0, 1, 0.25, 0.3, 5e-324),
    "image_size": ([28, 28], 14, 35, [28, 14]),
    "patch_size": ([7, 7], 14, 8),
    "per_layer_config": ({}, {"0": {"use_qk_norm": False}}),
    "is_causal": (True, False),
}
"""Values that a field may well have, junk apart."""

TEXT_NAMES = sorted({field.name for field in dataclasses.fields(Llama4TextConfig)} | LIKELY.keys())
VISION_NAMES = sorted({field.name for field in dataclasses.fields(Llama4VisionConfig)} | {"rope_theta", "rope_scaling"})
OUTSIDE = {"rope_scaling", "rope_parameters", "rope_theta", "num_local_experts", "moe_layers", "attention_chunk_size"}
"""Fields of the text decoder that may stand beside it, too."""

WHOLE_NAMES = sorted(
    {field.name for field in dataclasses.fields(Llama4Config)} | {"image_token_id", "torch_dtype"} | OUTSIDE
)
SEPARATE = {"text_config", "vision_config", "model_type"}

RELATED = (
    {"num_attention_heads", "num_key_value_heads", "head_dim", "hidden_size"},
    {"num_local_experts", "num_experts_per_tok", "moe_layers", "interleave_moe_layer_step", "num_hidden_layers"},
    {"layer_types", "no_rope_layers", "num_hidden_layers", "attention_chunk_size"},
    {"rope_theta", "rope_scaling", "rope_parameters", "original_max_position_embeddings", "partial_rotary_factor"}
    | {"factor", "low_freq_factor", "high_freq_factor"},
    {"dtype", "torch_dtype"},
    {"vocab_size", "image_token_id", "image_token_index", "pad_token_id"},
    {"hidden_size", "num_attention_heads", "intermediate_size", "pixel_shuffle_ratio", "image_size", "patch_size"},
    {"projector_input_dim", "projector_output_dim", "vision_output_dim"},
)
"""Fields any of which may be named where another is wrong."""


def mutated(seed: int) -> tuple[dict[str, Any], set[str]]:
    """A configuration with one to four fields changed, and the fields that a refusal of it may name."""
    rng = random.Random(seed)
    config = copy.deepcopy(rng.choice(list(BASES.values())))
    changed = set()
    for _ in range(rng.choice((1, 1, 2, 2, 3, 4))):
        part, names = config, TEXT_NAMES
        if config["model_type"] == "llama4":
            key, names = rng.choice(
                (("text_config", TEXT_NAMES),) * 3 + (("vision_config", VISION_NAMES), ("", WHOLE_NAMES))
            )
            part = config[key] if key else config
        likely = [name for name in names if name in LIKELY]
        name = rng.choice(
            likely if likely and rng.random() < 0.75 else [each for each in names if each not in SEPARATE]
        )
        if rng.random() < 0.05:
            part.pop(name, None)
        else:
            part[name] = copy.deepcopy(rng.choice(LIKELY[name] if name in LIKELY and rng.random() < 0.75 else JUNK))
        changed.add(name)
    return config, changed | {name for group in RELATED if group & changed for name in group}


def several(seeds: range) -> Iterator[tuple[dict[str, Any], set[str]]]:
    """Configurations by their seeds."""
    return map(mutated, seeds)
