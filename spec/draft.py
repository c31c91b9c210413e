"""The geometry of an EAGLE-3 head, which drafts tokens for a decoder to verify. Standard library only.

The head reads a token's embedding beside hidden states of the decoder, and guesses the token after the next (Li et al.
2025, arXiv:2503.01840).
"""

from dataclasses import dataclass
from typing import Literal

from ..errors import shortened
from .geometry import MOST_LAYERS, LayerSpec, ModelSpec, RopeScaling
from .sizes import check_positive, check_sizes
from .types import DType

DRAFT_PREFIX = "draft-"
"""Beginning of the names of a head's weight files, which lie beside the checkpoint's."""

DRAFT_TOKENS = "draft_tokens.safetensors"
"""The file in a folder that says which of the model's tokens each of a head's own stands for: `tokens`, int64."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DraftSpec:
    """The geometry of an EAGLE-3 head.

    Attributes:
        vocab_size: Tokens that it can guess; where they are fewer than the model's, `draft_tokens.safetensors` beside
            the graph says which.
        hidden_size: Width of its own hidden states.
        layers: Number of its layers, all of full attention.
        heads: Query heads.
        kv_heads: Key and value heads.
        head_dim: Width of a head.
        mlp_size: Width of the feed-forward.
        norm_eps: Epsilon of the RMS norms.
        rope_theta: Base of the rotation's frequencies.
        rope_scaling: Scaling of these frequencies; None leaves them.
        states: The decoder's hidden states that it reads, each by the number of layers that they have been through.
        input_norm: Whether these are normalised: not at all, side by side as a `whole`, or `each`.
        norm_before_residual: Whether the residual of the first layer starts from normalised states.
        norm_output: Whether its next token goes on from normalised states.
        dtype: Type of its weights.
    """

    vocab_size: int
    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_size: int
    norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None = None
    states: tuple[int, ...]
    input_norm: Literal["none", "whole", "each"] = "none"
    norm_before_residual: bool = False
    norm_output: bool = False
    dtype: DType

    def __post_init__(self) -> None:
        check_sizes(self, ("vocab_size", "hidden_size", "heads", "kv_heads", "head_dim", "mlp_size"))
        check_sizes(self, ("layers",), 1, MOST_LAYERS)
        check_positive(self, ("rope_theta",))
        if self.heads % self.kv_heads or self.head_dim % 2:
            raise ValueError("the draft's sizes do not fit together")
        in_range = all(0 <= state <= MOST_LAYERS for state in self.states)
        if not self.states or len(set(self.states)) < len(self.states) or not in_range:
            raise ValueError(f"the draft's states are {shortened(list(self.states))}, expected numbers of layers, once")

    def check_decoder(self, model: ModelSpec) -> None:
        """Refuses a head that cannot be this decoder's.

        Raises:
            ValueError: It reads states of layers, or guesses tokens, that the decoder does not have.
        """
        if max(self.states) > len(model.layers):
            raise ValueError(f"the draft reads states behind layer {max(self.states)} of {len(model.layers)}")
        if self.vocab_size > model.vocab_size:
            raise ValueError(f"the draft guesses {self.vocab_size} tokens, the model has {model.vocab_size}")

    def as_model(self, max_positions: int) -> ModelSpec:
        """The head as a decoder with this number of positions, for whoever counts caches and layers."""
        layer = LayerSpec(rope=True, chunk=0, experts=False)
        return ModelSpec(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            layers=(layer,) * self.layers,
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            experts=0,
            experts_per_token=0,
            expert_size=0,
            dense_size=self.mlp_size,
            norm_eps=self.norm_eps,
            qk_norm=False,
            rope_theta=self.rope_theta,
            rope_scaling=self.rope_scaling,
            max_positions=max_positions,
            temperature_scale=0.0,
            temperature_floor=1.0,
            dtype=self.dtype,
        )
