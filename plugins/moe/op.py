"""Mixture-of-experts dispatch as one op of domain `arriero`: its name, attributes, inputs and outputs.

Each token goes to the `top_k` experts with the largest router logits. What an expert sees is the token times the
sigmoid of its logit: the score multiplies the *input*, and nothing is renormalised. SwiGLU is not homogeneous, so
scaling the output instead would be another model. The outputs of a token's experts are added.

Quantised experts have their stored weights and scales as inputs. They lie with outputs in front, as a linear's do: the
matrix instructions of GPUs take 8-bit operands so, and checkpoints that are quantised already store them so. In `int8`
and `fp8` the expert's input (after the score) and its activated intermediate are quantised too, statically where their
scales are given, else each token by its own absolute maximum. In `int4` only the weights are.

A node may hold some of the experts only: those from `first_expert` on, E' of the router's E. What the routing sends to
the others adds nothing, so the outputs of the nodes that hold all experts between them add up to the whole op's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the runtime takes attributes, and has no need of what quantises
    from ..quantisation import Kind

DOMAIN = "arriero"
NAME = "MoeDispatch"
VERSION = 1

INPUTS = ("hidden", "router_logits", "gate_up", "down")
"""hidden [T, H]; router_logits [T, E]; gate_up [E, H, 2I], the gate's columns first; down [E, I, H]. Quantised experts'
are gate_up [E, 2I, H], the gate's rows first, and down [E, H, I]; two values of `int4` in a byte are two inputs' of one
output. Where a node holds some of the experts, E is E' in the weights and in every scale."""

WEIGHT_SCALES = ("gate_up_scale", "down_scale")
"""float32 [E, 2I, H / block] and [E, H, I / block]: one scale an output and block of its inputs. The block is all
inputs in `int8` and `fp8`, the group size in `int4`."""

ACTIVATION_SCALES = ("hidden_scale", "activated_scale")
"""float32 [E] each: of what expert e takes in, after the score, and of what its down projection takes in. Absent where
each token is quantised by its own scale."""

OUTPUTS = ("output",)
"""output [T, H]."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Attributes:
    """The attributes of one `MoeDispatch` node.

    Attributes:
        top_k: Experts a token is sent to.
        activation: The gate's activation function; Llama 4 knows `silu` only.
        quantisation: How the experts' weights are stored: `none`, `int8`, `fp8` (E4M3) or `int4`.
        first_expert: The router's number of the first expert whose weights are given.
        activation_bound: The largest magnitude that a token's own scale is chosen for: what is larger saturates. 0 is
            none.
    """

    top_k: int
    activation: str = "silu"
    quantisation: Kind = "none"
    first_expert: int = 0
    activation_bound: float = 0.0

    def __post_init__(self) -> None:
        assert self.top_k >= 1
        assert self.activation == "silu"
        assert self.quantisation in ("none", "int8", "fp8", "int4")
        assert self.first_expert >= 0
        assert self.activation_bound >= 0
