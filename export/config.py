"""A Llama 4 `config.json` as a `ModelSpec`, or a clear refusal.

Enters: the parsed JSON of a text-only (`llama4_text`) or multimodal (`llama4`) checkpoint, in the field names of
`transformers` 4 and 5. Leaves: a `ModelSpec` whose every number has been checked.
"""

from typing import Any, NoReturn

from ..errors import CheckpointError
from ..spec import DType, LayerSpec, ModelSpec, RopeScaling

DTYPES: dict[str, DType] = {"float32": "float32", "float16": "float16", "bfloat16": "bfloat16"}


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
        shared = {
            "dtype": config.get("dtype", config.get("torch_dtype")),
            "quantization_config": config.get("quantization_config"),
        }
        return {**shared, **nested}
    if kind == "llama4_text":
        return config
    raise CheckpointError(f"config.json: model_type is {kind!r}; Arriero takes 'llama4' and 'llama4_text' checkpoints")


def model_spec(config: dict[str, Any]) -> ModelSpec:
    """Reads the geometry.

    Raises:
        CheckpointError: Another architecture, a missing field, or a field out of range.
    """
    fields = Fields(text_config(config))
    layers = _layers(fields)
    heads = fields.count("num_attention_heads")
    kv_heads = fields.count("num_key_value_heads", heads)
    hidden_size = fields.count("hidden_size")
    head_dim = fields.count("head_dim", hidden_size // heads or None)
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
    quantised = fields.get("quantization_config")
    if quantised is not None:
        method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
        raise CheckpointError(
            f"config.json: the weights are already quantised ({method!r}); Arriero exports bf16, fp16 and fp32 "
            "checkpoints: start from the unquantised one"
        )
    dtype = str(fields.get("dtype", fields.get("torch_dtype", "bfloat16")) or "bfloat16").removeprefix("torch.")
    if dtype not in DTYPES:
        fields.refuse("dtype" if "dtype" in fields.values else "torch_dtype", " or ".join(DTYPES))
    rope_theta, rope_scaling = _rope(fields)
    tuned = bool(fields.get("attn_temperature_tuning", True))
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
        qk_norm=bool(fields.get("use_qk_norm", True)),
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        max_positions=fields.count("max_position_embeddings", 131072),
        temperature_scale=fields.positive("attn_scale", 0.1) if tuned else 0.0,
        temperature_floor=fields.positive("floor_scale", 8192),
        tied_embeddings=bool(fields.get("tie_word_embeddings", False)),
        dtype=DTYPES[dtype],
    )


class Fields:
    """The values of a configuration, read with their ranges."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.values = values

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

    def positive(self, name: str, default: float | None = None) -> float:
        """A number above 0."""
        value = self.values.get(name, default)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            self.refuse(name, "a number above 0")
        return float(value)

    def refuse(self, name: str, expected: str) -> NoReturn:
        """Raises the error for a value out of range."""
        found = repr(self.values[name]) if name in self.values else "missing"
        raise CheckpointError(f"config.json: {name} is {found}, expected {expected}")


def _layers(fields: Fields) -> tuple[LayerSpec, ...]:
    """Which layers rotate, chunk and route; the rules fill in what a configuration leaves out."""
    count = fields.count("num_hidden_layers")
    interval = fields.count("no_rope_layer_interval", 4)
    ropes = fields.get("no_rope_layers") or [int((index + 1) % interval != 0) for index in range(count)]
    kinds = fields.get("layer_types") or ["chunked_attention" if rope else "full_attention" for rope in ropes]
    step = fields.count("interleave_moe_layer_step", 1)
    routed = fields.get("moe_layers")
    routed = list(range(step - 1, count, step)) if routed is None else routed
    for name, value in (("no_rope_layers", ropes), ("layer_types", kinds)):
        if not isinstance(value, list) or len(value) < count:
            fields.refuse(name, f"a list with an entry for each of the {count} layers")
    if unknown := set(kinds) - {"chunked_attention", "full_attention"}:
        fields.refuse("layer_types", f"chunked_attention or full_attention, not {sorted(map(str, unknown))[0]!r}")
    if not isinstance(routed, list) or any(not isinstance(index, int) for index in routed):
        fields.refuse("moe_layers", "a list of layer numbers")
    chunk = fields.count("attention_chunk_size", 8192) if "chunked_attention" in kinds[:count] else 0
    return tuple(
        LayerSpec(
            rope=bool(ropes[index]),
            chunk=chunk if kinds[index] == "chunked_attention" else 0,
            experts=index in routed,
        )
        for index in range(count)
    )


def _rope(fields: Fields) -> tuple[float, RopeScaling | None]:
    """RoPE's base and scaling, from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (4)."""
    name = "rope_parameters" if fields.get("rope_parameters") is not None else "rope_scaling"
    nested = fields.get(name) or {}
    if not isinstance(nested, dict):
        fields.refuse(name, "an object")
    rope = Fields({"rope_theta": fields.get("rope_theta", 500000.0), **nested})
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
