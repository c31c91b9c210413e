"""Damaged checkpoints: each gets one line that says what, what was found and the remedy."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from arriero.errors import CheckpointError
from arriero.export.checkpoint import open_checkpoint

Tensors = dict[str, torch.Tensor]


def change_config(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def change_shard(folder: Path, change: Callable[[Tensors], object], *, reindex: bool = True) -> Path:
    """Rewrites the shard that holds layer 0's q_proj, and the index with it."""
    index_path = folder / "model.safetensors.index.json"
    index = json.loads(index_path.read_text())
    file = index["weight_map"]["model.layers.0.self_attn.q_proj.weight"]
    tensors = load_file(folder / file)
    change(tensors)
    save_file(tensors, folder / file)
    if reindex:
        index["weight_map"] = {name: shard for name, shard in index["weight_map"].items() if shard != file}
        index["weight_map"] |= dict.fromkeys(tensors, file)
        index_path.write_text(json.dumps(index))
    return folder / file


def refuses(folder: Path, said: str) -> None:
    with pytest.raises(CheckpointError, match=re.escape(said)) as caught:
        open_checkpoint(folder)
    assert "\n" not in str(caught.value)


Q = "model.layers.0.self_attn.q_proj.weight"


def test_an_intact_checkpoint_opens(checkpoint: Path) -> None:
    opened = open_checkpoint(checkpoint)
    assert len(opened.shards) > 1
    assert opened.tensors[Q].region.shape == (64, 32)


def test_a_single_file_needs_no_index(make_llama4: Callable[..., Any], tmp_path: Path) -> None:
    make_llama4(num_hidden_layers=1).save_pretrained(tmp_path)
    assert not (tmp_path / "model.safetensors.index.json").exists()
    assert len(open_checkpoint(tmp_path).shards) == 1


def test_no_folder(tmp_path: Path) -> None:
    refuses(tmp_path / "missing", "is no folder: give the folder that holds config.json")


def test_no_config(checkpoint: Path) -> None:
    (checkpoint / "config.json").unlink()
    refuses(checkpoint, "config.json: No such file or directory: a checkpoint needs this file")


def test_a_config_that_is_not_json(checkpoint: Path) -> None:
    (checkpoint / "config.json").write_text("{")
    refuses(checkpoint, "config.json: damaged, not JSON")


def test_no_weights(checkpoint: Path) -> None:
    for path in checkpoint.glob("model*"):
        path.unlink()
    refuses(checkpoint, "neither model.safetensors nor model.safetensors.index.json: download the weights")


def test_a_missing_shard(checkpoint: Path) -> None:
    sorted(checkpoint.glob("*.safetensors"))[1].unlink()
    refuses(checkpoint, "No such file, one of 1 of 4 shards that model.safetensors.index.json names: download the")


def test_a_truncated_shard(checkpoint: Path) -> None:
    path = sorted(checkpoint.glob("*.safetensors"))[1]
    path.write_bytes(path.read_bytes()[:-10])
    refuses(checkpoint, "truncated")


def test_an_empty_shard(checkpoint: Path) -> None:
    sorted(checkpoint.glob("*.safetensors"))[0].write_bytes(b"")
    refuses(checkpoint, "truncated or no safetensors file (0 bytes): download it again")


def test_a_tensor_missing_from_its_shard(checkpoint: Path) -> None:
    change_shard(checkpoint, lambda tensors: tensors.pop(Q), reindex=False)
    refuses(checkpoint, f"lacks '{Q}', which the index puts there")


def test_a_missing_tensor(checkpoint: Path) -> None:
    change_shard(checkpoint, lambda tensors: tensors.pop(Q))
    refuses(checkpoint, f"tensor '{Q}' is missing: the shards do not belong to this config.json")


def test_an_unexpected_tensor(checkpoint: Path) -> None:
    change_shard(checkpoint, lambda tensors: tensors.update({"model.layers.0.bias": torch.zeros(3)}))
    refuses(checkpoint, "unexpected tensor 'model.layers.0.bias'")


def test_a_tensor_that_the_index_forgets(checkpoint: Path) -> None:
    change_shard(checkpoint, lambda tensors: tensors.update({"extra": torch.zeros(3)}), reindex=False)
    refuses(checkpoint, "does not list 'extra'")


def test_a_wrong_shape(checkpoint: Path) -> None:
    change_shard(checkpoint, lambda tensors: tensors.update({Q: tensors[Q].T.contiguous()}))
    refuses(checkpoint, f"tensor '{Q}' has shape [32, 64], config.json makes it [64, 32]")


def test_a_dtype_that_no_graph_has(checkpoint: Path) -> None:
    change_shard(checkpoint, lambda tensors: tensors.update({Q: tensors[Q].to(torch.float8_e4m3fn)}))
    refuses(checkpoint, f"tensor '{Q}' is F8_E4M3, expected one of BF16, F16, F32")


def test_an_index_that_points_outside(checkpoint: Path) -> None:
    path = checkpoint / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {Q: "../../etc/passwd"}}))
    refuses(checkpoint, "names the shard '../../etc/passwd', expected a plain file name")


def test_an_index_without_a_map(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors.index.json").write_text('{"weight_map": [1]}')
    refuses(checkpoint, "weight_map is no object of file names")


def test_a_geometry_that_is_not_the_weights(checkpoint: Path) -> None:
    change_config(checkpoint, num_local_experts=8)
    refuses(checkpoint, "has shape [4, 32], config.json makes it [8, 32]")


def test_a_multimodal_checkpoint_is_checked_whole(make_multimodal: Callable[..., Any], tmp_path: Path) -> None:
    make_multimodal(num_hidden_layers=1, vision={"num_hidden_layers": 1}).save_pretrained(tmp_path)
    opened = open_checkpoint(tmp_path)
    assert opened.prefix == "language_model."
    assert opened.vision is not None
    assert opened.vision.features == 4
    shard = tmp_path / "model.safetensors"
    tensors = load_file(shard)
    del tensors["vision_model.layernorm_pre.bias"]
    save_file(tensors, shard, {"format": "pt"})
    refuses(tmp_path, "tensor 'vision_model.layernorm_pre.bias' is missing")


def test_a_multimodal_checkpoint_without_its_tower_is_one_of_text(
    make_multimodal: Callable[..., Any], tmp_path: Path
) -> None:
    make_multimodal(num_hidden_layers=1, vision={"num_hidden_layers": 1}).save_pretrained(tmp_path)
    shard = tmp_path / "model.safetensors"
    tensors = {name: tensor for name, tensor in load_file(shard).items() if name.startswith("language_model.")}
    save_file(tensors, shard, {"format": "pt"})
    assert open_checkpoint(tmp_path).vision is None
