"""The meaning of mixture-of-experts dispatch, in numpy float64: the reference for every implementation of the op.

Written for reading, not for speed: one token, one expert at a time.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..quantisation import dequantise, fake_quantise
from .op import Attributes

Array = NDArray[np.float64]


def moe_dispatch(
    hidden: NDArray[np.floating],
    router_logits: NDArray[np.floating],
    gate_up: NDArray[Any],
    down: NDArray[Any],
    gate_up_scale: NDArray[np.float32] | None = None,
    down_scale: NDArray[np.float32] | None = None,
    hidden_scale: NDArray[np.float32] | None = None,
    activated_scale: NDArray[np.float32] | None = None,
    *,
    attributes: Attributes,
) -> Array:
    """Sends each token through its experts; see `op` for the shapes. Returns output [T, H]."""
    hidden_TH, logits_TE = hidden.astype(np.float64), router_logits.astype(np.float64)
    output_TH = np.zeros_like(hidden_TH)
    for token, chosen in zip(*chosen_experts(logits_TE, attributes.top_k), strict=True):
        expert = chosen - attributes.first_expert
        if not 0 <= expert < len(gate_up):
            continue
        expert_input_H = hidden_TH[token] * sigmoid(logits_TE[token, chosen])
        gate_up_2I = product(expert_input_H, expert, gate_up, gate_up_scale, hidden_scale, attributes)
        gate_I, up_I = np.split(gate_up_2I, 2)
        output_TH[token] += product(up_I * silu(gate_I), expert, down, down_scale, activated_scale, attributes)
    return output_TH


def product(
    x_K: Array,
    expert: int,
    weight: NDArray[Any],
    weight_scale: NDArray[np.float32] | None,
    x_scale_E: NDArray[np.float32] | None,
    attributes: Attributes,
) -> Array:
    """One expert's linear, [K] → [N]: of weights [E, K, N], or of quantised ones [E, N, K] and so its input."""
    if weight_scale is None:
        return x_K @ weight[expert].astype(np.float64)
    x_scale = None if x_scale_E is None else float(x_scale_E[expert])
    x_K = fake_quantise(x_K[None], x_scale, attributes.quantisation, attributes.activation_bound)[0]
    return dequantise(weight[expert], weight_scale[expert]) @ x_K


def chosen_experts(logits_TE: Array, top_k: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """The pairs (token, expert) of the routing; of equal logits the lower expert is taken first."""
    experts_TK = np.argsort(-logits_TE, axis=1, kind="stable")[:, :top_k]
    tokens_TK = np.broadcast_to(np.arange(len(logits_TE))[:, None], experts_TK.shape)
    return tokens_TK.ravel(), experts_TK.ravel()


def sigmoid(x: Array) -> Array:
    """The logistic function."""
    return np.asarray(1 / (1 + np.exp(-x)))


def silu(x: Array) -> Array:
    """The sigmoid-weighted linear unit, x * sigmoid(x)."""
    return x * sigmoid(x)
