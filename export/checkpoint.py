"""A Hugging Face checkpoint folder, opened and checked against the Llama 4 that its configuration describes.

Enters: a folder of `config.json` and safetensors shards, perhaps symlinks into a hub cache. Leaves: a `Checkpoint`
whose every tensor is present, of the right shape and of one dtype, or quantised as `Scheme` says (the vision tower's
never are). No tensor's data is read but scales.
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..files.safetensors import Shard, open_shard
from ..spec.geometry import VISION, ModelSpec, VisionSpec
from ..spec.recipe import Override
from ..spec.types import FLOATS_BY_CODE
from .config import model_spec, vision_spec
from .prequantised.inventory import Prequantised, find_quantised
from .prequantised.scheme import MODELOPT, read_scheme
from .prequantised.stored import CheckpointTensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """A checked checkpoint.

    Attributes:
        folder: Where it lies, absolute, symlinks kept.
        spec: The text decoder's geometry; its dtype is the one stored.
        prefix: Beginning of the text decoder's tensor names (`""` or `"language_model."`).
        tensors: All tensors by their full names.
        vision: The vision tower's geometry; None where the checkpoint has no tower.
        quantised: The tensors' roles and the recipe, where the checkpoint is quantised.
    """

    folder: Path
    spec: ModelSpec
    prefix: str
    tensors: dict[str, CheckpointTensor]
    vision: VisionSpec | None = None
    quantised: Prequantised | None = None

    @property
    def shards(self) -> list[Shard]:
        """The shards, in order of their names."""
        found = {tensor.shard.path: tensor.shard for tensor in self.tensors.values()}
        return [found[path] for path in sorted(found)]


def open_checkpoint(folder: Path, *, any_dtype: bool = False) -> Checkpoint:
    """Opens a checkpoint.

    Args:
        folder: The checkpoint.
        any_dtype: Whether tensors may be of another dtype than the configuration says, since they will be converted.

    Raises:
        CheckpointError: Something is missing, damaged, misshapen or unknown; the file or tensor is named.
    """
    folder = folder.absolute()
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is no folder: give the folder that holds config.json and the safetensors")
    config = read_json(folder / "config.json")
    model_spec(config)  # a wrong configuration is named before any shard
    scheme = read_scheme(config, read_json(folder / MODELOPT) if (folder / MODELOPT).exists() else None)
    found = _find_tensors(folder)
    stored = {FLOATS_BY_CODE[t.region.dtype] for t in found.values() if t.region.dtype in FLOATS_BY_CODE}
    spec = model_spec(config, stored.pop() if len(stored) == 1 else "bfloat16")
    prefix = "language_model." if any(name.startswith("language_model.") for name in found) else ""
    vision = vision_spec(config) if any(name.startswith(VISION) for name in found) else None
    expected = expected_tensors(spec, prefix)
    if vision is not None:
        expected |= tower_tensors(vision, spec.hidden_size)
    quantised = None if scheme is None else find_quantised(found, expected, spec, prefix, scheme)
    if quantised is None:
        _check_tensors(found, expected, spec, any_dtype=any_dtype)
    else:
        _check_tensors(quantised.plain, quantised.plain_shapes, spec, any_dtype=False)
        if vision is not None:
            kept = (*quantised.recipe.overrides, Override(pattern="vision_model.*", format="none"))
            quantised = dataclasses.replace(quantised, recipe=dataclasses.replace(quantised.recipe, overrides=kept))
    return Checkpoint(folder=folder, spec=spec, prefix=prefix, tensors=found, vision=vision, quantised=quantised)


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object of a checkpoint.

    Raises:
        CheckpointError: It is missing or not a JSON object.
    """
    try:
        value = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}: a checkpoint needs this file") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON ({error}): restore the file") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: not a JSON object: restore the file")
    return value


def expected_tensors(spec: ModelSpec, prefix: str = "") -> dict[str, tuple[int, ...]]:
    """The names and shapes of a text decoder's tensors."""
    hidden, query, kv = spec.hidden_size, spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    shapes: dict[str, tuple[int, ...]] = {f"{prefix}model.embed_tokens.weight": (spec.vocab_size, hidden)}
    for index, layer in enumerate(spec.layers):
        name = f"{prefix}model.layers.{index}"
        shapes[f"{name}.input_layernorm.weight"] = (hidden,)
        shapes[f"{name}.post_attention_layernorm.weight"] = (hidden,)
        shapes[f"{name}.self_attn.q_proj.weight"] = (query, hidden)
        shapes[f"{name}.self_attn.k_proj.weight"] = (kv, hidden)
        shapes[f"{name}.self_attn.v_proj.weight"] = (kv, hidden)
        shapes[f"{name}.self_attn.o_proj.weight"] = (hidden, query)
        mlp, size = f"{name}.feed_forward", spec.dense_size
        if layer.experts:
            shapes[f"{mlp}.router.weight"] = (spec.experts, hidden)
            shapes[f"{mlp}.experts.gate_up_proj"] = (spec.experts, hidden, 2 * spec.expert_size)
            shapes[f"{mlp}.experts.down_proj"] = (spec.experts, spec.expert_size, hidden)
            mlp, size = f"{mlp}.shared_expert", spec.expert_size
        shapes[f"{mlp}.gate_proj.weight"] = (size, hidden)
        shapes[f"{mlp}.up_proj.weight"] = (size, hidden)
        shapes[f"{mlp}.down_proj.weight"] = (hidden, size)
    shapes[f"{prefix}model.norm.weight"] = (hidden,)
    if not spec.tied_embeddings:
        shapes[f"{prefix}lm_head.weight"] = (spec.vocab_size, hidden)
    return shapes


def tower_tensors(vision: VisionSpec, text_size: int) -> dict[str, tuple[int, ...]]:
    """The names and shapes of a vision tower's and projector's tensors.

    Args:
        vision: Geometry.
        text_size: Hidden size of the text decoder.
    """
    hidden, width = vision.hidden_size, vision.adapter_size
    shapes: dict[str, tuple[int, ...]] = {
        "vision_model.class_embedding": (hidden,),
        "vision_model.positional_embedding_vlm": (vision.positions, hidden),
        "vision_model.patch_embedding.linear.weight": (hidden, vision.patch_values),
        "vision_model.vision_adapter.mlp.fc1.weight": (width, vision.mlp_size),
        "vision_model.vision_adapter.mlp.fc2.weight": (width, width),
        "multi_modal_projector.linear_1.weight": (text_size, width),
    }
    linears = {f"self_attn.{name}_proj": (hidden, hidden) for name in "qkvo"}
    linears |= {"mlp.fc1": (vision.mlp_size, hidden), "mlp.fc2": (hidden, vision.mlp_size)}
    names = [f"vision_model.layernorm_{place}" for place in ("pre", "post")]
    for index in range(vision.layers):
        layer = f"vision_model.model.layers.{index}"
        names += [f"{layer}.{name}_layernorm" for name in ("input", "post_attention")]
        for name, shape in linears.items():
            shapes |= {f"{layer}.{name}.weight": shape, f"{layer}.{name}.bias": shape[:1]}
    for name in names:
        shapes |= {f"{name}.weight": (hidden,), f"{name}.bias": (hidden,)}
    return shapes


def _find_tensors(folder: Path) -> dict[str, CheckpointTensor]:
    """All tensors of the folder's shards, as the index names them, or of the single file."""
    index_path, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if not index_path.exists():
        if not single.exists():
            raise CheckpointError(f"{folder}: neither {single.name} nor {index_path.name}: download the weights")
        shard = open_shard(single)
        return {name: CheckpointTensor(shard=shard, region=region) for name, region in shard.tensors.items()}
    weight_map = read_json(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(f"{index_path}: weight_map is no object of file names: restore the file")
    if escaping := sorted(file for file in weight_map.values() if Path(file).name != file):
        raise CheckpointError(f"{index_path}: names the shard {escaping[0]!r}, expected a plain file name")
    shards = {file: open_shard(folder / file) for file in sorted(set(weight_map.values()))}
    tensors = {}
    for name, file in weight_map.items():
        if name not in shards[file].tensors:
            raise CheckpointError(f"{folder / file}: lacks {name!r}, which the index puts there: download it again")
        tensors[name] = CheckpointTensor(shard=shards[file], region=shards[file].tensors[name])
    for file, shard in shards.items():
        if unlisted := sorted(name for name in shard.tensors if weight_map.get(name) != file):
            raise CheckpointError(f"{index_path}: does not list {unlisted[0]!r} of {file}: restore the index")
    return tensors


def _check_tensors(
    found: dict[str, CheckpointTensor], expected: dict[str, tuple[int, ...]], spec: ModelSpec, *, any_dtype: bool
) -> None:
    if missing := [name for name in expected if name not in found]:
        raise CheckpointError(
            f"tensor {missing[0]!r} is missing{_and_more(missing)}: the shards do not belong to this config.json"
        )
    if unexpected := [name for name in found if name not in expected]:
        raise CheckpointError(
            f"unexpected tensor {unexpected[0]!r}{_and_more(unexpected)}: no Llama 4 of this config.json has it"
        )
    for name, shape in expected.items():
        region = found[name].region
        if region.shape != shape:
            raise CheckpointError(f"tensor {name!r} has shape {list(region.shape)}, config.json makes it {list(shape)}")
        dtype = FLOATS_BY_CODE.get(region.dtype)
        if dtype is None:
            raise CheckpointError(
                f"tensor {name!r} is {region.dtype}, expected one of {', '.join(sorted(FLOATS_BY_CODE))}"
            )
        if dtype != spec.dtype and not any_dtype:
            raise CheckpointError(
                f"tensor {name!r} is {dtype}, config.json says {spec.dtype}: choose with --dtype, which converts"
            )


def _and_more(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""
