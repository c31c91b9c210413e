"""Built TensorRT engines: their profiles, caches, kernels and files."""

import math
import re
from dataclasses import dataclass
from typing import Literal

from ..errors import shortened
from .sizes import check_hash, check_name, check_shape, check_sizes
from .types import BITS, Stored

FP8_FROM = 89
"""The first compute capability whose GPUs compute in FP8; the other types work everywhere."""


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
        activations: Bytes of activations and scratch memory at its largest, as the build computed them.
    """

    name: str
    max_batch: int
    usual_batch: int
    max_length: int
    usual_length: int
    max_logits: int
    activations: int = 0

    def __post_init__(self) -> None:
        check_sizes(self, ("max_batch", "usual_batch", "max_length", "usual_length", "max_logits"))
        check_sizes(self, ("activations",), 0, 2**53)


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
        sha256: SHA-256 of the cubin.
        dependent: Whether it may be launched while the kernel before it runs.
    """

    kernel: str
    capability: int
    file: str
    entry: str
    parameters: tuple[str, ...]
    threads: int
    shared: int
    sha256: str
    dependent: bool = False

    def __post_init__(self) -> None:
        check_name("the file of a kernel", self.file)
        check_hash("the SHA-256 of a kernel", self.sha256)
        check_sizes(self, ("threads",), 1, 1024)
        check_sizes(self, ("shared",), 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheInput:
    """One of an engine's caches.

    Attributes:
        name: The input's name without `past.`, and the output's without `present.`.
        shape: Heads, slots and head dim [K, C, D] of one row.
        dtype: Type of the values.
    """

    name: str
    shape: tuple[int, ...]
    dtype: Stored

    def __post_init__(self) -> None:
        check_shape(f"cache {shortened(self.name)}", self.shape)
        if len(self.shape) != 3 or not re.fullmatch(r"\d{1,5}\.(key|value)", self.name):
            raise ValueError(f"cache {shortened(self.name)} has the shape {list(self.shape)}, expected [K, C, D]")

    @property
    def row_size(self) -> int:
        """Bytes of one row of a batch."""
        return math.prod(self.shape) * BITS[self.dtype] // 8


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineSpec:
    """An engine: its file, the machines it is for, its shapes and its memory.

    Attributes:
        file: Its file name.
        flavour: `tensorrt-rtx` or `tensorrt`.
        version: Version of that library; an engine runs on the version that built it.
        cuda: Major version of CUDA that that library needs of the driver; 0 is not known.
        capabilities: Compute capabilities that it was built for.
        sha256: SHA-256 of the file.
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
    cuda: int = 0

    def __post_init__(self) -> None:
        check_name("the file of the engine", self.file)
        check_hash("the SHA-256 of the engine", self.sha256)
        check_sizes(self, ("max_seq",))
        check_sizes(self, ("weights",), 0, 2**53)
        if not self.profiles or not self.caches:
            raise ValueError("the engine has no profiles, or no caches")


@dataclass(frozen=True, kw_only=True, slots=True)
class TowerEngine:
    """A vision tower's engine. It is for the TensorRT and the GPUs that the decoder's is for.

    Attributes:
        file: Its file name.
        sha256: SHA-256 of the file.
        max_tiles: Tiles that it takes at once at most.
        activations: Bytes of activations and scratch memory for `max_tiles`, as the build computed them.
        weights: Bytes of the weights inside.
    """

    file: str
    sha256: str
    max_tiles: int
    activations: int
    weights: int

    def __post_init__(self) -> None:
        check_name("the file of the vision tower's engine", self.file)
        check_hash("the SHA-256 of the vision tower's engine", self.sha256)
        check_sizes(self, ("max_tiles",))
        check_sizes(self, ("activations", "weights"), 0, 2**53)
