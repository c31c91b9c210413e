"""An EAGLE-3 head under training: one layer that goes on from its own states for some steps.

The method is that of Li et al. (2025, arXiv:2503.01840). Enters: a frozen model's hidden states and the tokens behind
them. Leaves: logits of the tokens after the next, one prediction for each step that the head goes on alone. Its
parameters have the names that the `speculators` library gives them, so that its state is the file that is written.

Shapes: R rows, S slots, W width of the model's states side by side, H the head's, D of one of its attention heads.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True, kw_only=True, slots=True)
class Geometry:
    """The head's sizes.

    Attributes:
        hidden: Its width, that of the model, whose embedding it reads.
        states: Width of the model's states side by side.
        heads: Query heads.
        kv_heads: Key and value heads.
        head_dim: Width of each.
        mlp: Width of the feed-forward.
        vocabulary: Tokens that it guesses among.
        eps: Epsilon of the norms.
        theta: Base of the rotation.
    """

    hidden: int
    states: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    vocabulary: int
    eps: float
    theta: float


class Head(nn.Module):
    """The head; its layer is a Llama's whose attention reads embedding and state side by side.

    Args:
        geometry: Its sizes.
    """

    def __init__(self, geometry: Geometry) -> None:
        super().__init__()
        own, hidden = geometry, geometry.hidden
        self.geometry = geometry
        self.input_norm = nn.RMSNorm(own.states, own.eps)
        self.fc = nn.Linear(own.states, hidden, bias=False)
        self.layers = nn.ModuleList([Layer(own)])
        self.norm = nn.RMSNorm(hidden, own.eps)
        self.lm_head = nn.Linear(hidden, own.vocabulary, bias=False)
        exponents = torch.arange(0, own.head_dim, 2) / own.head_dim
        self.register_buffer("frequencies", own.theta**-exponents, persistent=False)

    def forward(self, embedded: Tensor, states: Tensor, first: int, steps: int) -> list[Tensor]:
        """Logits of chains that begin in each slot from `first` on.

        A slot holds a token's embedding beside the model's state of the token before it. A chain's step reads the next
        slot's token beside the state that the step before left, and attends to the slots up to its first and to its own
        further ones, as when tokens are guessed.

        Args:
            embedded: Embeddings [R, S, H], each of the token after that of the state in its slot.
            states: The model's states [R, S, W].
            first: The first slot in which a chain begins.
            steps: Predictions of each chain; those at the end of a row, whose tokens the row has not, are left out.

        Returns:
            For each step the logits [R, S - first - step, V'].
        """
        x = self.fc(self.input_norm(states)).float()  # the sums of a layer stay of float32
        layer: Layer = self.layers[0]
        length, found, own = states.shape[1], list[Tensor](), list[tuple[Tensor, Tensor]]()
        keys, values = self._keys(layer, layer.read(embedded, x), 0)
        for step in range(steps):
            count = length - first - step
            x = x[:, first:] if step == 0 else x[:, :count]
            inputs = layer.read(embedded[:, first + step :], x)
            if step:
                own = [(k[:, :, :count], v[:, :, :count]) for k, v in own]
                own.append(self._keys(layer, inputs, first + step))
            query = self._turned(layer.query(inputs), first + step)
            x = layer.after(x, attend(query, keys, values, own, first))
            found.append(self.lm_head(self.norm(x)))
        return found

    def _keys(self, layer: "Layer", inputs: Tensor, start: int) -> tuple[Tensor, Tensor]:
        return self._turned(layer.key(inputs), start), layer.value(inputs)

    def _turned(self, x: Tensor, start: int) -> Tensor:
        """Rotary positions from `start` on: the first half of dims turns with the second, as Llama's do."""
        angles = torch.arange(start, start + x.shape[2])[:, None] * self.frequencies
        left, right = x.chunk(2, -1)
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([left * cos - right * sin, right * cos + left * sin], -1)


class Layer(nn.Module):
    """The head's layer, under the names of Llama's parameters."""

    def __init__(self, geometry: Geometry) -> None:
        super().__init__()
        own, hidden = geometry, geometry.hidden
        self.geometry = geometry

        def linear(width: int, out: int) -> nn.Linear:
            return nn.Linear(width, out, bias=False)

        for name in ("hidden_norm", "input_layernorm", "post_attention_layernorm"):
            self.add_module(name, nn.RMSNorm(hidden, own.eps))
        kv = own.kv_heads * own.head_dim
        self.self_attn = nn.ModuleDict(
            {
                "q_proj": linear(2 * hidden, own.heads * own.head_dim),
                "k_proj": linear(2 * hidden, kv),
                "v_proj": linear(2 * hidden, kv),
                "o_proj": linear(own.heads * own.head_dim, hidden),
            }
        )
        self.mlp = nn.ModuleDict(
            {
                "gate_proj": linear(hidden, own.mlp),
                "up_proj": linear(hidden, own.mlp),
                "down_proj": linear(own.mlp, hidden),
            }
        )

    def read(self, embedded: Tensor, x: Tensor) -> Tensor:
        """The input of queries, keys and values."""
        return torch.cat([self.input_layernorm(embedded), self.hidden_norm(x)], -1)

    def query(self, inputs: Tensor) -> Tensor:
        """Queries [R, heads, S, D]."""
        return self._split(self.self_attn["q_proj"](inputs))

    def key(self, inputs: Tensor) -> Tensor:
        """Keys [R, heads, S, D], each repeated for the queries that share it."""
        return self._shared(self.self_attn["k_proj"](inputs))

    def value(self, inputs: Tensor) -> Tensor:
        """Values likewise."""
        return self._shared(self.self_attn["v_proj"](inputs))

    def after(self, x: Tensor, attended: Tensor) -> Tensor:
        """The layer's output from its input and what attention found."""
        x = x + self.self_attn["o_proj"](attended.transpose(1, 2).flatten(2))
        y = self.post_attention_layernorm(x)
        return x + self.mlp["down_proj"](functional.silu(self.mlp["gate_proj"](y)) * self.mlp["up_proj"](y))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.geometry.head_dim)).transpose(1, 2)

    def _shared(self, x: Tensor) -> Tensor:
        return self._split(x).repeat_interleave(self.geometry.heads // self.geometry.kv_heads, 1)


def attend(query: Tensor, keys: Tensor, values: Tensor, own: list[tuple[Tensor, Tensor]], first: int) -> Tensor:
    """Attention of chains: each query sees all slots up to its chain's first, and its chain's own further keys.

    Args:
        query: A query of each chain [R, heads, chains, D].
        keys: Keys of all slots [R, heads, S, D].
        values: Their values.
        own: Keys and values of each further step, one for each chain.
        first: The slot in which the first chain begins.
    """
    count, scale = query.shape[2], 1 / math.sqrt(query.shape[3])
    places = torch.arange(keys.shape[2])
    hidden = places[None] > torch.arange(first, first + count)[:, None]
    scores = (query @ keys.transpose(2, 3) * scale).masked_fill(hidden, -torch.inf)
    scores = torch.cat([scores, *((query * key).sum(-1, keepdim=True) * scale for key, _ in own)], -1)
    weights = scores.softmax(-1)
    attended = weights[..., : len(places)] @ values
    for index, (_, value) in enumerate(own):
        attended = attended + weights[..., len(places) + index, None] * value
    return attended
