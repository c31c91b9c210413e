"""A vision tower's parts, each run on hidden states that are given, and the outputs of their units.

Enters: a side, a layer's number, its input for some tiles. Leaves: the units' outputs by name, biases and all: of the
stem and the head under the weights' full names, of a layer as in `self_attn.q_proj`. As with the decoder, PyTorch
computes from a side's weights, and of a folder each part is a subgraph of the lowered graph.

Shapes: as in `export.llama4_tower`; R rows are all positions of all tiles, or all features.
"""

from collections.abc import Mapping
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import linear

from ...export.llama4_tower import split_patches
from ...spec.choice import ADAPTER, PATCHES, PROJECTOR
from ...spec.geometry import VISION_LAYERS, VisionSpec
from ...walk.numbers import Weights
from ...walk.tower import Pixels, TowerLayerWalk, embed_tiles, project
from ..sides.checkpoint_side import CheckpointSide
from ..sides.folder_side import FolderSide
from ..sides.side import Side
from .location import STEM
from .subgraphs import Subgraphs
from .units import Halves, Hidden, Units, observed, rows_of, weights_of

PRODUCTS = {
    "self_attn.q_proj": "attention_input",
    "self_attn.k_proj": "attention_input",
    "self_attn.v_proj": "attention_input",
    "self_attn.o_proj": "attention_output",
    "mlp.fc1": "feed_input",
    "mlp.fc2": "down_input",
}
"""Inputs of a layer's linears."""

HEAD = dict(zip((*ADAPTER, PROJECTOR), ("adapter_input", "adapter_middle", "projector_input"), strict=True))
"""Inputs of the head's linears."""


class TowerUnits(Halves, Protocol):
    """A vision tower, each part run by itself."""

    def stem(self, pixels_N3PP: Pixels) -> Units:
        """The patches' product, and what enters the first layer."""
        ...

    def head(self, x_NSC: Hidden) -> Units:
        """The adapter's products and the projector's."""
        ...


def open_tower(side: Side) -> TowerUnits:
    """A side's vision tower as it runs: a checkpoint's in PyTorch, a folder's on ONNX Runtime.

    Raises:
        AccuracyError: It is an engine, whose layers are fused.
    """
    if isinstance(side, CheckpointSide):
        return in_torch(side)
    assert isinstance(side, FolderSide)
    return OrtTower(side)


def in_torch(side: Side) -> "TorchTower":
    """A side's vision tower computed by PyTorch from the numbers that its weights stand for.

    Raises:
        AccuracyError: It is an engine.
    """
    assert side.vision is not None
    return TorchTower(side.vision, weights_of(side, "vision"))


class TorchTower:
    """A tower computed by PyTorch in float32.

    Args:
        vision: Geometry.
        weights: The weights.

    Attributes:
        inputs: Inputs of the products of the part that was run last: `attention_input`, `adapter_middle`, ….
    """

    def __init__(self, vision: VisionSpec, weights: Weights) -> None:
        self.vision, self.weights = vision, weights
        self.inputs: dict[str, Tensor] = {}

    def stem(self, pixels_N3PP: Pixels) -> Units:
        """The patches' product, and what enters the first layer."""
        x_NSC = np.empty((len(pixels_N3PP), self.vision.positions, self.vision.hidden_size), np.float32)
        embed_tiles(self.vision, self.weights, pixels_N3PP, x_NSC)
        patches = split_patches(torch.from_numpy(pixels_N3PP.astype(np.float32)), self.vision)
        self.inputs = {"patches": patches.flatten(0, 1)}
        product = linear(self.inputs["patches"], self.weights.wide(f"{PATCHES}.weight"))
        return {PATCHES: product, STEM: rows_of(x_NSC)}

    def attend(self, index: int, x_NSC: Hidden) -> Units:
        """A layer's first half."""
        walk = self._walk(index, np.empty_like(x_NSC))
        self.inputs = observed(lambda observe: walk.attend(x_NSC, observe))
        found = {f"self_attn.{part}_proj": self._product(walk, f"self_attn.{part}_proj") for part in "qkv"}
        found["self_attn"] = self.inputs["attention_output"]
        found["self_attn.o_proj"] = self._product(walk, "self_attn.o_proj")
        return found | {"attended": rows_of(walk.attended)}

    def feed(self, index: int, attended_NSC: Hidden) -> Units:
        """A layer's second half."""
        walk = self._walk(index, attended_NSC)
        self.inputs = observed(walk.feed)
        return {unit: self._product(walk, unit) for unit in ("mlp.fc1", "mlp.fc2")} | {"out": rows_of(walk.out)}

    def head(self, x_NSC: Hidden) -> Units:
        """The adapter's products and the projector's."""
        size = self.weights.wide(f"{PROJECTOR}.weight").shape[0]
        features_MH = np.empty((len(x_NSC) * self.vision.features, size), np.float32)
        self.inputs = observed(lambda observe: project(self.vision, self.weights, x_NSC, features_MH, observe))
        return {unit: linear(self.inputs[source], self.weights.wide(f"{unit}.weight")) for unit, source in HEAD.items()}

    def release(self) -> None:
        """Releases the pages read so far."""
        self.weights.release()

    def _walk(self, index: int, attended_NSC: Hidden) -> TowerLayerWalk:
        return TowerLayerWalk(self.vision, index, self.weights, attended_NSC, np.empty_like(attended_NSC))

    def _product(self, walk: TowerLayerWalk, unit: str) -> Tensor:
        return linear(self.inputs[PRODUCTS[unit]], walk.weight(f"{unit}.weight"), walk.weight(f"{unit}.bias"))


class OrtTower:
    """Parts cut out of a folder's lowered vision graph.

    Args:
        side: A model, or a bundle for the CPU, with a vision tower.

    Raises:
        AccuracyError: It is an engine.
    """

    def __init__(self, side: FolderSide) -> None:
        self.subgraphs = Subgraphs(side, side.lowered_tower)
        self.graph = self.subgraphs.graph
        self.weights: Weights = self.subgraphs.weights
        assert side.vision is not None
        self.vision = side.vision

    def stem(self, pixels_N3PP: Pixels) -> Units:
        """The patches' product, and what enters the first layer."""
        wanted = {PATCHES: self._read_by(PATCHES), STEM: self._entering(0)}
        return self._run("pixels", pixels_N3PP.astype(np.float32), wanted)

    def attend(self, index: int, x_NSC: Hidden) -> Units:
        """A layer's first half."""
        wanted = {f"self_attn.{part}_proj": self._biased(index, f"self_attn.{part}_proj") for part in "qkv"}
        wanted["self_attn"] = self.graph.output_of(f"layers.{index}/Attention")
        wanted["self_attn.o_proj"] = self._biased(index, "self_attn.o_proj")
        return self._run(self._entering(index), x_NSC, wanted | {"attended": self._attended(index)})

    def feed(self, index: int, attended_NSC: Hidden) -> Units:
        """A layer's second half."""
        wanted = {unit: self._biased(index, unit) for unit in ("mlp.fc1", "mlp.fc2")}
        return self._run(self._attended(index), attended_NSC, wanted | {"out": self._entering(index + 1)})

    def head(self, x_NSC: Hidden) -> Units:
        """The adapter's products and the projector's."""
        return self._run(self._entering(self.vision.layers), x_NSC, {unit: self._read_by(unit) for unit in HEAD})

    def release(self) -> None:
        """Releases the sessions."""
        self.subgraphs.release()

    def _entering(self, index: int) -> str:
        """The value that enters a layer, or the head behind the last."""
        last = index == self.vision.layers
        norm = "vision_model.layernorm_post" if last else f"{VISION_LAYERS}{index}.input_layernorm"
        return self.graph.norm_input(f"{norm}.weight")

    def _attended(self, index: int) -> str:
        return self.graph.norm_input(f"{VISION_LAYERS}{index}.post_attention_layernorm.weight")

    def _biased(self, index: int, unit: str) -> str | None:
        """The value that a layer's linear computes."""
        product = self.graph.output_of(f"layers.{index}/{unit}")
        return None if product is None else self.graph.with_bias(product, f"{VISION_LAYERS}{index}.{unit}.bias")

    def _read_by(self, unit: str) -> str | None:
        """The value that a linear of the stem or the head computes."""
        found = self.graph.unit_reading(f"{unit}.weight")
        return None if found is None else self.graph.output_of(found)

    def _run(self, given: str, x: Pixels | Hidden, wanted: Mapping[str, str | None]) -> Units:
        """Runs a part; units that the graph does not have are left out."""
        shape = (len(x), self.vision.positions, self.vision.hidden_size)
        return self.subgraphs.run({given: np.ascontiguousarray(x)}, wanted, shape)
