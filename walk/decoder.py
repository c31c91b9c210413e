"""The decoder walked layer by layer over whole sequences, each tensor in float32 and read when it is needed.

Enters: a model's stored tensors and hidden states. Leaves: the next layer's hidden states, and on the way what every
product takes in, given to an observer. Memory holds one linear or one expert at a time besides the hidden states, which
may be mapped files; it does not grow with depth.

Shapes: W sequences ("windows") of S tokens each, T tokens (W·S), otherwise as in `export.llama4`.
"""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention, silu

from ..export.llama4 import attention_attributes, inverse_frequencies, rms_norm
from ..plugins.gqa.op import Attributes
from ..plugins.gqa.torch_op import prepare
from ..spec.geometry import ModelSpec
from .accelerator import HOST, to_host
from .numbers import Weights

TOKENS = 4096
"""Tokens that pass through a product at once."""

COLUMNS = 512
"""Columns of a weight that are widened at once."""

Hidden = NDArray[np.float32]
"""Hidden states [W, S, H], in memory or in a mapped file."""

Observe = Callable[[str, Tensor], None]
"""Called with the name of a product's input and its rows [N, K]."""


def ignore(name: str, x_NK: Tensor) -> None:
    """An observer that does nothing."""


def embed(
    weights: Weights,
    ids_WS: NDArray[np.int64],
    out: Hidden,
    image_token: int | None = None,
    features_MH: NDArray[np.float32] | None = None,
) -> None:
    """Writes the embeddings of token ids, with image features in the places of image tokens, in order."""
    table = weights.stored("embed_tokens.weight")
    taken = 0
    for window, ids_S in enumerate(ids_WS):
        out[window] = table[torch.from_numpy(ids_S)].float().numpy()
        if features_MH is not None:
            is_image_S = ids_S == image_token
            count = int(is_image_S.sum())
            out[window][is_image_S] = features_MH[taken : taken + count]
            taken += count


def open_head(spec: ModelSpec, weights: Weights) -> Callable[[Tensor], Tensor]:
    """Reads the last norm and the LM head once.

    Returns:
        The logits [N, V] of hidden states [N, H] behind the layers, both on the weights' device.
    """
    norm = weights.wide("norm.weight")
    head = weights.wide("embed_tokens.weight" if spec.tied_embeddings else "lm_head.weight")
    return lambda hidden_NH: linear(rms_norm(hidden_NH, norm, spec.norm_eps), head)


class LayerWalk:
    """One layer's way, in the steps in which its weights are needed: `attend`, `feed`, then `feed_expert` for each.

    Args:
        spec: Geometry.
        index: Which layer.
        weights: Where its tensors are read from.
        attended: Hidden states behind the attention's residual; written by `attend`, read by the other steps.
        out: The layer's output; written by `feed`, added to by `feed_expert`.
    """

    def __init__(self, spec: ModelSpec, index: int, weights: Weights, attended: Hidden, out: Hidden) -> None:
        self.spec, self.layer, self.weights = spec, spec.layers[index], weights
        self.prefix = f"layers.{index}."
        self.attended, self.out = attended, out
        self.router_logits_TE = torch.empty(0)

    def weight(self, name: str, index: int | None = None) -> Tensor:
        """One of the layer's tensors in float32."""
        return self.weights.wide(self.prefix + name, index)

    def factor(self, name: str, index: int | None = None) -> Tensor:
        """One of the layer's weights, or a part of a stacked one, on the device, as `Weights.factor` has it."""
        return self.weights.factor(self.prefix + name, index)

    def run(self, x: Hidden, observe: Observe = ignore) -> None:
        """All of the steps."""
        self.attend(x, observe)
        self.feed(observe)
        if self.layer.experts:
            for expert in range(self.spec.experts):
                gate_up, down = (
                    self.factor(f"feed_forward.experts.{name}_proj", expert) for name in ("gate_up", "down")
                )
                self.feed_expert(expert, gate_up, down, observe)

    def attend(self, x: Hidden, observe: Observe = ignore) -> None:
        """Norm, attention and residual of each window; observes the inputs of the products, the keys and the values.

        Keys and values are observed as the cache holds them, [N, K·D].
        """
        norm = self.weight("input_layernorm.weight")
        query_weight, key_weight, value_weight, output_weight = (
            self.factor(f"self_attn.{name}_proj.weight") for name in "qkvo"
        )
        inv_freq = inverse_frequencies(self.spec).to(self.weights.device) if self.layer.rope else None
        attributes = attention_attributes(self.spec, self.layer)
        at_once = max(1, TOKENS // x.shape[1])
        for start in range(0, len(x), at_once):
            hidden_WSH = self.weights.place(x[start : start + at_once])
            normed_WSH = rms_norm(hidden_WSH, norm, self.spec.norm_eps)
            observe("attention_input", normed_WSH.flatten(0, 1))
            attended_WSN, keys_WSN, values_WSN = attend_in_chunks(
                project(normed_WSH, query_weight),
                project(normed_WSH, key_weight),
                project(normed_WSH, value_weight),
                inv_freq,
                attributes,
            )
            for name, tensor in (("keys", keys_WSN), ("values", values_WSN), ("attention_output", attended_WSN)):
                observe(name, tensor.flatten(0, 1))
            self.attended[start : start + at_once] = to_host(hidden_WSH + project(attended_WSN, output_weight))

    def feed(self, observe: Observe = ignore) -> None:
        """The dense feed-forward, or the shared expert and the router, with the residual."""
        name = "feed_forward.shared_expert." if self.layer.experts else "feed_forward."
        gate, up, down = (self.factor(f"{name}{part}_proj.weight") for part in ("gate", "up", "down"))
        router = self.factor("feed_forward.router.weight") if self.layer.experts else None
        router_logits = []
        out_TH = self.out.reshape(-1, self.spec.hidden_size)
        for start, hidden_NH, normed_NH in self._normed_tokens():
            observe("feed_input", normed_NH)
            activated_NI = project(normed_NH, up) * silu(project(normed_NH, gate))
            observe("down_input", activated_NI)
            out_TH[start : start + len(hidden_NH)] = to_host(hidden_NH + project(activated_NI, down))
            if router is not None:
                router_logits.append(project(normed_NH, router).to(HOST))
        if router is not None:
            self.router_logits_TE = torch.cat(router_logits)

    def chosen(self) -> Tensor:
        """The experts of each token, [T, top_k]."""
        return self.router_logits_TE.topk(self.spec.experts_per_token, dim=1).indices

    def expert_inputs(self, expert: int, tokens_N: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """An expert's input: some of the tokens at a time, and their normed states times their scores [N, H]."""
        norm = self.weight("post_attention_layernorm.weight")
        attended_TH = self.attended.reshape(-1, self.spec.hidden_size)
        for part_N in tokens_N.split(TOKENS):
            normed_NH = rms_norm(self.weights.place(attended_TH[part_N.numpy()]), norm, self.spec.norm_eps)
            yield part_N, normed_NH * self.router_logits_TE[part_N, expert].sigmoid()[:, None].to(normed_NH.device)

    def feed_expert(
        self, expert: int, gate_up: Tensor, down: Tensor, observe: Observe = ignore, *, all_tokens: bool = False
    ) -> int:
        """Adds one expert's output for the tokens that chose it; observes its inputs.

        Args:
            expert: Its number.
            gate_up: Its weight [H, 2I], of any float type.
            down: Its weight [I, H], of any float type.
            observe: Called with the inputs of its products.
            all_tokens: Whether it sees every token, for the observer only.

        Returns:
            The tokens that chose it.
        """
        is_chosen_T = (self.chosen() == expert).any(dim=1)
        tokens_N = torch.arange(len(is_chosen_T)) if all_tokens else is_chosen_T.nonzero()[:, 0]
        out_TH = self.out.reshape(-1, self.spec.hidden_size)
        for part_N, expert_input_NH in self.expert_inputs(expert, tokens_N):
            observe("expert_input", expert_input_NH)
            gate_NI, up_NI = multiply(expert_input_NH, gate_up).chunk(2, dim=1)
            activated_NI = up_NI * silu(gate_NI)
            observe("expert_activated", activated_NI)
            theirs_N = is_chosen_T[part_N]
            out_TH[part_N[theirs_N].numpy()] += to_host(multiply(activated_NI[theirs_N.to(activated_NI.device)], down))
        return int(is_chosen_T.sum())

    def _normed_tokens(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        norm = self.weight("post_attention_layernorm.weight")
        attended_TH = self.attended.reshape(-1, self.spec.hidden_size)
        for start in range(0, len(attended_TH), TOKENS):
            hidden_NH = self.weights.place(attended_TH[start : start + TOKENS])
            yield start, hidden_NH, rms_norm(hidden_NH, norm, self.spec.norm_eps)


def walk_layer(spec: ModelSpec, index: int, weights: Weights, x: Hidden, observe: Observe = ignore) -> Hidden:
    """A layer's output for hidden states that fit in memory."""
    walk = LayerWalk(spec, index, weights, np.empty_like(x), np.empty_like(x))
    walk.run(x, observe)
    return walk.out


def project(x: Tensor, weight_MK: Tensor) -> Tensor:
    """A linear of states [..., K], its weight of any float type: [..., M]."""
    return multiply(x.flatten(0, -2), weight_MK.T).unflatten(0, x.shape[:-1])


def multiply(x_NK: Tensor, weight_KM: Tensor) -> Tensor:
    """A product in float32 with a weight of any float type, which is widened some columns at a time [N, M].

    Few rows take less time than memory for a whole widened weight, which the system must clear.
    """
    out_NM = torch.empty(len(x_NK), weight_KM.shape[1], device=x_NK.device)
    for start in range(0, weight_KM.shape[1], COLUMNS):
        some = slice(start, start + COLUMNS)
        torch.mm(x_NK, weight_KM[:, some].float(), out=out_NM[:, some])
    return out_NM


def attend_in_chunks(
    query: Tensor, key: Tensor, value: Tensor, inv_freq: Tensor | None, attributes: Attributes
) -> tuple[Tensor, Tensor, Tensor]:
    """Attends whole sequences [W, S, N·D], chunk by chunk, so that no [S, S] mask is ever made.

    Returns:
        Output [W, S, Q·D], and keys and values [W, S, K·D] as a cache holds them.
    """
    length = query.shape[1]
    positions = torch.arange(length, device=query.device)[None]
    query, key, value = prepare(query, key, value, positions, inv_freq, attributes)
    step = attributes.chunk or length
    outputs = [
        scaled_dot_product_attention(
            query[:, :, start : start + step],
            key[:, :, start : start + step],
            value[:, :, start : start + step],
            is_causal=True,
            scale=attributes.scale,
            enable_gqa=True,
        )
        for start in range(0, length, step)
    ]
    output, key, value = (x.transpose(1, 2).flatten(2) for x in (torch.cat(outputs, dim=2), key, value))
    return output, key, value
