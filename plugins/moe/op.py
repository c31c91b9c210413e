"""Mixture-of-experts dispatch as one op of domain `arriero`: its name, attributes, inputs and outputs.

Each token goes to the `top_k` experts with the largest router logits. What an expert sees is the token times the
sigmoid of its logit: the score multiplies the *input*, and nothing is renormalised. SwiGLU is not homogeneous, so
scaling the output instead would be another model. The outputs of a token's experts are added.
"""

from dataclasses import dataclass

DOMAIN = "arriero"
NAME = "MoeDispatch"
VERSION = 1

INPUTS = ("hidden", "router_logits", "gate_up", "down")
"""hidden [T, H]; router_logits [T, E]; gate_up [E, H, 2I], the gate's columns first; down [E, I, H]."""

OUTPUTS = ("output",)
"""output [T, H]."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Attributes:
    """The attributes of one `MoeDispatch` node.

    Attributes:
        top_k: Experts a token is sent to.
        activation: The gate's activation function; Llama 4 knows `silu` only.
    """

    top_k: int
    activation: str = "silu"

    def __post_init__(self) -> None:
        assert self.top_k >= 1
        assert self.activation == "silu"
