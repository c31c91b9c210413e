"""A model's draft quantised beside it, each weight to the nearest value.

Enters: the model's draft as it was exported. Leaves: its graph and a shard of its own in the new folder, in the format
of the recipe. Nothing is measured for it: what its guesses lose costs time, and no text. LM head and fusing linear are
quantised with the rest, since a draft reads all of its weights for every guess.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import onnx_ir as ir
import torch
from torch import Tensor

from ..export.draft_model import is_own, read_draft
from ..export.quantised_graph import Places, quantise_graph, short_name
from ..files.draft_tokens import carry_tokens
from ..files.safetensors import identity, open_shard
from ..spec.choice import choose, is_grouped_int8
from ..spec.draft import DRAFT_PREFIX
from ..spec.folder import DraftPart, FolderSpec
from ..spec.recipe import Override, Recipe
from ..spec.stored_weights import WeightFile
from ..walk.numbers import Weights
from .rounding import choose_scales, round_nearest
from .shard import pack_int4, write_shard

FILE = f"{DRAFT_PREFIX}model.safetensors"


def quantise_draft(
    source: Path, spec: FolderSpec, recipe: Recipe, folder: Path, files: Mapping[str, Path], places: Places
) -> tuple[DraftPart | None, list[WeightFile]]:
    """Writes a model's draft, quantised, into the folder of the model that was made from it.

    Args:
        source: The model.
        spec: Its spec.
        recipe: The recipe of the decoder, whose format the draft gets.
        folder: The new folder.
        files: The model's weight files, by name.
        places: File and region of the new decoder's weights.

    Returns:
        The draft's part of the new folder, and its weight file; nothing where there is no draft.
    """
    if spec.draft is None:
        return None, []
    model = read_draft(source, spec.draft, places)
    fitted, tensors = _recipe(recipe, model.graph), dict[str, Tensor]()
    stored = Weights(files, _places(model.graph))
    for short, name in stored.full_names.items():
        tensors |= _stored(name, stored.stored(short), fitted)
    write_shard(folder / FILE, tensors)
    shard = open_shard(folder / FILE)
    quantised = {name: (FILE, region) for name, region in shard.tensors.items()}
    quantise_graph(model, spec.draft.spec, fitted, {**places, **quantised}, folder)
    ir.save(model, folder / spec.draft.graph)
    carry_tokens(source, folder, spec)
    file = WeightFile(name=FILE, path="", size=shard.size, identity=identity(shard.path))
    return dataclasses.replace(spec.draft, format=recipe.format), [file]


def _places(graph: ir.Graph) -> dict[str, tuple[str, int]]:
    """File name and first byte of each of the head's own tensors."""
    return {
        str(value.name): (str(value.const_value.location), value.const_value.offset or 0)
        for value in graph.initializers.values()
        if is_own(value) and isinstance(value.const_value, ir.ExternalTensor)
    }


def _recipe(recipe: Recipe, graph: ir.Graph) -> Recipe:
    """The draft's recipe: the decoder's format, a scale a token; what its groups do not divide stays as it is."""
    overrides, has_groups = [], recipe.format == "int4" or is_grouped_int8(recipe)
    for node in graph:
        weight = node.inputs[0] if node.op_type == "Transpose" else None
        if weight is None or weight.shape is None or not weight.is_initializer():
            continue
        is_apart = has_groups and int(str(weight.shape[1])) % recipe.group_size
        overrides.append(Override(pattern=short_name(str(weight.name)), format="none" if is_apart else recipe.format))
    return Recipe(format=recipe.format, activations="dynamic", group_size=recipe.group_size, overrides=tuple(overrides))


def _stored(name: str, weight: Tensor, recipe: Recipe) -> dict[str, Tensor]:
    """A tensor as it is written: a linear's rounded, with its scales; a norm or an embedding as it is."""
    named = any(override.pattern == short_name(name) for override in recipe.overrides)
    choice = choose(recipe, short_name(name))
    if not named or choice.format == "none":
        return {name: weight}
    size, wide_NK = choice.group_size, weight.float()
    group, dtype = (size, weight.dtype) if size else (wide_NK.shape[1], torch.float32)
    scale_NG = choose_scales(wide_NK, choice.format, group, recipe.weight_clip, dtype)
    values_NK = round_nearest(wide_NK, scale_NG, choice.format).values_NK
    return {
        name: pack_int4(values_NK) if choice.format == "int4" else values_NK,
        f"{name}_scale": scale_NG.to(dtype) if size else scale_NG[:, 0].contiguous(),
    }
