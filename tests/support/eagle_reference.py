"""EAGLE-3 heads with random weights, and what they compute by `transformers`' own parts of Llama.

A head's first layer is a `LlamaDecoderLayer` whose queries, keys and values read embedding and state side by side;
norm, feed-forward, attention and rotation are the library's. Both published forms are written.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm, LlamaRotaryEmbedding

ROPE = {"rope_type": "default", "rope_theta": 10000.0}


class Reference(nn.Module):
    """A head.

    Args:
        config: Geometry of its layers.
        model_hidden: Hidden size of the model that it drafts for.
        states: Number of the model's states that it reads.
        vocabulary: Its own tokens.
        norm: Whether states are normalised before they are fused: `none`, `whole` or `each`.
        norm_before_residual: Whether the first residual is normalised.
        norm_output: Whether it goes on from normalised states.
    """

    def __init__(
        self,
        config: LlamaConfig,
        model_hidden: int,
        states: int,
        vocabulary: int,
        norm: str = "none",
        norm_before_residual: bool = False,
        norm_output: bool = False,
    ) -> None:
        super().__init__()
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.config, self.states, self.kind = config, states, norm
        self.norm_before_residual, self.norm_output = norm_before_residual, norm_output
        self.embed_tokens = nn.Embedding(config.vocab_size, hidden)
        self.fc = nn.Linear(states * model_hidden, hidden, bias=False)
        self.input_norm = LlamaRMSNorm(states * model_hidden, eps) if norm == "whole" else None
        each = [LlamaRMSNorm(model_hidden, eps) for _ in range(states)]
        self.fc_norm = nn.ModuleList(each) if norm == "each" else None
        self.layers = nn.ModuleList(LlamaDecoderLayer(config, index) for index in range(config.num_hidden_layers))
        first = self.layers[0].self_attn
        for name in ("q_proj", "k_proj", "v_proj"):
            setattr(first, name, nn.Linear(2 * hidden, getattr(first, name).out_features, bias=False))
        self.layers[0].hidden_norm = LlamaRMSNorm(hidden, eps)
        self.norm = LlamaRMSNorm(hidden, eps)
        self.lm_head = nn.Linear(hidden, vocabulary, bias=False)
        self.rotary = LlamaRotaryEmbedding(config)
        for parameter in self.parameters():
            mean = 1.0 if parameter.ndim == 1 else 0.0
            nn.init.normal_(parameter, mean, 0.1 if parameter.ndim == 1 else parameter.shape[1] ** -0.5)

    def fuse(self, states_BSW: Tensor) -> Tensor:
        """The model's states in the head's width."""
        if self.input_norm is not None:
            states_BSW = self.input_norm(states_BSW)
        if self.fc_norm is not None:
            parts = states_BSW.chunk(self.states, -1)
            states_BSW = torch.cat([norm(part) for norm, part in zip(self.fc_norm, parts, strict=True)], -1)
        return self.fc(states_BSW)

    def forward(self, ids_BS: Tensor, hidden_BSH: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens beside the states before them, fused or the head's own → logits, and the states to go on from."""
        length = ids_BS.shape[1]
        positions = self.rotary(hidden_BSH, torch.arange(length)[None])
        mask = torch.full((length, length), -torch.inf).triu(1)[None, None]
        embeds, x = self.embed_tokens(ids_BS), hidden_BSH
        for index, layer in enumerate(self.layers):
            residual = x
            if index == 0:
                normed = layer.hidden_norm(x)
                residual = normed if self.norm_before_residual else x
                y = torch.cat([layer.input_layernorm(embeds), normed], -1)
            else:
                y = layer.input_layernorm(x)
            x = residual + layer.self_attn(y, position_embeddings=positions, attention_mask=mask)[0]
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        normed = self.norm(x)
        return self.lm_head(normed), normed if self.norm_output else x

    @torch.no_grad()
    def chain(self, ids: list[int], states_SW: Tensor, further: list[int]) -> Tensor:
        """Logits after tokens beside the model's states, and after further ones, each beside the head's own state."""
        hidden = self.fuse(states_SW[None])
        rows = []
        for step in range(len(further) + 1):
            logits, after = self(torch.tensor([[*ids, *further[:step]]]), hidden)
            rows.append(logits[0, -1])
            hidden = torch.cat([hidden, after[:, -1:]], 1)
        return torch.stack(rows)


def write_head(
    reference: Reference,
    folder: Path,
    states: list[int],
    *,
    form: str = "speculators",
    tokens: list[int] | None = None,
    has_embedding: bool = True,
    changes: dict[str, Any] | None = None,
) -> Path:
    """Writes a head's folder in a published form, some fields of its configuration changed or (None) taken out."""
    tensors = {name: tensor.detach().contiguous() for name, tensor in reference.state_dict().items()}
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("rotary")}
    if not has_embedding:
        del tensors["embed_tokens.weight"]
    if form == "eagle":
        tensors = {name.replace("layers.0.", "midlayer."): tensor for name, tensor in tensors.items()}
    vocabulary = reference.lm_head.out_features
    if tokens is not None:
        tensors["d2t"] = torch.tensor(tokens) - torch.arange(vocabulary)
        tensors["t2d"] = torch.zeros(reference.config.vocab_size, dtype=torch.bool)
        tensors["t2d"][tokens] = True
    config = reference.config
    layers = {
        name: getattr(config, name)
        for name in (
            *("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
            *("num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps", "max_position_embeddings"),
            "rope_parameters",
        )
    }
    flags = {
        "draft_vocab_size": vocabulary,
        "norm_before_residual": reference.norm_before_residual,
        "norm_before_fc": reference.kind == "whole",
        "fc_norm": reference.kind == "each",
        "norm_output": reference.norm_output,
    }
    if form == "speculators":
        written: dict[str, Any] = {
            "architectures": ["Eagle3Speculator"],
            "speculators_model_type": "eagle3",
            "speculators_version": "0.9.0",
            "eagle_aux_hidden_state_layer_ids": states,
            "transformer_layer_config": layers,
            **flags,
        }
    else:
        eagle = {"eagle_aux_hidden_state_layer_ids": [state - 1 for state in states], "use_aux_hidden_state": True}
        written = {"architectures": ["LlamaForCausalLMEagle3"], **layers, **flags, "eagle_config": eagle}
    written |= changes or {}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({k: v for k, v in written.items() if v is not None}))
    save_file(tensors, folder / "model.safetensors")
    return folder


def head_config(vocabulary: int, **changes: Any) -> LlamaConfig:
    """Geometry of a small head."""
    geometry: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 512,
        "rope_parameters": ROPE,
        "attn_implementation": "eager",
        **changes,
    }
    return LlamaConfig(**geometry)
