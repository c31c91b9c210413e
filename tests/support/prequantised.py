"""Already quantised checkpoints of small random Llama 4s, each written by the library whose form it has."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

FLOAT8 = {"num_bits": 8, "type": "float", "symmetric": True}
INT8 = {"num_bits": 8, "type": "int", "symmetric": True}
TOKEN = {"strategy": "token", "dynamic": True}
TENSOR = {"strategy": "tensor", "dynamic": False}
CHANNEL = {"strategy": "channel", "dynamic": False}

SCHEMES: dict[str, dict[str, Any]] = {
    "fp8 static": {"weights": {**FLOAT8, **TENSOR}, "input_activations": {**FLOAT8, **TENSOR}},
    "fp8 dynamic": {"weights": {**FLOAT8, **CHANNEL}, "input_activations": {**FLOAT8, **TOKEN}},
    "int8 static": {"weights": {**INT8, **CHANNEL}, "input_activations": {**INT8, **TENSOR}},
    "int8 dynamic": {"weights": {**INT8, **CHANNEL}, "input_activations": {**INT8, **TOKEN}},
    "int4": {"weights": {**INT8, "num_bits": 4, "strategy": "group", "group_size": 32}},
}


class Expert(nn.Module):
    """One expert as three linears, as libraries split them before they quantise."""

    def __init__(self, gate_up_HI: Tensor, down_IH: Tensor) -> None:
        super().__init__()
        gate, up = gate_up_HI.chunk(2, dim=1)
        self.gate_proj, self.up_proj, self.down_proj = (linear(weight.T) for weight in (gate, up, down_IH))

    def forward(self, x_TH: Tensor) -> Tensor:
        return self.down_proj(self.up_proj(x_TH) * nn.functional.silu(self.gate_proj(x_TH)))


class Experts(nn.ModuleList):
    """A layer's experts under their numbers."""

    def forward(self, x: Tensor) -> Tensor:
        x_ETH = x.view(len(self), -1, x.shape[-1])
        return torch.stack([expert(x_TH) for expert, x_TH in zip(self, x_ETH, strict=True)]).view(-1, x.shape[-1])


def linear(weight_NK: Tensor) -> nn.Linear:
    module = nn.Linear(weight_NK.shape[1], weight_NK.shape[0], bias=False, dtype=weight_NK.dtype)
    module.weight = nn.Parameter(weight_NK.detach().contiguous())
    return module


def split_experts(model: Any) -> None:
    """Replaces each layer's stacked experts by modules."""
    for layer in model.model.layers:
        if layer.is_moe_layer:
            stacked = layer.feed_forward.experts
            pairs = zip(stacked.gate_up_proj, stacked.down_proj, strict=True)
            layer.feed_forward.experts = Experts(Expert(*pair) for pair in pairs)


@torch.no_grad()
def write_compressed_tensors(model: Any, folder: Path, scheme: dict[str, Any], ids: Tensor, **options: Any) -> Tensor:
    """Quantises a model with compressed-tensors and writes it. Returns that library's own logits of `ids`."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
    from compressed_tensors.quantization.utils import calculate_qparams

    split_experts(model)
    inputs = observe_inputs(model, ids)
    groups = options.pop("groups", {"group_0": {"targets": ["Linear"], **scheme}})
    config = QuantizationConfig(
        config_groups=groups, ignore=["re:.*lm_head", "re:.*router", *options.pop("ignore", [])], **options
    )
    apply_quantization_config(model, config)
    for name, module in model.named_modules():
        if (quantised := getattr(module, "quantization_scheme", None)) is None or not hasattr(module, "weight"):
            continue
        blocks = module.weight
        if quantised.weights.strategy == "group":
            blocks = blocks.unflatten(-1, (-1, quantised.weights.group_size))
        whole = quantised.weights.strategy == "tensor"
        least, most = (blocks.min(), blocks.max()) if whole else (blocks.amin(-1), blocks.amax(-1))
        scales, _ = calculate_qparams(least, most, quantised.weights)
        module.weight_scale.copy_(scales.reshape(module.weight_scale.shape))
        if hasattr(module, "input_scale"):
            scales, _ = calculate_qparams(-inputs[name], inputs[name], quantised.input_activations)
            module.input_scale.copy_(scales)
    for index, layer in enumerate(model.model.layers):
        if hasattr(layer.self_attn, "k_scale"):
            layer.self_attn.k_scale.fill_(0.01 + 0.001 * index)
            layer.self_attn.v_scale.fill_(0.02)
    logits = model(ids, use_cache=True).logits
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(str(folder))
    return logits


def observe_inputs(model: Any, ids: Tensor) -> dict[str, Tensor]:
    """The largest magnitude that each linear takes in; what no token reaches is given 1."""
    largest: dict[str, Tensor] = {}
    hooks = [
        module.register_forward_pre_hook(
            lambda _, arguments, name=name: (
                largest.update({name: arguments[0].abs().amax()}) if len(arguments) else None
            )
        )
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    model(ids)
    for hook in hooks:
        hook.remove()
    return {name: torch.where(value > 0, value, 1.0) for name, value in largest.items()}
