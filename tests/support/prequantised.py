"""Already quantised checkpoints of small random Llama 4s, each written by the library whose form it has."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
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
    for module in model.modules():
        if hasattr(module, "quantization_scheme") and isinstance(module, nn.Linear):
            module.forward = by_token(module.forward)
    logits = model(ids, use_cache=True).logits
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(str(folder))
    return logits


def by_token(forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A quantised linear over three axes: of two axes compressed-tensors takes the first for the batch's, and all its
    rows for one token's."""
    return lambda x: forward(x) if x.ndim == 3 else forward(x[None])[0]


@torch.no_grad()
def write_modelopt(model: Any, folder: Path, ids: Tensor) -> Tensor:
    """Quantises a model and its cache to FP8 with ModelOpt and writes it. Returns that library's own logits."""
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export import export_hf_checkpoint

    model.config.architectures = ["Llama4ForCausalLM"]  # the library looks for its kind there
    config = mtq.update_quant_cfg_with_kv_cache_quant(copy.deepcopy(mtq.FP8_DEFAULT_CFG), mtq.FP8_KV_CFG["quant_cfg"])
    mtq.quantize(model, config, lambda model: model(ids))
    logits = model(ids).logits
    export_hf_checkpoint(model, export_dir=folder)
    return logits


def unstack_experts(folder: Path) -> None:
    """Rewrites a checkpoint of ModelOpt's with a tensor an expert, as it writes those of other models."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for name in [name for name in tensors if name.endswith("experts.gate_up_proj")]:
        experts = name.removesuffix(".gate_up_proj")
        gate, up = tensors[name].transpose(1, 2).chunk(2, dim=1)
        down = tensors[f"{experts}.down_proj"].transpose(1, 2)
        for part, stack, weight_ENK in (("gate", "gate_up", gate), ("up", "gate_up", up), ("down", "down", down)):
            for index, weight_NK in enumerate(weight_ENK):
                module = f"{experts}.{index}.{part}_proj"
                tensors[f"{module}.weight"] = weight_NK.contiguous()
                for scale in ("weight_scale", "input_scale"):
                    tensors[f"{module}.{scale}"] = tensors[f"{experts}.{stack}_proj_{scale}"].clone()
        for stack in ("gate_up_proj", "down_proj"):
            for suffix in ("", "_weight_scale", "_input_scale"):
                del tensors[f"{experts}.{stack}{suffix}"]
    save_file(tensors, path, {"format": "pt"})


@torch.no_grad()
def write_fbgemm(model: Any, folder: Path, ids: Tensor, bound: float) -> Tensor:
    """Quantises all but attention, router and head as `transformers` does for fbgemm. Returns emulated logits.

    The kernels need a GPU; what they compute is written out here: rows in E4M3 by their own largest magnitude, of
    weights as they are, of activations up to the bound.
    """
    tensors, left_out = {}, ["lm_head", "self_attn", "router"]
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and not any(part in name for part in left_out):
            stored, scale = rows_in_e4m3(module.weight.float())
            tensors |= {f"{name}.weight": stored, f"{name}.weight_scale": scale}
            model.set_submodule(name, RowwiseLinear(stored, scale, bound))
        elif type(module).__name__ == "Llama4TextExperts":
            experts = []
            for part in ("gate_up_proj", "down_proj"):
                stored, scale = rows_in_e4m3(getattr(module, part).float().transpose(1, 2))
                shape = (len(scale), 1, -1) if part == "gate_up_proj" else (len(scale), -1, 1)
                tensors |= {
                    f"{name}.{part}": stored.transpose(1, 2).contiguous(),
                    f"{name}.{part}_scale": scale.reshape(shape),
                }
                experts.append([RowwiseLinear(*pair, bound) for pair in zip(stored, scale, strict=True)])
            model.set_submodule(name, Experts(RowwiseExpert(*pair) for pair in zip(*experts, strict=True)))
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in tensors}
    folder.mkdir()
    save_file({**state, **tensors}, folder / "model.safetensors", {"format": "pt"})
    config = model.config.to_dict()
    config["quantization_config"] = {
        "quant_method": "fbgemm_fp8",
        "activation_scale_ub": bound,
        "modules_to_not_convert": left_out,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return model(ids).logits


def rows_in_e4m3(x: Tensor, bound: float = float("inf")) -> tuple[Tensor, Tensor]:
    """Rows [..., K] in E4M3, and their scales [..., 1]."""
    scale = x.abs().amax(-1, keepdim=True).clamp(1e-12, bound) / 448
    return (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn), scale


class RowwiseLinear(nn.Module):
    """A linear of E4M3 rows over activations quantised to such rows."""

    def __init__(self, stored_NK: Tensor, scale_N1: Tensor, bound: float) -> None:
        super().__init__()
        self.weight_NK, self.bound = stored_NK.float() * scale_N1, bound

    def forward(self, x: Tensor) -> Tensor:
        stored, scale = rows_in_e4m3(x.float(), self.bound)
        return ((stored.float() * scale) @ self.weight_NK.T).to(x.dtype)


class RowwiseExpert(nn.Module):
    """An expert of two such linears."""

    def __init__(self, gate_up: RowwiseLinear, down: RowwiseLinear) -> None:
        super().__init__()
        self.gate_up, self.down = gate_up, down

    def forward(self, x_TH: Tensor) -> Tensor:
        gate, up = self.gate_up(x_TH).chunk(2, dim=-1)
        return self.down(up * nn.functional.silu(gate))


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
