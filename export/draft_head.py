"""An EAGLE-3 head's folder, opened and checked against its configuration and the decoder that it drafts for.

Enters: a folder of `config.json` and safetensors in the form of the `speculators` library (`layers.0.…`), or in that of
EAGLE's repository (`midlayer.…`), which NVIDIA's heads follow. Leaves: a `DraftHead` whose every tensor is present, of
the right shape and of one type. Of the data only the table of tokens is read.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..errors import CheckpointError, shortened
from ..files.safetensors import Region
from ..spec.draft import DraftSpec
from ..spec.geometry import ModelSpec
from ..spec.types import FLOATS_BY_CODE
from .draft_config import draft_spec
from .prequantised.stored import CheckpointTensor
from .shards import find_tensors, read_json

EMBEDDING = "embed_tokens.weight"
IGNORED = ("t2d", "verifier_norm.weight", "verifier_lm_head.weight")
"""Tensors that training needs: which of the model's tokens the head knows, and the model's own norm and LM head."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DraftHead:
    """A checked head.

    Attributes:
        folder: Where it lies, absolute.
        spec: Its geometry.
        tensors: Its tensors by the names that `speculators` gives them, each with its own name in its file.
        tokens: The model's token that each of its own stands for, int64; None where they are the same.
    """

    folder: Path
    spec: DraftSpec
    tensors: dict[str, tuple[str, CheckpointTensor]]
    tokens: NDArray[np.int64] | None

    @property
    def has_embedding(self) -> bool:
        """Whether it has an embedding of its own; else it reads the model's."""
        return EMBEDDING in self.tensors


def open_head(folder: Path, model: ModelSpec) -> DraftHead:
    """Opens a head.

    Args:
        folder: The head's folder.
        model: Geometry of the decoder that it drafts for.

    Raises:
        CheckpointError: Something is missing, damaged, misshapen or unknown; the field or tensor is named.
    """
    folder = folder.absolute()
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is no folder: give the one that holds the draft's config.json and safetensors")
    try:
        return _open(folder, model)
    except CheckpointError as error:
        said = str(error)
        raise CheckpointError(said if str(folder) in said else f"the draft {folder}: {said}") from error


def _open(folder: Path, model: ModelSpec) -> DraftHead:
    config = read_json(folder / "config.json")
    found = {_plain_name(name): (name, tensor) for name, tensor in find_tensors(folder).items()}
    d2t = found.pop("d2t", None)
    for name in IGNORED:
        found.pop(name, None)
    if (fc := found.get("fc.weight")) is None:
        raise CheckpointError("tensor 'fc.weight' is missing: no EAGLE-3 head is without it")
    code = fc[1].region.dtype
    if code not in FLOATS_BY_CODE:
        raise CheckpointError(f"tensor 'fc.weight' is {code}: give the head before it was quantised")
    spec = draft_spec(config, model, FLOATS_BY_CODE[code])
    expected = head_tensors(spec, model.hidden_size)
    if EMBEDDING in found:
        expected[EMBEDDING] = (model.vocab_size, spec.hidden_size)
    elif spec.hidden_size != model.hidden_size:
        raise CheckpointError(f"tensor {EMBEDDING!r} is missing, and the model's is {model.hidden_size} wide")
    _check_tensors({name: tensor.region for name, (_, tensor) in found.items()}, expected, code)
    tokens = _tokens(None if d2t is None else d2t[1], spec, model)
    return DraftHead(folder=folder, spec=spec, tensors=found, tokens=tokens)


def head_tensors(spec: DraftSpec, model_hidden: int) -> dict[str, tuple[int, ...]]:
    """The names and shapes of a head's tensors, but for an embedding of its own."""
    hidden, query, kv = spec.hidden_size, spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    states = len(spec.states)
    shapes: dict[str, tuple[int, ...]] = {"fc.weight": (hidden, states * model_hidden)}
    if spec.input_norm == "whole":
        shapes["input_norm.weight"] = (states * model_hidden,)
    elif spec.input_norm == "each":
        shapes |= {f"fc_norm.{index}.weight": (model_hidden,) for index in range(states)}
    for index in range(spec.layers):
        name, width = f"layers.{index}", hidden if index else 2 * hidden
        if index == 0:
            shapes[f"{name}.hidden_norm.weight"] = (hidden,)
        shapes[f"{name}.input_layernorm.weight"] = (hidden,)
        shapes[f"{name}.post_attention_layernorm.weight"] = (hidden,)
        shapes[f"{name}.self_attn.q_proj.weight"] = (query, width)
        shapes[f"{name}.self_attn.k_proj.weight"] = (kv, width)
        shapes[f"{name}.self_attn.v_proj.weight"] = (kv, width)
        shapes[f"{name}.self_attn.o_proj.weight"] = (hidden, query)
        shapes[f"{name}.mlp.gate_proj.weight"] = (spec.mlp_size, hidden)
        shapes[f"{name}.mlp.up_proj.weight"] = (spec.mlp_size, hidden)
        shapes[f"{name}.mlp.down_proj.weight"] = (hidden, spec.mlp_size)
    shapes["norm.weight"] = (hidden,)
    shapes["lm_head.weight"] = (spec.vocab_size, hidden)
    return shapes


def _plain_name(name: str) -> str:
    """A tensor's name as `speculators` has it: EAGLE's only layer is its `midlayer`."""
    plain = name.removeprefix("model.")
    return f"layers.0.{plain.removeprefix('midlayer.')}" if plain.startswith("midlayer.") else plain


def _check_tensors(found: dict[str, Region], expected: dict[str, tuple[int, ...]], code: str) -> None:
    """Refuses a head whose tensors are not those of its configuration."""
    if missing := [name for name in expected if name not in found]:
        raise CheckpointError(f"tensor {missing[0]!r} is missing: its config.json asks for it")
    if unknown := [name for name in found if name not in expected]:
        raise CheckpointError(f"unexpected tensor {shortened(unknown[0])}: no draft of its config.json has it")
    for name, shape in expected.items():
        if found[name].shape != shape:
            raise CheckpointError(
                f"tensor {name!r} has shape {list(found[name].shape)}, its config.json and the model make it "
                f"{list(shape)}"
            )
        if found[name].dtype != code:
            raise CheckpointError(f"tensor {name!r} is {found[name].dtype}, others are {code}: save it as one type")


def _tokens(d2t: CheckpointTensor | None, spec: DraftSpec, model: ModelSpec) -> NDArray[np.int64] | None:
    """The model's token of each of the head's, from the differences that it stores."""
    if spec.vocab_size == model.vocab_size:
        return None
    if d2t is None:
        raise CheckpointError(f"tensor 'd2t' is missing, and draft_vocab_size is {spec.vocab_size}")
    region = d2t.region
    if region.dtype not in ("I64", "I32") or region.shape != (spec.vocab_size,):
        raise CheckpointError(
            f"tensor 'd2t' is {region.dtype} {list(region.shape)}, expected I64 [{spec.vocab_size}]: restore the file"
        )
    tokens = np.arange(spec.vocab_size, dtype=np.int64) + d2t.read().astype(np.int64)
    if ((tokens < 0) | (tokens >= model.vocab_size)).any() or len(np.unique(tokens)) < len(tokens):
        raise CheckpointError(f"tensor 'd2t' names no {spec.vocab_size} tokens of the model: restore the file")
    return tokens
