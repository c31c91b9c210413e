"""One rank's part of a decoder layer: the layer of `llama4` with narrower weights, and its sums over the ranks.

Enters: a kind of layer and a `Split`. Leaves: a `DecoderLayer` of the same parameter names whose shapes are those of
the rank's portions. Ranks differ in the number of their first expert only, which is no part of a layer.
"""

import dataclasses

import torch
from torch import Tensor, nn

from ..plugins.all_reduce.torch_op import all_reduce
from ..plugins.gqa import op as gqa
from ..spec.geometry import LayerSpec, ModelSpec
from .llama4 import Cache, DecoderLayer, attention_attributes
from .split import Split


class RankLayer(DecoderLayer):
    """A rank's decoder layer: attention and feed-forward give parts of the results, which are summed over the ranks.

    Args:
        spec: Geometry of the whole model.
        layer: Kind of layer.
        split: Layout over ranks, two at least.
    """

    def __init__(self, spec: ModelSpec, layer: LayerSpec, split: Split) -> None:
        super().__init__(spec, layer)
        self.ranks = split.ranks
        self.self_attn.attributes = rank_attributes(spec, layer, split)
        for name, parameter in list(self.named_parameters()):
            owner, _, leaf = name.rpartition(".")
            part = split.portion(name, tuple(parameter.shape), 0)
            setattr(self.get_submodule(owner), leaf, nn.Parameter(torch.empty(part.shape)))

    def forward(self, x_BSH: Tensor, cache: Cache | None = None) -> tuple[Tensor, Cache | None]:
        """[B, S, H] → [B, S, H], and the cache with these tokens in it."""
        attended_BSH, cache = self.self_attn(self.input_layernorm(x_BSH), cache)
        x_BSH = x_BSH + all_reduce(attended_BSH, self.ranks)
        fed_BSH = self.feed_forward(self.post_attention_layernorm(x_BSH))
        return x_BSH + all_reduce(fed_BSH, self.ranks), cache


def layer_of(spec: ModelSpec, layer: LayerSpec, split: Split) -> DecoderLayer:
    """A layer of the whole model, or a rank's where it is split."""
    return DecoderLayer(spec, layer) if split.ranks == 1 else RankLayer(spec, layer, split)


def rank_attributes(spec: ModelSpec, layer: LayerSpec, split: Split) -> gqa.Attributes:
    """The attention op's attributes in one layer of a rank, which has its share of the heads."""
    whole = attention_attributes(spec, layer)
    heads, kv_heads = whole.heads // split.ranks, whole.kv_heads // split.ranks
    return dataclasses.replace(whole, heads=heads, kv_heads=kv_heads)
