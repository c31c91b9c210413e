"""Grouped-query attention as a TensorRT plugin: the inputs it has, the types it takes, its plan of kernels.

The caches are updated in place: the plugin's present outputs are its past inputs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..launch import Buffer, Launch
from ..tensorrt_plugin import PluginOp, Tensor
from . import op
from .op import Attributes
from .plan import MODULE, STORED, Geometry, Plan

CACHES = {triton_type: kind for kind, triton_type in STORED.items()}
"""Kinds of quantised caches, by their types in Triton's words."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings(Attributes):
    """The op's attributes, and whether there is `inv_freq`: TensorRT has no absent inputs between others.

    Attributes:
        rope: 1 where queries and keys are rotated.
        width: Q·D where query, key and value are each given the projection [B, S, (Q+2K)·D] of all three; else 0.
    """

    rope: int
    width: int = 0


def inputs_of(settings: Settings, count: int) -> tuple[str, ...]:
    """Names of a node's inputs."""
    names = op.INPUTS if settings.rope else op.INPUTS[:-1]
    return names if count == len(names) else names + op.CACHE_SCALES


def accepts(settings: Settings, types: Sequence[str]) -> bool:
    """Whether the kernels take inputs of these types; later inputs may be missing."""
    if types[0] not in ("bf16", "fp16"):
        return False
    stored = types[3] if len(types) > 3 and types[3] in CACHES else types[0]
    expected = (*[types[0]] * 3, stored, stored, "i32", *["fp32"] * 3)
    return all(found == wanted for found, wanted in zip(types, expected, strict=False))


class Call:
    """The op over tensors of one set of types."""

    def __init__(self, settings: Settings, tensors: Sequence[Tensor], capability: int) -> None:
        self.names = inputs_of(settings, len(tensors))
        query, _, _, key_cache, *_ = tensors
        geometry = Geometry(
            attributes=settings,
            head_dim=key_cache.shape[3],
            rope=bool(settings.rope),
            dtype=query.dtype,  # type: ignore[arg-type]
            cache=CACHES.get(key_cache.dtype, "none"),  # type: ignore[arg-type]
            fused=settings.width > 0,
        )
        self.plan = Plan(geometry, capability)
        self.kernels = self.plan.kernels

    def workspace(self, tensors: Sequence[Tensor]) -> dict[str, Buffer]:
        """Scratch memory for a piece of S tokens in B rows over C slots."""
        return self.plan.workspace(*_sizes(tensors))

    def largest_workspace(self, tensors: Sequence[Tensor]) -> dict[str, Buffer]:
        """Scratch memory that is enough for every piece of up to these sizes."""
        return self.plan.largest_workspace(*_sizes(tensors))

    def launches(self, pointers: Mapping[str, Any], tensors: Sequence[Tensor]) -> list[Launch]:
        """The kernels for such a piece, in order."""
        return self.plan.launches(pointers, *_sizes(tensors))


def _sizes(tensors: Sequence[Tensor]) -> tuple[int, int, int]:
    batch, length, _ = tensors[0].shape
    return batch, length, tensors[3].shape[2]


PLUGIN = PluginOp(
    name=op.NAME,
    settings=Settings,
    outputs=op.OUTPUTS,
    like=(0, 3, 4),
    in_place=(-1, 3, 4),
    accepts=accepts,
    call=Call,
    kernels=MODULE,
    varying=((0, 1), (0, 1), (0, 1), (0,), (0,), (0,)),
    width=lambda settings: settings.width,
)
