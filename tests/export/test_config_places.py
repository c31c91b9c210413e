"""One quantity, several places: every pair that disagrees, as `transformers` decides it."""

from typing import Any

import pytest
from config_mutations import LLAMA3, TEXT, VISION
from config_oracle import logit_difference, their_quantities
from transformers import GenerationConfig

from arriero.errors import CheckpointError
from arriero.export.config import model_spec, text_config, vision_spec
from arriero.export.llama4 import inverse_frequencies
from arriero.files.unheeded import GENERATION_HEEDED, GENERATION_NEUTRAL, generation_fields

OTHER = {**LLAMA3, "factor": 2.0, "rope_theta": 777.0}
DEFAULT = {"rope_type": "default", "rope_theta": 10000.0}
LACKING = {name: value for name, value in LLAMA3.items() if name != "original_max_position_embeddings"}

ROPES: dict[str, dict[str, Any]] = {
    "rope_scaling before rope_parameters": {"rope_scaling": LLAMA3, "rope_parameters": DEFAULT},
    "the base beside rope_scaling, not that of rope_parameters": {
        "rope_scaling": LLAMA3,
        "rope_parameters": DEFAULT,
        "rope_theta": 55.0,
    },
    "default rope_scaling before rope_parameters": {"rope_scaling": DEFAULT, "rope_parameters": LLAMA3},
    "an empty rope_scaling says nothing": {"rope_scaling": {}, "rope_parameters": OTHER},
    "nor does null": {"rope_scaling": None, "rope_parameters": OTHER},
    "the base inside before that beside": {"rope_parameters": OTHER, "rope_theta": 55.0},
    "the base beside where none is inside": {"rope_parameters": LLAMA3, "rope_theta": 55.0},
    "the base's default": {"rope_parameters": LLAMA3},
    "null beside, a base inside": {"rope_parameters": OTHER, "rope_theta": None},
    "the original context beside before that inside": {"rope_scaling": LLAMA3, "original_max_position_embeddings": 64},
    "the context where there is no original one": {"rope_scaling": LACKING},
    "rope_type before type": {"rope_scaling": {**LLAMA3, "type": "default"}},
    "type where there is no rope_type": {"rope_scaling": {"type": "llama3", **dict(list(LLAMA3.items())[1:])}},
    "whole numbers": {"rope_scaling": {**LLAMA3, "factor": 4, "low_freq_factor": 1}, "rope_theta": 10000},
    "no scaling, a part of a head": {"rope_parameters": {**DEFAULT, "partial_rotary_factor": 0.5}},
    "scaling, the whole head": {"rope_scaling": LLAMA3, "partial_rotary_factor": 1.0},
}


@pytest.mark.parametrize("case", ROPES)
def test_rope_is_that_of_transformers(case: str) -> None:
    config = {**TEXT, **ROPES[case]}
    found, expected = inverse_frequencies(model_spec(config)), their_quantities(config)["inv_freq"]
    assert found.tolist() == pytest.approx(expected.tolist(), rel=1e-6)


def test_the_logits_are_those_of_rope_scaling() -> None:
    assert logit_difference({**TEXT, **ROPES["rope_scaling before rope_parameters"]}) < 1e-5


def whole(**fields: Any) -> dict[str, Any]:
    text = {**TEXT, **fields.pop("text", {})}
    return {"model_type": "llama4", "image_token_index": 96, "vision_config": VISION, "text_config": text, **fields}


WHOLES: dict[str, tuple[dict[str, Any], str]] = {
    "the text decoder's tie flag, true": (whole(tie_word_embeddings=False, text={"tie_word_embeddings": True}), "tied"),
    "the text decoder's tie flag, left out": (whole(tie_word_embeddings=True), "tied"),
    "rope beside the text decoder": (whole(rope_parameters=DEFAULT, rope_theta=5.0), "inv_freq"),
    "experts beside the text decoder": (whole(num_local_experts=2, num_experts_per_tok=2), "experts"),
    "layers beside the text decoder": (whole(num_hidden_layers=2, moe_layers=[]), "layers"),
    "a chunk beside the text decoder": (whole(attention_chunk_size=None), "layers"),
    "dtype before torch_dtype": (whole(dtype="float16", torch_dtype="bfloat16"), "dtype"),
    "torch_dtype where dtype is null": (whole(dtype=None, torch_dtype="bfloat16"), "dtype"),
    "the whole's dtype before the text decoder's": (whole(torch_dtype="bfloat16", text={"dtype": "float16"}), "dtype"),
    "a dtype by its other name": (whole(dtype="half"), "dtype"),
}


@pytest.mark.parametrize("case", WHOLES)
def test_a_multimodal_checkpoint_is_read_as_transformers_reads_it(case: str) -> None:
    config, name = WHOLES[case]
    spec, expected = model_spec(config), their_quantities(config)[name]
    found = {
        "tied": spec.tied_embeddings,
        "inv_freq": inverse_frequencies(spec).tolist(),
        "experts": (spec.experts, spec.experts_per_token),
        "layers": [(layer.rope, layer.chunk, layer.experts) for layer in spec.layers],
        "dtype": spec.dtype,
    }[name]
    assert found == (expected if name != "inv_freq" else pytest.approx(expected.tolist(), rel=1e-6))


def test_the_stored_type_decides_where_the_whole_names_none() -> None:
    assert model_spec(whole(text={"dtype": "float16"}), "float32").dtype == "float32"
    assert model_spec(whole(text={"dtype": "float16"})).dtype == "float16"
    assert model_spec(whole()).dtype == "bfloat16"


def test_scaling_beside_the_text_decoder_is_refused_with_its_place() -> None:
    with pytest.raises(CheckpointError, match=r"rope_scaling is .*, expected it within text_config"):
        model_spec(whole(rope_scaling=LLAMA3))
    assert model_spec(whole(text={"rope_scaling": LLAMA3})).rope_scaling is not None


@pytest.mark.parametrize("fields", [{"image_token_id": 5}, {"image_token_index": 7}, {"image_token_id": 0}])
def test_the_image_token_is_that_of_transformers(fields: dict[str, int]) -> None:
    config = whole(**fields)
    assert vision_spec(config).image_token == their_quantities(config)["image_token"]


def test_the_wholes_quantisation_is_taken_before_the_text_decoders() -> None:
    ours, other = {"quant_method": "fbgemm_fp8"}, {"quant_method": "gptq"}
    assert (
        text_config(whole(quantization_config=ours, text={"quantization_config": other}))["quantization_config"] == ours
    )
    assert (
        text_config(whole(quantization_config=None, text={"quantization_config": ours}))["quantization_config"] == ours
    )


@pytest.mark.parametrize(
    "config",
    [
        {"eos_token_id": 3, "text_config": {"eos_token_id": [4, 5], "bos_token_id": 1, "temperature": 0.5}},
        {"eos_token_id": None, "text_config": {"eos_token_id": [4, 5], "pad_token_id": None}},
        {"bos_token_id": 0, "do_sample": True, "temperature": 0.7, "max_length": 33, "stop_strings": ["x"]},
        {"temperature": 0.7, "text_config": {"temperature": 0.2, "top_k": 3, "do_sample": True}},
        {"text_config": None},
    ],
)
def test_generation_values_of_a_config_are_those_that_transformers_takes(config: dict[str, Any]) -> None:
    expected = GenerationConfig.from_model_config(config)
    found = generation_fields(config)
    names = GENERATION_HEEDED | GENERATION_NEUTRAL.keys() | {"bos_token_id", "pad_token_id"}
    assert {name: getattr(expected, name, None) for name in names} == {name: found.get(name) for name in names}


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("value", [float("inf"), [], {}, 16, "float8_e4m3fn", "nothing"], ids=repr)
def test_a_towers_type_that_is_none_is_refused(name: str, value: Any) -> None:
    with pytest.raises(CheckpointError, match=rf"vision_config\.{name} is "):
        vision_spec(whole(vision_config={**VISION, name: value}))


def test_a_towers_type_changes_nothing() -> None:
    plain = vision_spec(whole())
    for value in (None, "bfloat16", "torch.float16", "half"):
        assert vision_spec(whole(vision_config={**VISION, "dtype": value})) == plain


@pytest.mark.parametrize("name", ["rope_theta", "rms_norm_eps", "attn_scale"])
def test_a_whole_number_that_pytorch_cannot_hold_is_refused_and_its_fraction_taken(name: str) -> None:
    with pytest.raises(CheckpointError, match=rf"{name} is 1000.*at most 9223372036854775807, or with a decimal point"):
        model_spec({**TEXT, name: 10**30})
    model_spec({**TEXT, name: 1e30})


def test_a_towers_base_that_pytorch_cannot_hold_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"vision_config\.rope_theta is 9223"):
        vision_spec(whole(vision_config={**VISION, "rope_theta": 2**63}))


@pytest.mark.parametrize("value", [[], "", 0, {"0": {"use_qk_norm": False}}], ids=repr)
def test_a_configuration_by_layers_is_refused(value: Any) -> None:
    with pytest.raises(CheckpointError, match="per_layer_config is "):
        model_spec({**TEXT, "per_layer_config": value})


@pytest.mark.parametrize(
    ("name", "value"), [("multi_modal_projector_bias", 0), ("multi_modal_projector_bias", 0.0), ("num_channels", 3.0)]
)
def test_an_equal_value_of_another_type_is_refused(name: str, value: Any) -> None:
    with pytest.raises(CheckpointError, match=rf"vision_config\.{name} is {value!r}, expected "):
        vision_spec(whole(vision_config={**VISION, name: value}))
