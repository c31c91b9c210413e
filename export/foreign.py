"""Checkpoints in forms that are not read, recognised by their files and by their tensors' names, with the way out.

Enters: a folder, or names of tensors. Leaves: nothing, or an error that names the form and says what makes a checkpoint
of it that is read.
"""

import re
from collections.abc import Iterable
from pathlib import Path

from ..errors import CheckpointError

CONVERT = "convert it with transformers: AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)"
MERGE = "merge it into its base model first (PEFT: merge_and_unload, then save_pretrained) and give that folder"
META = "give the Hugging Face checkpoint, or convert with transformers' convert_llama4_weights_to_hf.py"
UNWRAP = "save the model inside the wrapper again, or remove that beginning from the tensors' names"

FILES: tuple[tuple[str, str], ...] = (
    ("adapter_config.json", f"a LoRA adapter alone: {MERGE}"),
    ("adapter_model.*", f"a LoRA adapter alone: {MERGE}"),
    ("*.gguf", "llama.cpp's GGUF: give the Hugging Face checkpoint that it was made from"),
    ("consolidated*.pth", f"Meta's original layout: {META}"),
    ("params.json", f"Meta's original layout: {META}"),
    ("*.distcp", "a distributed checkpoint of PyTorch's FSDP: merge it with `accelerate merge-weights`"),
    ("zero_pp_rank_*", "DeepSpeed's shards: merge them with its zero_to_fp32.py --safe_serialization"),
    ("mp_rank_*", "DeepSpeed's shards: merge them with its zero_to_fp32.py --safe_serialization"),
    ("global_step*", "DeepSpeed's shards: merge them with its zero_to_fp32.py --safe_serialization"),
    ("*.h5", f"TensorFlow's format: {CONVERT}"),
    ("*.msgpack", f"Flax's format: {CONVERT}"),
    ("*.npz", "MLX's old format: give the Hugging Face checkpoint that it was made from"),
    ("*.bin", f"PyTorch's pickles, which are programs and are not read: {CONVERT}"),
    ("*.pth", f"PyTorch's pickles, which are programs and are not read: {CONVERT}"),
    ("*.pt", f"PyTorch's pickles, which are programs and are not read: {CONVERT}"),
    ("model-*-of-*.safetensors", "shards without their model.safetensors.index.json: download that file too"),
    ("*.safetensors", "no model.safetensors: where that file is the whole model, rename it to model.safetensors"),
    ("snapshots", "a hub cache's own folder: give one of the folders in its snapshots/"),
)
"""Files by which a folder without weights that are read is recognised, the surest first."""

NAMES: tuple[tuple[str, str], ...] = (
    (r"\.lora_[AB]\b|\.lora_embedding|\.lora_magnitude", f"a LoRA adapter's: {MERGE}"),
    (r"^base_model\.model\.", "under PEFT's prefix base_model.model.: save what merge_and_unload returns, and give it"),
    (r"^tok_embeddings\.|\.attention\.w[qkvo]\b", f"of Meta's original layout: {META}"),
    (r"^token_embd\.|^blk\.\d", "named as llama.cpp's: give the Hugging Face checkpoint that it was made from"),
    (r"\.qweight$|\.qzeros$|\.g_idx$", "of GPTQ or AWQ: give the checkpoint that was quantised"),
    (
        r"\.(absmax|quant_map|nested_absmax|nested_quant_map|SCB)$|\.quant_state\.",
        "of bitsandbytes: give the checkpoint that was quantised",
    ),
    (r"\.weight_scale_inv$", "of FP8 in blocks of DeepSeek's kind: give the checkpoint that was quantised"),
    (
        r"\.(scales|biases)$|\.experts\.(gate|up|down)_proj\.weight$",
        "of MLX: give the checkpoint it was converted from",
    ),
    (r"\b_orig_mod\.", f"under torch.compile's wrapper (_orig_mod.): {UNWRAP}"),
    (r"\b_fsdp_wrapped_module\.|\b_checkpoint_wrapped_module\.", f"under FSDP's wrapper: {UNWRAP}"),
    (r"\b_forward_module\.|^module\.", f"under the wrapper of data-parallel training (module.): {UNWRAP}"),
    (r"^model\.(language_model|vision_model|multi_modal_projector)\.", f"under a wrapper named model.: {UNWRAP}"),
    (r"^(embed_tokens|layers\.\d+)\.", "a text model's without its LM head: save the Llama4ForCausalLM around it"),
)
"""Names of tensors by which another form is recognised."""


def refuse_foreign_files(folder: Path) -> None:
    """Refuses a folder, or a file in place of one, that holds a model in another form.

    Raises:
        CheckpointError: It does.
    """
    if folder.is_file():
        found = next((form for pattern, form in FILES if folder.match(pattern)), None)
        if folder.suffix == ".safetensors":
            raise CheckpointError(f"{folder} is a file: give the folder that holds it and config.json")
        if found is not None:
            raise CheckpointError(f"{folder} is {found}")
        return
    for pattern, form in FILES:
        if path := min(folder.glob(pattern), default=None):
            raise CheckpointError(f"{folder} holds {path.name}, {form}")


def refuse_foreign_names(names: Iterable[str]) -> None:
    """Refuses tensors that another form names.

    Raises:
        CheckpointError: There is one; what it is of is named.
    """
    names = list(names)
    for pattern, form in NAMES:
        if found := next((name for name in names if re.search(pattern, name)), None):
            raise CheckpointError(f"tensor {found!r} is {form}")
