"""The frozen dataclasses that travel between the stages, and their JSON.

Standard library only: every room imports this one, and the runtime must stay thin.
"""

import dataclasses
import json
import math
import re
import typing
from dataclasses import dataclass, field
from typing import Literal, Self

from .errors import FolderError
from .fields import decode
from .geometry import ModelSpec, VisionSpec

SCHEMA = 1
"""Version of `spec.json`. A folder with a newer one is refused."""

Stored = Literal["float32", "float16", "bfloat16", "int8", "uint8", "fp8", "int4", "uint4"]
EXPERT = re.compile(r"\.experts\.")
"""What names of routed experts' weights hold, of one's or of all of them."""
GROUP = 32
"""Dims of a token's key or value that a scale of their own is for in a cache of groups."""
PANEL = 32
"""Outputs of a matrix that the CPU's own kernels compute together."""
BLOCK = 32
"""Inputs that these kernels round by one scale, at most; a matrix is padded to a multiple."""
BITS = {"float32": 32, "float16": 16, "bfloat16": 16, "int8": 8, "uint8": 8, "fp8": 8, "int4": 4, "uint4": 4}
"""Of an element, by its type as it is stored."""

Format = Literal["none", "int8", "fp8", "int4"]
"""How weights are stored: in the model's own type, or quantised."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightFile:
    """A safetensors file that a folder's graph reads in place.

    Attributes:
        name: File name, which is also its `location` in the ONNX graph.
        path: Absolute path where it was found, or empty where it lies in the folder itself.
        size: Bytes.
        identity: `shards.identity` of the file: its header and samples of its data.
    """

    name: str
    path: str
    size: int
    identity: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Weight:
    """One tensor that the runtime hands to a lowered graph, as a region of a weight file.

    Attributes:
        name: The graph's name for it.
        file: Name of its `WeightFile`.
        offset: First byte in the file.
        shape: Dimensions, row-major.
        dtype: Type in the file; two of `int4` lie in a byte, the first in its low half.
        convert: Type the graph wants; equal to `dtype` where the file's bytes are used as they lie. `uint4` is `int4`
            plus 8, `uint8` is `int8` plus 128.
        layout: How the graph wants it: in `rows`, as it is stored; in `panels` of 32 outputs, those of the CPU's own
            kernels, a matrix; or as the `scales` of such panels.
        stacked: Whether it is all experts' [E, K, N], a matrix for each; others in panels are [N, K].
        interleaved: Whether a panel is 16 of a matrix's first half of outputs, and the same 16 of the second.
        is_made: Whether the file holds it as the graph is given it; `dtype` and `shape` say what it was made from.
    """

    name: str
    file: str
    offset: int
    shape: tuple[int, ...]
    dtype: Stored
    convert: Stored
    layout: Literal["rows", "panels", "scales"] = "rows"
    stacked: bool = False
    interleaved: bool = False
    is_made: bool = False

    @property
    def size(self) -> int:
        """Bytes in the file."""
        return self.given_size if self.is_made else math.prod(self.shape) * BITS[self.dtype] // 8

    @property
    def matrix(self) -> tuple[int, int]:
        """Outputs, and inputs or groups of them, of one matrix or its scales."""
        if self.stacked:
            return self.shape[2], self.shape[1]
        return self.shape[0], math.prod(self.shape[1:])

    @property
    def panels(self) -> int:
        """Panels of one matrix."""
        outputs = self.matrix[0] // 2 if self.interleaved else self.matrix[0]
        return -(-outputs // (PANEL // 2 if self.interleaved else PANEL))

    @property
    def given_shape(self) -> tuple[int, ...]:
        """Dimensions as the graph is given them, of panels those of bytes."""
        if self.layout == "rows":
            return self.shape
        experts = self.shape[:1] if self.stacked else ()
        if self.layout == "scales":
            return (*experts, self.panels, self.matrix[1], PANEL)
        padded = -(-self.matrix[1] // BLOCK) * BLOCK
        return (*experts, self.panels, padded * PANEL * BITS[self.convert] // 8)

    @property
    def given_size(self) -> int:
        """Bytes as the graph is given it."""
        return math.prod(self.given_shape) * (1 if self.layout == "panels" else BITS[self.convert] // 8)

    @property
    def is_converted(self) -> bool:
        """Whether the graph is given a copy in other memory, not the file's own bytes."""
        if self.is_made:
            return False
        is_misaligned = self.offset % max(1, BITS[self.dtype] // 8) != 0
        return self.dtype != self.convert or self.layout != "rows" or is_misaligned


def slot_bytes(head_dim: int, bits: int) -> int:
    """Bytes of a head's key or value in a cache of groups, scales among them, as `plugins/cpu/matrix.h` says."""
    groups = -(-head_dim // GROUP)
    return groups * (GROUP * bits // 8 + (4 if bits == 4 else 2))


@dataclass(frozen=True, kw_only=True, slots=True)
class Override:
    """What a recipe says otherwise of some weights; None leaves it as the recipe has it.

    Attributes:
        pattern: Shell pattern of names without `.weight`, as in `layers.*.self_attn.o_proj` or `lm_head`; one
            layer's routed experts are `layers.N.feed_forward.experts`.
    """

    pattern: str
    format: Format | None = None
    activations: Literal["static", "dynamic"] | None = None
    clip: Literal["absmax", "percentile", "entropy", "mse"] | None = None
    group_size: int | None = None
    rounding: Literal["nearest", "gptq"] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """How a model is quantised.

    Attributes:
        format: Of the linears and of the experts; `int4` quantises weights only, the others activations too.
        activations: One scale a tensor from calibration, or one a token, computed as it runs.
        clip: How the largest activation that is represented is chosen.
        percentile: Share of activations, in percent, that `percentile` keeps within the clip.
        weight_clip: How the largest weight of a column or group is chosen.
        smoothing: What moves difficult channels from activations into weights before rounding.
        strength: Of the smoothing, 0 to 1; None searches it for each group of linears with a common input.
        rounding: To the nearest value, or with GPTQ's correction of what is rounded later.
        group_size: Rows of a weight that share a scale in `int4`.
        kv_cache: How keys and values are stored.
        activation_bound: The largest magnitude that a token's own scale is chosen for: larger ones are clipped; 0 is
            none.
        overrides: Exceptions, of which a later one goes before an earlier one.
    """

    format: Literal["int8", "fp8", "int4"]
    activations: Literal["static", "dynamic"] = "static"
    clip: Literal["absmax", "percentile", "entropy", "mse"] = "absmax"
    percentile: float = 99.99
    weight_clip: Literal["absmax", "mse"] = "absmax"
    smoothing: Literal["none", "smoothquant", "awq"] = "none"
    strength: float | None = None
    rounding: Literal["nearest", "gptq"] = "nearest"
    group_size: int = 64
    kv_cache: Literal["none", "int8", "fp8"] = "none"
    activation_bound: float = 0.0
    overrides: tuple[Override, ...] = ()

    def __post_init__(self) -> None:
        if not 50 <= self.percentile <= 100:
            raise ValueError(f"percentile is {self.percentile}, expected 50 to 100")
        if self.strength is not None and not 0 <= self.strength <= 1:
            raise ValueError(f"strength is {self.strength}, expected 0 to 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class Profile:
    """A range of shapes that an engine is optimised for.

    Attributes:
        name: `decode` or `prefill`.
        max_batch: Rows at most.
        usual_batch: Rows it is tuned for.
        max_length: Tokens of a row's piece at most.
        usual_length: Tokens it is tuned for.
        max_logits: Positions of a piece that get logits at most.
        activations: Bytes of activations and scratch memory at its largest, as the build reckoned.
    """

    name: str
    max_batch: int
    usual_batch: int
    max_length: int
    usual_length: int
    max_logits: int
    activations: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Binary:
    """A compiled kernel as it lies in a bundle.

    Attributes:
        kernel: The kernel's name.
        capability: Compute capability it was compiled for, as in 89.
        file: File name of the cubin.
        entry: Symbol of the kernel in it.
        parameters: Types of the run-time parameters, without the two scratch pointers that Triton appends.
        threads: Threads a program.
        shared: Bytes of dynamic shared memory.
        sha256: Of the cubin.
    """

    kernel: str
    capability: int
    file: str
    entry: str
    parameters: tuple[str, ...]
    threads: int
    shared: int
    sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheInput:
    """One of an engine's caches: its name without `past.` or `present.`, its shape [K, C, D], its type."""

    name: str
    shape: tuple[int, ...]
    dtype: Stored

    @property
    def row_size(self) -> int:
        """Bytes of one row of a batch."""
        return math.prod(self.shape) * BITS[self.dtype] // 8


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineSpec:
    """What an engine is and asks for.

    Attributes:
        file: Its file name.
        flavour: `tensorrt-rtx` or `tensorrt`.
        version: Of that library; an engine runs on the version that built it.
        capabilities: Compute capabilities that it was built for.
        sha256: Of the file.
        max_seq: Positions that a sequence may hold.
        profiles: In the engine's order.
        caches: Its cache inputs; each output of the same name is the same memory.
        attention: Path of the attention layers: `plugin` or `native`.
        experts: Path of the expert layers: `plugin` or `function`.
        placement: Which weights are inputs: `inside` (none), `experts`, `outside`.
        weight_streaming: Whether weights may stay in the host's memory.
        weights: Bytes of the weights inside the engine.
        kernels: The plugins' compiled kernels.
    """

    file: str
    flavour: Literal["tensorrt-rtx", "tensorrt"]
    version: str
    capabilities: tuple[int, ...]
    sha256: str
    max_seq: int
    profiles: tuple[Profile, ...]
    caches: tuple[CacheInput, ...]
    attention: str
    experts: str
    placement: str
    weight_streaming: bool
    weights: int
    kernels: tuple[Binary, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class TowerEngine:
    """A vision tower's engine. It is for the TensorRT and the GPUs that the decoder's is for.

    Attributes:
        file: Its file name.
        sha256: Of the file.
        max_tiles: Tiles that it takes at once at most.
        activations: Bytes of activations and scratch memory for so many, as the build reckoned.
        weights: Bytes of the weights inside.
    """

    file: str
    sha256: str
    max_tiles: int
    activations: int
    weights: int


@dataclass(frozen=True, kw_only=True, slots=True)
class VisionPart:
    """What a folder holds of a model's vision tower.

    Attributes:
        spec: The tower's geometry.
        graph: File name of its graph; empty where it is an engine.
        weights: What the runtime hands to a bundle's graph; empty in a model.
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
        kind: `model` (canonical graph), `bundle` (one target's artifact), or `group` (a model folder a rank).
        version: Arriero's version that wrote it.
        model: The decoder's geometry; the whole model's where the graph is one rank's.
        target: What a bundle was built for; empty in a model.
        graph: File name of the decoder's graph.
        source: The checkpoint or model it was made from.
        source_hashes: SHA-256 of the small files it was made from, by name.
        weight_files: The safetensors files that the graph reads in place.
        recipe: How the model is quantised; None where it is not.
        weights: What the runtime hands to a bundle's graph; empty in a model, whose graph says it itself.
        tools: Versions of the libraries that wrote it.
        session: Flags that the graph needs from its session.
        engine: A TensorRT bundle's engine.
        vision: The vision tower's part; None where the model takes text only.
        rank: Which rank's the graph is, of a model that is split over several.
        ranks: How many there are.
        cache_bits: Bits of keys and values in the caches of a bundle for the CPU, 8 or 4, each group of a token's by a
            scale of its own; 0 where the graph's caches are as they are.
        expert_groups: Over how many groups of ranks the experts are distributed.
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
    weights: tuple[Weight, ...] = ()
    tools: dict[str, str] = field(default_factory=dict)
    session: dict[str, str] = field(default_factory=dict)
    engine: EngineSpec | None = None
    vision: VisionPart | None = None
    rank: int = 0
    ranks: int = 1
    expert_groups: int = 1
    cache_bits: int = 0
    schema: int = SCHEMA

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.ranks or self.expert_groups < 1 or self.ranks % self.expert_groups:
            raise ValueError(f"rank {self.rank} of {self.ranks} in {self.expert_groups} expert groups")

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
