"""Memory of a session on the CPU, and the part of it that a decode step reads, estimated before anything is loaded.

Enters: the geometry, and which weights the graph is given. Leaves: bytes. Invariant: weights and caches are counted
exactly; the process, the graph and the activations follow measurements with ONNX Runtime 1.31 on Linux.
"""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from ..spec.folder import DraftPart, FolderSpec
from ..spec.geometry import ModelSpec, VisionSpec
from ..spec.stored_weights import EXPERT, Weight, slot_bytes
from ..spec.types import BITS
from .backends.onnxruntime_decoder import LONGEST_PIECE
from .backends.onnxruntime_tower import TILES
from .draft import SLACK
from .room import cache_bytes

PROCESS = 76_000_000
"""Bytes of Python, numpy, ONNX Runtime, the kernels and a tokenizer."""

PER_GRAPH_BYTE = 28
"""Bytes that ONNX Runtime holds for each byte of a serialized graph: 8.6 MB with 128 experts in twelve layers took
240 MB."""

PER_HIDDEN, PER_WIDTH = 5, 14
"""Float32 values a token of a piece holds for each hidden channel and for each of the widest feed-forward's, measured.
The allocator keeps some of a first piece's memory and ONNX Runtime plans another block for pieces like it, so the
second number is twice the seven values that SwiGLU computes."""

KEPT_PERCENT = 40
"""Percent of caches and activations that are counted once more, as `kept`; the total was at most a tenth off the memory
taken, in 20 runs of five shapes."""

PER_CHANNEL, PER_MLP = 10, 3
"""Float32 values that the vision tower holds, for each patch of the tiles that it computes at once, for each of its
channels and for each of its feed-forward's. The scores of attention come on top, measured with towers up to Scout's
width."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """Bytes that a session holds at most.

    Attributes:
        process: Python and its libraries.
        graph: The graph's nodes as ONNX Runtime holds them.
        mapped: Weights used as they lie in their files; pages of experts and embedding rows not in use stay away.
        converted: Weights in memory of their own, in another type or layout than in their files.
        kv_cache: Keys and values.
        activations: Values that a piece of tokens computes.
        kept: Earlier caches and activations that the allocator has not given back: between none and all, as measured.
        tower: The vision tower's weights and graph; from the first image on.
        tiles: Values that the tower computes of the tiles that it takes at once; from the first image on.
        draft: The draft's weights, graph, keys and values; the embedding that it shares is the decoder's.
    """

    process: int
    graph: int
    mapped: int
    converted: int
    kv_cache: int
    activations: int
    kept: int
    tower: int = 0
    tiles: int = 0
    draft: int = 0

    @property
    def total(self) -> int:
        """Sum of all: the resident set's size once every expert has been used, and the vision tower if there is one."""
        return sum(getattr(self, field.name) for field in dataclasses.fields(self))


@dataclass(frozen=True, kw_only=True, slots=True)
class StepReads:
    """Bytes that a decode step must read.

    Attributes:
        shared: Weights that every token uses: attention, norms, routers, dense and shared MLPs, head, embedding rows.
        experts: Routed experts that are expected to be chosen.
        kv_cache: Keys and values of the positions seen.
    """

    shared: float
    experts: float
    kv_cache: float

    @property
    def total(self) -> float:
        """Sum of all."""
        return self.shared + self.experts + self.kv_cache


def session_memory(
    spec: FolderSpec, graph_size: int, tower_size: int, max_seq: int, batch: int, draft_size: int = 0
) -> Memory:
    """Estimates the memory of a session of a CPU bundle.

    Args:
        spec: The bundle's spec.
        graph_size: Bytes of the decoder graph's file.
        tower_size: Bytes of the vision tower graph's file; 0 where there is none.
        max_seq: Positions that a sequence may hold.
        batch: Number of rows at once.
        draft_size: Bytes of the draft graph's file; 0 where there is none.
    """
    model = spec.model
    mapped, converted = _held(spec.weights)
    tower = () if spec.vision is None else _held(spec.vision.weights)
    tokens = max(batch, min(LONGEST_PIECE, batch * min(model.chunk or max_seq, max_seq)))
    width = max(model.expert_size if layer.experts else model.dense_size for layer in model.layers)
    kv_cache = cache_bytes(model, batch, max_seq, slot_size(spec))
    activations = tokens * 4 * (PER_HIDDEN * model.hidden_size + PER_WIDTH * width)
    return Memory(
        process=PROCESS,
        graph=graph_size * PER_GRAPH_BYTE,
        mapped=mapped,
        converted=converted,
        kv_cache=kv_cache,
        activations=activations,
        kept=(kv_cache + activations) * KEPT_PERCENT // 100,
        tower=sum(tower) + tower_size * PER_GRAPH_BYTE,
        tiles=0 if spec.vision is None else _tiles(spec.vision.spec),
        draft=0 if spec.draft is None else _draft(spec, spec.draft, max_seq, batch) + draft_size * PER_GRAPH_BYTE,
    )


def step_reads(spec: FolderSpec, sizes: Mapping[str, int], batch: int, past: float) -> StepReads:
    """Estimates the bytes that a decode step of a CPU session must read.

    A batch of B tokens with k experts each is expected to choose E·(1 − (1 − k/E)^B) different ones of a layer's E
    where routing is even. Attention must read the filled slots, the new token's own among them.

    Args:
        spec: The folder's spec.
        sizes: Bytes of each weight as the graph is given it, by initializer name.
        batch: Number of rows.
        past: Tokens in each row's caches before the step; a mean over several steps where that is meant.
    """
    model = spec.model
    chosen = 1 - (1 - model.experts_per_token / max(1, model.experts)) ** batch
    shared, experts = 0.0, 0.0
    for name, size in sizes.items():
        if EXPERT.search(name):
            experts += size * chosen
        elif _is_embedding(name, sizes, model):
            shared += size * batch / model.vocab_size
        else:
            shared += size
    slots = sum((past % layer.chunk if layer.chunk else past) + 1 for layer in model.layers)
    return StepReads(shared=shared, experts=experts, kv_cache=batch * slots * slot_size(spec))


def slot_size(spec: FolderSpec) -> int:
    """Bytes of one position's key and value in one layer of a session on the CPU."""
    size = spec.model.head_dim * BITS[_cache_type(spec)] // 8
    return 2 * spec.model.kv_heads * (slot_bytes(spec.model.head_dim, spec.cache_bits) if spec.cache_bits else size)


def _cache_type(spec: FolderSpec) -> str:
    """The type in which a session on the CPU keeps keys and values."""
    if spec.recipe is not None and spec.recipe.kv_cache != "none":
        return spec.recipe.kv_cache
    is_narrow = spec.model.dtype != "float32" and any(weight.layout == "panels" for weight in spec.weights)
    return "float16" if is_narrow else "float32"


def _held(weights: Sequence[Weight]) -> tuple[int, int]:
    """Bytes of weights used as they lie in their files, and of those in memory of their own."""
    mapped = sum(weight.size for weight in weights if not weight.is_converted)
    return mapped, sum(weight.given_size for weight in weights if weight.is_converted)


def _draft(spec: FolderSpec, draft: DraftPart, max_seq: int, batch: int) -> int:
    """Bytes of the draft's own weights, and of its keys and values."""
    shared = {(weight.file, weight.offset) for weight in spec.weights}
    own = sum(_held([weight for weight in draft.weights if (weight.file, weight.offset) not in shared]))
    model = draft.spec.as_model(spec.model.max_positions)
    is_narrow = draft.spec.dtype != "float32" and any(weight.layout == "panels" for weight in draft.weights)
    slot = 2 * model.kv_heads * model.head_dim * BITS["float16" if is_narrow else "float32"] // 8
    return own + cache_bytes(model, batch, max_seq + SLACK, slot)


def _tiles(vision: VisionSpec) -> int:
    """Bytes of the values that the vision tower computes of the tiles that it takes at once."""
    patches = vision.positions
    scores = vision.heads * patches**2
    return TILES * 4 * (patches * (PER_CHANNEL * vision.hidden_size + PER_MLP * vision.mlp_size) + scores)


def _is_embedding(name: str, names: Collection[str], model: ModelSpec) -> bool:
    """Whether a step reads only the tokens' rows of a weight; a head that is the same initializer reads it whole."""
    stem, _, form = name.partition(":")
    is_head = form == "panels" or (model.tied_embeddings and f"{stem}:panels" not in names)
    return stem.endswith("embed_tokens.weight") and not is_head
