"""Layers that are run half by half on hidden states that are given, and the outputs of their units.

Enters: a side. Leaves: its weights, and the interface that decoder and tower share, in PyTorch and on ONNX Runtime.
"""

from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...walk.accelerator import HOST
from ...walk.decoder import Observe
from ...walk.numbers import FolderWeights, Weights
from ..sides.checkpoint_side import CheckpointSide
from ..sides.folder_side import FolderSide
from ..sides.side import Side
from .location import ModelPart

Hidden = NDArray[np.float32]
"""Hidden states: of one sequence [S, H], of tiles [N, S, C]."""

Units = dict[str, Tensor]
"""Outputs as rows [R, …] by unit, a layer's without `layers.N.`; behind a half's residual `attended` or `out`."""


class Halves(Protocol):
    """A decoder's or a tower's layers, each half of one run by itself."""

    weights: Weights

    def attend(self, index: int, x: Hidden) -> Units:
        """A layer's first half."""
        ...

    def feed(self, index: int, attended: Hidden) -> Units:
        """A layer's second half."""
        ...

    def release(self) -> None:
        """Releases what the last layers held in memory."""
        ...


def weights_of(side: Side, part: ModelPart) -> Weights:
    """The weights of a side's decoder or tower, as the numbers that they stand for.

    Raises:
        AccuracyError: The side is an engine.
    """
    if isinstance(side, CheckpointSide):
        return side.weights.on(HOST)  # where the other side computes
    assert isinstance(side, FolderSide)
    graph = side.lowered if part == "decoder" else side.lowered_tower
    return FolderWeights(graph.weights, side.files)


def rows_of(array: NDArray[np.float32]) -> Tensor:
    """[N, S, …] as rows [N·S, …]; rows as they are."""
    tensor = torch.from_numpy(array)
    return tensor.flatten(0, 1) if tensor.ndim == 3 else tensor


def observed(run: Callable[[Observe], None]) -> Units:
    """The inputs of a walk's products, by the names under which they are observed."""
    parts: dict[str, list[Tensor]] = {}
    run(lambda name, rows: parts.setdefault(name, []).append(rows))
    return {name: torch.cat(rows) for name, rows in parts.items()}
