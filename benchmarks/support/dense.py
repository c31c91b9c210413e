"""Llama-4-shaped checkpoints of random weights, with their bytes on disk: for what sparse files cannot measure."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from arriero.export.checkpoint import expected_tensors, open_checkpoint
from arriero.export.config import model_spec
from arriero.export.draft_config import draft_spec
from arriero.export.draft_head import head_tensors

from .sparse import MAVERICK, SCOUT, SHARED

PIECE = 1 << 24

GEOMETRY = {
    **SCOUT,
    "hidden_size": 1024,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "intermediate_size": 1024,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
"""Scout's shape at a fifth of its width, for many layers of float32."""


def scout_like(layers: int, hidden: int = 1024, experts: int = 8) -> dict[str, Any]:
    """Scout's shape at a smaller width: attention of head dim 128, experts in every layer."""
    return {
        **SHARED,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 128,
        "num_key_value_heads": max(hidden // 512, 1),
        "head_dim": 128,
        "intermediate_size": 2 * hidden,
        "intermediate_size_mlp": 4 * hidden,
        "num_local_experts": experts,
        "vocab_size": 32000,
        "interleave_moe_layer_step": 1,
        "use_qk_norm": True,
        "max_position_embeddings": 131072,
        "rope_scaling": None,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


PEERS: dict[str, dict[str, Any]] = {
    "scout": {**SCOUT, "intermediate_size": 2048, "intermediate_size_mlp": 4096},
    "maverick": {**MAVERICK, "intermediate_size": 512, "intermediate_size_mlp": 4096},
}
"""Two shapes of 1.4 billion parameters, of which a token uses 0.25 and 0.19: hundreds of MB read in every step."""


def peer(shape: str, layers: int = 8, experts: int | None = None) -> dict[str, Any]:
    """A shape of `PEERS`; QK norm is off where there are 128 experts, as llama.cpp takes it to be."""
    config = {
        **PEERS[shape],
        "hidden_size": 1536,
        "num_hidden_layers": layers,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "vocab_size": 32000,
        "max_position_embeddings": 131072,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if experts is not None:
        config |= {"num_local_experts": experts, "use_qk_norm": experts != 128}
    return config


def write_random_checkpoint(config: dict[str, Any], folder: Path, seed: int = 0, pool: int = 0) -> int:
    """Writes a bfloat16 checkpoint of normal weights, deviation 1/sqrt(width), one shard. Returns its parameters.

    With a `pool` each piece begins at random in that many drawn numbers: a checkpoint of many GB takes no minutes.
    """
    return _write(config, expected_tensors(model_spec(config)), folder, seed, pool)


HEAD_TOKENS = 8000
"""Tokens that a random head guesses among."""


def write_random_head(config: dict[str, Any], folder: Path, seed: int = 1) -> int:
    """Writes an EAGLE-3 head of one layer, of the model's widths and its embedding. Returns its parameters."""
    model, layers = model_spec(config), len(model_spec(config).layers)
    taken = ("vocab_size", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    layer = {name: config[name] for name in taken} | {
        "model_type": "llama",
        "num_hidden_layers": 1,
        "intermediate_size": config["intermediate_size_mlp"],
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    }
    own = {
        "architectures": ["Eagle3Speculator"],
        "speculators_model_type": "eagle3",
        "speculators_version": "0.9.0",
        "draft_vocab_size": HEAD_TOKENS,
        "eagle_aux_hidden_state_layer_ids": [2, layers // 2, layers - 3],
        "transformer_layer_config": layer,
    }
    spec = draft_spec(own, model, "bfloat16")
    return _write(own, head_tensors(spec, model.hidden_size), folder, seed, 0, tokens=HEAD_TOKENS)


def _write(
    config: dict[str, Any],
    shapes: dict[str, tuple[int, ...]],
    folder: Path,
    seed: int,
    pool: int,
    tokens: int = 0,
) -> int:
    """Writes a folder of random tensors; with `tokens` the first so many of a model's, which a head guesses among."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * 2
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    if tokens:
        header["d2t"] = {"dtype": "I64", "shape": [tokens], "data_offsets": [end, end + 8 * tokens]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    rng = np.random.default_rng(seed)
    drawn = rng.standard_normal(pool, dtype=np.float32)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            left = math.prod(shape)
            scale = np.float32(1.0 if name.endswith("norm.weight") else shape[-1] ** -0.5)
            while left:
                count = min(left, PIECE)
                start = int(rng.integers(pool - count + 1)) if pool else 0
                numbers = drawn[start : start + count] if pool else rng.standard_normal(count, dtype=np.float32)
                piece = numbers * scale
                if len(shape) == 1:
                    piece = np.ones(count, dtype=np.float32)
                file.write((piece.view(np.uint32) >> 16).astype(np.uint16).tobytes())
                left -= count
        file.write(bytes(8 * tokens))
    return sum(map(math.prod, shapes.values()))


def fill(checkpoint: Path) -> int:
    """Overwrites the zeros of a sparse float32 checkpoint with random weights. Returns its bytes."""
    rng = np.random.default_rng(0)
    total = 0
    for shard in open_checkpoint(checkpoint).shards:
        with shard.path.open("r+b") as file:
            for name, region in shard.tensors.items():
                file.seek(region.offset)
                values = rng.standard_normal(region.size // 4, dtype=np.float32)
                (values + 1 if "norm" in name else values * np.float32(0.02)).tofile(file)
                total += region.size
    return total
