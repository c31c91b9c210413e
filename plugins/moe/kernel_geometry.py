"""The sizes and types that fix the GPU kernels of mixture-of-experts dispatch. Standard library only.

Invariant: two geometries of one `name` need the same kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...errors import BuildError

if TYPE_CHECKING:
    from .op import Attributes

STORED = {"int8": "i8", "fp8": "fp8e4nv", "int4": "u8"}
"""Triton's types of stored weights; two of `int4` lie in a byte, as ONNX packs them."""


LEAST_GROUP = 8
"""Fewest inputs that share a scale; ranks that cut groups leave no fewer."""


def group_of(weights: Sequence[tuple[int, int]]) -> int:
    """Inputs that share a scale in `int4`, from weights' depths and scales an output; 0 where all of an output do.

    Raises:
        BuildError: There is no kernel for it.
    """
    if all(scales == 1 for _, scales in weights):
        return 0
    groups = {depth // scales if depth % scales == 0 else 0 for depth, scales in weights}
    (group, *others) = sorted(groups)
    if others or group < LEAST_GROUP or group & (group - 1):
        found = " and ".join(f"{scales} scales for {depth} inputs" for depth, scales in weights)
        raise BuildError(
            f"int4 experts have {found}: the GPU kernels take one group size, a power of two from {LEAST_GROUP} on; "
            "calibrate with --group-size 32, 64 or 128, or split over fewer ranks"
        )
    return group


@dataclass(frozen=True, kw_only=True, slots=True)
class Geometry:
    """One layer's experts on one GPU.

    Attributes:
        hidden: H.
        expert_size: I.
        experts: Experts that the router knows (E).
        local_experts: Experts whose weights and scales are here, each input's first axis; tokens that go to others get
            nothing added. None: all.
        first_expert: The router's number of the first of them.
        attributes: The op's attributes.
        dtype: `bf16` or `fp16`, of the tokens; of the weights too, where these are not quantised.
        group: Inputs of a weight that share a scale in `int4`, a power of two from 8 on; 0 is all of them.
        scale: Type of groups' scales: `fp32`, which lie [E, N, K / group], or the tokens', which lie [E, K / group, N].
        static: Whether the activation scales are given.

    Raises:
        BuildError: One expert's weight has 2^31 elements or more: within one, the kernels count in 32 bits.
    """

    hidden: int
    expert_size: int
    experts: int
    local_experts: int | None = None
    first_expert: int = 0
    attributes: Attributes
    dtype: str = "bf16"
    group: int = 0
    scale: str = "fp32"
    static: bool = False

    def __post_init__(self) -> None:
        assert self.dtype in ("bf16", "fp16")
        assert 0 <= self.first_expert <= self.experts - self.local
        assert self.attributes.top_k <= self.experts
        assert self.rounded or not self.static
        if self.kind == "int4":
            assert self.hidden % 2 == self.expert_size % 2 == 0, "a byte's two weights are of one column"
        if (largest := max(depth * width for depth, width in self.weight_sizes.values())) >= 1 << 31:
            raise BuildError(
                f"a weight of one expert has {largest} elements, the GPU kernels take fewer than {1 << 31}: "
                "split the model over ranks"
            )
        assert self.scale in ("fp32", self.dtype if self.group else "fp32")
        if self.group:
            assert self.kind == "int4"
            assert self.group >= LEAST_GROUP
            assert self.group & (self.group - 1) == 0
            assert self.hidden % self.group == self.expert_size % self.group == 0

    @property
    def name(self) -> str:
        """Name that tells this geometry's kernels from those of others in a bundle."""
        scales = f"g{self.group}" if self.kind == "int4" else "static" if self.static else ""
        if self.scale != "fp32":
            scales += self.scale
        if self.bound:
            scales = f"to{self.bound:g}"
        experts = f"{self.local}of{self.experts}k{self.attributes.top_k}"
        return f"moe_{self.dtype}_{self.kind}{scales}_{self.hidden}x{self.expert_size}x{experts}"

    @property
    def local(self) -> int:
        """Experts whose weights are here."""
        return self.experts if self.local_experts is None else self.local_experts

    @property
    def kind(self) -> str:
        """Format of the stored weights, in the attributes' words."""
        return self.attributes.quantisation

    @property
    def rounded(self) -> bool:
        """Whether activations are quantised too."""
        return self.kind in ("int8", "fp8")

    @property
    def dynamic(self) -> bool:
        """Whether activations are quantised by each token's own scale."""
        return self.rounded and not self.static

    @property
    def bound(self) -> float:
        """The largest magnitude that a token's own scale is chosen for; 0 is none."""
        return self.attributes.activation_bound if self.dynamic else 0.0

    @property
    def direct(self) -> bool:
        """Whether a pair's output is its token's: each token has one expert, and it is here."""
        return self.attributes.top_k == 1 and self.local == self.experts

    @property
    def weight_sizes(self) -> dict[str, tuple[int, int]]:
        """Depth and width of an expert's weights."""
        return {"gate_up": (self.hidden, 2 * self.expert_size), "down": (self.expert_size, self.hidden)}

    @property
    def types(self) -> dict[str, str]:
        """Types of the arrays that a call has, the op's and the scratch memory's, in Triton's words."""
        stored = STORED.get(self.kind, self.dtype)
        activation = stored if self.rounded else self.dtype
        types = dict.fromkeys(("hidden", "router_logits", "output"), self.dtype)
        types |= {"gate_up": stored, "down": stored, "expert_input": activation, "activated": activation}
        types |= dict.fromkeys(("chosen", "order", "tile_expert", "counters"), "i32")
        types |= dict.fromkeys(("gate_up_parts", "down_parts"), "fp32")
        if self.kind != "none":
            types |= dict.fromkeys(("gate_up_scale", "down_scale"), self.scale)
        if self.static:
            types |= dict.fromkeys(("hidden_scale", "activated_scale"), "fp32")
        if self.dynamic:
            types |= dict.fromkeys(("input_row_scale", "activated_row_scale"), "fp32") | {"wide": self.dtype}
            types |= dict.fromkeys(("few_wide", "few_peaks"), "fp32")
        if not self.direct:
            types["pair_outputs"] = self.dtype
        return types
