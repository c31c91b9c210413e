"""A Hugging Face checkpoint folder, opened and checked against the Llama 4 that its configuration describes.

Enters: a folder of `config.json` and safetensors shards, perhaps symlinks into a hub cache. Leaves: a `Checkpoint`
whose every tensor is present, of the right shape and a float, or quantised as `Scheme` says (the vision tower's never
are). Experts may be stacked or stored one by one. No tensor's data is read but scales.
"""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import CheckpointError
from ..files.safetensors import Region, Shard
from ..spec.geometry import VISION, ModelSpec, VisionSpec
from ..spec.recipe import Override
from ..spec.types import FLOATS_BY_CODE, DType
from .config import model_spec, vision_spec
from .foreign import refuse_foreign_files, refuse_foreign_names
from .prequantised.inventory import Prequantised, find_quantised
from .prequantised.scheme import MODELOPT, read_scheme
from .prequantised.stored import CheckpointTensor
from .shards import INDEX, SINGLE, find_tensors, read_json
from .single_experts import ExpertStack, find_stacks


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """A checked checkpoint.

    Attributes:
        folder: Where it lies, absolute, symlinks kept.
        spec: The text decoder's geometry; its dtype is the configuration's, which tensors need not be stored in.
        prefix: Beginning of the text decoder's tensor names (`""` or `"language_model."`).
        tensors: All tensors by their full names.
        vision: The vision tower's geometry; None where the checkpoint has no tower.
        quantised: The tensors' roles and the recipe, where the checkpoint is quantised.
        stacks: The experts that are stored one by one and not quantised, as the stacks that they make up.
    """

    folder: Path
    spec: ModelSpec
    prefix: str
    tensors: dict[str, CheckpointTensor]
    vision: VisionSpec | None = None
    quantised: Prequantised | None = None
    stacks: dict[str, ExpertStack] = field(default_factory=dict)

    @property
    def shards(self) -> list[Shard]:
        """The shards, in order of their names."""
        found = {tensor.shard.path: tensor.shard for tensor in self.tensors.values()}
        return [found[path] for path in sorted(found)]

    def regions(self, shard: Shard) -> dict[str, Region]:
        """The tensors that a shard is read for: not those that the index puts elsewhere, nor single experts'."""
        single = {name for stack in self.stacks.values() for name in stack.names}
        return {
            name: region
            for name, region in shard.tensors.items()
            if name in self.tensors and name not in single and self.tensors[name].shard is shard
        }


def open_checkpoint(folder: Path) -> Checkpoint:
    """Opens a checkpoint.

    Args:
        folder: The checkpoint.

    Raises:
        CheckpointError: Something is missing, damaged, misshapen or unknown, or the checkpoint has a form that is not
            read; the file or tensor is named.
    """
    folder = folder.absolute()
    if not folder.is_dir():
        refuse_foreign_files(folder)
        raise CheckpointError(f"{folder} is no folder: give the folder that holds config.json and the safetensors")
    if not any((folder / name).exists() for name in (INDEX, SINGLE)):
        refuse_foreign_files(folder)
    config = read_json(folder / "config.json")
    model_spec(config)  # a wrong configuration is named before any shard
    scheme = read_scheme(config, read_json(folder / MODELOPT) if (folder / MODELOPT).exists() else None)
    found = find_tensors(folder)
    refuse_foreign_names(found)
    spec = model_spec(config, _stored_dtype(found))
    prefix = "language_model." if any(name.startswith("language_model.") for name in found) else ""
    if spec.tied_embeddings and any(f"{prefix}lm_head.{part}" in found for part in ("weight", "weight_packed")):
        spec = dataclasses.replace(spec, tied_embeddings=False)  # a head that is stored is the one that counts
    vision = vision_spec(config) if any(name.startswith(VISION) for name in found) else None
    expected = expected_tensors(spec, prefix)
    if vision is not None:
        expected |= tower_tensors(vision, spec.hidden_size)
    opened = Checkpoint(folder=folder, spec=spec, prefix=prefix, tensors=found, vision=vision)
    if scheme is None:
        stacks, rest = find_stacks(found, expected, spec, prefix)
        _check_tensors(rest, {name: shape for name, shape in expected.items() if name not in stacks})
        return dataclasses.replace(opened, stacks=stacks)
    quantised = find_quantised(found, expected, spec, prefix, scheme)
    _check_tensors(quantised.plain, quantised.plain_shapes)
    if vision is not None:
        kept = (*quantised.recipe.overrides, Override(pattern="vision_model.*", format="none"))
        quantised = dataclasses.replace(quantised, recipe=dataclasses.replace(quantised.recipe, overrides=kept))
    return dataclasses.replace(opened, quantised=quantised)


def _stored_dtype(found: dict[str, CheckpointTensor]) -> DType | None:
    """The type that `transformers` takes where a configuration names none: that of the first float; None without."""
    ordered = sorted(found.items(), key=lambda item: (item[1].shard.path.name, item[0]))
    floats = (FLOATS_BY_CODE[t.region.dtype] for _, t in ordered if t.region.dtype in FLOATS_BY_CODE)
    return next(floats, None)


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


def _check_tensors(found: dict[str, CheckpointTensor], expected: dict[str, tuple[int, ...]]) -> None:
    """Compares tensors that are not quantised with those that a configuration asks for.

    Raises:
        CheckpointError: One is missing, unknown, misshapen or no float.
    """
    if missing := [name for name in expected if name not in found]:
        remedy = "the shards do not belong to this config.json"
        if missing[0].endswith("lm_head.weight"):
            remedy = "where the embedding is the LM head, set tie_word_embeddings to true in config.json"
        raise CheckpointError(f"tensor {missing[0]!r} is missing{_and_more(missing)}: {remedy}")
    if unexpected := [name for name in found if name not in expected]:
        raise CheckpointError(
            f"unexpected tensor {unexpected[0]!r}{_and_more(unexpected)}: no Llama 4 of this config.json has it"
        )
    for name, shape in expected.items():
        region = found[name].region
        if region.shape != shape:
            raise CheckpointError(f"tensor {name!r} has shape {list(region.shape)}, config.json makes it {list(shape)}")
        if region.dtype not in FLOATS_BY_CODE:
            floats = ", ".join(sorted(FLOATS_BY_CODE))
            raise CheckpointError(
                f"tensor {name!r} is {region.dtype}, expected one of {floats}: save it as one of them"
            )


def _and_more(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""
