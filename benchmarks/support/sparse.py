"""Full-size Llama 4 checkpoints that take no disk: safetensors files whose data is one hole.

The geometries are those of the published configurations (Scout 17B-16E, Maverick 17B-128E): of their text decoders, and
with `multimodal` of the whole models.
"""

import json
import math
from pathlib import Path
from typing import Any

from arriero.export.checkpoint import expected_tensors, tower_tensors
from arriero.export.config import model_spec, vision_spec

SHARED = {
    "model_type": "llama4_text",
    "architectures": ["Llama4ForCausalLM"],
    "dtype": "bfloat16",
    "hidden_size": 5120,
    "num_hidden_layers": 48,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 8192,
    "intermediate_size_mlp": 16384,
    "num_experts_per_tok": 1,
    "vocab_size": 202048,
    "rope_theta": 500000.0,
    "attention_chunk_size": 8192,
    "attn_temperature_tuning": True,
    "floor_scale": 8192,
    "attn_scale": 0.1,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 200000,
    "eos_token_id": [200001, 200007, 200008],
}
SCOUT = {
    **SHARED,
    "num_local_experts": 16,
    "interleave_moe_layer_step": 1,
    "use_qk_norm": True,
    "max_position_embeddings": 10485760,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 16.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
    },
}
MAVERICK = {
    **SHARED,
    "num_local_experts": 128,
    "interleave_moe_layer_step": 2,
    "use_qk_norm": False,
    "max_position_embeddings": 1048576,
    "rope_scaling": None,
}
VISION = {
    "hidden_size": 1408,
    "num_hidden_layers": 34,
    "num_attention_heads": 16,
    "intermediate_size": 5632,
    "image_size": 336,
    "patch_size": 14,
    "pixel_shuffle_ratio": 0.5,
    "projector_input_dim": 4096,
    "projector_output_dim": 4096,
    "vision_output_dim": 4096,
    "rope_theta": 10000.0,
}
ITEM_SIZES = {"BF16": 2, "F32": 4}
SHARD_SIZE = 5 << 30
"""Bytes at which a new shard begins, about as in the published checkpoints."""


def multimodal(text: dict[str, Any], **vision: Any) -> dict[str, Any]:
    """The configuration of a whole model with this text decoder; `vision` changes its tower."""
    return {
        "model_type": "llama4",
        "architectures": ["Llama4ForConditionalGeneration"],
        "image_token_index": min(200092, text["vocab_size"] - 1),
        "text_config": text,
        "vision_config": {**VISION, **vision},
    }


def tensors_of(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The names and shapes of a checkpoint's tensors."""
    spec = model_spec(config)
    if config["model_type"] != "llama4":
        return expected_tensors(spec)
    return tower_tensors(vision_spec(config), spec.hidden_size) | expected_tensors(spec, "language_model.")


def write_sparse_checkpoint(config: dict[str, Any], folder: Path, dtype: str = "BF16") -> int:
    """Writes a checkpoint of zeros that are never stored. Returns the bytes of weights it stands for."""
    item_size = ITEM_SIZES[dtype]
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    for name, shape in tensors_of(config).items():
        if sum(map(math.prod, shards[-1].values())) * item_size > SHARD_SIZE:
            shards.append({})
        shards[-1][name] = shape
    weight_map, total = {}, 0
    for number, tensors in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        header, end = {}, 0
        for name, shape in tensors.items():
            start, end = end, end + math.prod(shape) * item_size
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
            weight_map[name] = file
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with (folder / file).open("wb") as shard:
            shard.write(len(text).to_bytes(8, "little") + text)
            shard.truncate(8 + len(text) + end)
        total += end
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total
