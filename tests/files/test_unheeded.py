import json
from pathlib import Path
from typing import Any

import pytest
from transformers import GenerationConfig

from arriero.files.unheeded import (
    GENERATION_HARMLESS,
    GENERATION_HEEDED,
    GENERATION_NEUTRAL,
    generation_fields,
    unheeded,
)


def lines(folder: Path, name: str, config: dict[str, Any]) -> list[str]:
    (folder / name).write_text(json.dumps(config))
    return unheeded(folder)


def test_every_generation_field_of_transformers_has_its_place() -> None:
    places = [GENERATION_HEEDED, GENERATION_HARMLESS, GENERATION_NEUTRAL.keys()]
    for name in GenerationConfig().to_dict():
        assert name.startswith("_") or sum(name in each for each in places) == 1, name


def test_the_defaults_of_transformers_are_named_by_no_line(tmp_path: Path) -> None:
    defaults = {**GenerationConfig().to_dict(), **GenerationConfig._get_default_generation_params()}
    assert lines(tmp_path, "generation_config.json", defaults) == []


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("num_beams", 4), ("penalty_alpha", 0.6), ("guidance_scale", 1.5), ("forced_eos_token_id", 2)],
        *[("sequence_bias", [[[3], 1.0]]), ("watermarking_config", {"bias": 2.0}), ("epsilon_cutoff", 0.1)],
        *[("encoder_repetition_penalty", 1.2), ("cache_implementation", "quantized"), ("of_tomorrow", 5)],
        *[("exponential_decay_length_penalty", [5, 1.1]), ("top_h", 0.4), ("remove_invalid_values", True)],
    ],
)
def test_a_generation_field_that_is_not_heeded_is_named(tmp_path: Path, name: str, value: Any) -> None:
    (line,) = lines(tmp_path, "generation_config.json", {name: value, "temperature": 0.5, "num_return_sequences": 1})
    assert line.startswith(f"generation_config.json: not heeded, though it may change results: {name}=")


def test_fields_of_the_other_files_are_named(tmp_path: Path) -> None:
    assert "add_eos_token=True" in lines(tmp_path, "tokenizer_config.json", {"add_eos_token": True})[-1]
    assert "image_token='<image>'" in lines(tmp_path, "processor_config.json", {"image_token": "<image>"})[-1]
    assert "do_pad=True" in lines(tmp_path, "preprocessor_config.json", {"do_pad": True, "size": {}})[-1]
    found = lines(tmp_path, "config.json", {"quantization_config": {"quant_method": "x", "rotation": "hadamard"}})
    assert "quantization_config: not heeded, though it may change results: rotation='hadamard'" in found[-1]
    assert len(found) == 4


def test_a_long_value_is_cut(tmp_path: Path) -> None:
    (line,) = lines(tmp_path, "generation_config.json", {f"x{number}": "y" * 5000 for number in range(50)})
    assert len(line) < 600
    assert "42 more" in line


@pytest.mark.parametrize("folder", ["tiny-llama4", "tiny-llama4-vision"])
def test_the_examples_ask_for_nothing_else(folder: str) -> None:
    assert unheeded(Path(__file__).parents[2] / "examples" / folder) == []


def test_without_a_generation_config_the_outer_fields_come_first() -> None:
    config = {"eos_token_id": 5, "temperature": None, "num_beams": 3, "hidden_size": 8}
    config["text_config"] = {"eos_token_id": [1], "temperature": 0.5, "top_k": 4, "bos_token_id": 0}
    expected = {"bos_token_id": 0, "eos_token_id": 5, "num_beams": 3, "temperature": 0.5, "top_k": 4}
    assert generation_fields(config) == expected


@pytest.mark.parametrize(
    "config",
    [
        {"eos_token_id": 5, "text_config": {"eos_token_id": 1}},
        {"eos_token_id": None, "text_config": {"eos_token_id": [1, 2]}},
        {"eos_token_id": [3], "temperature": 0.5, "do_sample": True, "text_config": {"temperature": 0.7, "top_k": 9}},
        {"text_config": {"eos_token_id": 1, "max_length": 30, "num_beams": 2, "bad_words_ids": [[4]]}},
        {"eos_token_id": 7, "min_length": 4, "no_repeat_ngram_size": 2},
    ],
    ids=str,
)
def test_fields_of_config_json_have_the_precedence_of_transformers(config: dict[str, Any]) -> None:
    expected = GenerationConfig.from_model_config(json.loads(json.dumps(config)))
    found = generation_fields(config)
    for name in GENERATION_HEEDED & expected.to_dict().keys():
        assert found.get(name) == getattr(expected, name), name
