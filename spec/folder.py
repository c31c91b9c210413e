"""`spec.json`: what a folder is, made from what, by which version."""

import dataclasses
import json
import typing
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Literal, Self

from ..errors import FolderError, shortened, shortened_text
from .built_engine import EngineSpec, TowerEngine
from .draft import DraftSpec
from .fields import decode
from .geometry import ModelSpec, VisionSpec, share_of
from .json_text import parse_json
from .older_schema import BUILD_AGAIN, read_older
from .recipe import Format, Recipe
from .sizes import check_name
from .stored_weights import Weight, WeightFile

SCHEMA = 2
"""Version of `spec.json`. A folder with a newer one is refused; of older ones `older_schema` says what is read."""

SPEC_NAME = "spec.json"
"""The name of the file, and in a lowered graph the place of what the runtime supplies by name."""

MOST_RANKS = 4096
"""Ranks of a group at most."""

SESSION_ENTRIES: Mapping[str, Collection[str]] = {"session.disable_prepacking": ("0", "1")}
"""Entries of ONNX Runtime's session configuration that graphs need, and their values; all others are refused."""


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

    def __post_init__(self) -> None:
        if self.graph:  # a rank's may be rank 0's alone
            _check_graph(self.graph, "the vision tower's graph", is_engine=self.engine is not None)
        check_session(self.session)


@dataclass(frozen=True, kw_only=True, slots=True)
class DraftPart:
    """A folder's part of the head that drafts tokens.

    Attributes:
        spec: The head's geometry.
        graph: File name of its graph.
        format: How its linears are stored.
        weights: Tensors that the runtime hands to a bundle's graph; empty in a model.
        session: Flags that the graph needs from its session.
    """

    spec: DraftSpec
    graph: str = "draft.onnx"
    format: Format = "none"
    weights: tuple[Weight, ...] = ()
    session: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_name("the name of the draft's graph", self.graph)
        check_session(self.session)


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
        draft: The part of the head that drafts tokens; None where there is none.
        rank: Which rank's the graph is, of a model that is split over several.
        ranks: Number of ranks.
        cache_bits: Bits of keys and values in the caches of a bundle for the CPU, 8 or 4, each group of a token's by a
            scale of its own; 0 where the graph's caches are as they are.
        expert_groups: Over how many groups of ranks the experts are distributed.
        experts_only: Whether the routed experts alone are split, and each rank has all else whole.
        rank_hashes: A group's fingerprints of its ranks' folders: SHA-256 of their specs and graphs.
        schema: Version of this description; a folder with a newer one is refused, and with an older one where its
            quantised experts lie in another order.
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
    draft: DraftPart | None = None
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
        _check_graph(self.graph, "the graph", is_engine=self.engine is not None or self.kind == "group")
        check_session(self.session)
        if self.cache_bits not in (0, 4, 8):
            raise ValueError(f"cache_bits is {self.cache_bits}, expected 0, 4 or 8")
        vision = self.vision
        if vision is not None and not vision.graph and vision.engine is None and not self.rank:
            raise ValueError("the vision tower has no graph")
        if vision is not None and vision.graph and (vision.engine is None) != (self.engine is None):
            raise ValueError("the decoder is an engine and the vision tower none, or the other way round")
        if vision is not None and vision.spec.image_token >= self.model.vocab_size:
            raise ValueError(f"image_token is {vision.spec.image_token} of {self.model.vocab_size} tokens")
        if self.draft is not None:
            self.draft.spec.check_decoder(self.model)
            if self.kind == "group" or self.ranks > 1 or self.engine is not None:
                raise ValueError("a draft beside ranks or an engine, neither of which has one")
        names = [file.name for file in self.weight_files]
        if len(set(names)) < len(names):
            raise ValueError("two weight files have one name")
        if self.experts_only and self.expert_groups != self.ranks:
            raise ValueError(f"experts alone in {self.expert_groups} groups of {self.ranks} ranks")
        if max(self.ranks, self.expert_groups) > MOST_RANKS:
            raise ValueError(f"{shortened(self.ranks)} ranks, expected at most {MOST_RANKS}")

    @property
    def parts(self) -> int:
        """Ranks that have attention, dense MLPs, shared experts and LM head between them; 1 where each has them."""
        return 1 if self.experts_only else self.ranks

    @property
    def rank_model(self) -> ModelSpec:
        """The geometry of the graph in this folder: a rank's part of the decoder's."""
        return share_of(self.model, self.parts, self.ranks // self.expert_groups)

    @property
    def made_again(self) -> str:
        """The way to such a folder anew: by the stage that wrote it."""
        if self.kind == "bundle" or self.target:
            return BUILD_AGAIN
        verb = "calibrate" if self.graph in self.source_hashes else "export"
        return f"{verb} {shortened(self.source)} again"

    def to_json(self) -> str:
        """The text of `spec.json`."""
        return json.dumps(dataclasses.asdict(self), indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Reads `spec.json`.

        Raises:
            FolderError: The text is not a folder's spec, or one of a schema that is not read.
        """
        try:
            fields = parse_json(text, unique=True)
            schema = fields["schema"]
        except (ValueError, KeyError, TypeError) as error:
            said = shortened_text(repr(error), 150)
            raise FolderError(f"spec.json is damaged ({said}): write the folder again") from error
        if schema not in range(1, SCHEMA + 1):
            found = shortened(schema)
            raise FolderError(f"spec.json has schema {found}, this Arriero reads {SCHEMA}: use matching versions")
        try:
            spec = typing.cast(Self, decode(cls, fields))
            _ = spec.rank_model  # which refuses a share of nothing
            spec.check_target()
            spec.check_weights()
        except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
            said = shortened_text(str(error), 200)
            raise FolderError(f"spec.json is damaged ({said}): write the folder again") from error
        if spec.schema == SCHEMA:
            return spec
        weights = read_older(spec.model, spec.recipe, spec.target, spec.weights, spec.made_again)
        return dataclasses.replace(spec, schema=SCHEMA, weights=weights)

    def check_target(self) -> None:
        """Refuses a target that is none, or another than that of what the folder holds.

        Raises:
            ValueError: It is.
        """
        flavour = self.target.partition(":")[0]
        if self.kind == "group":
            expected: Collection[str] = ("", "cpu", "tensorrt", "tensorrt-rtx")
        elif self.kind == "model":
            expected = ("",)
        else:
            expected = ("cpu",) if self.engine is None else (self.engine.flavour,)
        if flavour not in expected or (flavour in ("", "cpu") and self.target != flavour):
            names = " or ".join(name or "none" for name in expected)
            raise ValueError(f"a {self.kind}'s target is {shortened(self.target)}, expected {names}")

    def check_weights(self) -> None:
        """Refuses weights that are in no weight file of the list, and two of one name.

        Raises:
            ValueError: There are such.
        """
        files = {file.name for file in self.weight_files}
        parts = (self.weights, *(part.weights for part in (self.vision, self.draft) if part is not None))
        for weights in parts:
            names: set[str] = set()
            for weight in weights:
                if weight.file not in files:
                    raise ValueError(f"weight {shortened(weight.name)} is in {shortened(weight.file)}, no weight file")
                if weight.name in names:
                    raise ValueError(f"weight {shortened(weight.name)} is there twice")
                names.add(weight.name)


def check_session(session: Mapping[str, str]) -> None:
    """Refuses entries of a session's configuration that no graph of Arriero's needs: some write files, or read them.

    Raises:
        ValueError: There is such an entry; it is named.
    """
    for name, value in session.items():
        if value not in SESSION_ENTRIES.get(name, ()):
            raise ValueError(f"session has the entry {shortened(name)} = {shortened(value)}, which no graph needs")


def _check_graph(name: str, what: str, *, is_engine: bool) -> None:
    """Refuses a graph's name that is none; an engine takes the graph's place."""
    if name or not is_engine:
        check_name(f"the name of {what}", name)
