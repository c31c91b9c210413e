"""A model folder quantised by plain rounding, in seconds: for what is timed, where calibration's quality is no matter.

The folder has the form that `arriero calibrate` writes: the same graph, types and scales, absolute maxima to nearest.
Caches' scales are made for keys and values of at most 8.
"""

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path

import onnx
import onnx_ir as ir
import torch
from torch import Tensor

from arriero.calibration.recipe import PRESETS
from arriero.calibration.shard import pack_int4, write_shard
from arriero.export.choice import choose, units
from arriero.export.quantised import quantise_graph
from arriero.export.walk import Weights
from arriero.folder import SPEC, carry_files, find_files, read_spec
from arriero.geometry import ModelSpec
from arriero.plugins.quantisation import LARGEST
from arriero.shards import identity, open_shard
from arriero.spec import Recipe, WeightFile

LARGEST_CACHED = 8.0


def quantise_plainly(model: Path, out: Path, recipe: Recipe) -> Path:
    """Writes a quantised model folder of an unquantised one with dynamic activations."""
    out.mkdir(parents=True)
    spec = read_spec(model)
    weights = Weights(find_files(model, spec.weight_files, None))
    shards = []
    for number, tensors in enumerate(_portions(spec.model, recipe, weights)):
        path = out / f"model-{number:05}.safetensors"
        write_shard(path, tensors)
        shards.append(open_shard(path))
    places = {name: (shard.path.name, region) for shard in shards for name, region in shard.tensors.items()}
    graph = ir.from_proto(onnx.load(model / spec.graph, load_external_data=False))
    quantise_graph(graph, spec.model, recipe, places, out)
    ir.save(graph, out / spec.graph)
    carry_files(model, out)
    files = [WeightFile(name=each.path.name, path="", size=each.size, identity=identity(each.path)) for each in shards]
    record = dataclasses.replace(spec, source=str(model), weight_files=tuple(files), recipe=recipe)
    (out / SPEC).write_text(record.to_json(), "utf-8")
    return out


def _portions(spec: ModelSpec, recipe: Recipe, weights: Weights) -> Iterator[dict[str, Tensor]]:
    """The quantised tensors of each layer, and those around the layers."""
    quantised = {name for name, _ in units(spec) if choose(recipe, name).format != "none"}
    names = weights.full_names
    portions = [[name for name in names if name.startswith(f"layers.{index}.")] for index in range(len(spec.layers))]
    portions.append([name for name in names if not name.startswith("layers.")])
    for index, portion in enumerate(portions):
        tensors: dict[str, Tensor] = {}
        for name in portion:
            unit = name.removesuffix(".weight") if name.endswith(".weight") else name.rpartition(".")[0]
            if unit not in quantised:
                tensors[names[name]] = weights.stored(name)
                continue
            stored, scale = rounded(weights.stored(name), recipe, is_expert=not name.endswith(".weight"))
            tensors[names[name]], tensors[f"{names[name]}_scale"] = stored, scale
        if recipe.kv_cache != "none" and index < len(spec.layers):
            scale_KD = torch.full((spec.kv_heads, spec.head_dim), LARGEST_CACHED / LARGEST[recipe.kv_cache])
            for part in ("key", "value"):
                tensors[f"model.layers.{index}.self_attn.{part}_scale"] = scale_KD
        yield tensors


def rounded(weight: Tensor, recipe: Recipe, *, is_expert: bool) -> tuple[Tensor, Tensor]:
    """Stored values and scales of a linear [N, K], or of stacked experts [E, K, N]."""
    axis, kind = (-2 if is_expert else -1), recipe.format
    count = weight.shape[axis]
    blocks = weight.float().unflatten(axis, (-1, recipe.group_size if kind == "int4" else count))
    scale = blocks.abs().amax(axis, keepdim=True) / LARGEST[kind]
    values = (blocks / scale).round_().to(torch.int8).view(weight.shape)
    scale = scale.squeeze(axis)
    if kind == "int4":
        return pack_int4(values), scale if is_expert else scale.to(weight.dtype)
    return values, scale if is_expert else scale[:, 0].contiguous()


if __name__ == "__main__":
    source, target, name, *cache = sys.argv[1:]
    changes = {"activations": "dynamic", "kv_cache": cache[0] if cache else None}
    quantise_plainly(Path(source), Path(target), PRESETS[name](**changes))
