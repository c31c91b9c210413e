import contextlib
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.sparse import SCOUT as TEXT

from arriero.errors import CheckpointError
from arriero.export.config import model_spec

DEFAULTED = ("dtype", "num_experts_per_tok", "use_qk_norm", "floor_scale", "attn_scale", "rms_norm_eps")
"""Fields that a configuration may leave out."""

SCOUT: dict[str, Any] = {
    "model_type": "llama4",
    "torch_dtype": "bfloat16",
    "text_config": {
        **{name: value for name, value in TEXT.items() if name not in DEFAULTED},
        "attn_temperature_tuning": 4,
        "no_rope_layers": [],
    },
}
"""The configuration as it was published, by names that have changed since."""


def changed(**fields: Any) -> dict[str, Any]:
    return {**SCOUT["text_config"], "dtype": "bfloat16", **fields}


def test_the_published_form_of_scout_is_read() -> None:
    spec = model_spec(SCOUT)
    assert [layer.rope for layer in spec.layers[:4]] == [True, True, True, False]
    assert [layer.chunk for layer in spec.layers[:4]] == [8192, 8192, 8192, 0]
    assert all(layer.experts for layer in spec.layers)
    assert spec.rope_scaling is not None
    assert spec.rope_scaling.factor == 16.0
    assert spec.temperature_scale == 0.1
    assert spec.dtype == "bfloat16"


def test_mavericks_layers_alternate() -> None:
    spec = model_spec(changed(interleave_moe_layer_step=2, num_local_experts=128, use_qk_norm=False, rope_scaling=None))
    assert [layer.experts for layer in spec.layers[:4]] == [False, True, False, True]
    assert spec.rope_scaling is None
    assert not spec.qk_norm


def test_transformers_5_names_are_read() -> None:
    spec = model_spec(changed(rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, rope_scaling=None))
    assert spec.rope_theta == 10000.0


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"model_type": "qwen3_moe"}, "model_type is 'qwen3_moe'"),
        ({"model_type": None}, "model_type is None"),
        ({"model_type": None, "speculators_model_type": "eagle3"}, "give this folder with --draft"),
        ({"model_type": "llama", "architectures": ["LlamaForCausalLMEagle3"]}, "give this folder with --draft"),
        ({"hidden_size": 0}, "hidden_size is 0, expected a whole number from 1 up"),
        ({"hidden_size": "5120"}, "hidden_size is '5120'"),
        ({"num_hidden_layers": -1}, "num_hidden_layers is -1"),
        ({"num_key_value_heads": 7}, "num_key_value_heads is 7, expected a divisor of num_attention_heads (40)"),
        ({"head_dim": 127}, "head_dim is 127, expected even"),
        ({"num_experts_per_tok": 17}, "num_experts_per_tok is 17, expected at most num_local_experts (16)"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"rms_norm_eps": 0}, "rms_norm_eps is 0"),
        ({"floor_scale": -8}, "floor_scale is -8"),
        ({"attention_chunk_size": 0}, "attention_chunk_size is 0"),
        (
            {"no_rope_layers": [1, 1]},
            "no_rope_layers is [1, 1], expected a list with one of 0, 1 for each of the 48 layers",
        ),
        ({"no_rope_layers": 5}, "no_rope_layers is 5, expected a list"),
        ({"layer_types": ["sliding"] * 48}, "layer_types"),
        ({"layer_types": [["a"]] * 48}, "layer_types"),
        ({"moe_layers": [0.5]}, "moe_layers is [0.5], expected a list of whole numbers"),
        ({"num_hidden_layers": 300000}, "num_hidden_layers is 300000, expected at most 1000"),
        ({"use_qk_norm": "no"}, "use_qk_norm is 'no', expected true or false"),
        ({"attn_temperature_tuning": "false"}, "attn_temperature_tuning is 'false'"),
        ({"rope_theta": 10**400}, "rope_theta is 1000"),
        ({"moe_layers": "all"}, "moe_layers is 'all'"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rope_scaling"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "factor is missing"),
        ({"dtype": "float8"}, "dtype is 'float8'"),
    ],
)
def test_what_is_out_of_range_is_named_with_what_was_found(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(CheckpointError, match=re.escape(said)):
        model_spec(changed(**fields))


junk = (
    st.none()
    | st.booleans()
    | st.integers(-3, 10**5)
    | st.floats()
    | st.text(max_size=3)
    | st.lists(st.integers(-1, 2))
)


@given(st.dictionaries(st.sampled_from(sorted(SCOUT["text_config"])), junk | st.lists(junk, max_size=50), max_size=3))
def test_any_fields_are_read_or_refused(fields: dict[str, Any]) -> None:
    with contextlib.suppress(CheckpointError):
        model_spec(changed(**fields))


def test_a_missing_field_is_named() -> None:
    config = changed()
    del config["vocab_size"]
    with pytest.raises(CheckpointError, match="vocab_size is missing"):
        model_spec(config)
