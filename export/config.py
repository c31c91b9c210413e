"""A Llama 4 `config.json` as a `ModelSpec`, or a clear refusal.

Enters: the parsed JSON of a text-only (`llama4_text`) or multimodal (`llama4`) checkpoint, in the field names of
`transformers` 4 and 5. Leaves: a `ModelSpec`, and a `VisionSpec` of a multimodal one, whose every number has been
checked. Where a quantity may stand in several places, `transformers` 5 says which is taken:

| quantity | first | then | else |
|---|---|---|---|
| type of the weights | `dtype` | `torch_dtype` | the stored type, then a multimodal checkpoint's `text_config` |
| quantisation | `quantization_config` | the same in `text_config` | none |
| embedding and head tied | `tie_word_embeddings` of the text decoder | | no |
| image token | `image_token_id` | `image_token_index` | 200092 |
| everything else | the text decoder's own | | its default |

The text decoder of a multimodal checkpoint is its `text_config` alone: fields of the same names beside it say nothing
about it. `config_rope` and `config_layers` have the precedence of theirs, `files.unheeded` that of generation.
Null is a value: it does not fall through to a default.
"""

from typing import Any

from ..errors import CheckpointError, shortened
from ..spec.geometry import ModelSpec, VisionSpec
from ..spec.types import FLOATS, DType
from .config_fields import Fields, is_whole
from .config_layers import read_layers
from .config_rope import refuse_outside, text_rope, vision_theta

UNUSED: dict[str, tuple[Any, ...]] = {
    "per_layer_config": (None, {}),
    "fusion_config": (None, {}, []),
    "kv_sharing_modes": (None, {}, []),
    "transformers_weights": (None, {}, []),
}
"""Fields with which `transformers` would build another model than Llama 4, and their values that say nothing."""

ACTIVATIONS = ("silu", "swish")
"""Two names of one function."""

VISION_FIXED = {
    "hidden_act": "gelu",
    "num_channels": 3,
    "multi_modal_projector_bias": False,
    "vision_feature_select_strategy": "default",
}
"""Fields of a vision tower's configuration that have one value."""


def text_config(config: dict[str, Any]) -> dict[str, Any]:
    """The text decoder's part of a `config.json`.

    Raises:
        CheckpointError: The configuration is of another architecture.
    """
    kind = config.get("model_type")
    nested = config.get("text_config")
    if kind == "llama4":
        if not isinstance(nested, dict):
            raise CheckpointError(
                f"config.json: text_config is {shortened(nested)}, expected an object: restore the file"
            )
        return {**nested, "quantization_config": config.get("quantization_config") or nested.get("quantization_config")}
    if kind == "llama4_text":
        if nested is not None:
            raise CheckpointError(
                "config.json: text_config is given, but model_type is 'llama4_text': restore the file"
            )
        return config
    if "speculators_model_type" in config or "eagle_config" in config or "Eagle" in str(config.get("architectures")):
        raise CheckpointError(
            "config.json is an EAGLE-3 head's, which only guesses for a model: export the model's checkpoint, and give "
            "this folder with --draft"
        )
    raise CheckpointError(
        f"config.json: model_type is {shortened(kind)}; Arriero takes 'llama4' and 'llama4_text' checkpoints"
    )


def model_spec(config: dict[str, Any], stored_dtype: DType | None = None) -> ModelSpec:
    """Reads the geometry.

    Args:
        config: The parsed `config.json`.
        stored_dtype: Type of the weights, for a configuration that names none; None where it is not known.

    Raises:
        CheckpointError: Another architecture, a missing field, or a field out of range.
    """
    fields = Fields(text_config(config))
    if fields.values is not config:
        refuse_outside(Fields(config))
    _refuse_variants(fields)
    layers = read_layers(fields)
    heads, kv_heads, head_dim = _heads(fields)
    experts, experts_per_token = _experts(fields, routed=any(layer.experts for layer in layers))
    max_positions = fields.count("max_position_embeddings", 131072)
    rope_theta, rope_scaling = text_rope(fields, max_positions)
    vocab_size = fields.count("vocab_size")
    _check_tokens(fields, vocab_size)
    temperature_scale = fields.not_negative("attn_scale", 0.1)
    return ModelSpec(
        vocab_size=vocab_size,
        hidden_size=fields.count("hidden_size"),
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        experts=experts,
        experts_per_token=experts_per_token,
        expert_size=fields.count("intermediate_size"),
        dense_size=fields.count("intermediate_size_mlp", 16384),
        norm_eps=fields.positive("rms_norm_eps", 1e-5),
        qk_norm=fields.flag("use_qk_norm", True),
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        max_positions=max_positions,
        temperature_scale=temperature_scale if _is_tuned(fields) else 0.0,
        temperature_floor=float(fields.count("floor_scale", 8192)),
        tied_embeddings=fields.flag("tie_word_embeddings", False),
        dtype=_dtype(config, stored_dtype),
    )


def vision_spec(config: dict[str, Any]) -> VisionSpec:
    """Reads the geometry of a multimodal checkpoint's vision tower.

    Raises:
        CheckpointError: A missing field, or a field out of range.
    """
    nested = config.get("vision_config")
    if not isinstance(nested, dict):
        raise CheckpointError(
            f"config.json: vision_config is {shortened(nested)}, expected an object: restore the file"
        )
    fields = Fields(nested, "vision_config.")
    hidden_size, heads = fields.count("hidden_size", 768), fields.count("num_attention_heads", 16)
    image_size, patch_size = fields.side("image_size", 448), fields.side("patch_size", 14)
    if hidden_size % (4 * heads):
        fields.refuse("hidden_size", f"{heads} heads of a multiple of 4, since RoPE rotates pairs by column and by row")
    grid, ratio = image_size // patch_size, fields.positive("pixel_shuffle_ratio", 0.5)
    shuffle = round(1 / max(ratio, 1e-9))
    if ratio * shuffle != 1 or grid % shuffle or not grid:
        fields.refuse("pixel_shuffle_ratio", f"one over a divisor of the {grid} patches of a side")
    mlp_size, adapter_size = fields.count("intermediate_size", 5632), fields.count("projector_input_dim", 4096)
    if mlp_size != hidden_size * shuffle**2:
        fields.refuse("intermediate_size", f"hidden_size over pixel_shuffle_ratio squared, {hidden_size * shuffle**2}")
    for name, default in (("projector_output_dim", 4096), ("vision_output_dim", 7680)):
        if fields.count(name, default) != adapter_size:
            fields.refuse(name, f"projector_input_dim, {adapter_size}")
    for name, fixed in VISION_FIXED.items():
        given = fields.get(name, fixed)
        if type(given) is not type(fixed) or given != fixed:  # 0 is not false
            fields.refuse(name, f"{fixed!r}, as in every Llama 4")
    _named_dtype(fields)  # refuses what is none: the tower has the decoder's type, whatever is named here
    return VisionSpec(
        hidden_size=hidden_size,
        layers=fields.count("num_hidden_layers", 34),
        heads=heads,
        mlp_size=mlp_size,
        image_size=image_size,
        patch_size=patch_size,
        shuffle=shuffle,
        adapter_size=adapter_size,
        rope_theta=vision_theta(fields),
        image_token=_image_token(config),
    )


def _image_token(config: dict[str, Any]) -> int:
    """The token that stands for an image's features: by its newer name, where it has both."""
    fields = Fields(config)
    name = "image_token_id" if "image_token_id" in config else "image_token_index"
    fields.count("image_token_index", 200092, least=0)
    token, vocab_size = fields.count(name, 200092, least=0), Fields(text_config(config)).count("vocab_size")
    if token >= vocab_size:
        fields.refuse(name, f"a token of the vocabulary of {vocab_size}")
    return token


def _refuse_variants(fields: Fields) -> None:
    """Refuses what no Llama 4 does.

    Raises:
        CheckpointError: A field asks for it.
    """
    fields.one_of("hidden_act", "silu", ACTIVATIONS, "'silu', as in every Llama 4")
    if fields.flag("attention_bias", False):
        fields.refuse("attention_bias", "false, as in every Llama 4")
    if not fields.flag("is_causal", True):
        fields.refuse("is_causal", "true, as in every Llama 4")
    for name, nothing in UNUSED.items():
        if fields.get(name) not in nothing:
            fields.refuse(name, "nothing, as in every Llama 4")


def _heads(fields: Fields) -> tuple[int, int, int]:
    """Query heads, key and value heads, and their width; null derives the last two, as `transformers` 4 did."""
    heads = fields.count("num_attention_heads")
    kv_heads = heads if fields.is_null("num_key_value_heads") else fields.count("num_key_value_heads", 8)
    derived = fields.is_null("head_dim")
    head_dim = fields.count("hidden_size") // heads if derived else fields.count("head_dim", 128)
    if heads % kv_heads:
        fields.refuse("num_key_value_heads", f"a divisor of num_attention_heads ({heads})")
    if head_dim % 2 or not head_dim:
        fields.refuse("head_dim", "even, since RoPE rotates pairs")
    return heads, kv_heads, head_dim


def _experts(fields: Fields, *, routed: bool) -> tuple[int, int]:
    """Experts of a layer and of a token; none in a model whose layers are all dense."""
    least = 1 if routed else 0
    experts = fields.count("num_local_experts", 16, least)
    experts_per_token = fields.count("num_experts_per_tok", 1, least)
    if not routed:
        return 0, 0
    if experts_per_token > experts:
        fields.refuse("num_experts_per_tok", f"at most num_local_experts ({experts})")
    return experts, experts_per_token


def _is_tuned(fields: Fields) -> bool:
    """Whether attention's temperature is tuned; older files write a number."""
    if is_whole(fields.get("attn_temperature_tuning")):
        return bool(fields.get("attn_temperature_tuning"))
    return fields.flag("attn_temperature_tuning", True)


def _dtype(config: dict[str, Any], stored: DType | None) -> DType:
    """Type of the weights: as the whole configuration says, as they are stored, or as the text decoder's part says."""
    named = _named_dtype(Fields(config))
    nested = config.get("text_config")
    inner = _named_dtype(Fields(nested, "text_config.")) if isinstance(nested, dict) else None
    return named or stored or inner or "bfloat16"


def _named_dtype(fields: Fields) -> DType | None:
    name = "torch_dtype" if fields.get("dtype") is None else "dtype"
    if fields.get(name) is None:
        return None
    names: dict[str, DType] = {dtype: dtype for dtype in FLOATS} | {"half": "float16", "float": "float32"}
    names |= {f"torch.{alias}": dtype for alias, dtype in names.items()}
    return names[fields.one_of(name, None, names, " or ".join(FLOATS))]


def _check_tokens(fields: Fields, vocab_size: int) -> None:
    """Refuses special tokens that are no tokens; -1 is a way to write none."""
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = fields.get(name)
        ids = value if isinstance(value, list) and name == "eos_token_id" else [] if value is None else [value]
        if not all(map(is_whole, ids)):
            fields.refuse(name, "a token's number" + (" or a list of them" if name == "eos_token_id" else ""))
        if name == "pad_token_id" and not all(-vocab_size <= token < vocab_size for token in ids):
            fields.refuse(name, f"a token of the vocabulary of {vocab_size}")
