"""How a model is split over ranks, each a device of its own: which part of every weight a rank has.

Enters: a geometry, `tp` (ranks) and `ep` (groups of experts). Leaves: a `Split` whose numbers divide what they must,
and the portion of each tensor. Over all ranks the portions of a tensor hold each of its elements: once where it is
split, everywhere where it is not.

N ranks run one graph in step, each over its part of every layer's width (tensor parallelism: Shoeybi et al. 2019,
arXiv:1909.08053):

- attention: N-th parts of the query heads and of the kv heads that these share, and so of the cache and its scales
- dense MLPs and shared experts: N-th parts of the width
- routed experts: the ranks stand in M groups of neighbours (expert parallelism: Lepikhin et al. 2020,
  arXiv:2006.16668). A group has E/M experts, and each of its N/M ranks an equal part of their width
- LM head: N-th parts of the vocabulary, as even as they come
- embedding, router and norms: whole on every rank

So a layer has two sums over ranks, of [B, S, H]: after attention's output projection, and after the feed-forward, where
shared and routed experts are summed at once. The logits are a third: each rank brings its own columns, zeros elsewhere.
The embedding is whole since only the rows in use are read: it costs each rank V·H items of memory (2.07 GB in Scout)
and saves a sum. The LM head is split since all of it is read for each token.

Where the experts alone are split, a rank has all else whole and each layer of experts one sum, of [T, H]: a token with
one expert has its result from one rank, and zeros from the others.

A quantised weight's scales go with it: those of its outputs, and those of the groups of its inputs. A group of inputs
that a split cuts becomes several of the same scale.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

from ..errors import ExportError
from ..files.safetensors import Region
from ..spec.geometry import VISION, ModelSpec

Span = tuple[int, int]
"""First index and the one after the last."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Portion:
    """The part of a tensor that a rank has.

    Attributes:
        whole: The tensor's shape.
        spans: For each axis the indices taken, in order.
    """

    whole: tuple[int, ...]
    spans: tuple[tuple[Span, ...], ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """The portion's own shape."""
        return tuple(sum(stop - start for start, stop in spans) for spans in self.spans)

    def region(self, tensor: Region) -> Region | None:
        """Where the portion lies in the tensor's file, or None where it is scattered over the tensor."""
        first = self._position(spans[0][0] for spans in self.spans)
        last = self._position(spans[-1][1] - 1 for spans in self.spans)
        count = math.prod(self.shape)
        if last - first + 1 != count:
            return None
        item = tensor.size // math.prod(self.whole)
        return Region(tensor.dtype, self.shape, tensor.offset + first * item, count * item)

    def _position(self, index: Iterable[int]) -> int:
        """An element's place in the tensor, row-major."""
        position = 0
        for size, i in zip(self.whole, index, strict=True):
            position = position * size + i
        return position


@dataclass(frozen=True, kw_only=True, slots=True)
class Split:
    """The layout over ranks; by itself it is that of a whole model.

    Attributes:
        ranks: Devices (N), each with its own graph.
        expert_groups: Groups of ranks (M) over which the experts are distributed; it divides `ranks`.
        experts_only: Whether each rank has all but the routed experts whole; `expert_groups` is `ranks` then.
    """

    ranks: int = 1
    expert_groups: int = 1
    experts_only: bool = False

    @property
    def parts(self) -> int:
        """Ranks that have attention, dense MLPs, shared experts and LM head between them."""
        return 1 if self.experts_only else self.ranks

    @property
    def sharers(self) -> int:
        """Ranks that have an expert's width between them."""
        return self.ranks // self.expert_groups

    def first_expert(self, spec: ModelSpec, rank: int) -> int:
        """The router's number of a rank's first expert."""
        return rank // self.sharers * (spec.experts // self.expert_groups)

    def portion(self, name: str, whole: tuple[int, ...], rank: int, *, is_quantised: bool = False) -> Portion:
        """A rank's portion of the tensor of this name and shape, a weight's or its scales'.

        Args:
            name: The tensor's name in the graph.
            whole: Its shape.
            rank: The rank.
            is_quantised: Whether it is a quantised weight: experts' then lie with outputs in front of inputs.
        """
        axes: list[tuple[Span, ...]] = [((0, size),) for size in whole]
        group, place = divmod(rank, self.sharers)
        if name.startswith(VISION):
            pass  # the whole tower
        elif ".experts." in name:
            axes[0] = (share(whole[0], self.expert_groups, group),)
            outputs_first = is_quantised or name.endswith("_scale")
            if self.is_cut(name, whole):
                axis = 2 if outputs_first else 1
                axes[axis] = (share(whole[axis], self.sharers, place),)
            elif "gate_up_proj" in name:  # outputs of the gate, and as many of the up projection behind the gate's
                axis = 1 if outputs_first else 2
                size = whole[axis] // 2
                start, stop = share(size, self.sharers, place)
                axes[axis] = ((start, stop), (size + start, size + stop))
        elif COLUMNS.search(name):
            axes[0] = (share(whole[0], self.parts, rank % self.parts),)
        elif self.is_cut(name, whole):
            axes[1] = (share(whole[1], self.parts, rank % self.parts),)
        return Portion(whole=whole, spans=tuple(axes))

    def is_cut(self, name: str, whole: tuple[int, ...]) -> bool:
        """Whether a tensor's inputs or groups of them are split.

        A scale of all inputs of an output goes to each rank that has some of them.
        """
        return bool(ROWS.search(name)) and not (name.endswith("_scale") and (len(whole) == 1 or whole[-1] == 1))

    def cuts(self, name: str) -> int:
        """The ranks among which the inputs of the weight of this name are divided."""
        if not ROWS.search(name):
            return 1
        return self.sharers if ".experts." in name else self.parts


COLUMNS = re.compile(
    r"\.([qkv]_proj|gate_proj|up_proj)\.weight(_scale)?$|lm_head\.weight(_scale)?$|\.(key|value)_scale$"
)
"""Names of what is split by outputs: the matrices that read the hidden states, and the scales of keys and values."""

ROWS = re.compile(r"\.(o_proj|down_proj)\.weight(_scale)?$|\.experts\.down_proj(_scale)?$")
"""Names of what is split by inputs: the matrices whose results are summed."""

WHOLE = Split()
"""One rank that has everything."""


def share(size: int, parts: int, index: int) -> Span:
    """The indices of one of several parts of an axis, all of one size where it divides."""
    return size * index // parts, size * (index + 1) // parts


def split_model(spec: ModelSpec, tp: int, ep: int | None) -> Split:
    """Checks a split against a geometry.

    Args:
        spec: Geometry of the whole model.
        tp: Ranks that attention, MLPs and LM head are split over; 1 leaves these whole, and splits the experts alone.
        ep: Groups of ranks over which the experts are distributed; None is as many as `tp`: experts stay whole.

    Raises:
        ExportError: A number that does not divide what it must, with those that would.
    """
    for name, value in (("tp", tp), ("ep", 1 if ep is None else ep)):
        if value < 1:
            raise ExportError(f"{name} is {value}, expected a whole number from 1 up")
    dense, routed = (any(layer.experts == experts for layer in spec.layers) for experts in (False, True))
    if tp == 1:
        return _split_experts(spec.experts if routed else 0, 1 if ep is None else ep)
    widths = {"kv heads": spec.kv_heads}
    if dense:
        widths["columns of a dense MLP"] = spec.dense_size
    if routed:
        widths["columns of an expert"] = spec.expert_size
    for what, count in widths.items():
        if count % tp:
            fitting = divisors(math.gcd(*widths.values()))
            raise ExportError(f"tp is {tp}, which does not divide the {count} {what}: choose one of {fitting}")
    groups, named = (tp, f"ep is {tp}, as tp") if ep is None else (ep, f"ep is {ep}")
    experts = spec.experts if routed else 0
    fitting = divisors(math.gcd(tp, experts))
    if tp % groups:
        raise ExportError(f"{named}, which does not divide tp ({tp}): choose one of {fitting} for ep")
    if experts % groups:
        raise ExportError(f"{named}, which does not divide the {experts} experts: choose one of {fitting} for ep")
    return Split(ranks=tp, expert_groups=groups)


def _split_experts(experts: int, groups: int) -> Split:
    """The split of the experts alone, a rank a group."""
    if groups == 1:
        return WHOLE
    if not experts:
        raise ExportError(f"ep is {groups}, and the model has no experts: give --tp {groups} in its place")
    if experts % groups:
        fitting = divisors(experts)
        raise ExportError(f"ep is {groups}, which does not divide the {experts} experts: choose one of {fitting}")
    return Split(ranks=groups, expert_groups=groups, experts_only=True)


def divisors(number: int) -> str:
    """The numbers up to 64 that divide a number, as a list to read."""
    return ", ".join(str(each) for each in range(1, 65) if number % each == 0)
