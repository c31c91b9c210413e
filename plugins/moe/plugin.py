"""Mixture-of-experts dispatch as a TensorRT plugin: the inputs it has, the types it takes, its plan of kernels."""

from collections.abc import Mapping, Sequence
from typing import Any

from ..launch import Buffer, Launch
from ..tensorrt_plugin import PluginOp, Tensor
from . import op
from .kernel_geometry import Geometry, group_of
from .op import Attributes
from .plan import MODULE, Plan

STORED = {"int8": "i8", "fp8": "fp8e4nv", "int4": "i4"}


def inputs_of(attributes: Attributes, count: int) -> tuple[str, ...]:
    """Names of a node's inputs."""
    names = op.INPUTS if attributes.quantisation == "none" else op.INPUTS + op.WEIGHT_SCALES
    return names if count == len(names) else names + op.ACTIVATION_SCALES


def accepts(attributes: Attributes, types: Sequence[str]) -> bool:
    """Whether the kernels take inputs of these types; later ones may be missing. int4 scales may be as tokens."""
    if types[0] not in ("bf16", "fp16"):
        return False
    weights = STORED.get(attributes.quantisation, types[0])
    narrow = attributes.quantisation == "int4" and len(types) > 4 and types[4] == types[0]
    expected = (types[0], types[0], weights, weights, *[types[0] if narrow else "fp32"] * 2, "fp32", "fp32")
    return all(found == wanted for found, wanted in zip(types, expected, strict=False))


class Call:
    """The op over tensors of one set of types."""

    def __init__(self, attributes: Attributes, tensors: Sequence[Tensor], capability: int) -> None:
        self.names = inputs_of(attributes, len(tensors))
        hidden, router_logits, gate_up, down, *scales = tensors
        quantised, group = attributes.quantisation != "none", 0
        if attributes.quantisation == "int4":
            axis = 2 if scales[0].dtype == "fp32" else 1  # in 16 bits they are turned
            group = group_of(
                [(each.shape[2], scale.shape[axis]) for each, scale in zip(tensors[2:4], scales[:2], strict=True)]
            )
        geometry = Geometry(
            hidden=hidden.shape[1],
            expert_size=down.shape[2 if quantised else 1],
            experts=router_logits.shape[1],
            local_experts=gate_up.shape[0],
            first_expert=attributes.first_expert,
            attributes=attributes,
            dtype=hidden.dtype,
            group=group,
            scale=scales[0].dtype if group else "fp32",
            static=len(scales) == 4,
        )
        self.plan = Plan(geometry, capability)
        self.kernels = self.plan.kernels

    def workspace(self, tensors: Sequence[Tensor]) -> dict[str, Buffer]:
        """Scratch memory for T tokens."""
        return self.plan.workspace(tensors[0].shape[0])

    def largest_workspace(self, tensors: Sequence[Tensor]) -> dict[str, Buffer]:
        """Scratch memory that is enough for every call of up to T tokens."""
        return self.workspace(tensors)

    def launches(self, pointers: Mapping[str, Any], tensors: Sequence[Tensor]) -> list[Launch]:
        """The kernels for T tokens, in order."""
        return self.plan.launches(pointers, tensors[0].shape[0])


PLUGIN = PluginOp(
    name=op.NAME,
    settings=Attributes,
    outputs=op.OUTPUTS,
    like=(0,),
    in_place=(-1,),
    accepts=accepts,
    call=Call,
    kernels=MODULE,
    varying=((0,), (0,)),
)
