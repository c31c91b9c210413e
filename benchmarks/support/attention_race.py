"""Llama 4's attention raced: our kernels over three kinds of cache, and PyTorch's back ends. For `kernel_speed`.

Decoding attends all of the past, as Llama 4's full layers do, over a cache made for 32k; prefill is the first piece of
a chunk, with RoPE and norm. The oracle is PyTorch's attention over queries prepared here in float32, and over the cache
that our kernels have written, whose new keys are checked too.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from arriero.plugins.gqa.op import Attributes
from arriero.plugins.gqa.plan import LARGEST, Geometry, Plan
from arriero.plugins.launch import Kernels

from .gpu_race import Contestant, Ours, Row, able, distance, race, scratch, sets_for

HEADS, KV_HEADS, HEAD_DIM = 40, 8, 128
SIZES = {"heads": HEADS, "kv_heads": KV_HEADS, "scale": HEAD_DIM**-0.5}
CHUNKED = Attributes(**SIZES, chunk=8192, qk_norm_eps=1e-5)
FULL = Attributes(**SIZES, temperature_scale=0.1, temperature_floor=8192.0)
FULL_CAPACITY = 32768 + 128
CACHES = {"none": torch.bfloat16, "int8": torch.int8, "fp8": torch.float8_e4m3fn}
MOST = {"none": 1e-2, "int8": 2e-2, "fp8": 2e-2}
MOST_KEY = {"none": 1e-2, "int8": 2e-2, "fp8": 5e-2}
"""How far new keys may be from the prepared ones: half a step of their type."""

BACK_ENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION}

Tensors = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """A call's: rows, tokens in their caches, new tokens a row."""

    batch: int
    past: int
    length: int

    def __str__(self) -> str:
        rows = f", {self.batch} rows" if self.batch > 1 else ""
        return f"decode{rows}, past {self.past}" if self.length == 1 else f"prefill {self.length}"

    @property
    def layer(self) -> Attributes:
        """A full layer's attributes in decoding, a chunked one's in prefill."""
        return FULL if self.length == 1 else CHUNKED

    @property
    def capacity(self) -> int:
        """Slots of the cache."""
        return FULL_CAPACITY if self.length == 1 else CHUNKED.chunk

    @property
    def seen(self) -> int:
        """Slots that the last new token sees."""
        return self.past + self.length

    def size(self, element: int) -> float:
        """Bytes that a call reads and writes: the caches' that it sees, and the activations'."""
        cache = 2 * self.batch * KV_HEADS * self.seen * HEAD_DIM * element
        return cache + 2 * self.batch * self.length * HEAD_DIM * 2 * (HEADS + KV_HEADS)

    @property
    def operations(self) -> float:
        """Floating-point operations of the two products, over what each token sees."""
        pairs = self.length * self.past + self.length * (self.length + 1) / 2
        return 4 * self.batch * HEADS * HEAD_DIM * pairs


def shapes(quick: bool) -> list[Shape]:
    pasts, batches, lengths = (
        ((8192,), (1, 32), (2048,)) if quick else ((1024, 8192, 32768), (1, 8, 32), (512, 2048, 8192))
    )
    decode = [Shape(batch=batch, past=past, length=1) for batch in batches for past in pasts]
    return decode + [Shape(batch=1, past=0, length=length) for length in lengths]


def plan(layer: Attributes, cache: str, capability: int) -> Plan:
    rope = layer.chunk > 0
    return Plan(Geometry(attributes=layer, head_dim=HEAD_DIM, rope=rope, dtype="bf16", cache=cache), capability)  # type: ignore[arg-type]


def plans(capability: int) -> Iterator[Plan]:
    for layer in (CHUNKED, FULL):
        for cache in CACHES:
            yield plan(layer, cache, capability)


def rows(shape: Shape, kernels: Kernels, say: Callable[[str], None]) -> Iterator[Row]:
    """One row a kind of cache; the peers run beside each in bfloat16."""
    sets = [inputs(shape) for _ in range(sets_for(shape.size(1)))]
    ours = [Contestant(name=cache, calls=calls_of(shape, cache, sets, kernels)) for cache in CACHES]
    for each in ours:
        for call in each.calls:
            call()
    peer_sets = [(prepared(each["query"], HEADS, shape, each, heats=True), *seen(each, shape)) for each in sets]
    errors = {each.name: error_of(each.calls[0], shape, each.name, peer_sets[0][0]) for each in ours}
    peers, refusals = able(peers_of(peer_sets, shape))
    for name, reason in refusals.items():
        say(f"{name} does not run attention, {shape}: {reason}")
    right = [each for each in ours if errors[each.name] < MOST[each.name]]
    micros = race([*right, *peers])
    for cache, dtype in CACHES.items():
        yield Row(
            op="attention",
            shape=str(shape),
            kind=f"{cache} cache" if cache != "none" else "bf16 cache",
            error=errors[cache],
            most=MOST[cache],
            bytes=shape.size(dtype.itemsize),
            operations=shape.operations,
            is_bound_by_bytes=shape.length == 1,
            ours=micros.get(cache),
            peers={each.name: micros[each.name] for each in peers},
        )


def calls_of(shape: Shape, cache: str, sets: list[Tensors], kernels: Kernels) -> list[Ours]:
    """Our kernels over each set, its caches stored in that kind."""
    sizes = (shape.batch, shape.length, shape.capacity)
    layer_plan = plan(shape.layer, cache, kernels.capability)
    space = scratch(layer_plan.workspace(*sizes))
    return [Ours(kernels, in_kind(each, cache) | space, lambda at: layer_plan.launches(at, *sizes)) for each in sets]


def inputs(shape: Shape) -> Tensors:
    """The op's inputs, caches in bfloat16; and its output, NaN until it is written."""

    def normal(*sizes: int) -> Tensor:
        return torch.empty(sizes, dtype=torch.bfloat16).normal_()

    cache = (shape.batch, KV_HEADS, shape.capacity, HEAD_DIM)
    tensors = {
        "query": normal(shape.batch, shape.length, HEADS * HEAD_DIM),
        "key": normal(shape.batch, shape.length, KV_HEADS * HEAD_DIM),
        "value": normal(shape.batch, shape.length, KV_HEADS * HEAD_DIM),
        "key_cache": normal(*cache),
        "value_cache": normal(*cache),
        "past_lengths": torch.full((shape.batch,), shape.past, dtype=torch.int32),
        "output": torch.full((shape.batch, shape.length, HEADS * HEAD_DIM), torch.nan, dtype=torch.bfloat16),
    }
    if shape.layer.chunk:
        tensors["inv_freq"] = 500000.0 ** -(torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    return tensors


def in_kind(tensors: Tensors, cache: str) -> Tensors:
    """The inputs with caches as that kind stores them, and their scales."""
    if cache == "none":
        return tensors
    stored = {**tensors, "output": torch.full_like(tensors["output"], torch.nan)}
    for name in ("key", "value"):
        step_KD = torch.empty(KV_HEADS, HEAD_DIM).uniform_(0.8, 1.2) * (4.5 / LARGEST[cache])
        whole = tensors[f"{name}_cache"] / step_KD[:, None].bfloat16()
        whole = whole.round_() if cache == "int8" else whole
        stored[f"{name}_cache"] = whole.clamp_(-LARGEST[cache], LARGEST[cache]).to(CACHES[cache])
        stored[f"{name}_scale"] = step_KD
    return stored


def seen(tensors: Tensors, shape: Shape) -> tuple[Tensor, Tensor]:
    """Keys and values that the call sees, [B, K, N, D] in bfloat16: views where they are stored so."""
    found = []
    for name in ("key", "value"):
        cache_BKND = tensors[f"{name}_cache"][:, :, : shape.seen]
        if f"{name}_scale" in tensors:
            cache_BKND = cache_BKND.bfloat16() * tensors[f"{name}_scale"][:, None].bfloat16()
        found.append(cache_BKND)
    return found[0], found[1]


def prepared(x_BSF: Tensor, heads: int, shape: Shape, tensors: Tensors, *, heats: bool = False) -> Tensor:
    """Queries or keys as they are attended, [B, heads, S, D]: rotated in pairs and normed; queries are heated too."""
    layer = shape.layer
    x_BHSD = x_BSF.view(shape.batch, shape.length, heads, HEAD_DIM).transpose(1, 2).float()
    position_S = torch.arange(shape.past, shape.seen, dtype=torch.float64)
    if layer.chunk:
        turned = torch.polar(torch.ones(()).double(), position_S[:, None] * tensors["inv_freq"].double())
        pairs = torch.view_as_complex(x_BHSD.reshape(*x_BHSD.shape[:-1], -1, 2))
        x_BHSD = torch.view_as_real(pairs * turned.to(torch.complex64)).flatten(-2).bfloat16().float()
    if layer.qk_norm_eps:
        x_BHSD = x_BHSD * torch.rsqrt(x_BHSD.square().mean(-1, keepdim=True) + layer.qk_norm_eps)
    if heats and layer.temperature_scale:
        ahead_S = torch.floor((position_S + 1) / layer.temperature_floor)
        x_BHSD = x_BHSD * (torch.log(ahead_S + 1) * layer.temperature_scale + 1).float()[:, None]
    return x_BHSD.bfloat16()


def error_of(call: Ours, shape: Shape, cache: str, query_BHSD: Tensor) -> float:
    """The output's distance from PyTorch's over the same cache; infinite where the new keys are wrong."""
    keys, values = seen(call.tensors, shape)
    expected_key = prepared(call.tensors["key"], KV_HEADS, shape, call.tensors)
    if not distance(keys[:, :, shape.past :], expected_key) < MOST_KEY[cache]:
        return torch.inf
    expected = attend(SDPBackend.FLASH_ATTENTION, query_BHSD, keys, values, shape.length > 1)
    return distance(call.tensors["output"], expected.transpose(1, 2).reshape(call.tensors["output"].shape))


def attend(back_end: SDPBackend, query: Tensor, keys: Tensor, values: Tensor, causal: bool) -> Tensor:
    with sdpa_kernel(back_end):
        return scaled_dot_product_attention(
            query, keys, values, is_causal=causal, scale=FULL.scale, enable_gqa=query.shape[1] != keys.shape[1]
        )


def peers_of(sets: list[tuple[Tensor, Tensor, Tensor]], shape: Shape) -> Iterator[Contestant]:
    """Each back end; in decoding also with the heads of a kv head as rows of one, so that they share its cache."""
    for name, back_end in BACK_ENDS.items():
        yield Contestant(name=name, calls=[partial(attend, back_end, *each, shape.length > 1) for each in sets])
        if shape.length == 1:
            stacked = [(query.view(shape.batch, KV_HEADS, -1, HEAD_DIM), *caches) for query, *caches in sets]
            yield Contestant(
                name=f"{name}, heads as rows", calls=[partial(attend, back_end, *each, False) for each in stacked]
            )
