"""A Llama 4 checkpoint as llama.cpp's file: the same weights under its names, in the `gguf` package's container.

Enters: a bfloat16 checkpoint of the text decoder. Leaves: a GGUF of architecture `llama4`, with the checkpoint's
tokenizer where it has one that splits texts as GPT-2's does. What
llama.cpp fixes for the architecture (chunks and temperature steps of 8192, its strength of 0.1, every fourth layer
without RoPE, QK norm unless there are 128 experts) is not in the file, and a model that differs is refused.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind
from numpy.typing import NDArray

from arriero.export.checkpoint import open_checkpoint
from arriero.export.config import text_config
from arriero.export.llama4 import inverse_frequencies
from arriero.spec.geometry import ModelSpec

NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "feed_forward.router.weight": "ffn_gate_inp.weight",
    "feed_forward.gate_proj.weight": "ffn_gate.weight",
    "feed_forward.up_proj.weight": "ffn_up.weight",
    "feed_forward.down_proj.weight": "ffn_down.weight",
    "feed_forward.shared_expert.gate_proj.weight": "ffn_gate_shexp.weight",
    "feed_forward.shared_expert.up_proj.weight": "ffn_up_shexp.weight",
    "feed_forward.shared_expert.down_proj.weight": "ffn_down_shexp.weight",
}
LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
GATE_UP, DOWN = "feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj"
FIXED = 8192
"""The chunk and the temperature's step that llama.cpp has for every Llama 4."""


def write_gguf(checkpoint: Path, out: Path) -> None:
    """Writes the file; matrices stay bfloat16, the rest (norms, router) is float32, as llama.cpp wants it."""
    opened = open_checkpoint(checkpoint)
    spec = opened.spec
    config = text_config(json.loads((checkpoint / "config.json").read_text()))
    check_fixed(spec)
    writer = gguf.GGUFWriter(out, "llama4")
    add_geometry(writer, spec, config["interleave_moe_layer_step"])
    add_tokenizer(writer, checkpoint, config["eos_token_id"])
    for name, tensor in opened.tensors.items():
        for target, shape in targets(name, tensor.region.shape):
            wide = is_wide(target)
            size = int(np.prod(shape)) * (4 if wide else 2)
            kind = Kind.F32 if wide else Kind.BF16
            writer.add_tensor_info(target, shape, np.dtype(np.float32), size, raw_dtype=kind)
    if spec.rope_scaling is not None:
        factors_F = rope_factors(spec)
        writer.add_tensor_info("rope_freqs.weight", factors_F.shape, factors_F.dtype, factors_F.nbytes)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, tensor in opened.tensors.items():
        values = tensor.read().view(np.uint16)
        for (target, _), part in zip(targets(name, values.shape), parts(name, values), strict=True):
            whole = np.ascontiguousarray(part)
            writer.write_tensor_data(whole.astype(np.uint32) << 16 if is_wide(target) else whole)
    if spec.rope_scaling is not None:
        writer.write_tensor_data(factors_F)
    writer.close()


def check_fixed(spec: ModelSpec) -> None:
    """Refuses a model that llama.cpp would compute otherwise."""
    fits = (
        spec.chunk == FIXED
        and spec.temperature_floor == FIXED
        and spec.temperature_scale == 0.1
        and spec.qk_norm == (spec.experts != 128)
        and all(layer.rope == ((index + 1) % 4 != 0) for index, layer in enumerate(spec.layers))
    )
    if not fits:
        raise SystemExit(
            "llama.cpp fixes chunk, temperature, RoPE layers and QK norm of Llama 4 otherwise than this model"
        )


def add_geometry(writer: gguf.GGUFWriter, spec: ModelSpec, interleave: int) -> None:
    """The metadata, as llama.cpp's own converter writes it."""
    writer.add_block_count(len(spec.layers))
    writer.add_context_length(spec.max_positions)
    writer.add_embedding_length(spec.hidden_size)
    writer.add_feed_forward_length(spec.dense_size)
    writer.add_expert_feed_forward_length(spec.expert_size)
    writer.add_expert_count(spec.experts)
    writer.add_expert_used_count(spec.experts_per_token)
    writer.add_interleave_moe_layer_step(interleave)
    writer.add_head_count(spec.heads)
    writer.add_head_count_kv(spec.kv_heads)
    writer.add_key_length(spec.head_dim)
    writer.add_value_length(spec.head_dim)
    writer.add_rope_dimension_count(spec.head_dim)
    writer.add_rope_freq_base(spec.rope_theta)
    writer.add_layer_norm_rms_eps(spec.norm_eps)
    writer.add_vocab_size(spec.vocab_size)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)


def add_tokenizer(writer: gguf.GGUFWriter, checkpoint: Path, end: int) -> None:
    """The tokenizer, if there is one, and the chat template."""
    if not (path := checkpoint / "tokenizer.json").exists():
        writer.add_tokenizer_model("none")
        return
    found = json.loads(path.read_text("utf-8"))
    special = {each["id"]: each["content"] for each in found["added_tokens"] if each["special"]}
    tokens = {number: token for token, number in found["model"]["vocab"].items()} | special
    kinds = [gguf.TokenType.CONTROL if number in special else gguf.TokenType.NORMAL for number in range(len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([tokens[number] for number in range(len(tokens))])
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(pair) for pair in found["model"]["merges"]])
    writer.add_bos_token_id(found["post_processor"]["special_tokens"]["<|begin_of_text|>"]["ids"][0])
    writer.add_eos_token_id(end)
    writer.add_add_bos_token(True)
    writer.add_chat_template((checkpoint / "chat_template.jinja").read_text("utf-8"))


def rope_factors(spec: ModelSpec) -> NDArray[np.float32]:
    """Each frequency's divisor under Llama 3's scaling."""
    plain_F = spec.rope_theta ** -(np.arange(0, spec.head_dim, 2) / spec.head_dim)
    factors: NDArray[np.float32] = (plain_F / inverse_frequencies(spec).double().numpy()).astype(np.float32)
    return factors


def targets(name: str, shape: tuple[int, ...]) -> list[tuple[str, tuple[int, ...]]]:
    """The tensors that a checkpoint's tensor becomes, and their shapes, outputs before inputs."""
    if (found := LAYER.fullmatch(name)) is None:
        return [(NAMES[name], shape)]
    block, part = f"blk.{found[1]}", found[2]
    if part == GATE_UP:
        experts, hidden, both = shape
        return [(f"{block}.ffn_{each}_exps.weight", (experts, both // 2, hidden)) for each in ("gate", "up")]
    if part == DOWN:
        return [(f"{block}.ffn_down_exps.weight", (shape[0], shape[2], shape[1]))]
    return [(f"{block}.{NAMES[part]}", shape)]


def parts(name: str, bits: NDArray[np.uint16]) -> Iterator[NDArray[np.uint16]]:
    """The values of those tensors."""
    if name.endswith(GATE_UP):
        half = bits.shape[2] // 2
        yield bits[..., :half].swapaxes(1, 2)
        yield bits[..., half:].swapaxes(1, 2)
    else:
        yield bits.swapaxes(1, 2) if name.endswith(DOWN) else bits


def is_wide(target: str) -> bool:
    """Whether a tensor is stored in float32."""
    return target.endswith(("norm.weight", "ffn_gate_inp.weight"))


def tensor_sizes(file: Path) -> dict[str, int]:
    """Bytes of each tensor of a file."""
    return {tensor.name: int(tensor.n_bytes) for tensor in gguf.GGUFReader(file).tensors}
