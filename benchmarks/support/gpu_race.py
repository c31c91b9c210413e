"""Contestants on a GPU: launched, captured in CUDA graphs, timed in turns. For `kernel_speed`.

Enter: callables that put work into the current stream, several a contestant, each over inputs of its own. Leave:
microseconds a call, medians. Invariant: what one call reads is not in the L2 cache when it starts, as long as the
inputs of a contestant's calls together are larger than that.
"""

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from arriero.plugins.launch import COUNTERS, Buffer, Kernels, Launch

ROTATED = 160 << 20
"""Bytes that a contestant's calls read together, at least: three times an H100's L2 cache."""

FLUSH = 1 << 30
"""Bytes written before each replay; that takes longer than the host takes to launch the graph behind it."""

ROUNDS = 9


@dataclass(frozen=True, kw_only=True, slots=True)
class Contestant:
    """One way to do the work, over each set of inputs."""

    name: str
    calls: Sequence[Callable[[], Any]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One line of the table.

    Attributes:
        op: `attention` or `experts`.
        shape: The call's, in words.
        kind: How our cache or our experts are stored.
        error: Relative distance of our result from the oracle's, and `most` that it may be.
        bytes: Bytes that a call must read and write.
        operations: Floating-point operations that a call must do.
        is_bound_by_bytes: Whether the former, not the latter, is its measure.
        ours: Microseconds; None where the result is wrong.
        peers: Microseconds by name.
    """

    op: str
    shape: str
    kind: str
    error: float
    most: float
    bytes: float
    operations: float
    is_bound_by_bytes: bool
    ours: float | None
    peers: dict[str, float]

    @property
    def is_right(self) -> bool:
        """Whether rounding explains the error; it does not explain NaN."""
        return self.error < self.most


class Ours:
    """One call of our kernels over one set of inputs.

    Args:
        kernels: Loaded.
        tensors: The op's inputs, `output`, and what `scratch` makes, by name.
        launches: Makes the launches of a call whose arrays lie at these addresses.
    """

    def __init__(
        self,
        kernels: Kernels,
        tensors: Mapping[str, Tensor],
        launches: Callable[[dict[str, Any]], list[Launch]],
    ) -> None:
        self.kernels = kernels
        self.tensors = tensors
        self.launches = launches(addresses(self.tensors))

    def __call__(self) -> Tensor:
        """Puts the launches into the current stream; the output is there when they are done."""
        stream = current_stream()
        for launch in self.launches:
            self.kernels.launch(launch, stream)
        return self.tensors["output"]


def scratch(workspace: Mapping[str, Buffer]) -> dict[str, Tensor]:
    """Buffers that a plan asks for, for calls one after another; full of NaN, so that what is not written is seen."""
    buffers = {name: torch.full((each.size,), 255, dtype=torch.uint8) for name, each in workspace.items()}
    return buffers | {"counters": torch.zeros(COUNTERS, dtype=torch.int32)}


def addresses(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    return {name: tensor.data_ptr() for name, tensor in tensors.items()}


def current_stream() -> int:
    return torch.cuda.current_stream().cuda_stream


def sets_for(size: float) -> int:
    """How many sets of inputs of that many bytes a contestant's calls need, two at least."""
    return max(2, min(64, -int(-ROTATED // size)))


def distance(found: Tensor, expected: Tensor) -> float:
    """The norm of the difference over the norm of what is expected."""
    return ((found.float() - expected.float()).norm() / expected.float().norm()).item()


def captured(contestant: Contestant) -> torch.cuda.CUDAGraph:
    for call in contestant.calls:  # loads what is loaded lazily
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in contestant.calls:
            call()
    return graph


def race(contestants: Iterable[Contestant], rounds: int = ROUNDS) -> dict[str, float]:
    """Microseconds a call of each contestant: the median over rounds in which each has its turn."""
    graphs = {each.name: (captured(each), len(each.calls)) for each in contestants}
    flush = torch.empty(FLUSH, dtype=torch.uint8)
    times: dict[str, list[float]] = {name: [] for name in graphs}
    order = list(graphs)
    for number in range(rounds + 1):
        for name in order:
            graph, count = graphs[name]
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush.zero_()
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            if number:  # the first replay uploads the graph
                times[name].append(1e3 * start.elapsed_time(end) / count)
        order.reverse()
    return {name: statistics.median(each) for name, each in times.items()}


def able(peers: Iterable[Contestant]) -> tuple[list[Contestant], dict[str, str]]:
    """The peers that this PyTorch runs here, and why the others do not."""
    runs, refusals = [], {}
    for peer in peers:
        try:
            peer.calls[0]()
            torch.cuda.synchronize()
        except RuntimeError as error:
            refusals[peer.name] = str(error).strip().splitlines()[0]
        else:
            runs.append(peer)
    return runs, refusals


def ceilings() -> tuple[float, float]:
    """This card's best: bytes a second of a copy, read and written, and operations a second in bfloat16."""
    source = torch.empty(1 << 30, dtype=torch.bfloat16).normal_()
    target = torch.empty_like(source)
    x_MK, y_KN = (torch.empty(8192, 8192, dtype=torch.bfloat16).normal_() for _ in range(2))
    product_MN = torch.empty_like(x_MK)
    copy = Contestant(name="copy", calls=[lambda: target.copy_(source)] * 2)
    product = Contestant(name="product", calls=[lambda: torch.mm(x_MK, y_KN, out=product_MN)] * 4)
    micros = race([copy, product])
    return 2 * source.nbytes / micros["copy"] * 1e6, 2 * 8192**3 / micros["product"] * 1e6
