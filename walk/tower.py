"""The vision tower walked layer by layer over tiles, each tensor in float32 and read when it is needed.

Enters: a model's stored tensors, and tiles or hidden states. Leaves: the next layer's hidden states, and on the way
every product's input, given to an observer; at the end the image features. As in `walk.decoder`, memory holds one
linear at a time besides the hidden states, which may be mapped files.

Shapes: as in `export.llama4_tower`; hidden states are [N, S, C].
"""

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, linear

from ..export.llama4_tower import NORM_EPS, attend_patches, rotate_patches, shuffle_patches, split_patches, turns
from ..spec.choice import ADAPTER, PATCHES, PROJECTOR
from ..spec.geometry import VISION_LAYERS, VisionSpec
from .accelerator import HOST, to_host
from .decoder import TOKENS, Hidden, Observe, ignore
from .numbers import Weights

Pixels = NDArray[np.float32] | NDArray[np.float16]
"""Tiles [N, 3, P, P], normalised."""


def each_patches(
    vision: VisionSpec, pixels_N3PP: Pixels, device: torch.device = HOST
) -> Iterator[tuple[slice, Tensor]]:
    """The places of some tiles at a time, and their patches [N, S - 1, 3·side²] in float32."""
    for part in _parts(vision, len(pixels_N3PP)):
        yield part, split_patches(torch.from_numpy(pixels_N3PP[part].astype(np.float32)).to(device), vision)


def embed_tiles(vision: VisionSpec, weights: Weights, pixels_N3PP: Pixels, out: Hidden) -> None:
    """Writes the first layer's input."""
    linear_weight, last, places = (
        weights.wide(name)
        for name in (f"{PATCHES}.weight", "vision_model.class_embedding", "vision_model.positional_embedding_vlm")
    )
    for part, patches in each_patches(vision, pixels_N3PP, weights.device):
        tokens = torch.cat([linear(patches, linear_weight), last.expand(len(patches), 1, -1)], dim=1)
        out[part] = to_host(normed(weights, "vision_model.layernorm_pre", tokens + places))


class TowerLayerWalk:
    """One layer's way, in two steps: `attend`, then `feed`.

    Args:
        vision: Geometry.
        index: Which layer.
        weights: Where its tensors are read from.
        attended: Hidden states behind the attention's residual; written by `attend`, read by `feed`.
        out: The layer's output; written by `feed`.
    """

    def __init__(self, vision: VisionSpec, index: int, weights: Weights, attended: Hidden, out: Hidden) -> None:
        self.vision, self.weights = vision, weights
        self.prefix = f"{VISION_LAYERS}{index}."
        self.attended, self.out = attended, out

    def weight(self, name: str) -> Tensor:
        """One of the layer's tensors in float32."""
        return self.weights.wide(self.prefix + name)

    def run(self, x: Hidden, observe: Observe = ignore) -> None:
        """Both steps."""
        self.attend(x, observe)
        self.feed(observe)

    def attend(self, x: Hidden, observe: Observe = ignore) -> None:
        """Norm, attention and residual; observes `attention_input` and `attention_output`, [N·S, C]."""
        cos_SP, sin_SP = (turn.to(self.weights.device) for turn in turns(self.vision))
        heads = self.vision.heads
        for part in _parts(self.vision, len(x)):
            x_NSC = self.weights.place(x[part])
            normed_NSC = normed(self.weights, f"{self.prefix}input_layernorm", x_NSC)
            observe("attention_input", normed_NSC.flatten(0, 1))
            query, key, value = (self._linear(f"self_attn.{name}_proj", normed_NSC) for name in "qkv")
            query, key = (rotate_patches(turned, cos_SP, sin_SP, heads) for turned in (query, key))
            attended = attend_patches(query, key, value, heads)
            observe("attention_output", attended.flatten(0, 1))
            self.attended[part] = to_host(x_NSC + self._linear("self_attn.o_proj", attended))

    def feed(self, observe: Observe = ignore) -> None:
        """Norm, feed-forward and residual; observes `feed_input` and `down_input`."""
        for part in _parts(self.vision, len(self.attended)):
            x_NSC = self.weights.place(self.attended[part])
            normed_NSC = normed(self.weights, f"{self.prefix}post_attention_layernorm", x_NSC)
            observe("feed_input", normed_NSC.flatten(0, 1))
            activated = gelu(self._linear("mlp.fc1", normed_NSC))
            observe("down_input", activated.flatten(0, 1))
            self.out[part] = to_host(x_NSC + self._linear("mlp.fc2", activated))

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return linear(x, self.weight(f"{name}.weight"), self.weight(f"{name}.bias"))


def project(
    vision: VisionSpec, weights: Weights, x: Hidden, out: NDArray[np.float32], observe: Observe = ignore
) -> None:
    """Writes the image features [M, H] of the last layer's output.

    Observes `adapter_input`, `adapter_middle` and `projector_input`, [M, K] each.
    """
    fc1, fc2, projector = (weights.wide(f"{name}.weight") for name in (*ADAPTER, PROJECTOR))
    for part in _parts(vision, len(x)):
        normed_NSC = normed(weights, "vision_model.layernorm_post", weights.place(x[part]))
        squares = shuffle_patches(normed_NSC[:, :-1], vision).flatten(0, 1)
        observe("adapter_input", squares)
        middle = gelu(linear(squares, fc1))
        observe("adapter_middle", middle)
        features = gelu(linear(middle, fc2))
        observe("projector_input", features)
        start = part.start * vision.features
        out[start : start + len(features)] = to_host(linear(features, projector))


def encode_tiles(vision: VisionSpec, weights: Weights, pixels_N3PP: Pixels) -> NDArray[np.float32]:
    """The image features [M, H] of tiles whose hidden states fit in memory."""
    x, attended, out = (
        np.empty((len(pixels_N3PP), vision.positions, vision.hidden_size), np.float32) for _ in range(3)
    )
    embed_tiles(vision, weights, pixels_N3PP, x)
    for index in range(vision.layers):
        TowerLayerWalk(vision, index, weights, attended, out).run(x)
        x, out = out, x
    _, region = weights.region(f"{PROJECTOR}.weight")
    features = np.empty((len(x) * vision.features, region.shape[0]), np.float32)
    project(vision, weights, x, features)
    return features


def _parts(vision: VisionSpec, tiles: int) -> Iterator[slice]:
    """Some tiles at a time."""
    at_once = max(1, TOKENS // vision.positions)
    return (slice(start, start + at_once) for start in range(0, tiles, at_once))


def normed(weights: Weights, name: str, x: Tensor) -> Tensor:
    """One of the tower's layer norms of [..., C]."""
    return layer_norm(x, x.shape[-1:], weights.wide(f"{name}.weight"), weights.wide(f"{name}.bias"), NORM_EPS)
