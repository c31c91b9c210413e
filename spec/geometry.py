"""A model's geometry: that of its text decoder and of its vision tower. Standard library only."""

import dataclasses
import typing
from dataclasses import dataclass
from typing import Any, Self

from ..errors import shortened
from .fields import decode
from .sizes import MOST, check_positive, check_sizes
from .types import DType

VISION = ("vision_model.", "multi_modal_projector.")
"""Beginnings of the names of a vision tower's and projector's tensors."""

VISION_LAYERS = "vision_model.model.layers."
"""Beginning of the names of the tower's layers."""


MOST_LAYERS = 4096
"""Layers of a decoder or a vision tower at most."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeScaling:
    """Llama 3's frequency scaling, as Scout uses it (`rope_type: llama3`).

    Attributes:
        factor: Divisor of the low frequencies.
        low_freq_factor: Wavelengths above `original_max_positions` over this are low frequencies.
        high_freq_factor: Wavelengths below `original_max_positions` over this stay as they are; between the two the
            divisor goes smoothly from 1 to `factor`.
        original_max_positions: Positions of the context that the model was first trained on.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int

    def __post_init__(self) -> None:
        check_positive(self, self.__slots__)


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerSpec:
    """The kind of one decoder layer.

    Attributes:
        rope: Whether queries and keys are rotated; a NoPE layer has its temperature tuned instead.
        chunk: Attention stays within chunks of this many positions; 0 is full attention.
        experts: Whether the feed-forward is a mixture of experts.
    """

    rope: bool
    chunk: int
    experts: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSpec:
    """The geometry of a Llama 4 text decoder, in the words of its `config.json`.

    Attributes:
        vocab_size: Tokens of the vocabulary (V).
        hidden_size: Width of the hidden states (H).
        layers: The decoder layers, in order.
        heads: Query heads (Q).
        kv_heads: Key and value heads (K).
        head_dim: Width of a head (D).
        experts: Routed experts of a layer that has some (E); 0 in a model without.
        experts_per_token: Experts that each token is sent to (top-k); 0 in a model without.
        expert_size: Width of one expert and of the shared expert (I).
        dense_size: Width of the feed-forward in layers without experts.
        norm_eps: Epsilon of the RMS norms.
        qk_norm: Whether rotated queries and keys are normalised.
        rope_theta: Base of the rotation's frequencies.
        rope_scaling: Scaling of these frequencies; None leaves them.
        max_positions: Positions of the context.
        temperature_scale: Strength of the NoPE layers' temperature tuning; 0 is none.
        temperature_floor: Positions per step of that tuning.
        tied_embeddings: Whether the LM head is the embedding.
        dtype: Type of the weights and of the graph's floats.
    """

    vocab_size: int
    hidden_size: int
    layers: tuple[LayerSpec, ...]
    heads: int
    kv_heads: int
    head_dim: int
    experts: int
    experts_per_token: int
    expert_size: int
    dense_size: int
    norm_eps: float
    qk_norm: bool
    rope_theta: float
    rope_scaling: RopeScaling | None = None
    max_positions: int
    temperature_scale: float
    temperature_floor: float
    tied_embeddings: bool = False
    dtype: DType

    def __post_init__(self) -> None:
        check_sizes(self, ("vocab_size", "hidden_size", "heads", "kv_heads", "head_dim", "max_positions"))
        check_sizes(self, ("experts", "experts_per_token", "expert_size", "dense_size"), 0)
        check_positive(self, ("rope_theta", "temperature_floor"))
        if self.heads % self.kv_heads or self.head_dim % 2 or not 0 < len(self.layers) <= MOST_LAYERS:
            raise ValueError("the model's sizes do not fit together")
        chunks = {layer.chunk for layer in self.layers} - {0}
        if not all(0 < chunk <= MOST for chunk in chunks):
            raise ValueError(f"the layers' chunks are {shortened(sorted(chunks))}, expected numbers from 1 to {MOST}")
        least = 1 if any(layer.experts for layer in self.layers) else 0
        if not least <= self.experts_per_token <= self.experts:
            raise ValueError(f"experts_per_token is {self.experts_per_token} of {self.experts} experts")

    @classmethod
    def from_fields(cls, fields: Any) -> Self:
        """Rebuilds what `dataclasses.asdict` made.

        Raises:
            ValueError: A field is missing, unknown, or of another type.
        """
        return typing.cast(Self, decode(cls, fields))

    @property
    def chunk(self) -> int:
        """Positions that no piece may cross: the chunk of the chunked layers, 0 where every layer is full."""
        return max((layer.chunk for layer in self.layers), default=0)


@dataclass(frozen=True, kw_only=True, slots=True)
class VisionSpec:
    """The geometry of a Llama 4 vision tower and its projector.

    Attributes:
        hidden_size: Width of the hidden states.
        layers: Number of layers.
        heads: Heads of its attention; each as wide as `hidden_size` over their number.
        mlp_size: Width of a layer's feed-forward.
        image_size: Pixels of a tile's side (P).
        patch_size: Pixels of a patch's side.
        shuffle: Patches a side that pixel shuffle makes one feature of.
        adapter_size: Width of the adapter's two linears.
        rope_theta: Base of the rotation by columns and rows.
        image_token: Id of the token whose embeddings the image features take the place of.
    """

    hidden_size: int
    layers: int
    heads: int
    mlp_size: int
    image_size: int
    patch_size: int
    shuffle: int
    adapter_size: int
    rope_theta: float
    image_token: int

    def __post_init__(self) -> None:
        check_sizes(self, ("hidden_size", "layers", "heads", "mlp_size", "adapter_size"))
        check_sizes(self, ("image_size", "patch_size", "shuffle"), 1, 2**16)
        check_sizes(self, ("image_token",), 0)
        check_positive(self, ("rope_theta",))
        if (
            not self.grid
            or self.hidden_size % self.heads
            or self.head_dim % 4
            or self.grid % self.shuffle
            or self.layers > MOST_LAYERS
        ):
            raise ValueError("the vision tower's sizes do not fit together")

    @property
    def head_dim(self) -> int:
        """Width of a head (D)."""
        return self.hidden_size // self.heads

    @property
    def grid(self) -> int:
        """Patches a side of a tile."""
        return self.image_size // self.patch_size

    @property
    def features(self) -> int:
        """Image features of a tile, and tokens that they take the place of."""
        return (self.grid // self.shuffle) ** 2

    @property
    def positions(self) -> int:
        """Patches of a tile and the class token (S)."""
        return self.grid**2 + 1

    @property
    def patch_values(self) -> int:
        """Values of a patch: its pixels in three colours."""
        return 3 * self.patch_size**2


def share_of(model: ModelSpec, parts: int, sharers: int) -> ModelSpec:
    """The geometry of a rank's part of a decoder.

    Args:
        model: The whole decoder.
        parts: Ranks that have heads and dense MLPs between them.
        sharers: Ranks that have an expert's width between them.
    """
    if parts == sharers == 1:
        return model
    return dataclasses.replace(
        model,
        heads=model.heads // parts,
        kv_heads=model.kv_heads // parts,
        dense_size=model.dense_size // parts,
        expert_size=model.expert_size // sharers,
    )
