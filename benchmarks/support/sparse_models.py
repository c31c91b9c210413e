"""Full-size quantised model folders that take no disk: a whole graph over safetensors files whose data is one hole."""

import dataclasses
import struct
from collections import defaultdict
from pathlib import Path

import onnx_ir as ir

from arriero.export.quantised_graph import PLACED, quantise_graph, short_name
from arriero.export.rank_graph import external
from arriero.files.folders import SPEC, carry_files, read_spec
from arriero.files.safetensors import encode_header, identity, open_shard
from arriero.plugins.canonical_graph import read_graph
from arriero.spec.choice import choose
from arriero.spec.recipe import Override, Recipe
from arriero.spec.stored_weights import WeightFile
from arriero.spec.types import CODES

CODES_BY_TYPE = {dtype: code for code, dtype in PLACED.items()}
Tensors = dict[str, tuple[str, tuple[int, ...]]]


def write_sparse_fp8(model: Path, out: Path) -> Path:
    """Writes the model folder that `calibrate --recipe fp8 --activations dynamic` would, with zeros for weights.

    The scales of all but the experts are ones, since TensorRT reads them and takes no zeros.
    The vision tower stays as it is, as in the published FP8 checkpoints.
    """
    spec = read_spec(model)
    recipe = Recipe(format="fp8", activations="dynamic", overrides=(Override(pattern="vision_model.*", format="none"),))
    out.mkdir()
    graphs = {name: read_graph(model / name) for name in (spec.graph, *([spec.vision.graph] if spec.vision else []))}
    layers: dict[str, Tensors] = defaultdict(dict)
    for graph in graphs.values():
        for name, tensor in external(graph):
            layer = name.partition("layers.")[2].partition(".")[0] or "rest"
            tower = "vision-" if name.startswith("vision_model.") else ""
            layers[f"{tower}{layer}"] |= _stored(name, tensor, recipe)
    places, files = {}, []
    for layer, tensors in layers.items():
        path = out / f"quantised-{layer}.safetensors"
        size = sum(_size(code, shape) for code, shape in tensors.values())
        header = encode_header(tensors)
        path.write_bytes(header)
        with path.open("r+b") as file:
            file.truncate(len(header) + size)
            for name, region in open_shard(path).tensors.items():
                if name.endswith("_scale") and len(region.shape) == 1:
                    file.seek(region.offset)
                    file.write(struct.pack("<f", 1.0) * region.shape[0])
        places |= {name: (path.name, region) for name, region in open_shard(path).tensors.items()}
        files.append(WeightFile(name=path.name, path="", size=len(header) + size, identity=identity(path)))
    for name, graph in graphs.items():
        quantise_graph(graph, spec.model, recipe, places, out)
        ir.save(graph, out / name)
    carry_files(model, out)
    (out / SPEC).write_text(dataclasses.replace(spec, recipe=recipe, weight_files=tuple(files)).to_json())
    return out


def _stored(name: str, tensor: ir.ExternalTensor, recipe: Recipe) -> Tensors:
    """A tensor as the quantised model stores it, and its scales."""
    shape = tensor.shape.numpy()
    plain: Tensors = {name: (CODES_BY_TYPE[tensor.dtype], shape)}
    if name.startswith(("vision_model.", "multi_modal_projector.")):
        return plain
    if ".experts." in name:
        experts, inputs, outputs = shape  # quantised ones lie [E, N, K]
        stored = (experts, outputs, inputs)
        return {name: (CODES["fp8"], stored), f"{name}_scale": ("F32", (experts, outputs, 1))}
    if len(shape) == 2 and "embed_tokens" not in name and choose(recipe, short_name(name)).format == "fp8":
        return {name: (CODES["fp8"], shape), f"{name}_scale": ("F32", shape[:1])}
    return plain


def _size(code: str, shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count * {"F32": 4, "BF16": 2}.get(code, 1)
