"""A checkpoint without a generation config: what its `config.json` says, as `transformers` loads it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Llama4ForCausalLM, Llama4ForConditionalGeneration

from arriero.export.checkpoint import open_checkpoint
from arriero.files.unheeded import generation_fields
from arriero.runtime.defaults import read_defaults

DUMPED = {"max_length": 20, "min_length": 0, "do_sample": False, "temperature": 1.0, "top_k": 50, "num_beams": 1}
"""Fields that `transformers` 4 wrote into a whole `config.json`."""


@pytest.mark.parametrize("is_multimodal", [False, True])
@pytest.mark.parametrize(
    "fields", [{}, {"eos_token_id": ...}, {"eos_token_id": None}, {"max_length": 20}, DUMPED, {"max_length": 33}]
)
def test_ends_and_lengths_are_those_that_transformers_loads(
    make_llama4: Callable[..., Llama4ForCausalLM],
    make_multimodal: Callable[..., Llama4ForConditionalGeneration],
    tmp_path: Path,
    fields: dict[str, Any],
    is_multimodal: bool,
) -> None:
    made = make_multimodal(num_hidden_layers=1) if is_multimodal else make_llama4(num_hidden_layers=1)
    made.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").unlink(missing_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    part = config["text_config"] if is_multimodal else config
    for name, value in fields.items():
        part.pop(name, None)
        if value is not ...:
            part[name] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    theirs = type(made).from_pretrained(tmp_path).generation_config
    (tmp_path / "generation_config.json").write_text(json.dumps(generation_fields(config)))  # as the export does
    ours = read_defaults(tmp_path)
    ends = theirs.eos_token_id
    assert list(ours.eos_token_ids) == ([] if ends is None else [ends])
    assert (ours.max_length, ours.max_new_tokens) == (theirs.max_length, theirs.max_new_tokens)
    assert (ours.sampling.temperature > 0) == bool(theirs.do_sample)


@pytest.mark.parametrize("wide", ["lm_head.weight", "model.norm.weight", "model.embed_tokens.weight", "router"])
@pytest.mark.parametrize("rest", [torch.bfloat16, torch.float16])
def test_stored_types_that_are_mixed_make_the_type_that_transformers_loads(
    make_llama4: Callable[..., Llama4ForCausalLM], tmp_path: Path, wide: str, rest: torch.dtype
) -> None:
    model = make_llama4(num_hidden_layers=1).to(rest)
    for name, parameter in model.named_parameters():
        if wide in name:
            parameter.data = parameter.data.float()
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["dtype"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    theirs = Llama4ForCausalLM.from_pretrained(tmp_path, dtype="auto").config.dtype
    assert f"torch.{open_checkpoint(tmp_path).spec.dtype}" == str(theirs)
