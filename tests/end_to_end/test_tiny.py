"""The trained tiny Llama 4, from its checkpoint to text."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

import arriero

PROMPT = "The with statement is used to wrap the execution of a block with methods defined by a context manager."


def test_it_is_small_and_whole(tiny: Path) -> None:
    assert sum(path.stat().st_size for path in tiny.iterdir() if path.is_file()) <= 12e6
    assert len(list(tiny.glob("*.safetensors"))) > 1
    config = json.loads((tiny / "config.json").read_text())
    assert config["attention_chunk_size"] == 128
    assert config["num_local_experts"] >= 8
    assert config["num_key_value_heads"] < config["num_attention_heads"]
    assert set(config["no_rope_layers"]) == {0, 1}
    assert config["use_qk_norm"]
    assert config["attn_temperature_tuning"]
    assert config["floor_scale"] < 100


def test_greedy_text_equals_that_of_transformers_past_chunk_boundaries(tiny: Path, tiny_model: Path) -> None:
    reference = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(tiny)(PROMPT, return_tensors="pt").input_ids
    expected = reference.generate(ids, max_new_tokens=200, do_sample=False, eos_token_id=None)[0, ids.shape[1] :]
    found = arriero.load(tiny_model).generate(PROMPT, max_new_tokens=200, temperature=0, eos_token_id=[])
    assert ids.shape[1] + 200 > 128
    assert found.ids == expected.tolist()


def test_held_out_perplexity_is_the_one_recorded(tiny: Path, tiny_model: Path, texts: tuple[Path, Path]) -> None:
    recorded = json.loads((tiny / "training.json").read_text())
    text = texts[0].read_text()
    if len(text) != recorded["held_out_characters"]:
        pytest.skip(f"recorded with Python {recorded['python']}, whose documentation is another")
    session = arriero.load(tiny_model)
    length = recorded["row_length"] - 1
    ids = Tokenizer.from_file(str(tiny / "tokenizer.json")).encode(text, add_special_tokens=False).ids  # a long text
    bos = session.text.encode("")
    rows = [bos + ids[start : start + length] for start in range(0, len(ids), length)]
    total, count = 0.0, 0
    for row in rows:
        logits = session.logits([row])[0, :-1].astype(np.float64)
        log_sum = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) + logits.max(-1)
        total += float((log_sum - logits[np.arange(len(logits)), row[1:]]).sum())
        count += len(row) - 1
    expected = recorded["held_out_perplexity_bf16_weights_fp32_arithmetic"]
    assert np.exp(total / count) == pytest.approx(expected, rel=1e-4)
