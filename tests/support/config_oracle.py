"""What `transformers` makes of a `config.json`, and whether ours is the same: equal, or refused by a field's name."""

import copy
import re
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Llama4Config, Llama4ForCausalLM, Llama4TextConfig
from transformers.models.llama4.modeling_llama4 import Llama4TextRotaryEmbedding, Llama4VisionRotaryEmbedding

from arriero.errors import CheckpointError
from arriero.export.config import model_spec, vision_spec
from arriero.export.llama4 import Llama4, inverse_frequencies
from arriero.spec.geometry import ModelSpec, VisionSpec

WITHOUT_EFFECT = frozenset(
    [
        "initializer_range",
        "use_cache",
        "attention_dropout",
        "output_router_logits",
        "router_aux_loss_coef",
        "router_jitter_noise",
        "projector_dropout",
        "norm_eps",
        "boi_token_index",
        "eoi_token_index",
        "transformers_version",
        "architectures",
        "output_hidden_states",
        "return_dict",
        "chunk_size_feed_forward",
        "is_encoder_decoder",
        "id2label",
        "label2id",
        "problem_type",
    ]
)
"""Fields that change no logit: we read none of them, `transformers` checks their types."""

FLOATS = ("attn_scale", "rms_norm_eps", "pixel_shuffle_ratio")

UNCHUNKED = 10**6
"""`transformers` 5 cannot run a chunk of null: as a chunk longer than any text."""


class RefusedError(Exception):
    """`transformers` does not take a configuration."""


@dataclass(frozen=True)
class Outcome:
    """How a configuration fared.

    Attributes:
        kind: `equal`, `refused` (by both), `refused here` (`transformers` takes it), or a fault: `taken` (it does not),
            `differs`, `unnamed`.
        said: The field that a refusal names, or the fault.
    """

    kind: str
    said: str = ""


def modern(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration with older spellings that we take written as `transformers` 5 writes them."""
    found = copy.deepcopy(config)
    for part in (found, found.get("text_config"), found.get("vision_config")):
        if not isinstance(part, dict):
            continue
        for name in WITHOUT_EFFECT & part.keys():
            del part[name]
        for name in FLOATS:
            if type(part.get(name)) is int:
                part[name] = float(part[name])
        for name in ("image_size", "patch_size"):
            if isinstance(side := part.get(name), list) and len(side) == 2 and side[0] == side[1]:
                part[name] = side[0]
        for name in ("dtype", "torch_dtype"):
            if isinstance(part.get(name), str):
                part[name] = part[name].removeprefix("torch.")
        if type(part.get("attn_temperature_tuning")) is int:
            part["attn_temperature_tuning"] = bool(part["attn_temperature_tuning"])
        if isinstance(heads := part.get("num_attention_heads"), int) and heads > 0:
            if part.get("head_dim", 0) is None and isinstance(part.get("hidden_size"), int):
                part["head_dim"] = part["hidden_size"] // heads
            if part.get("num_key_value_heads", 0) is None:
                part["num_key_value_heads"] = heads
    if found.get("model_type") == "llama4":  # of no effect beside the text decoder's own
        found.pop("tie_word_embeddings", None)
    return found


def theirs(config: dict[str, Any]) -> tuple[Any, Llama4TextConfig]:
    """The configuration of `transformers`, and its text decoder's.

    Raises:
        RefusedError: It does not take it.
    """
    found = modern(config)
    try:
        whole = (Llama4Config if found["model_type"] == "llama4" else Llama4TextConfig)(**found)
        return whole, whole.text_config if found["model_type"] == "llama4" else whole
    except Exception as error:
        raise RefusedError(str(error)) from error


def their_quantities(config: dict[str, Any]) -> dict[str, Any]:
    """The quantities that a model of `transformers` computes with.

    Raises:
        RefusedError: No such model comes to be.
    """
    whole, text = theirs(config)
    try:
        rotary = Llama4TextRotaryEmbedding(text)
        chunks = {"chunked_attention": text.attention_chunk_size or 0, "full_attention": 0}
        layers = [
            (bool(text.no_rope_layers[index]), chunks[text.layer_types[index]], index in text.moe_layers)
            for index in range(text.num_hidden_layers)
        ]
        routed = any(layer[2] for layer in layers)
        found = {
            "layers": layers,
            "sizes": (text.vocab_size, text.hidden_size, text.intermediate_size, text.intermediate_size_mlp),
            "heads": (text.num_attention_heads, text.num_key_value_heads, text.head_dim),
            "experts": (text.num_local_experts, text.num_experts_per_tok) if routed else (0, 0),
            "norms": (text.rms_norm_eps, text.use_qk_norm),
            "tuning": (text.attn_scale if text.attn_temperature_tuning else 0.0, text.floor_scale),
            "tied": text.tie_word_embeddings,
            "max_positions": text.max_position_embeddings,
            "inv_freq": rotary.inv_freq,
            "attention_scaling": rotary.attention_scaling,
            "dtype": None if whole.dtype is None else str(whole.dtype).removeprefix("torch."),
        }
        if whole is not text:
            vision = whole.vision_config
            found["vision"] = (vision.hidden_size, vision.num_hidden_layers, vision.num_attention_heads)
            found["pixels"] = (vision.image_size, vision.patch_size, vision.pixel_shuffle_ratio)
            found["image_token"] = whole.image_token_id
            Llama4VisionRotaryEmbedding(vision)
            found["vision_rope"] = vision.rope_parameters["rope_theta"]
    except Exception as error:
        raise RefusedError(str(error)) from error
    return found


def our_quantities(spec: ModelSpec, vision: VisionSpec | None) -> dict[str, Any]:
    """The same of ours."""
    found = {
        "layers": [(layer.rope, layer.chunk, layer.experts) for layer in spec.layers],
        "sizes": (spec.vocab_size, spec.hidden_size, spec.expert_size, spec.dense_size),
        "heads": (spec.heads, spec.kv_heads, spec.head_dim),
        "experts": (spec.experts, spec.experts_per_token),
        "norms": (spec.norm_eps, spec.qk_norm),
        "tuning": (spec.temperature_scale, spec.temperature_floor),
        "tied": spec.tied_embeddings,
        "max_positions": spec.max_positions,
        "inv_freq": inverse_frequencies(spec),
        "attention_scaling": 1.0,
        "dtype": spec.dtype,
    }
    if vision is not None:
        found["vision"] = (vision.hidden_size, vision.layers, vision.heads)
        found["pixels"] = (vision.image_size, vision.patch_size, 1 / vision.shuffle)
        found["image_token"] = vision.image_token
        found["vision_rope"] = vision.rope_theta
    return found


def outcome(config: dict[str, Any], changed: set[str], logits: bool = False) -> Outcome:
    """Compares ours with `transformers`'.

    Args:
        config: A configuration, which is left as it is.
        changed: Fields that a refusal may name.
        logits: Whether two models are built and run where both take it.
    """
    try:
        spec = model_spec(copy.deepcopy(config), "float32")
        vision = vision_spec(copy.deepcopy(config)) if config["model_type"] == "llama4" else None
    except CheckpointError as error:
        return _refusal(str(error), config, changed)
    try:
        expected = their_quantities(config)
    except RefusedError as error:
        return Outcome("taken", str(error)[:200])
    found = our_quantities(spec, vision)
    if expected["dtype"] is None:
        expected["dtype"] = "float32"
    for name, value in expected.items():
        if not _is_equal(name, found[name], value):
            return Outcome("differs", f"{name}: {found[name]}, expected {value}"[:300])
    if logits and (difference := logit_difference(config)) > 1e-4:
        return Outcome("differs", f"logits by {difference}")
    return Outcome("equal")


def logit_difference(config: dict[str, Any], length: int = 40) -> float:
    """The largest difference of logits between the two random models of a configuration's text decoder, relative."""
    text = theirs(config)[1]
    text.dtype = None
    if text.attention_chunk_size is None:
        text.attention_chunk_size = UNCHUNKED
    torch.manual_seed(0)
    text.initializer_range = 0.2
    reference = Llama4ForCausalLM(text).eval()
    spec = model_spec(copy.deepcopy(config), "float32")
    ours = Llama4(spec).eval()
    ours.load_state_dict(reference.state_dict(), strict=not spec.tied_embeddings)
    ids = torch.randint(0, spec.vocab_size, (1, length))
    with torch.no_grad():
        expected = reference(ids, use_cache=False).logits
        return float((ours(ids) - expected).abs().max() / expected.abs().max())


def _refusal(said: str, config: dict[str, Any], changed: set[str]) -> Outcome:
    named = re.match(r"config\.json: (?:\w+\.)*(\w+) is ", said)
    if named is None or named[1] not in changed or len(said) > 300:
        return Outcome("unnamed", f"{said}; changed {sorted(changed)}")
    if _is_huge(config):
        return Outcome("refused", named[1])
    try:
        their_quantities(config)
    except RefusedError:
        return Outcome("refused", named[1])
    return Outcome("refused here", said.removeprefix("config.json: "))


def _is_huge(value: Any) -> bool:
    """Whether `transformers` would take very long, or all memory, over a number in a configuration."""
    if isinstance(value, dict):
        return any(map(_is_huge, value.values()))
    return isinstance(value, int) and value > 2**20


def _is_equal(name: str, found: Any, expected: Any) -> bool:
    if name == "inv_freq":
        return found.shape == expected.shape and torch.allclose(found, expected, rtol=2e-6, atol=0, equal_nan=True)
    return bool(found == expected)
