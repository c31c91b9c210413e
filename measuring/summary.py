"""A folder in numbers: for `arriero inspect`, as JSON or as tables.

Enters: a model or bundle folder; only its `spec.json` and the lists of fused layers are read. Nothing is loaded.
"""

from collections import Counter
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import FolderError, shortened, shortened_text
from ..files.folders import LAYERS, TOWER_LAYERS, read_spec
from ..files.reading import read_text
from ..spec.built_engine import EngineSpec
from ..spec.fields import decode
from ..spec.folder import FolderSpec, VisionPart
from ..spec.fused_layers import Layer
from ..spec.geometry import ModelSpec, VisionSpec
from ..spec.json_text import parse_json
from ..spec.parameters import count_parameters
from ..spec.recipe_words import bits, in_words
from ..spec.types import BITS, Stored
from .group_summary import summarise_group

QUIET = ("shape_call", "signal", "wait", "copy", "NoOp", "Constant", "ShapeHostToDevice")
"""Kinds of layers that move or order things and compute nothing."""


def summarise(
    folder: str | Path, *, every_layer: bool = False, max_seq: int | None = None, batch: int = 1
) -> dict[str, Any]:
    """Describes a folder.

    Args:
        folder: A model or bundle folder, or a group of them.
        every_layer: Whether an engine's fused layers are listed one by one, beside how many there are of each kind.
        max_seq: Tokens of a sequence that a CPU bundle's memory is estimated for; None takes what a session takes.
        batch: Rows at once that it is estimated for.

    Returns:
        JSON-ready: the folder's kind and source, the model's geometry, its KV cache, its vision tower, of a CPU bundle
        the memory that a session takes, and of an engine its profiles with the memory each needs and its fused layers.
        Of a group the same of each rank, with the bytes of its weights, and the sums that a step computes over ranks.

    Raises:
        FolderError: The folder is not one of Arriero's, or damaged.
        SessionError: `max_seq` or `batch` is out of range.
    """
    path = Path(folder)
    spec = read_spec(path)
    own = spec if spec.kind == "group" else replace(spec, model=spec.rank_model)
    found = _describe(path, own, every_layer=every_layer, max_seq=max_seq, batch=batch)
    if spec.kind == "group":
        describe = partial(_describe, every_layer=every_layer, max_seq=max_seq, batch=batch)
        found["ranks"] = summarise_group(path, spec, describe)
        for name in ("kv_cache", "weight_files"):
            del found[name]  # those are the ranks'
    return found


def _describe(path: Path, spec: FolderSpec, *, every_layer: bool, max_seq: int | None, batch: int) -> dict[str, Any]:
    found: dict[str, Any] = {
        "kind": spec.kind,
        "version": spec.version,
        "target": spec.target,
        "source": spec.source,
        "model": geometry(spec.model),
        "quantised": _quantised(spec),
        "parameters": dict(zip(("total", "active"), count_parameters(*_geometries(spec)), strict=True)),
        "weight_files": {"count": len(spec.weight_files), "bytes": sum(file.size for file in spec.weight_files)},
        "kv_cache": _cache(spec),
        **companions(path),
    }
    if spec.vision is not None:
        found["vision"] = _vision(path, spec.model, spec.vision, every_layer=every_layer)
    if spec.draft is not None:
        found["draft"] = asdict(spec.draft.spec) | {"format": spec.draft.format}
    if spec.target == "cpu" and spec.kind == "bundle":
        found["memory"] = _memory(path, spec, max_seq, batch)
    if spec.engine is not None:
        found["engine"] = _with_totals(_engine(path, spec, spec.engine))
        layers = _read_layers(path / LAYERS)
        found["layers"] = _counted(layers)
        if every_layer:
            found["every_layer"] = layers
    return found


def companions(folder: Path) -> dict[str, bool]:
    """Whether the files that turn text and images into a model's inputs lie in a folder."""
    return {
        "has_tokenizer": (folder / "tokenizer.json").is_file(),
        "has_preprocessor": any((folder / n).is_file() for n in ("preprocessor_config.json", "processor_config.json")),
    }


def _geometries(spec: FolderSpec) -> tuple[ModelSpec, VisionSpec | None]:
    return spec.model, None if spec.vision is None else spec.vision.spec


def _quantised(spec: FolderSpec) -> dict[str, Any] | None:
    """How a folder is quantised, its caches too; None where neither is."""
    recipe = spec.recipe
    if recipe is None and not spec.cache_bits:
        return None
    caches = f"int{spec.cache_bits}" if spec.cache_bits else "none" if recipe is None else recipe.kv_cache
    return {
        "words": in_words(recipe),
        "format": "none" if recipe is None else recipe.format,
        "weight_bits": bits(recipe, BITS[spec.model.dtype]),
        "kv_cache": caches,
        "unmeasured_experts": len(spec.unmeasured),
        "recipe": None if recipe is None else asdict(recipe),
    }


def geometry(model: ModelSpec) -> dict[str, Any]:
    """A decoder's geometry."""
    return {
        "layers": len(model.layers),
        "chunked_layers": sum(layer.chunk > 0 for layer in model.layers),
        "expert_layers": sum(layer.experts for layer in model.layers),
        "hidden_size": model.hidden_size,
        "heads": model.heads,
        "kv_heads": model.kv_heads,
        "head_dim": model.head_dim,
        "experts": model.experts,
        "experts_per_token": model.experts_per_token,
        "vocab_size": model.vocab_size,
        "max_positions": model.max_positions,
        "chunk": model.chunk,
        "dtype": model.dtype,
    }


def _cache(spec: FolderSpec) -> dict[str, int]:
    """Bytes of keys and values a token; those of chunked layers stop growing at the chunk's length."""
    from ..runtime.memory import slot_size

    dtypes = {cache.name: cache.dtype for cache in spec.engine.caches} if spec.engine else {}
    default: Stored = spec.model.dtype
    if spec.recipe is not None and spec.recipe.kv_cache != "none":
        default = spec.recipe.kv_cache
    per_token = {"chunked_bytes_per_token": 0, "full_bytes_per_token": 0}
    for index, layer in enumerate(spec.model.layers):
        bits = sum(BITS[dtypes.get(f"{index}.{kind}", default)] for kind in ("key", "value"))
        name = "chunked_bytes_per_token" if layer.chunk else "full_bytes_per_token"
        per_token[name] += (
            slot_size(spec) if spec.target == "cpu" else spec.model.kv_heads * spec.model.head_dim * bits // 8
        )
    return {"bytes_per_token": sum(per_token.values()), **per_token}


def _memory(folder: Path, spec: FolderSpec, max_seq: int | None, batch: int) -> dict[str, int]:
    """Memory that a session on the CPU takes, part by part and in all."""
    from ..runtime.backends.pages import in_huge_pages
    from ..runtime.memory import session_memory
    from ..runtime.state import Limits

    limits = Limits.of(spec.model, max_seq, batch)
    graph_size = _size(folder / spec.graph)
    tower_size = 0 if spec.vision is None or not spec.vision.graph else _size(folder / spec.vision.graph)
    draft_size = 0 if spec.draft is None else _size(folder / spec.draft.graph)
    memory = session_memory(spec, graph_size, tower_size, limits.max_seq, batch, draft_size)
    own = sum(weight.given_size for weight in in_huge_pages(spec.weights, "huge"))
    return {"max_seq": limits.max_seq, "batch": batch, **asdict(memory), "total": memory.total, "huge_pages": own}


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise FolderError(f"{path}: {error.strerror}: build the bundle again") from error


def _vision(folder: Path, model: ModelSpec, vision: VisionPart, *, every_layer: bool) -> dict[str, Any]:
    """The vision tower's geometry, and of its engine the memory on the GPU and the fused layers."""
    spec = vision.spec
    found: dict[str, Any] = {
        "layers": spec.layers,
        "hidden_size": spec.hidden_size,
        "heads": spec.heads,
        "image_size": spec.image_size,
        "features": spec.features,
    }
    engine = vision.engine
    if engine is None:
        return found
    outside = sum(weight.given_size for weight in vision.weights)
    of_a_tile = 3 * spec.image_size**2 * 4 + spec.features * model.hidden_size * BITS[model.dtype] // 8
    layers = _read_layers(folder / TOWER_LAYERS)
    found["engine"] = {
        "bytes": _size(folder / engine.file),
        "max_tiles": engine.max_tiles,
        "weights_inside_bytes": engine.weights,
        "weights_outside_bytes": outside,
        "activations_bytes": engine.activations,
        "tiles_bytes": engine.max_tiles * of_a_tile,
        "total_bytes": engine.weights + outside + engine.activations + engine.max_tiles * of_a_tile,
    }
    found["fused_layers"] = _counted(layers)
    if every_layer:
        found["every_layer"] = layers
    return found


def _engine(folder: Path, spec: FolderSpec, engine: EngineSpec) -> dict[str, Any]:
    row = sum(cache.row_size for cache in engine.caches)
    outside = sum(weight.given_size for weight in spec.weights)
    file = folder / engine.file
    return {
        "flavour": engine.flavour,
        "version": engine.version,
        "capabilities": list(engine.capabilities),
        "bytes": file.stat().st_size if file.exists() else None,
        "attention": engine.attention,
        "experts": engine.experts,
        "placement": engine.placement,
        "weights_inside_bytes": engine.weights,
        "weights_outside_bytes": outside,
        "max_seq": engine.max_seq,
        "kernels": len(engine.kernels),
        "profiles": [
            {
                "name": profile.name,
                "max_batch": profile.max_batch,
                "max_length": profile.max_length,
                "activations_bytes": profile.activations,
                "logits_bytes": profile.max_batch * profile.max_logits * spec.model.vocab_size * 4,
                "kv_cache_bytes": row * profile.max_batch,
            }
            for profile in engine.profiles
        ],
    }


def _with_totals(engine: dict[str, Any]) -> dict[str, Any]:
    """An engine with each profile's memory in all; that of activations is shared, and the larger profile's."""
    activations = max(profile["activations_bytes"] for profile in engine["profiles"])
    weights = engine["weights_inside_bytes"] + engine["weights_outside_bytes"]
    for profile in engine["profiles"]:
        profile["total_bytes"] = activations + weights + profile["kv_cache_bytes"] + profile["logits_bytes"]
    return engine


def _read_layers(path: Path) -> list[dict[str, Any]]:
    """An engine's fused layers, those that compute nothing left out."""
    remedy = "build the bundle again"
    try:
        layers: Any = parse_json(read_text(path, remedy=remedy, folder=path.parent))
        if not isinstance(layers, list):
            raise ValueError(f"{shortened(layers)} is no list")
        for layer in layers:
            decode(Layer, layer)
    except (FileNotFoundError, ValueError, TypeError) as error:
        raise FolderError(f"{path}: cannot be read ({shortened_text(str(error), 150)}): {remedy}") from error
    return [layer for layer in layers if layer["kind"] not in QUIET]


def _counted(layers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """How many layers there are of each kind and types."""
    counted = Counter((layer["kind"], _types(layer["inputs"]), _types(layer["outputs"])) for layer in layers)
    names = ("kind", "inputs", "outputs", "count")
    return [dict(zip(names, (*key, count), strict=True)) for key, count in counted.most_common()]


def _types(tensors: list[dict[str, Any]]) -> str:
    """The types among tensors, each once, in order."""
    return ", ".join(dict.fromkeys(tensor["dtype"] for tensor in tensors))
