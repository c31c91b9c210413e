"""Llama 4 in PyTorch, written so that it can be traced: real-valued RoPE, two custom ops, no data-dependent Python.

Parameter names are those of the Hugging Face checkpoint, so `load_state_dict(strict=True)` takes its tensors. Called
on token ids, the model reads whole sequences with no cache and agrees with `transformers` bit for bit. One layer called
with a `Cache` is the step that export traces.

From the top down: cache, model, layer, attention, feed-forward, norm. The configuration is `spec.geometry.ModelSpec`.

Shapes: B batch, S sequence, T tokens (B·S), H hidden, I expert width, E experts, Q query heads, K kv heads, D head
dim, C cache slots, R positions that get logits, V vocabulary.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from ..plugins.gqa import op as gqa
from ..plugins.gqa.torch_op import attend_whole, grouped_query_attention
from ..plugins.moe import op as moe
from ..plugins.moe.torch_op import moe_dispatch
from ..spec.geometry import LayerSpec, ModelSpec


class Cache(NamedTuple):
    """One layer's KV cache and how much of it is filled: key, value [B, K, C, D], past_lengths [B] int32."""

    key: Tensor
    value: Tensor
    past_lengths: Tensor


class Llama4(nn.Module):
    """The text decoder with its language-model head.

    Args:
        spec: Geometry. Parameters are created in the default dtype and on the default device, uninitialised where a
            checkpoint will fill them.
    """

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        self.model = TextModel(spec)
        self.lm_head = nn.Linear(spec.hidden_size, spec.vocab_size, bias=False)
        if spec.tied_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, input_ids_BS: Tensor) -> Tensor:
        """Token ids [B, S], unpadded → logits [B, S, V] in the model's dtype."""
        return self.lm_head(self.model(input_ids_BS))


class TextModel(nn.Module):
    """Embedding, layers and the last norm."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(spec.vocab_size, spec.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(spec, layer) for layer in spec.layers)
        self.norm = RMSNorm(spec.hidden_size, spec.norm_eps)

    def forward(self, input_ids_BS: Tensor) -> Tensor:
        """Token ids [B, S] → normalised hidden states [B, S, H]."""
        return self.run(self.embed_tokens(input_ids_BS))

    def run(self, x_BSH: Tensor) -> Tensor:
        """Embeddings [B, S, H] → normalised hidden states [B, S, H]."""
        for layer in self.layers:
            x_BSH, _ = layer(x_BSH)
        return self.norm(x_BSH)


class DecoderLayer(nn.Module):
    """Norm, attention, norm, feed-forward, with both residuals."""

    def __init__(self, spec: ModelSpec, layer: LayerSpec) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(spec.hidden_size, spec.norm_eps)
        self.self_attn = Attention(spec, layer)
        self.post_attention_layernorm = RMSNorm(spec.hidden_size, spec.norm_eps)
        self.feed_forward = MixtureOfExperts(spec) if layer.experts else MLP(spec.hidden_size, spec.dense_size)

    def forward(self, x_BSH: Tensor, cache: Cache | None = None) -> tuple[Tensor, Cache | None]:
        """[B, S, H] → [B, S, H], and the cache with these tokens in it."""
        attended_BSH, cache = self.self_attn(self.input_layernorm(x_BSH), cache)
        x_BSH = x_BSH + attended_BSH
        return x_BSH + self.feed_forward(self.post_attention_layernorm(x_BSH)), cache


class Attention(nn.Module):
    """Grouped-query attention with its four linears."""

    inv_freq: Tensor | None

    def __init__(self, spec: ModelSpec, layer: LayerSpec) -> None:
        super().__init__()
        self.attributes = attention_attributes(spec, layer)
        query_size, kv_size = self.attributes.heads * spec.head_dim, self.attributes.kv_heads * spec.head_dim
        self.q_proj = nn.Linear(spec.hidden_size, query_size, bias=False)
        self.k_proj = nn.Linear(spec.hidden_size, kv_size, bias=False)
        self.v_proj = nn.Linear(spec.hidden_size, kv_size, bias=False)
        self.o_proj = nn.Linear(query_size, spec.hidden_size, bias=False)
        self.register_buffer("inv_freq", inverse_frequencies(spec) if layer.rope else None, persistent=False)

    def forward(self, x_BSH: Tensor, cache: Cache | None) -> tuple[Tensor, Cache | None]:
        """[B, S, H] → [B, S, H], and the cache with these tokens in it."""
        query, key, value = self.q_proj(x_BSH), self.k_proj(x_BSH), self.v_proj(x_BSH)
        if cache is None:
            return self.o_proj(attend_whole(query, key, value, self.inv_freq, self.attributes)), None
        a = self.attributes
        attended, present_key, present_value = grouped_query_attention(
            query,
            key,
            value,
            *cache,
            self.inv_freq,
            a.heads,
            a.kv_heads,
            a.scale,
            a.chunk,
            a.qk_norm_eps,
            a.temperature_scale,
            a.temperature_floor,
        )
        return self.o_proj(attended), Cache(present_key, present_value, cache.past_lengths)


def attention_attributes(spec: ModelSpec, layer: LayerSpec) -> gqa.Attributes:
    """The op's attributes in one layer: norm where there is RoPE, temperature where there is none."""
    return gqa.Attributes(
        heads=spec.heads,
        kv_heads=spec.kv_heads,
        scale=spec.head_dim**-0.5,
        chunk=layer.chunk,
        qk_norm_eps=spec.norm_eps if spec.qk_norm and layer.rope else 0.0,
        temperature_scale=0.0 if layer.rope else spec.temperature_scale,
        temperature_floor=spec.temperature_floor,
    )


def inverse_frequencies(spec: ModelSpec) -> Tensor:
    """RoPE's angle per position for each pair of a head, [D/2] float32, with Llama 3's scaling where the spec has it.

    Long wavelengths are stretched by `factor`, short ones kept, those between blended (the rule that Llama 3.1's
    release describes). Where low and high factors are equal there is nothing between.
    """
    exponent = torch.arange(0, spec.head_dim, 2, dtype=torch.int64).float() / spec.head_dim
    inv_freq = 1.0 / (spec.rope_theta**exponent)
    scaling = spec.rope_scaling
    if scaling is None:
        return inv_freq
    wavelength = 2 * math.pi / inv_freq
    longest_kept = scaling.original_max_positions / scaling.high_freq_factor
    shortest_stretched = scaling.original_max_positions / scaling.low_freq_factor
    stretched = torch.where(wavelength > shortest_stretched, inv_freq / scaling.factor, inv_freq)
    if scaling.high_freq_factor == scaling.low_freq_factor:
        return stretched
    smooth = (scaling.original_max_positions / wavelength - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    blended = (1 - smooth) * inv_freq / scaling.factor + smooth * inv_freq
    between = (wavelength >= longest_kept) & (wavelength <= shortest_stretched)
    return torch.where(between, blended, stretched)


class MixtureOfExperts(nn.Module):
    """Router, routed experts and the shared expert."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.router = nn.Linear(spec.hidden_size, spec.experts, bias=False)
        self.experts = StackedExperts(spec)
        self.shared_expert = MLP(spec.hidden_size, spec.expert_size)
        self.attributes = moe.Attributes(top_k=spec.experts_per_token)

    def forward(self, x_BSH: Tensor) -> Tensor:
        """[B, S, H] → [B, S, H]."""
        x_TH = x_BSH.reshape(-1, x_BSH.shape[-1])
        routed_TH = moe_dispatch(
            x_TH,
            self.router(x_TH),
            self.experts.gate_up_proj,
            self.experts.down_proj,
            self.attributes.top_k,
            self.attributes.activation,
        )
        return self.shared_expert(x_BSH) + routed_TH.view_as(x_BSH)


class StackedExperts(nn.Module):
    """The routed experts' stacked weights, input dimension first."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        count, size = spec.experts, spec.expert_size
        self.gate_up_proj = nn.Parameter(torch.empty(count, spec.hidden_size, 2 * size))
        self.down_proj = nn.Parameter(torch.empty(count, size, spec.hidden_size))


class MLP(nn.Module):
    """SwiGLU feed-forward: a dense layer's, or the shared expert."""

    def __init__(self, hidden_size: int, size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, size, bias=False)
        self.up_proj = nn.Linear(hidden_size, size, bias=False)
        self.down_proj = nn.Linear(size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., H] → [..., H]."""
        return self.down_proj(silu(self.gate_proj(x)) * self.up_proj(x))


class RMSNorm(nn.Module):
    """Llama 4's RMS norm."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        """[..., H] → [..., H]."""
        return traced_rms_norm(x, self.weight, self.eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS norm over the last axis in float32, cast back, *then* times the weight: ONNX's `RMSNormalization`."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).type_as(x) * weight


traced_rms_norm = torch.library.custom_op("arriero::rms_norm", rms_norm, mutates_args=())
"""The norm as one node of a traced graph."""


@traced_rms_norm.register_fake
def _(x, weight, eps):  # type: ignore[no-untyped-def]
    return torch.empty_like(x)
