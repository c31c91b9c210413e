"""The rules by which a canonical graph's linears, experts among them, are lowered for ONNX Runtime's CPU.

Enters: how a linear is quantised. Leaves: its rule, which `cpu_lowering` carries out. Invariant: each has exactly one.

    rule  format of the weight   input's scale    lowered to                            weight lies in
    1     int8                   a token's own    kernel `Linear`, blocks of 32 inputs  panels, 8 bits
    2     int8                   static           kernel `Linear`, the static scale     panels, 8 bits
    3     int4                   none             kernel `Linear`, blocks of 32 inputs  panels, 4 bits
    4     fp8                    either           kernel `Fp8Linear`                    rows, as it is stored
    5     a float                none             kernel `PlainLinear`                  rows, as it is stored
    6     experts, int8 or int4  any              kernel `MoeDispatch`                  panels, 8 or 4 bits
    7     experts, fp8           either           kernel `Fp8MoeDispatch`               rows, as they are stored
    8     experts, a float       none             kernel `PlainMoeDispatch`             rows, as they are stored

Where any of a graph's weights is int8 or int4 (rules 1 to 3 and 6) its bundle has a file of its own for all weights.
"""

from enum import Enum

from ..plugins.linear import Linear
from ..spec.types import Stored

INTEGERS: dict[str, Stored] = {"int4": "uint4", "int8": "uint8"}
"""Formats that the CPU's own kernels multiply as integers, and the unsigned type that panels hold each in."""


class Rule(Enum):
    """The rules, by their numbers in the table."""

    INT8_OWN_SCALES = 1
    """The kernel rounds activations itself, each 32 inputs by their own scale: finer than the graph's scale a token,
    whose nodes, the division and the multiplication behind the product among them, are left out."""
    INT8_STATIC = 2
    """The kernel rounds activations by the graph's static scale."""
    INT4 = 3
    """The kernel rounds activations to int8, each 32 inputs (or fewer, within a group) by their own scale."""
    FP8 = 4
    """The kernel rounds activations to E4M3 by the graph's static scale, or a token's own, whose nodes go."""
    FLOAT = 5
    """The weight [N, K] is multiplied as it lies, in any type of floats: it is a view of the file."""
    INTEGER_EXPERTS = 6
    """One node for all experts; activations are rounded as in rules 1 to 3."""
    FP8_EXPERTS = 7
    """One node for all experts, stacked [E, N, K] as in the file; activations are rounded as in rule 4."""
    FLOAT_EXPERTS = 8
    """One node for all experts, stacked [E, K, N] as in the file; those that no token chose are not read."""


def rule_of_quantised(linear: Linear) -> Rule:
    """The rule of a quantised linear: 1 to 4."""
    match linear.kind:
        case "int8":
            return Rule.INT8_STATIC if linear.own_scale is None else Rule.INT8_OWN_SCALES
        case "int4":
            return Rule.INT4
        case _:
            return Rule.FP8


def rule_of_experts(quantisation: str) -> Rule:
    """The rule of a layer of experts by the format of its weights: 6 to 8."""
    if quantisation in INTEGERS:
        return Rule.INTEGER_EXPERTS
    return Rule.FLOAT_EXPERTS if quantisation == "none" else Rule.FP8_EXPERTS
