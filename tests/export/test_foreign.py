"""Checkpoints in forms that are not read: each is recognised, and its way out named in one line."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import arriero
from arriero.errors import CheckpointError
from arriero.export import export_checkpoint
from arriero.export.checkpoint import open_checkpoint

Q = "model.layers.0.self_attn.q_proj.weight"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


@pytest.fixture(scope="module")
def written(make_llama4: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("foreign") / "checkpoint"
    make_llama4(num_hidden_layers=1).save_pretrained(folder)
    return folder


@pytest.fixture
def single(written: Path, tmp_path: Path) -> Path:
    """A checkpoint of one file, free to be changed."""
    return Path(shutil.copytree(written, tmp_path / "checkpoint"))


def refuses(folder: Path, *said: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder)
    assert all(part in str(caught.value) for part in said), caught.value
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (["adapter_config.json", "adapter_model.safetensors"], "a LoRA adapter alone: merge it into its base model"),
        (["adapter_model.bin"], "a LoRA adapter alone: merge it"),
        (["llama-4-Q4_K_M.gguf"], "llama.cpp's GGUF: give the Hugging Face checkpoint that it was made from"),
        (["consolidated.00.pth", "params.json", "tokenizer.model"], "Meta's original layout: give the Hugging Face"),
        (["config.json", "pytorch_model.bin"], "PyTorch's pickles, which are programs and are not read: convert it"),
        (["pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json"], "PyTorch's pickles"),
        (["model.pt"], "PyTorch's pickles"),
        (["__0_0.distcp", ".metadata"], "FSDP: merge it with `accelerate merge-weights`"),
        (["zero_pp_rank_0_mp_rank_00_optim_states.pt"], "DeepSpeed's shards: merge them with its zero_to_fp32.py"),
        (["tf_model.h5"], "TensorFlow's format"),
        (["flax_model.msgpack"], "Flax's format"),
        (["weights.npz"], "MLX's old format"),
        (["model-00001-of-00002.safetensors"], "shards without their model.safetensors.index.json: download that file"),
        (["llama.safetensors"], "no model.safetensors: where that file is the whole model, rename it"),
        (["snapshots/abc/config.json"], "a hub cache's own folder: give one of the folders in its snapshots/"),
    ],
)
def test_files_of_another_form_are_recognised(tmp_path: Path, files: list[str], said: str) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"{}")
    refuses(tmp_path, said)


def test_a_file_in_place_of_a_folder_is_recognised(tmp_path: Path) -> None:
    for name, said in (
        ("model.gguf", "llama.cpp's GGUF"),
        ("pytorch_model.bin", "PyTorch's pickles"),
        ("model.safetensors", "is a file: give the folder that holds it"),
        ("config.json", "is no folder"),
    ):
        (tmp_path / name).write_bytes(b"{}")
        refuses(tmp_path / name, said)


@pytest.mark.parametrize(
    ("rename", "said"),
    [
        (
            lambda name: f"base_model.model.{name}",
            "PEFT's prefix base_model.model.: save what merge_and_unload returns",
        ),
        (lambda name: f"base_model.model.{name[:-7]}.lora_A.weight", "a LoRA adapter's: merge it"),
        (lambda name: f"_orig_mod.{name}", "torch.compile's wrapper (_orig_mod.): save the model inside"),
        (lambda name: f"module.{name}", "data-parallel training (module.): save the model inside"),
        (lambda name: f"_fsdp_wrapped_module.{name}", "FSDP's wrapper"),
        (lambda name: f"model.language_{name.replace('model.', 'model.', 1)}", "a wrapper named model."),
        (lambda name: name.removeprefix("model."), "without its LM head: save the Llama4ForCausalLM around it"),
        (lambda name: name.replace("model.embed_tokens", "tok_embeddings"), "of Meta's original layout"),
        (lambda name: name.replace("model.layers.", "blk."), "named as llama.cpp's"),
        (lambda name: name.replace(".weight", ".qweight"), "of GPTQ or AWQ: give the checkpoint that was quantised"),
        (lambda name: f"{name}.quant_state.bitsandbytes__nf4", "of bitsandbytes: give the checkpoint that was quanti"),
        (lambda name: f"{name}_scale_inv", "of FP8 in blocks"),
        (lambda name: name.replace(".weight", ".scales"), "of MLX: give the checkpoint it was converted from"),
    ],
)
def test_names_of_another_form_are_recognised(single: Path, rename: Callable[[str], str], said: str) -> None:
    tensors = load_file(single / "model.safetensors")
    save_file({rename(name): tensor for name, tensor in tensors.items()}, single / "model.safetensors")
    refuses(single, said)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"quantization": {"group_size": 64, "bits": 4}}, "config.json: quantization is MLX's"),
        ({"quantization_config": {"group_size": 64, "bits": 4, "mode": "affine"}}, "quantization_config is MLX's"),
        ({"quantization_config": {"bits": 4}}, "quant_method is None: expected the name of the library"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128}}, "are quantised by 'gptq'"),
        ({"quantization_config": {"quant_method": "awq"}}, "are quantised by 'awq'"),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "by 'bitsandbytes'"),
        ({"quantization_config": "x" * 1000}, "expected an object"),
    ],
)
def test_other_tools_quantisation_is_recognised(single: Path, config: dict[str, Any], said: str) -> None:
    path = single / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    with pytest.raises(CheckpointError, match=re.escape(said)) as caught:
        open_checkpoint(single)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_pointer_of_git_lfs_is_named(single: Path, name: str) -> None:
    (single / name).write_text(POINTER)
    refuses(single, f"{name} is a git-lfs pointer, not the file itself: run `git lfs pull`")


def test_a_tokenizer_that_is_a_pointer_is_named(single: Path, tmp_path: Path) -> None:
    (single / "tokenizer.json").write_text(POINTER)
    with pytest.raises(CheckpointError, match=r"tokenizer.json is a git-lfs pointer"):
        export_checkpoint(single, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_name_of_any_length_is_not_repeated(single: Path) -> None:
    tensors = load_file(single / "model.safetensors")
    save_file({**tensors, "x" * 100_000: torch.zeros(1)}, single / "model.safetensors")
    with pytest.raises(CheckpointError, match="a tensor's name has 100000 characters") as caught:
        open_checkpoint(single)
    assert len(str(caught.value)) < 300


def test_pickles_converted_as_the_message_says_are_taken(single: Path, tmp_path: Path) -> None:
    expected = arriero.load(export_checkpoint(single, tmp_path / "expected")).logits(np.arange(9)[None])
    torch.save(load_file(single / "model.safetensors"), single / "pytorch_model.bin")
    (single / "model.safetensors").unlink()
    refuses(single, "AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)")
    AutoModelForCausalLM.from_pretrained(single).save_pretrained(tmp_path / "new")
    found = arriero.load(export_checkpoint(tmp_path / "new", tmp_path / "model")).logits(np.arange(9)[None])
    assert np.array_equal(found, expected)


def test_a_wrapper_removed_as_the_message_says_is_taken(single: Path) -> None:
    path = single / "model.safetensors"
    save_file({f"_orig_mod.{name}": tensor for name, tensor in load_file(path).items()}, path)
    refuses(single, "remove that beginning from the tensors' names")
    save_file({name.removeprefix("_orig_mod."): tensor for name, tensor in load_file(path).items()}, path)
    assert open_checkpoint(single).tensors[Q].region.shape == (64, 32)


def test_a_single_file_under_another_name_is_taken_when_renamed(single: Path) -> None:
    (single / "model.safetensors").rename(single / "llama.safetensors")
    refuses(single, "rename it to model.safetensors")
    (single / "llama.safetensors").rename(single / "model.safetensors")
    open_checkpoint(single)
