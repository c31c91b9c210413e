"""A group of ranks in numbers: what each holds, and what they exchange in a step.

Enters: a group's folder and how one folder is described. Leaves: figures ready for JSON. Specs and graphs are read.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..files.folders import rank_folder
from ..spec.folder import FolderSpec
from ..spec.types import BITS

Describe = Callable[[Path, FolderSpec], dict[str, Any]]
"""Describes a folder by its spec."""


def summarise_group(folder: Path, spec: FolderSpec, describe: Describe) -> dict[str, Any]:
    """Describes each rank of a group, by its own part of the geometry, and the group's sums.

    Raises:
        FolderError: A rank's folder is missing, damaged, or of another group.
    """
    ranks = []
    for rank in range(spec.ranks):
        path, own = rank_folder(folder, spec, rank)
        part = dataclasses.replace(own, model=own.rank_model)
        experts = spec.model.experts // spec.expert_groups
        first = rank // (spec.ranks // spec.expert_groups) * experts
        ranks.append(
            {
                "rank": rank,
                "weights_bytes": weights_of(path, own),
                "experts": [first, first + experts - 1] if experts else None,
                **describe(path, part),
            }
        )
    return {
        "count": spec.ranks,
        "expert_groups": spec.expert_groups,
        "experts_only": spec.experts_only,
        "each": ranks,
        "sums": sums_of(spec),
    }


def sums_of(spec: FolderSpec) -> dict[str, int]:
    """The sums over ranks that a step computes, and the bytes that each rank brings to them.

    A sum in a layer has a hidden state a token; that of the logits a vocabulary a position that gets logits.
    """
    model = spec.model
    bits = BITS["float32"] if spec.target == "cpu" else BITS[model.dtype]
    layers = sum(layer.experts for layer in model.layers) if spec.experts_only else 2 * len(model.layers)
    logits = 0 if spec.experts_only else model.vocab_size * bits // 8
    return {
        "a_step": layers + (not spec.experts_only),
        "bytes_per_token": layers * model.hidden_size * bits // 8,
        "bytes_per_logits": logits,
    }


def weights_of(folder: Path, spec: FolderSpec) -> int:
    """Bytes of the weights that a rank's decoder, and on rank 0 the vision tower, reads."""
    vision = spec.vision
    if spec.kind == "bundle":
        given = (*spec.weights, *(vision.weights if vision is not None else ()))
        inside = spec.engine.weights if spec.engine is not None else 0
        tower = vision.engine.weights if vision is not None and vision.engine is not None else 0
        return sum(weight.given_size for weight in given) + inside + tower
    import onnx_ir as ir

    from ..plugins.canonical_graph import read_graph

    graphs = [spec.graph, *([vision.graph] if vision is not None and vision.graph else [])]
    return sum(
        value.const_value.nbytes
        for name in graphs
        for value in read_graph(folder / name).graph.initializers.values()
        if isinstance(value.const_value, ir.ExternalTensor)
    )
