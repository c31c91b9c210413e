"""A Llama 4 `config.json` as a `ModelSpec`, or a clear refusal.

Enters: the parsed JSON of a text-only (`llama4_text`) or multimodal (`llama4`) checkpoint, in the field names of
`transformers` 4 and 5. Leaves: a `ModelSpec`, and a `VisionSpec` of a multimodal one, whose every number has been
checked.
"""

from typing import Any, NoReturn

from ..errors import CheckpointError
from ..spec.geometry import LayerSpec, ModelSpec, RopeScaling, VisionSpec
from ..spec.types import FLOATS, DType

MOST_LAYERS = 1000
"""A configuration with more is damaged."""

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
    if kind == "llama4":
        nested = config.get("text_config")
        if not isinstance(nested, dict):
            raise CheckpointError(f"config.json: text_config is {nested!r}, expected an object: restore the file")
        shared = {name: config[name] for name in ("dtype", "torch_dtype", "quantization_config") if name in config}
        return {**shared, **nested}
    if kind == "llama4_text":
        return config
    raise CheckpointError(f"config.json: model_type is {kind!r}; Arriero takes 'llama4' and 'llama4_text' checkpoints")


def model_spec(config: dict[str, Any], stored_dtype: DType = "bfloat16") -> ModelSpec:
    """Reads the geometry.

    Args:
        config: The parsed `config.json`.
        stored_dtype: Type of the weights, for a configuration that names none.

    Raises:
        CheckpointError: Another architecture, a missing field, or a field out of range.
    """
    fields = Fields(text_config(config))
    layers = _layers(fields)
    heads = fields.count("num_attention_heads")
    kv_heads = fields.count("num_key_value_heads", heads if "num_key_value_heads" in fields.values else 8)
    hidden_size = fields.count("hidden_size")
    head_dim = fields.count("head_dim", hidden_size // heads if "head_dim" in fields.values else 128)
    experts = fields.count("num_local_experts", 16)
    experts_per_token = fields.count("num_experts_per_tok", 1)
    if heads % kv_heads:
        fields.refuse("num_key_value_heads", f"a divisor of num_attention_heads ({heads})")
    if head_dim % 2:
        fields.refuse("head_dim", "even, since RoPE rotates pairs")
    if experts_per_token > experts:
        fields.refuse("num_experts_per_tok", f"at most num_local_experts ({experts})")
    if fields.get("hidden_act", "silu") != "silu":
        fields.refuse("hidden_act", "'silu', as in every Llama 4")
    if fields.get("attention_bias", False):
        fields.refuse("attention_bias", "false, as in every Llama 4")
    dtype = str(fields.get("dtype") or fields.get("torch_dtype") or stored_dtype).removeprefix("torch.")
    if dtype not in FLOATS:
        fields.refuse("dtype" if "dtype" in fields.values else "torch_dtype", " or ".join(FLOATS))
    rope_theta, rope_scaling = _rope(fields)
    tuned = fields.flag("attn_temperature_tuning", True)
    return ModelSpec(
        vocab_size=fields.count("vocab_size"),
        hidden_size=hidden_size,
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
        max_positions=fields.count("max_position_embeddings", 131072),
        temperature_scale=fields.positive("attn_scale", 0.1) if tuned else 0.0,
        temperature_floor=fields.positive("floor_scale", 8192),
        tied_embeddings=fields.flag("tie_word_embeddings", False),
        dtype=dtype,
    )


def vision_spec(config: dict[str, Any]) -> VisionSpec:
    """Reads the geometry of a multimodal checkpoint's vision tower.

    Raises:
        CheckpointError: A missing field, or a field out of range.
    """
    nested = config.get("vision_config")
    if not isinstance(nested, dict):
        raise CheckpointError(f"config.json: vision_config is {nested!r}, expected an object: restore the file")
    fields = Fields(nested, "vision_config.")
    hidden_size, heads = fields.count("hidden_size", 768), fields.count("num_attention_heads", 16)
    image_size, patch_size = fields.side("image_size", 448), fields.side("patch_size", 14)
    if hidden_size % (4 * heads):
        fields.refuse("hidden_size", f"{heads} heads of a multiple of 4, since RoPE rotates pairs by column and by row")
    grid, shuffle = image_size // patch_size, round(1 / fields.positive("pixel_shuffle_ratio", 0.5))
    if fields.positive("pixel_shuffle_ratio", 0.5) * shuffle != 1 or grid % shuffle or not grid:
        fields.refuse("pixel_shuffle_ratio", f"one over a divisor of the {grid} patches of a side")
    mlp_size, adapter_size = fields.count("intermediate_size", 5632), fields.count("projector_input_dim", 4096)
    if mlp_size != hidden_size * shuffle**2:
        fields.refuse("intermediate_size", f"hidden_size over pixel_shuffle_ratio squared, {hidden_size * shuffle**2}")
    for name, default in (("projector_output_dim", 4096), ("vision_output_dim", 7680)):
        if fields.count(name, default) != adapter_size:
            fields.refuse(name, f"projector_input_dim, {adapter_size}")
    for name, fixed in VISION_FIXED.items():
        if fields.get(name, fixed) != fixed:
            fields.refuse(name, f"{fixed!r}, as in every Llama 4")
    whole = Fields(config)
    token = "image_token_id" if "image_token_id" in config else "image_token_index"
    image_token, vocab_size = whole.count(token, 200092), Fields(text_config(config)).count("vocab_size")
    if image_token >= vocab_size:
        whole.refuse(token, f"a token of the vocabulary of {vocab_size}")
    return VisionSpec(
        hidden_size=hidden_size,
        layers=fields.count("num_hidden_layers", 34),
        heads=heads,
        mlp_size=mlp_size,
        image_size=image_size,
        patch_size=patch_size,
        shuffle=shuffle,
        adapter_size=adapter_size,
        rope_theta=_rope_parameters(fields, 10000.0)[1].positive("rope_theta"),
        image_token=image_token,
    )


class Fields:
    """The values of a configuration, read with their ranges.

    Args:
        values: By name.
        place: Put before a name in errors.
    """

    def __init__(self, values: dict[str, Any], place: str = "") -> None:
        self.values, self.place = values, place

    def get(self, name: str, default: Any = None) -> Any:
        """The value as it stands."""
        return self.values.get(name, default)

    def count(self, name: str, default: int | None = None) -> int:
        """A whole number from 1 up."""
        value = self.values.get(name, default)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            self.refuse(name, "a whole number from 1 up")
        return value

    def side(self, name: str, default: int) -> int:
        """A square's side, which may be written as height and width."""
        value = self.values.get(name)
        if isinstance(value, list) and len(value) == 2 and value[0] == value[1]:
            return Fields({name: value[0]}, self.place).count(name)
        return self.count(name, default)

    def positive(self, name: str, default: float | None = None) -> float:
        """A number above 0."""
        value = self.values.get(name, default)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e300:
            self.refuse(name, "a number above 0")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        """True or false; older files write numbers."""
        value = self.values.get(name, default)
        if not isinstance(value, bool | int):
            self.refuse(name, "true or false")
        return bool(value)

    def choices(self, name: str, valid: tuple[Any, ...], count: int) -> list[Any]:
        """A list with a valid entry for each layer, or an empty one where the field is left out."""
        values = self.values.get(name) or []
        if not isinstance(values, list) or any(value not in valid for value in values) or 0 < len(values) < count:
            self.refuse(name, f"a list with one of {', '.join(map(str, valid))} for each of the {count} layers")
        return values[:count]

    def refuse(self, name: str, expected: str) -> NoReturn:
        """Raises the error for a value out of range."""
        found = repr(self.values[name]) if name in self.values else "missing"
        raise CheckpointError(f"config.json: {self.place}{name} is {found}, expected {expected}")


def _layers(fields: Fields) -> tuple[LayerSpec, ...]:
    """Which layers rotate, chunk and route; the rules fill in what a configuration leaves out."""
    count = fields.count("num_hidden_layers")
    if count > MOST_LAYERS:
        fields.refuse("num_hidden_layers", f"at most {MOST_LAYERS}")
    interval = fields.count("no_rope_layer_interval", 4)
    step = fields.count("interleave_moe_layer_step", 1)
    ropes = fields.choices("no_rope_layers", (0, 1), count)
    ropes = ropes or [int((index + 1) % interval != 0) for index in range(count)]
    kinds = fields.choices("layer_types", ("chunked_attention", "full_attention"), count)
    kinds = kinds or ["chunked_attention" if rope else "full_attention" for rope in ropes]
    routed = fields.get("moe_layers")
    if routed is None:
        routed = range(step - 1, count, step)
    elif not isinstance(routed, list) or any(type(index) is not int or not 0 <= index < count for index in routed):
        fields.refuse("moe_layers", f"a list of layer numbers below {count}")
    chunk = fields.count("attention_chunk_size", 8192) if "chunked_attention" in kinds else 0
    return tuple(
        LayerSpec(rope=bool(rope), chunk=chunk if kind == "chunked_attention" else 0, experts=index in routed)
        for index, (rope, kind) in enumerate(zip(ropes, kinds, strict=True))
    )


def _rope(fields: Fields) -> tuple[float, RopeScaling | None]:
    """RoPE's base and scaling, from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (4)."""
    name, rope = _rope_parameters(fields, 500000.0)
    theta = rope.positive("rope_theta")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind != "llama3":
        fields.refuse(name, "of type 'default' or 'llama3'")
    return theta, RopeScaling(
        factor=rope.positive("factor"),
        low_freq_factor=rope.positive("low_freq_factor"),
        high_freq_factor=rope.positive("high_freq_factor"),
        original_max_positions=rope.count("original_max_position_embeddings"),
    )


def _rope_parameters(fields: Fields, theta: float) -> tuple[str, Fields]:
    """The field that holds RoPE's parameters, and these, `rope_theta` among them."""
    name = "rope_parameters" if fields.get("rope_parameters") is not None else "rope_scaling"
    nested = fields.get(name) or {}
    if not isinstance(nested, dict):
        fields.refuse(name, "an object")
    return name, Fields({"rope_theta": fields.get("rope_theta", theta), **nested}, fields.place)
