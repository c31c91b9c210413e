"""An EAGLE-3 head as a part of a model folder: its graph, its tokens, its weights left in place.

A head's weight files lie beside the checkpoint's under names of their own, since both are `model.safetensors` at home.
"""

from collections.abc import Mapping
from pathlib import Path

import onnx_ir as ir

from ..errors import ExportError
from ..files.draft_tokens import write_tokens
from ..files.output import copy_sparse
from ..files.safetensors import Region, identity
from ..plugins.canonical_graph import read_graph
from ..spec.draft import DRAFT_PREFIX
from ..spec.folder import DraftPart
from ..spec.geometry import ModelSpec
from ..spec.stored_weights import WeightFile
from .assembly import external_tensor
from .draft_graph import stitch_draft
from .draft_head import DraftHead
from .placement import PlacedWeights


def write_draft(
    head: DraftHead, model: ModelSpec, embedding: str, placement: PlacedWeights, folder: Path, copy_weights: bool
) -> DraftPart:
    """Writes a head's graph into a model folder, and its weights where they are to be copied.

    Args:
        head: The head.
        model: The decoder's geometry.
        embedding: Name of the decoder's embedding.
        placement: The decoder's weights; the head's files are added to it.
        folder: The model folder.
        copy_weights: Whether the head's weights are to lie in the folder.

    Returns:
        The part that `spec.json` has of it.

    Raises:
        ExportError: A file of the head changed meanwhile, or has the name of another.
    """
    placed = _place(head, placement, folder, copy_weights)

    def place_of(name: str) -> tuple[str, Region]:
        return placed[name] if name in placed else placement.regions[name]

    part = DraftPart(spec=head.spec)
    ir.save(stitch_draft(head, model, embedding, place_of), folder / part.graph)
    if head.tokens is not None:
        write_tokens(folder, head.tokens.tolist())
    return part


def _place(
    head: DraftHead, placement: PlacedWeights, folder: Path, copy_weights: bool
) -> dict[str, tuple[str, Region]]:
    """Adds the head's files to those of the model. Returns file and region of each tensor, by its name in its file."""
    shards = {tensor.shard.path: tensor.shard for _, tensor in head.tensors.values()}
    for path, shard in shards.items():
        name, fingerprint = f"{DRAFT_PREFIX}{path.name}", identity(path)
        if any(file.name == name for file in placement.files):
            raise ExportError(f"{path}: the model has a weight file named {name}: rename the draft's")
        if copy_weights:
            copy_sparse(path, folder / name)
            if identity(folder / name) != fingerprint:
                raise ExportError(f"{path}: its copy differs, the file changed meanwhile: export again")
        placement.files.append(
            WeightFile(name=name, path="" if copy_weights else str(path), size=shard.size, identity=fingerprint)
        )
    return {name: (f"{DRAFT_PREFIX}{tensor.shard.path.name}", tensor.region) for name, tensor in head.tensors.values()}


def read_draft(source: Path, part: DraftPart, places: Mapping[str, tuple[str, Region]]) -> ir.Model:
    """Reads a model's draft for a model that was made from it, whose decoder's weights lie elsewhere.

    Args:
        source: The model.
        part: Its draft.
        places: File and region of the new decoder's weights.
    """
    model = read_graph(source / part.graph)
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor) and not is_own(value):
            value.const_value = external_tensor(str(value.name), *places[str(value.name)])
    return model


def is_own(value: ir.Value) -> bool:
    """Whether an initializer of a draft's graph is the head's own, and not the decoder's."""
    tensor = value.const_value
    return isinstance(tensor, ir.ExternalTensor) and str(tensor.location).startswith(DRAFT_PREFIX)
