"""Whether what `spec.json` says of weights and graphs is so: nothing is loaded that its own files contradict.

Enters: the weights that a graph is given, the weight files' headers, and a graph's bytes. Leaves: nothing, or a
refusal. Names, types, shapes and places of all three must be the same.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from ..errors import FolderError, shortened
from ..spec.folder import SPEC_NAME, DraftPart, FolderSpec
from ..spec.geometry import ModelSpec
from ..spec.stored_weights import Weight, slot_bytes
from ..spec.types import CODES, TYPES
from .decoder_agreement import FEATURES, GROUP, check_decoder_nodes
from .draft_agreement import check_draft_nodes
from .onnx_outline import Outline, Tensor, read_outline
from .safetensors import Region, Shard, open_shard
from .tower_agreement import PIXELS, check_tower_nodes

NODES, NODES_OF_LAYER = 1000, 200
"""Nodes of a decoder's graph at most: besides its layers', and of each layer. Of each layer ours have some 40."""

CACHE = re.compile(r"(past|present)\.(\d{1,5})\.(key|value)")


def check_weights(weights: Iterable[Weight], files: Mapping[str, Path], *, of_rank: bool = False) -> None:
    """Holds weights against the headers of their files.

    Args:
        weights: The weights.
        files: The files, by name.
        of_rank: Whether they are one rank's, of whose tensors a file may hold more, before and behind them.

    Raises:
        FolderError: One lies elsewhere than its file says, or is of another type or shape there.
    """
    shards: dict[str, Shard] = {}
    for weight in weights:
        if weight.file not in files:
            raise _wrong(weight, "is in a file that the folder does not list")
        if weight.file not in shards:
            shards[weight.file] = open_shard(files[weight.file])
        _check_weight(weight, shards[weight.file].tensors, of_rank=of_rank)


def _check_weight(weight: Weight, tensors: Mapping[str, Region], *, of_rank: bool) -> None:
    region, dtype, expected = _find(weight, tensors), CODES[weight.dtype], weight.shape
    if weight.is_made:
        dtype, expected = CODES["uint8" if weight.layout == "panels" else weight.convert], weight.given_shape
    elif weight.dtype in ("int4", "uint4") and expected:
        expected = (*expected[:-1], expected[-1] // 2)
    if region.dtype != dtype:
        raise _wrong(weight, f"is {dtype}, its file has it as {region.dtype}")
    if of_rank and _is_portion(weight, expected, region):
        return
    if region.shape != expected:
        raise _wrong(weight, f"has the shape {shortened(list(expected))}, in its file {shortened(list(region.shape))}")
    if weight.offset != region.offset:
        raise _wrong(weight, f"lies at {weight.offset}, in its file at {region.offset}")


def _is_portion(weight: Weight, shape: tuple[int, ...], whole: Region) -> bool:
    """Whether a weight is some rows of a tensor, one behind another: what a rank reads of it in place."""
    if len(shape) != len(whole.shape) or shape == whole.shape or not math.prod(shape):
        return False
    axis = next((index for index, size in enumerate(shape) if size != 1), len(shape) - 1)
    while axis and shape[axis:] == whole.shape[axis:]:
        axis -= 1
    row = whole.size // math.prod(whole.shape) * math.prod(shape[axis + 1 :])
    start, end = weight.offset - whole.offset, weight.offset - whole.offset + row * shape[axis]
    return shape[axis + 1 :] == whole.shape[axis + 1 :] and 0 <= start <= end <= whole.size and start % row == 0


def _find(weight: Weight, tensors: Mapping[str, Region]) -> Region:
    """A weight's tensor in its file."""
    for name in (weight.name, weight.name.partition(":")[0]):
        if name in tensors:
            return tensors[name]
    raise _wrong(weight, "is not in its file")


def _wrong(weight: Weight, what: str) -> FolderError:
    return FolderError(
        f"weight {shortened(weight.name)} of {shortened(weight.file)} {what}: spec.json, the graph and the weights do "
        "not belong together, write the folder again"
    )


def check_decoder(graph: bytes, weights: Sequence[Weight], spec: FolderSpec, path: Path) -> None:
    """Holds a lowered decoder's graph against its weights and all that the spec says of it.

    Raises:
        FolderError: The graph is damaged, or another model's.
    """
    outline, model = _checked_outline(graph, weights, path), spec.rank_model
    try:
        _check_caches(outline, model, spec.cache_bits)
        _check_attention(outline, model)
        logits = outline.outputs.get("logits", Tensor(0, None))
        if logits.dims is None or len(logits.dims) != 3 or logits.dims[-1] != model.vocab_size:
            raise ValueError(f"logits of {shortened(logits.dims)}, the vocabulary has {model.vocab_size}")
        if spec.draft is not None:
            _check_last(outline.outputs, "draft_states", len(spec.draft.spec.states) * model.hidden_size)
        check_decoder_nodes(outline, weights, spec)
    except (ValueError, ArithmeticError) as error:
        raise _foreign(path, error) from error


def check_draft(graph: bytes, weights: Sequence[Weight], part: DraftPart, model: ModelSpec, path: Path) -> None:
    """Holds a lowered draft's graph against its weights, its geometry and the model's.

    Raises:
        FolderError: The graph is damaged, or another draft's.
    """
    outline, draft = _checked_outline(graph, weights, path), part.spec
    own = draft.as_model(model.max_positions)
    try:
        _check_caches(outline, own, 0)
        _check_attention(outline, own)
        width = len(draft.states) * model.hidden_size
        for values, name, size in (
            (outline.inputs, "draft_states", width),
            (outline.inputs, "hidden", draft.hidden_size),
            (outline.outputs, "next_hidden", draft.hidden_size),
            (outline.outputs, "logits", draft.vocab_size),
        ):
            _check_last(values, name, size)
        check_draft_nodes(outline, weights, part, model)
    except (ValueError, ArithmeticError) as error:
        raise _foreign(path, error) from error


def _check_last(values: Mapping[str, Tensor], name: str, size: int) -> None:
    """An input or output of the graph has three dimensions, the last of this size."""
    dims = values.get(name, Tensor(0, None)).dims
    if dims is None or len(dims) != 3 or dims[-1] != size:
        raise ValueError(f"{name} of {shortened(dims)}, expected {size} each")


def check_tower(graph: bytes, weights: Sequence[Weight], spec: FolderSpec, path: Path) -> None:
    """Holds a lowered vision tower's graph against its weights and geometry.

    Raises:
        FolderError: The graph is damaged, or another tower's.
    """
    outline, hidden = _checked_outline(graph, weights, path), spec.model.hidden_size
    assert spec.vision is not None
    vision = spec.vision.spec
    sides = {
        "pixels": (outline.inputs.get(PIXELS, Tensor(0, None)), (3, vision.image_size, vision.image_size)),
        "image features": (outline.outputs.get(FEATURES, Tensor(0, None)), (hidden,)),
    }
    try:
        for name, (found, expected) in sides.items():
            if found.dims is None or found.dims[1:] != expected:
                raise ValueError(f"{name} of {shortened(found.dims)}, expected {list(expected)} each")
        check_tower_nodes(outline, weights, vision, hidden, spec.recipe)
    except (ValueError, ArithmeticError) as error:
        raise _foreign(path, error) from error


def _foreign(path: Path, error: Exception) -> FolderError:
    return FolderError(f"{path}: not the graph that spec.json describes ({error}): write the folder again")


def _checked_outline(graph: bytes, weights: Sequence[Weight], path: Path) -> Outline:
    """The graph's outline, its operators known and its initializers those that are supplied."""
    try:
        outline = read_outline(graph)
        for node in outline.nodes:
            if node.op == "AllReduce" and (node.inputs[1:] != (GROUP,) or not _is_given(outline, GROUP)):
                raise ValueError("an AllReduce over other memory than the graph's input 'group'")
        given = {weight.name: weight for weight in weights}
        outside = {name: tensor for name, tensor in outline.weights.items() if tensor.location}
        for name, tensor in outside.items():
            if tensor.location != SPEC_NAME or name not in given:
                raise ValueError(f"the weight {shortened(name)} is not among those of spec.json")
            _check_given(given[name], tensor)
        if missing := sorted(given.keys() - outside.keys()):
            raise ValueError(f"the weight {shortened(missing[0])} of spec.json is not in the graph")
    except (ValueError, RecursionError) as error:
        raise _foreign(path, error) from error
    return outline


def _is_given(outline: Outline, name: str) -> bool:
    """Whether a value comes from whoever runs the graph alone."""
    return name in outline.inputs and name not in outline.weights


def _check_given(weight: Weight, tensor: Tensor) -> None:
    dtype = TYPES["uint8" if weight.layout == "panels" else weight.convert].onnx
    if tensor.dtype != dtype or tensor.dims != weight.given_shape:
        raise ValueError(
            f"the weight {shortened(weight.name)} is type {tensor.dtype} {shortened(list(tensor.dims or ()))}, of "
            f"spec.json type {dtype} {shortened(list(weight.given_shape))}"
        )


def _check_caches(outline: Outline, model: ModelSpec, cache_bits: int) -> None:
    """The caches are those of each layer, past and present alike."""
    slot = slot_bytes(model.head_dim, cache_bits) if cache_bits else model.head_dim
    for side, values in (("past", outline.inputs), ("present", outline.outputs)):
        found = {name for name in values if (match := CACHE.fullmatch(name)) and match[1] == side}
        expected = {f"{side}.{layer}.{kind}" for layer in range(len(model.layers)) for kind in ("key", "value")}
        if found != expected:
            raise ValueError(f"{len(found) // 2} layers of caches, spec.json has {len(model.layers)}")
        for name in sorted(found):
            dims = values[name].dims
            if dims is None or len(dims) != 4 or (dims[1], dims[3]) != (model.kv_heads, slot):
                raise ValueError(f"{name} of {shortened(dims)}, expected {model.kv_heads} heads of {slot}")
            if values[name].dtype != outline.inputs["past.0.key"].dtype:
                raise ValueError(f"{name} of another type than the other caches")


def _check_attention(outline: Outline, model: ModelSpec) -> None:
    """Each layer's attention has the geometry's heads and chunk, and no more nodes are there than layers need."""
    most = NODES + len(model.layers) * NODES_OF_LAYER
    if len(outline.nodes) > most:
        raise ValueError(f"{len(outline.nodes)} nodes, expected at most {most} of such a model")
    nodes = [node for node in outline.nodes if node.op == "GroupedQueryAttention"]
    if len(nodes) != len(model.layers):
        raise ValueError(f"{len(nodes)} layers of attention, spec.json has {len(model.layers)}")
    for number, (node, layer) in enumerate(zip(nodes, model.layers, strict=True)):
        expected = {"heads": model.heads, "kv_heads": model.kv_heads, "chunk": layer.chunk}
        for name, value in expected.items():
            if (found := node.attributes.get(name, 0)) != value:
                raise ValueError(f"layer {number} has {name} {shortened(found)}, spec.json {value}")
    for node in outline.nodes:
        chosen = node.attributes.get("top_k", 0) if node.op.endswith("MoeDispatch") else model.experts_per_token
        if chosen != model.experts_per_token:
            raise ValueError(f"{shortened(chosen)} experts a token, spec.json {model.experts_per_token}")
