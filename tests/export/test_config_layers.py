"""Lists of layers: longer, shorter, empty, of other things; as `transformers`, or refused by name."""

from typing import Any

import pytest
from config_mutations import SCOUT
from config_oracle import outcome

TAKEN: list[dict[str, Any]] = [
    {"moe_layers": [0, 3, 4, 99]},
    {"moe_layers": [-1, 2]},
    {"moe_layers": []},
    {"moe_layers": None, "interleave_moe_layer_step": 3},
    {"moe_layers": [1], "interleave_moe_layer_step": 0},
    {"interleave_moe_layer_step": 9},
    {"no_rope_layers": [], "no_rope_layer_interval": 2},
    {"no_rope_layers": None, "no_rope_layer_interval": 1},
    {"no_rope_layers": [1, 0, 0, 1], "no_rope_layer_interval": 2},
    {"no_rope_layers": [1, 0, 1, 0, 1], "layer_types": ["full_attention"] * 4},
    {"no_rope_layers": [1] * 4, "layer_types": ["full_attention", "chunked_attention"] * 2},
    {"layer_types": ["attention", "chunked_attention"] * 2},
    {"layer_types": None},
    {"attention_chunk_size": None},
]

REFUSED: list[dict[str, Any]] = [
    {"no_rope_layers": [1] * 5},
    {"no_rope_layers": [1] * 3},
    {"no_rope_layers": [1] * 3, "layer_types": ["full_attention"] * 4},
    {"no_rope_layers": [True] * 4},
    {"no_rope_layers": [1.0] * 4},
    {"no_rope_layers": "1111"},
    {"no_rope_layer_interval": 0, "no_rope_layers": [1] * 4},
    {"layer_types": []},
    {"layer_types": ["full_attention"] * 5},
    {"layer_types": ["full_attention"] * 3},
    {"layer_types": ["sliding_attention"] * 4},
    {"layer_types": [0] * 4},
    {"layer_types": "full_attention"},
    {"moe_layers": ["0"]},
    {"moe_layers": [True]},
    {"moe_layers": [1.0]},
    {"moe_layers": {"0": 1}},
    {"moe_layers": None, "interleave_moe_layer_step": 0},
    {"attention_chunk_size": 0},
    {"attention_chunk_size": -1},
    {"num_local_experts": 0},
]


@pytest.mark.parametrize("fields", TAKEN, ids=str)
def test_it_is_taken_with_the_logits_of_transformers(fields: dict[str, Any]) -> None:
    found = outcome({**SCOUT, **fields}, set(fields), logits=True)
    assert found.kind == "equal", found.said


@pytest.mark.parametrize("fields", REFUSED, ids=str)
def test_it_is_refused_by_its_name(fields: dict[str, Any]) -> None:
    found = outcome({**SCOUT, **fields}, set(fields))
    assert found.kind in ("refused", "refused here"), found
