"""What mixture-of-experts dispatch means, in numpy float64: the reference for every implementation of the op.

Written for reading, not for speed: one token, one expert at a time.
"""

import numpy as np
from numpy.typing import NDArray

from .op import Attributes

Array = NDArray[np.float64]


def moe_dispatch(
    hidden: NDArray[np.floating],
    router_logits: NDArray[np.floating],
    gate_up: NDArray[np.floating],
    down: NDArray[np.floating],
    attributes: Attributes,
) -> Array:
    """Sends each token through its experts; see `op` for the shapes. Returns output [T, H]."""
    hidden_TH, logits_TE = hidden.astype(np.float64), router_logits.astype(np.float64)
    output_TH = np.zeros_like(hidden_TH)
    for token, expert in zip(*chosen_experts(logits_TE, attributes.top_k), strict=True):
        expert_input_H = hidden_TH[token] * sigmoid(logits_TE[token, expert])
        gate_I, up_I = np.split(expert_input_H @ gate_up[expert].astype(np.float64), 2)
        output_TH[token] += (up_I * silu(gate_I)) @ down[expert].astype(np.float64)
    return output_TH


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
