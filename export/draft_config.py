"""An EAGLE-3 head's `config.json` as a `DraftSpec`, or a clear refusal.

Enters: the parsed JSON in one of the two published forms, and the geometry of the decoder that the head drafts for.
Leaves: a `DraftSpec` but for what only the tensors say. Two fields that stand in both forms count layers differently:

| form | known by | `eagle_aux_hidden_state_layer_ids` | where there are none |
|---|---|---|---|
| `speculators` | `speculators_model_type` | layers that a state has been through | 2, half of them, all but 3 |
| EAGLE's repository, NVIDIA's | `LlamaForCausalLMEagle3` | the layers that states come out of | the same states |
"""

from collections.abc import Mapping
from typing import Any, Literal

from ..errors import CheckpointError, shortened
from ..spec.draft import DraftSpec
from ..spec.geometry import ModelSpec, RopeScaling
from ..spec.types import DType
from .config_fields import Fields
from .config_rope import text_rope

NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "bias": (False, None),
    "qkv_bias": (False, None),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "hidden_act": ("silu", "swish"),
    "is_causal": (True, None),
    "logit_scale": (1, None),
    "parallel_drafting": (False, None),
    "partial_rotary_factor": (1, None),
    "pretraining_tp": (1, None),
    "quantization_config": (None, {}),
    "sliding_window": (None,),
    "use_sliding_window": (False, None),
}
"""Fields that would change what a head computes, and their values that change nothing."""

UNREAD = frozenset(
    {
        *("_name_or_path", "architectures", "attention_dropout", "auto_map", "bos_token_id", "cache_implementation"),
        *("chunk_size_feed_forward", "dtype", "embed_requires_grad", "eos_token_id", "id2label", "initializer_range"),
        *("is_encoder_decoder", "label2id", "max_position_embeddings", "max_window_layers", "modules_to_not_convert"),
        *("num_eagle_features", "output_attentions", "output_hidden_states", "pad_token_id", "problem_type"),
        *("return_dict", "speculators_config", "speculators_version", "tie_word_embeddings", "torch_dtype"),
        *("torchscript", "transformers_version", "use_bfloat16", "use_cache", "vocab_size", "base_model_type"),
        *("has_no_defaults_at_init", "speculators_model_type", "eagle_version", "original_max_position_embeddings"),
    }
)
"""Fields that say nothing of what a head computes, or what its tensors say as well."""

OF_LAYERS = frozenset(
    {
        *("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
        *("num_key_value_heads", "head_dim", "rms_norm_eps", "rope_theta", "rope_scaling", "rope_parameters"),
        *("layer_types",),
    }
)
OF_SPECULATORS = frozenset(
    {
        *("draft_vocab_size", "norm_before_residual", "target_hidden_size", "eagle_aux_hidden_state_layer_ids"),
        *("norm_before_fc", "fc_norm", "norm_output", "transformer_layer_config"),
    }
)
OF_EAGLE = OF_LAYERS | {
    *("draft_vocab_size", "target_hidden_size", "eagle_aux_hidden_state_layer_ids", "eagle_config", "norm_before_fc"),
    *("norm_before_residual", "fc_norm", "norm_output"),
}

EAGLE_FIXED: Mapping[str, tuple[Any, ...]] = {
    "use_aux_hidden_state": (True,),
    "use_input_layernorm_in_first_layer": (True,),
    "use_last_layernorm": (True,),
    "use_mtp_layernorm": (False, None),
    "next_layer_regular": (True, None),
    "parallel_draft_step": (0, 1, None),
    "parallel_draft_heads_num_layers": (0, 1, None),
}
"""Fields of NVIDIA's `eagle_config` that have one value here."""

ARCHITECTURES = ("LlamaForCausalLMEagle3", "Eagle3LlamaForCausalLM")


def draft_spec(config: dict[str, Any], model: ModelSpec, dtype: DType) -> DraftSpec:
    """Reads a head's geometry.

    Args:
        config: The parsed `config.json`.
        model: The decoder's geometry.
        dtype: Type of the head's weights.

    Raises:
        CheckpointError: Another form, a field that is not known, or one out of range.
    """
    fields = Fields(config)
    if "speculators_model_type" in config:
        if config["speculators_model_type"] != "eagle3":
            fields.refuse("speculators_model_type", "'eagle3', the only kind of draft that is taken")
        inner = config.get("transformer_layer_config")
        if not isinstance(inner, dict):
            fields.refuse("transformer_layer_config", "an object")
        _refuse_unknown(fields, OF_SPECULATORS)
        layers = Fields(inner, "transformer_layer_config.")
        _refuse_unknown(layers, OF_LAYERS)
        states = fields.list_of_whole("eagle_aux_hidden_state_layer_ids")
    else:
        found = config.get("architectures")
        name = found[0] if isinstance(found, list) and len(found) == 1 else found
        if name not in ARCHITECTURES:
            fields.refuse("architectures", f"['{ARCHITECTURES[0]}'], or speculators_model_type beside it")
        _refuse_unknown(fields, OF_EAGLE)
        layers = fields
        states = _states_of_eagle(fields)
    if layers.get("model_type", "llama") != "llama":
        layers.refuse("model_type", "'llama', the only kind of layer that a draft may have here")
    return _spec(fields, layers, states or _usual_states(model), model, dtype)


def _spec(fields: Fields, layers: Fields, states: list[int], model: ModelSpec, dtype: DType) -> DraftSpec:
    """The geometry, from fields that are known."""
    hidden = layers.count("hidden_size", 4096)
    heads = layers.count("num_attention_heads", 32)
    kv_heads = heads if layers.get("num_key_value_heads") is None else layers.count("num_key_value_heads")
    theta, scaling = _rope(layers)
    if (read := fields.get("target_hidden_size")) is not None and read != model.hidden_size:
        fields.refuse("target_hidden_size", f"{model.hidden_size}, the model's hidden size")
    kinds = layers.get("layer_types") or []
    if not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds):
        layers.refuse("layer_types", "'full_attention' alone")
    norms: tuple[tuple[str, Literal["whole", "each"]], ...] = (("norm_before_fc", "whole"), ("fc_norm", "each"))
    asked = [kind for name, kind in norms if fields.flag(name, False)]
    if len(asked) > 1:
        fields.refuse("fc_norm", "false beside norm_before_fc")
    whole_vocabulary = fields.is_null("draft_vocab_size") or "draft_vocab_size" not in fields.values
    try:
        spec = DraftSpec(
            vocab_size=model.vocab_size if whole_vocabulary else fields.count("draft_vocab_size"),
            hidden_size=hidden,
            layers=layers.count("num_hidden_layers", 1),
            heads=heads,
            kv_heads=kv_heads,
            head_dim=hidden // heads if layers.get("head_dim") is None else layers.count("head_dim"),
            mlp_size=layers.count("intermediate_size", 11008),
            norm_eps=layers.positive("rms_norm_eps", 1e-6),
            rope_theta=theta,
            rope_scaling=scaling,
            states=tuple(states),
            input_norm=asked[0] if asked else "none",
            norm_before_residual=fields.flag("norm_before_residual", False),
            norm_output=fields.flag("norm_output", False),
            dtype=dtype,
        )
        spec.check_decoder(model)
    except ValueError as error:
        raise CheckpointError(f"config.json: {error}: give the draft of this model") from error
    return spec


def _rope(layers: Fields) -> tuple[float, RopeScaling | None]:
    """RoPE's base, Llama's where none is given, and its scaling."""
    objects = [layers.get(name) for name in ("rope_parameters", "rope_scaling")]
    given = any(isinstance(each, dict) and "rope_theta" in each for each in objects)  # before the one beside it
    values = layers.values if given or "rope_theta" in layers.values else {**layers.values, "rope_theta": 10000.0}
    longest = layers.count("max_position_embeddings", 2048)
    return text_rope(Fields(values, layers.place), longest)


def _states_of_eagle(fields: Fields) -> list[int] | None:
    """The states that a head of EAGLE's form names, as numbers of layers gone through; None where it names none."""
    inner = fields.get("eagle_config") or {}
    if not isinstance(inner, dict):
        fields.refuse("eagle_config", "an object")
    nested = Fields(inner, "eagle_config.")
    for name, valid in EAGLE_FIXED.items():
        if name in inner and inner[name] not in valid:
            nested.refuse(name, shortened(valid[0]))
    _refuse_unknown(nested, frozenset({*EAGLE_FIXED, "eagle_aux_hidden_state_layer_ids"}))
    named = next((each for each in (nested, fields) if each.get("eagle_aux_hidden_state_layer_ids")), None)
    ids = None if named is None else named.list_of_whole("eagle_aux_hidden_state_layer_ids")
    return ids and [number + 1 for number in ids]


def _usual_states(model: ModelSpec) -> list[int]:
    """The states that EAGLE-3 reads where a head names none."""
    count = len(model.layers)
    return [2, count // 2, count - 3]


def _refuse_unknown(fields: Fields, known: frozenset[str]) -> None:
    """Refuses a field that may change what the head computes, and is not read."""
    for name, value in fields.values.items():
        if name in NEUTRAL:
            if value not in NEUTRAL[name]:
                fields.refuse(name, shortened(NEUTRAL[name][0]))
        elif name not in known and name not in UNREAD:
            raise CheckpointError(
                f"config.json: {fields.place}{shortened(name)} is a field of a draft that is not known: take it out "
                "where it changes nothing"
            )
