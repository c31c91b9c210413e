"""`spec.json`: what a folder is, made from what, by which version."""

import dataclasses
import json
import typing
from dataclasses import dataclass, field
from typing import Literal, Self

from ..errors import FolderError
from .built_engine import EngineSpec, TowerEngine
from .fields import decode
from .geometry import ModelSpec, VisionSpec, share_of
from .recipe import Recipe
from .stored_weights import Weight, WeightFile

SCHEMA = 1
"""Version of `spec.json`. A folder with a newer one is refused."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VisionPart:
    """A folder's part of a model's vision tower.

    Attributes:
        spec: The tower's geometry.
        graph: File name of its graph; empty where it is an engine, and on a rank that has none since rank 0 has it.
        weights: Tensors that the runtime hands to a bundle's graph; empty in a model.
        session: Flags that the graph needs from its session.
        engine: A TensorRT bundle's engine of the tower.
    """

    spec: VisionSpec
    graph: str = "vision.onnx"
    weights: tuple[Weight, ...] = ()
    session: dict[str, str] = field(default_factory=dict)
    engine: TowerEngine | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class FolderSpec:
    """`spec.json`: what a folder is, made from what, by which version.

    Attributes:
        kind: `model` (canonical graph), `bundle` (one target's artifact), or `group` (a model or bundle folder a rank,
            named `rank-0` and so on).
        version: Arriero's version that wrote it.
        model: The decoder's geometry; the whole model's where the graph is one rank's.
        target: Target that a bundle, or a group's bundles, were built for; empty in a model.
        graph: File name of the decoder's graph.
        source: The checkpoint or model it was made from.
        source_hashes: SHA-256 of the small files it was made from, by name.
        weight_files: The safetensors files that the graph reads in place.
        recipe: How the model is quantised; None where it is not.
        unmeasured: Experts that saw too few tokens, as `layers.5.feed_forward.experts[3]`: rounded to nearest without
            statistics of their own, static scales being the largest of the layer's others.
        weights: Tensors that the runtime hands to a bundle's graph; empty in a model, whose graph names them itself.
        tools: Versions of the libraries that wrote it.
        session: Flags that the graph needs from its session.
        engine: A TensorRT bundle's engine.
        vision: The vision tower's part; None where the model takes text only.
        rank: Which rank's the graph is, of a model that is split over several.
        ranks: Number of ranks.
        cache_bits: Bits of keys and values in the caches of a bundle for the CPU, 8 or 4, each group of a token's by a
            scale of its own; 0 where the graph's caches are as they are.
        expert_groups: Over how many groups of ranks the experts are distributed.
        experts_only: Whether the routed experts alone are split, and each rank has all else whole.
        rank_hashes: A group's fingerprints of its ranks' folders: SHA-256 of their specs and graphs.
        schema: Version of this description; a folder with another one is refused.
    """

    kind: Literal["model", "bundle", "group"]
    version: str
    model: ModelSpec
    target: str = ""
    graph: str = "decoder.onnx"
    source: str = ""
    source_hashes: dict[str, str] = field(default_factory=dict)
    weight_files: tuple[WeightFile, ...] = ()
    recipe: Recipe | None = None
    unmeasured: tuple[str, ...] = ()
    weights: tuple[Weight, ...] = ()
    tools: dict[str, str] = field(default_factory=dict)
    session: dict[str, str] = field(default_factory=dict)
    engine: EngineSpec | None = None
    vision: VisionPart | None = None
    rank: int = 0
    ranks: int = 1
    expert_groups: int = 1
    experts_only: bool = False
    rank_hashes: tuple[str, ...] = ()
    cache_bits: int = 0
    schema: int = SCHEMA

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.ranks or self.expert_groups < 1 or self.ranks % self.expert_groups:
            raise ValueError(f"rank {self.rank} of {self.ranks} in {self.expert_groups} expert groups")
        if self.experts_only and self.expert_groups != self.ranks:
            raise ValueError(f"experts alone in {self.expert_groups} groups of {self.ranks} ranks")

    @property
    def parts(self) -> int:
        """Ranks that have attention, dense MLPs, shared experts and LM head between them; 1 where each has them."""
        return 1 if self.experts_only else self.ranks

    @property
    def rank_model(self) -> ModelSpec:
        """The geometry of the graph in this folder: a rank's part of the decoder's."""
        return share_of(self.model, self.parts, self.ranks // self.expert_groups)

    def to_json(self) -> str:
        """The text of `spec.json`."""
        return json.dumps(dataclasses.asdict(self), indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Reads `spec.json`.

        Raises:
            FolderError: The text is not a folder's spec, or one of a newer schema.
        """
        try:
            fields = json.loads(text)
            schema = fields["schema"]
        except (ValueError, KeyError, TypeError) as error:
            raise FolderError(f"spec.json is damaged ({error!r}): write the folder again") from error
        if schema != SCHEMA:
            raise FolderError(f"spec.json has schema {schema!r}, this Arriero reads {SCHEMA}: use matching versions")
        try:
            return typing.cast(Self, decode(cls, fields))
        except (TypeError, ValueError, AttributeError) as error:
            raise FolderError(f"spec.json is damaged ({error}): write the folder again") from error
