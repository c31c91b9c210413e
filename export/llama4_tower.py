"""Llama 4's vision tower and projector in PyTorch, and the multimodal model that they make with the text decoder.

Tiles go in, image features come out: vectors that take the place of embeddings. Parameter names are those of the
Hugging Face checkpoint, and the numbers agree with `transformers` bit for bit. Export traces one `TowerLayer`. From the
top down, as in `llama4`.

Shapes: N tiles, P pixels of a tile's side, S patches and the class token, C channels (the tower's hidden size), D head
dim, F image features of a tile, H the text decoder's hidden size, M features of all tiles (N·F).
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention

from ..spec.geometry import ModelSpec, VisionSpec
from .llama4 import Llama4

NORM_EPS = 1e-5
"""Epsilon of the tower's layer norms, whatever its configuration says."""


class MultimodalLlama4(nn.Module):
    """The vision tower, the projector and the text decoder.

    Args:
        spec: The decoder's geometry.
        vision: The tower's.
    """

    def __init__(self, spec: ModelSpec, vision: VisionSpec) -> None:
        super().__init__()
        self.vision = vision
        self.vision_model = TowerModel(vision)
        self.multi_modal_projector = Projector(vision, spec.hidden_size)
        self.language_model = Llama4(spec)

    def encode(self, pixels_N3PP: Tensor) -> Tensor:
        """Normalised pixels [N, 3, P, P] → image features [M, H]."""
        return self.multi_modal_projector(self.vision_model(pixels_N3PP).flatten(0, 1))

    def forward(self, input_ids_BS: Tensor, pixels_N3PP: Tensor | None = None) -> Tensor:
        """Token ids [B, S] and the tiles of their images, in order → logits [B, S, V]."""
        x_BSH = self.language_model.model.embed_tokens(input_ids_BS)
        if pixels_N3PP is not None:
            x_BSH = merge(x_BSH, input_ids_BS == self.vision.image_token, self.encode(pixels_N3PP))
        return self.language_model.lm_head(self.language_model.model.run(x_BSH))


def merge(x_BSH: Tensor, is_image_BS: Tensor, features_MH: Tensor) -> Tensor:
    """Embeddings with image features in the places of image tokens, in order."""
    place_BS = (is_image_BS.flatten().cumsum(0) - 1).clamp(min=0).view_as(is_image_BS)
    return torch.where(is_image_BS[..., None], features_MH[place_BS], x_BSH)


class TowerModel(nn.Module):
    """The tower up to its adapter."""

    def __init__(self, spec: VisionSpec) -> None:
        super().__init__()
        self.spec = spec
        self.patch_embedding = PatchEmbedding(spec)
        self.class_embedding = nn.Parameter(torch.empty(spec.hidden_size))
        self.positional_embedding_vlm = nn.Parameter(torch.empty(spec.positions, spec.hidden_size))
        self.layernorm_pre = nn.LayerNorm(spec.hidden_size, NORM_EPS)
        self.model = TowerEncoder(spec)
        self.layernorm_post = nn.LayerNorm(spec.hidden_size, NORM_EPS)
        self.vision_adapter = Adapter(spec)

    def forward(self, pixels_N3PP: Tensor) -> Tensor:
        """Normalised pixels [N, 3, P, P] in any float → [N, F, adapter size]."""
        patches = self.patch_embedding(pixels_N3PP.type_as(self.class_embedding))
        last = self.class_embedding.expand(patches.shape[0], 1, -1)
        x_NSC = self.layernorm_pre(torch.cat([patches, last], dim=1) + self.positional_embedding_vlm)
        cos_SP, sin_SP = (x.to(x_NSC.device) for x in turns(self.spec))
        for layer in self.model.layers:
            x_NSC = layer(x_NSC, cos_SP, sin_SP)
        return self.vision_adapter(self.layernorm_post(x_NSC)[:, :-1])


def turns(spec: VisionSpec) -> tuple[Tensor, Tensor]:
    """Cosine and sine of each position's angles, [S, D/2] float32.

    The first half of the pairs turns by the patch's column plus one, the second by its row plus one, each with RoPE's
    frequencies for a head of half the width (axial RoPE, as in Pixtral, arXiv:2410.07073). The class token, which is
    the last, is not turned.
    """
    width = spec.head_dim // 2
    inv_freq = 1.0 / (spec.rope_theta ** (torch.arange(0, width, 2).float() / width))
    place = torch.arange(spec.grid**2)
    columns, rows = place % spec.grid + 1, place // spec.grid + 1
    angles = torch.cat([columns[:, None] * inv_freq, rows[:, None] * inv_freq], dim=-1).float()
    angles = torch.cat([angles, torch.zeros(1, width)])
    return angles.cos(), angles.sin()


class PatchEmbedding(nn.Module):
    """Each patch's pixels through one linear."""

    def __init__(self, spec: VisionSpec) -> None:
        super().__init__()
        self.spec = spec
        self.linear = nn.Linear(spec.patch_values, spec.hidden_size, bias=False)

    def forward(self, pixels_N3PP: Tensor) -> Tensor:
        """[N, 3, P, P] → [N, S - 1, C]."""
        return self.linear(split_patches(pixels_N3PP, self.spec))


def split_patches(pixels_N3PP: Tensor, spec: VisionSpec) -> Tensor:
    """Tiles as patches [N, S - 1, 3·side²], row by row, each in the order of channel, row, column.

    Pixels beyond the last whole patch are not read.
    """
    side, used = spec.patch_size, spec.grid * spec.patch_size
    patches = pixels_N3PP[:, :, :used, :used].unflatten(3, (-1, side)).unflatten(2, (-1, side))
    return patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


class TowerEncoder(nn.Module):
    """The layers."""

    def __init__(self, spec: VisionSpec) -> None:
        super().__init__()
        self.layers = nn.ModuleList(TowerLayer(spec) for _ in range(spec.layers))


class TowerLayer(nn.Module):
    """Norm, attention, norm, feed-forward, with both residuals."""

    def __init__(self, spec: VisionSpec) -> None:
        super().__init__()
        self.self_attn = TowerAttention(spec)
        self.mlp = TowerMLP(spec)
        self.input_layernorm = nn.LayerNorm(spec.hidden_size, NORM_EPS)
        self.post_attention_layernorm = nn.LayerNorm(spec.hidden_size, NORM_EPS)

    def forward(self, x_NSC: Tensor, cos_SP: Tensor, sin_SP: Tensor) -> Tensor:
        """[N, S, C] → [N, S, C]."""
        x_NSC = x_NSC + self.self_attn(self.input_layernorm(x_NSC), cos_SP, sin_SP)
        return x_NSC + self.mlp(self.post_attention_layernorm(x_NSC))


class TowerAttention(nn.Module):
    """Attention of every patch to every other, with its four linears."""

    def __init__(self, spec: VisionSpec) -> None:
        super().__init__()
        self.heads = spec.heads
        self.q_proj = nn.Linear(spec.hidden_size, spec.hidden_size)
        self.k_proj = nn.Linear(spec.hidden_size, spec.hidden_size)
        self.v_proj = nn.Linear(spec.hidden_size, spec.hidden_size)
        self.o_proj = nn.Linear(spec.hidden_size, spec.hidden_size)

    def forward(self, x_NSC: Tensor, cos_SP: Tensor, sin_SP: Tensor) -> Tensor:
        """[N, S, C] → [N, S, C]."""
        query = traced_rotate_patches(self.q_proj(x_NSC), cos_SP, sin_SP, self.heads)
        key = traced_rotate_patches(self.k_proj(x_NSC), cos_SP, sin_SP, self.heads)
        return self.o_proj(traced_attend_patches(query, key, self.v_proj(x_NSC), self.heads))


def rotate_patches(x_NSC: Tensor, cos_SP: Tensor, sin_SP: Tensor, heads: int) -> Tensor:
    """Rotates interleaved pairs of each head in float32 and casts back; cos and sin are [S, D/2]."""
    turn_S1P = torch.complex(cos_SP, sin_SP)[:, None]
    pairs = torch.view_as_complex(x_NSC.float().unflatten(-1, (heads, -1, 2)))
    return torch.view_as_real(pairs * turn_S1P).flatten(2).type_as(x_NSC)


traced_rotate_patches = torch.library.custom_op("arriero::rotate_patches", rotate_patches, mutates_args=())
"""The rotation as one node of a traced graph."""


@traced_rotate_patches.register_fake
def _(x_NSC, cos_SP, sin_SP, heads):  # type: ignore[no-untyped-def]
    return torch.empty_like(x_NSC)


def attend_patches(query_NSC: Tensor, key_NSC: Tensor, value_NSC: Tensor, heads: int) -> Tensor:
    """Attention of every patch to every other, [N, S, C] each."""
    split = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query_NSC, key_NSC, value_NSC))
    return scaled_dot_product_attention(*split).transpose(1, 2).flatten(2)


traced_attend_patches = torch.library.custom_op("arriero::attend_patches", attend_patches, mutates_args=())
"""The attention as one node of a traced graph."""


@traced_attend_patches.register_fake
def _(query_NSC, key_NSC, value_NSC, heads):  # type: ignore[no-untyped-def]
    return torch.empty_like(query_NSC)


class TowerMLP(nn.Module):
    """The feed-forward of one layer."""

    def __init__(self, spec: VisionSpec) -> None:
        super().__init__()
        self.fc1 = nn.Linear(spec.hidden_size, spec.mlp_size)
        self.fc2 = nn.Linear(spec.mlp_size, spec.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] → [..., C]."""
        return self.fc2(gelu(self.fc1(x)))


class Adapter(nn.Module):
    """Pixel shuffle, which makes one feature of each small square of patches, and the MLP."""

    def __init__(self, spec: VisionSpec) -> None:
        super().__init__()
        self.spec = spec
        self.mlp = AdapterMLP(spec)

    def forward(self, x_NSC: Tensor) -> Tensor:
        """[N, S - 1, C] → [N, F, adapter size]."""
        return self.mlp(shuffle_patches(x_NSC, self.spec))


def shuffle_patches(x_NSC: Tensor, spec: VisionSpec) -> Tensor:
    """Pixel shuffle: [N, S - 1, C] → [N, F, C·shuffle²]; a square's patches follow one another row by row."""
    squares = (spec.grid // spec.shuffle, spec.shuffle)
    patches = x_NSC.unflatten(1, (*squares, *squares))
    return patches.permute(0, 1, 3, 2, 4, 5).flatten(3).flatten(1, 2)


class AdapterMLP(nn.Module):
    """Two linears, each with a GELU behind it."""

    def __init__(self, spec: VisionSpec) -> None:
        super().__init__()
        self.fc1 = nn.Linear(spec.mlp_size, spec.adapter_size, bias=False)
        self.fc2 = nn.Linear(spec.adapter_size, spec.adapter_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[N, F, C·shuffle²] → [N, F, adapter size]."""
        return gelu(self.fc2(gelu(self.fc1(x))))


class Projector(nn.Module):
    """The linear into the text decoder's width."""

    def __init__(self, spec: VisionSpec, text_size: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(spec.adapter_size, text_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., adapter size] → [..., H]."""
        return self.linear_1(x)
