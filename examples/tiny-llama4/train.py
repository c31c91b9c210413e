"""Trains the tiny Llama 4 from nothing on Python's own documentation.

Enters: the text of `corpus.py`. Leaves: this folder's Hugging Face checkpoint (config, bf16 shards, tokenizer, chat
template, generation config) and `training.json` with the held-out perplexity. Every feature of Llama 4's text model is
alive at short lengths: attention in chunks of 128 with RoPE, NoPE layers with temperature tuning, QK norm,
grouped-query attention, and 8 routed experts beside a shared one in every second layer.

    python train.py --minutes 75 --output .
"""

import argparse
import functools
import json
import math
import random
import shutil
import sys
import time
from pathlib import Path

import torch
from corpus import Document, documents
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GenerationConfig, Llama4ForCausalLM, Llama4TextConfig, PreTrainedTokenizerFast
from transformers.models.llama4.modeling_llama4 import Llama4TextMoe

HERE = Path(__file__).parent
BOS, EOS, EOM, EOT = "<|begin_of_text|>", "<|end_of_text|>", "<|eom|>", "<|eot|>"
PAD, HEADER_START, HEADER_END = "<|finetune_right_pad|>", "<|header_start|>", "<|header_end|>"
VOCABULARY = 2048
SEQUENCE = 768
ROWS = 4
QUESTIONS = ("What is {}?", "Explain {}.", "What does {} do?", "Tell me about {}.")
CHAT_SHARE = 0.3
"""Share of the docstrings that an epoch shows as a question and its answer."""


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE over the training text, with Llama 4's special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [BOS, EOS, EOM, EOT, HEADER_START, HEADER_END, PAD]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[AddedToken(token, normalized=False, special=True) for token in special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    bos_id = tokenizer.token_to_id(BOS)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, bos_id)]
    )
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOT, pad_token=PAD)
    wrapped.chat_template = (HERE / "chat_template.jinja").read_text("utf-8")
    return wrapped


def tiny_config(tokenizer: PreTrainedTokenizerFast) -> Llama4TextConfig:
    """Llama 4 in small: Scout's attention, Maverick's alternation of dense and mixture-of-experts layers."""
    ids = tokenizer.convert_tokens_to_ids
    return Llama4TextConfig(
        vocab_size=VOCABULARY,
        hidden_size=192,
        intermediate_size=128,
        intermediate_size_mlp=512,
        num_hidden_layers=8,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        num_local_experts=8,
        num_experts_per_tok=1,
        interleave_moe_layer_step=2,
        max_position_embeddings=4096,
        attention_chunk_size=128,
        attn_temperature_tuning=True,
        floor_scale=64,
        attn_scale=0.1,
        use_qk_norm=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        bos_token_id=ids(BOS),
        eos_token_id=[ids(EOS), ids(EOM), ids(EOT)],
        pad_token_id=ids(PAD),
        tie_word_embeddings=False,
    )


def epoch_ids(training: list[Document], tokenizer: PreTrainedTokenizerFast, rng: random.Random) -> torch.Tensor:
    """One pass over the documents in a new order, as one stream of tokens."""
    texts = []
    for document in rng.sample(training, len(training)):
        name, _, _ = document.text.partition("\n\n")
        if not document.name.startswith("topic ") and rng.random() < CHAT_SHARE:
            question = rng.choice(QUESTIONS).format(name.partition("(")[0])
            texts.append(
                f"{HEADER_START}user{HEADER_END}\n\n{question}{EOT}"
                f"{HEADER_START}assistant{HEADER_END}\n\n{document.text}{EOT}"
            )
        else:
            texts.append(document.text + EOS)
    encoded = tokenizer.backend_tokenizer.encode_batch(texts)
    return torch.tensor([token for one in encoded for token in one.ids])


def sparse_moe(moe: Llama4TextMoe, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`Llama4TextMoe.forward` computing each token's chosen expert only; the others would add exact zeros."""
    x_TH = x.reshape(-1, moe.hidden_dim)
    logits_TE = torch.nn.functional.linear(x_TH, moe.router.weight)
    score_T, expert_T = logits_TE.max(-1)
    routed_TH = x_TH * score_T.sigmoid()[:, None]
    out_TH = moe.shared_expert(x_TH)
    for expert in range(moe.num_experts):
        rows = (expert_T == expert).nonzero()[:, 0]
        gate, up = (routed_TH[rows] @ moe.experts.gate_up_proj[expert]).chunk(2, dim=-1)
        out_TH = out_TH.index_add(0, rows, (up * torch.nn.functional.silu(gate)) @ moe.experts.down_proj[expert])
    moe.seen_logits_TE = logits_TE
    return out_TH, logits_TE


def balance_loss(router_logits: list[torch.Tensor]) -> torch.Tensor:
    """Switch Transformer's load-balancing loss (Fedus et al. 2021, eq. 4), a mean over layers; 1 is perfect balance."""
    losses = []
    for logits_TE in router_logits:
        share_E = torch.nn.functional.one_hot(logits_TE.argmax(-1), logits_TE.shape[-1]).float().mean(0)
        losses.append(logits_TE.shape[-1] * (share_E * logits_TE.softmax(-1).mean(0)).sum())
    return torch.stack(losses).mean()


@torch.no_grad()
def perplexity(model: Llama4ForCausalLM, tokenizer: PreTrainedTokenizerFast, text: str) -> float:
    """Perplexity per token of a text, read in rows of `SEQUENCE` tokens that start with BOS."""
    ids = tokenizer(text, add_special_tokens=False).input_ids
    bos_id = tokenizer.bos_token_id
    rows = [[bos_id, *ids[start : start + SEQUENCE - 1]] for start in range(0, len(ids), SEQUENCE - 1)]
    total, count = 0.0, 0
    for row in rows:
        tokens = torch.tensor([row])
        logits = model(tokens).logits[0, :-1].float()
        total += torch.nn.functional.cross_entropy(logits, tokens[0, 1:], reduction="sum").item()
        count += len(row) - 1
    return math.exp(total / count)


def train(minutes: float, output: Path, seed: int) -> None:
    """Trains for a number of minutes with AdamW and a cosine that ends with the time, then writes the checkpoint."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    corpus = documents()
    training = [document for document in corpus if not document.is_held_out]
    held_out = "\n\n\n".join(document.text for document in corpus if document.is_held_out)
    tokenizer = train_tokenizer([document.text for document in training])
    model = Llama4ForCausalLM(tiny_config(tokenizer))
    moes = [module for module in model.modules() if isinstance(module, Llama4TextMoe)]
    for moe in moes:
        moe.forward = functools.partial(sparse_moe, moe)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{parameters / 1e6:.2f} M parameters, {len(training)} documents", flush=True)

    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}], betas=(0.9, 0.95)
    )
    peak_rate, warm_up, step, seen = 3e-3, 100, 0, 0
    ids = torch.empty(0, dtype=torch.long)
    started = time.monotonic()
    while (elapsed := (time.monotonic() - started) / 60) < minutes:
        if len(ids) <= ROWS * SEQUENCE:
            ids = torch.cat([ids, epoch_ids(training, tokenizer, rng)])
        batch, ids = ids[: ROWS * SEQUENCE].view(ROWS, SEQUENCE), ids[ROWS * SEQUENCE :]
        cosine = 0.5 * (1 + math.cos(math.pi * elapsed / minutes))
        for group in optimizer.param_groups:
            group["lr"] = peak_rate * min(1, (step + 1) / warm_up) * (0.02 + 0.98 * cosine)
        logits = model(batch, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())
        (loss + 0.01 * balance_loss([moe.seen_logits_TE for moe in moes])).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step, seen = step + 1, seen + batch.numel()
        if step % 50 == 0:
            print(f"{elapsed:5.1f} min  step {step}  {seen / 1e6:.2f} M tokens  loss {loss.item():.3f}", flush=True)

    for moe in moes:
        del moe.forward
    model.eval().to(torch.bfloat16)
    write_checkpoint(model, tokenizer, output)
    reloaded = Llama4ForCausalLM.from_pretrained(output, dtype=torch.float32)  # a cast would round inv_freq as well
    record = {
        "parameters": parameters,
        "training_documents": len(training),
        "training_tokens_seen": seen,
        "steps": step,
        "held_out_characters": len(held_out),
        "held_out_perplexity_bf16_weights_fp32_arithmetic": round(perplexity(reloaded, tokenizer, held_out), 4),
        "row_length": SEQUENCE,
        "python": sys.version.split()[0],
    }
    (output / "training.json").write_text(json.dumps(record, indent=2) + "\n", "utf-8")
    print(json.dumps(record, indent=2))


def write_checkpoint(model: Llama4ForCausalLM, tokenizer: PreTrainedTokenizerFast, output: Path) -> None:
    """Writes the Hugging Face folder: sharded safetensors with their index, and everything beside them."""
    output.mkdir(parents=True, exist_ok=True)
    model.generation_config = GenerationConfig(
        bos_token_id=model.config.bos_token_id,
        eos_token_id=model.config.eos_token_id,
        pad_token_id=model.config.pad_token_id,
    )
    model.save_pretrained(output, max_shard_size="4MB")
    tokenizer.save_pretrained(output)
    if output.resolve() != HERE.resolve():
        shutil.copy(HERE / "chat_template.jinja", output)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train the tiny Llama 4.")
    parser.add_argument("--minutes", type=float, default=75)
    parser.add_argument("--output", type=Path, default=HERE)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    train(arguments.minutes, arguments.output, arguments.seed)
