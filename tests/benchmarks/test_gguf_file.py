"""The file that llama.cpp is raced with: every weight under the name that the `gguf` package has for it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from support import gguf_file

SCOUT: dict[str, Any] = {
    "attention_chunk_size": 8192,
    "floor_scale": 8192,
    "num_local_experts": 16,
    "head_dim": 8,
    "interleave_moe_layer_step": 1,
}
MAVERICK: dict[str, Any] = {
    **SCOUT,
    "num_local_experts": 128,
    "interleave_moe_layer_step": 2,
    "use_qk_norm": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}


@pytest.mark.parametrize(("shape", "geometry"), [("scout", SCOUT), ("maverick", MAVERICK)])
def test_every_weight_is_in_the_file_as_llama_cpp_multiplies_it(
    make_llama4: Callable[..., Any], tmp_path: Path, shape: str, geometry: dict[str, Any]
) -> None:
    model = make_llama4(dtype=torch.bfloat16, **geometry)
    model.save_pretrained(tmp_path / shape)
    gguf_file.write_gguf(tmp_path / shape, tmp_path / "file.gguf")
    reader = gguf.GGUFReader(tmp_path / "file.gguf")
    found = {
        tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type).reshape(tensor.shape[::-1])
        for tensor in reader.tensors
    }
    expected = dict(matrices(model))
    plain = 500000.0 ** -(np.arange(0, 8, 2) / 8)
    if shape == "scout":
        rotary = type(model.model.rotary_emb)(model.config)  # the model's own is rounded to bfloat16
        expected["rope_freqs.weight"] = plain / rotary.inv_freq.numpy()
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, rtol=1e-6, err_msg=name)
    assert reader.fields["llama4.expert_count"].contents() == geometry["num_local_experts"]
    assert reader.fields["llama4.interleave_moe_layer_step"].contents() == geometry["interleave_moe_layer_step"]


def matrices(model: Any) -> list[tuple[str, Any]]:
    """Names by the package's own map, and the weights [..., outputs, inputs]."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA4, 4)
    pairs = []
    for name, tensor in model.state_dict().items():
        array = tensor.float().numpy()
        parts = {name: array}
        if name.endswith("experts.gate_up_proj"):
            gate, up = np.split(array.swapaxes(1, 2), 2, axis=1)
            parts = {name.replace("gate_up", "gate"): gate, name.replace("gate_up", "up"): up}
        elif name.endswith("experts.down_proj"):
            parts = {name: array.swapaxes(1, 2)}
        for part, values in parts.items():
            target = names.get_name(part, try_suffixes=(".weight",))
            pairs.append((str(target).removesuffix(".weight") + ".weight", values))
    return pairs


def test_a_model_that_llama_cpp_would_compute_otherwise_is_refused(
    make_llama4: Callable[..., Any], tmp_path: Path
) -> None:
    make_llama4(dtype=torch.bfloat16, **{**SCOUT, "attention_chunk_size": 4096}).save_pretrained(tmp_path)
    with pytest.raises(SystemExit, match="chunk"):
        gguf_file.write_gguf(tmp_path, tmp_path / "file.gguf")
