"""Trains an EAGLE-3 head for the tiny Llama 4 on text that the model itself writes.

Enters: the model of `../tiny-llama4` and its training documents. Leaves: this folder's head in the form of the
`speculators` library (config and bf16 safetensors, 2 MB at most) and `training.json`. The model stays as it is.

1. The model goes on greedily from pieces of its training documents, and from beginnings that it drew itself, of which
   it is less sure, as of text that it never saw.
2. Its hidden states behind layers 2, 5 and 8 are computed once and kept in memory, in fp16.
3. The head learns the model's next tokens from these states and, for two steps more, from its own (EAGLE-3's
   training-time test, Li et al. 2025): half of each target is the model's distribution, half its likeliest token.

Held-out documents and `unseen.txt` are never read here: `benchmarks/draft_speed.py` measures on them.

    python train_draft.py --minutes 25 --output .
"""

import argparse
import functools
import json
import math
import random
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from draft_head import Geometry, Head
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer, Llama4ForCausalLM
from transformers.models.llama4.modeling_llama4 import Llama4TextMoe

import arriero
from arriero.export import export_checkpoint

HERE = Path(__file__).parent
MODEL = HERE.parent / "tiny-llama4"
sys.path.insert(0, str(MODEL))

from corpus import documents  # noqa: E402
from train import sparse_moe  # noqa: E402

STATES = (2, 5, 8)
PROMPT, SEED_TOKENS, CONTINUATION = 64, 16, 192
"""Tokens of a beginning, those of it that come from a document where the model drew the rest, and those after it."""

VOCABULARY, MLP = 1024, 768
FIRST, STEPS, DECAY = 8, 3, 0.8
"""The slot where the first chain begins, the steps of a chain, and the weight of each against the one before."""

BATCH, RATE = 1024, 2e-3
"""Tokens of a batch, and the highest rate of learning."""

CUT = 4000
"""Letters of a document that are encoded at once."""


@dataclass(frozen=True, slots=True)
class Text:
    """Sequences and what the model computed of them.

    Attributes:
        ids_RS: Tokens, padded.
        length_R: Their number.
        states_RSW: The model's states that the head reads, side by side.
    """

    ids_RS: Tensor
    length_R: Tensor
    states_RSW: Tensor

    def rows(self, chosen: Tensor | slice) -> "Text":
        """Some of the sequences."""
        return Text(self.ids_RS[chosen], self.length_R[chosen], self.states_RSW[chosen])


def written(rows: int, rng: random.Random) -> tuple[Tensor, Tensor]:
    """Sequences that the model went on with, up to where it ends them.

    Args:
        rows: Sequences.
        rng: Chooses where they begin.

    Returns:
        Beginnings and greedy continuations [rows, PROMPT + CONTINUATION], padded with zeros; their lengths.
    """
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    ids = [
        tokenizer(document.text[start : start + CUT], add_special_tokens=False).input_ids
        for document in documents()
        if not document.is_held_out
        for start in range(0, len(document.text), CUT)
    ]
    pieces = [
        [tokenizer.bos_token_id, *piece[start : start + PROMPT - 1]]
        for piece in ids
        for start in range(0, len(piece) - PROMPT + 2, PROMPT // 2)
    ]
    beginnings = rng.sample(pieces, min(rows, len(pieces)))
    with tempfile.TemporaryDirectory() as folder:
        session = arriero.load(export_checkpoint(MODEL, Path(folder) / "model"), max_seq=PROMPT + CONTINUATION)
        half = len(beginnings) // 2
        seeds = [piece[:SEED_TOKENS] for piece in beginnings[:half]]
        drawn = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "eos_token_id": []}
        found = session.generate_many(seeds, PROMPT - SEED_TOKENS, slots=64, seed=0, **drawn)
        beginnings[:half] = [[*seed, *each.ids] for seed, each in zip(seeds, found, strict=True)]
        rng.shuffle(beginnings)
        found = session.generate_many(beginnings, CONTINUATION, slots=64, temperature=0)
    whole = [[*piece, *each.ids] for piece, each in zip(beginnings, found, strict=True)]
    padded = torch.zeros(len(whole), PROMPT + CONTINUATION, dtype=torch.long)
    for row, sequence in enumerate(whole):
        padded[row, : len(sequence)] = torch.tensor(sequence)
    return padded, torch.tensor([len(sequence) for sequence in whole])


def batches(length_R: Tensor, rng: random.Random) -> list[Tensor]:
    """Rows of like lengths together, each batch of about as many tokens, in a new order."""
    order = (length_R + torch.tensor([rng.random() * 16 for _ in length_R])).argsort(descending=True).tolist()
    found = []
    while order:
        count = max(1, BATCH // int(length_R[order[0]] + 16))
        found.append(torch.tensor(order[:count]))
        order = order[count:]
    rng.shuffle(found)
    return found


@torch.no_grad()
def states_of(model: Llama4ForCausalLM, ids_RS: Tensor) -> Tensor:
    """The model's hidden states that the head reads, side by side, in fp16."""
    states = torch.empty(*ids_RS.shape, len(STATES) * model.config.hidden_size, dtype=torch.float16)
    last = []
    hook = model.model.norm.register_forward_pre_hook(lambda _, given: last.append(given[0]))
    for start in range(0, len(ids_RS), 12):
        rows = slice(start, start + 12)
        hidden = model.model(ids_RS[rows], use_cache=False, output_hidden_states=True).hidden_states
        chosen = [hidden[state] if state < len(hidden) - 1 else last.pop() for state in STATES]
        states[rows] = torch.cat(chosen, -1).half()
    hook.remove()
    return states


def started(model: Llama4ForCausalLM, tokens: Tensor, states: Tensor) -> Head:
    """A head that begins with the model's own norm and LM head, and states of one magnitude."""
    config = model.config
    geometry = Geometry(
        hidden=config.hidden_size,
        states=states.shape[-1],
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        mlp=MLP,
        vocabulary=len(tokens),
        eps=config.rms_norm_eps,
        theta=config.rope_parameters["rope_theta"],
    )
    head = Head(geometry)
    with torch.no_grad():
        scales = states[:64].flatten(0, 1).float().unflatten(1, (len(STATES), -1)).square().mean((0, 2)).rsqrt()
        head.input_norm.weight.copy_((scales / scales.min()).repeat_interleave(config.hidden_size))
        head.norm.weight.copy_(model.model.norm.weight)
        head.lm_head.weight.copy_(model.lm_head.weight[tokens])
        for name, parameter in head.layers[0].named_parameters():
            if name in ("self_attn.o_proj.weight", "mlp.down_proj.weight"):
                parameter.mul_(0.3)
    return head


def loss_of(model: Llama4ForCausalLM, head: Head, text: Text, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """The loss over some rows, and the share of each step's likeliest tokens that are the model's."""
    longest = int(text.length_R.max())
    ids, states = text.ids_RS[:, :longest], text.states_RSW[:, :longest].float()
    with torch.no_grad():
        logits = model.lm_head(model.model.norm(states[:, FIRST + 1 :, -model.config.hidden_size :]))
        best = logits.argmax(-1)
        place = torch.full((logits.shape[-1],), -1)
        place[tokens] = torch.arange(len(tokens))
        hard = place[best]
        soft = 0.5 * logits[..., tokens].softmax(-1)
        soft.scatter_add_(-1, hard.clamp(min=0)[..., None], torch.full((*hard.shape, 1), 0.5))
        is_there = torch.arange(FIRST + 1, longest) < text.length_R[:, None] - 1
        is_greedy = is_there & (torch.arange(FIRST + 1, longest) >= PROMPT - 1)
        embedded = model.model.embed_tokens(ids[:, 1:])
    predicted = head(embedded, states[:, :-1], FIRST, STEPS)
    total, shares = torch.zeros(()), []
    for step, found in enumerate(predicted):
        target, right, counts = soft[:, step:], hard[:, step:], is_there[:, step:]
        losses = -(target * found.log_softmax(-1)).sum(-1)
        total = total + DECAY**step * (losses * (counts & (right >= 0))).sum() / counts.sum()
        is_right = found.detach().argmax(-1) == right
        shares.append(is_right[is_greedy[:, step:]].float().mean())
    return total, torch.stack(shares)


def train(minutes: float, rows: int, kept_text: Path | None, start: Path | None, output: Path, seed: int) -> None:
    """Trains for minutes of processor time with AdamW and a cosine that ends with them, then writes the head."""
    torch.manual_seed(seed)
    rng, began = random.Random(seed), time.process_time()
    model = Llama4ForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval().requires_grad_(False)
    for module in model.modules():
        if isinstance(module, Llama4TextMoe):
            module.forward = functools.partial(sparse_moe, module)
    if kept_text is not None and kept_text.exists():
        whole = Text(*torch.load(kept_text))
    else:
        ids, length = written(rows, rng)
        whole = Text(ids, length, states_of(model, ids))
        if kept_text is not None:
            torch.save((ids, length, whole.states_RSW), kept_text)
    ids, length = whole.ids_RS, whole.length_R
    print(f"{(time.process_time() - began) / 60:.1f} min: {int(length.sum())} tokens and their states", flush=True)
    is_written = (torch.arange(ids.shape[1]) >= PROMPT) & (torch.arange(ids.shape[1]) < length[:, None])
    counts = ids[is_written].bincount(minlength=model.config.vocab_size)
    tokens = counts.argsort(descending=True, stable=True)[:VOCABULARY].sort().values
    apart, learned = whole.rows(slice(None, len(ids) // 32)), whole.rows(slice(len(ids) // 32, None))
    head = started(model, tokens, learned.states_RSW)
    before = {"steps": 0, "passes": 0.0, "minutes_of_processor_time": 0.0}
    if start is not None:
        stored = load_file(start / "model.safetensors")
        head.load_state_dict({name: stored[name].float() for name in head.state_dict()})
        before = json.loads((start / "training.json").read_text("utf-8"))
    step, passes = descend(model, head, learned, tokens, minutes, rng)
    head.to(torch.bfloat16).float()
    with torch.no_grad():
        shares = loss_of(model, head, apart, tokens)[1]
    write_head(head, tokens, model.config.vocab_size, output)
    record = {
        "parameters": sum(parameter.numel() for parameter in head.parameters()),
        "rows": len(ids),
        "tokens_written_by_the_model": int(counts.sum()),
        "share_within_draft_vocabulary": round(float(counts[tokens].sum() / counts.sum()), 4),
        "steps": before["steps"] + step,
        "passes": round(before["passes"] + passes, 1),
        "minutes_of_processor_time": round(before["minutes_of_processor_time"] + (time.process_time() - began) / 60, 1),
        "right_by_step_on_rows_kept_apart": [round(float(share), 3) for share in shares],
    }
    (output / "training.json").write_text(json.dumps(record, indent=2) + "\n", "utf-8")
    print(json.dumps(record, indent=2))


def descend(
    model: Llama4ForCausalLM, head: Head, text: Text, tokens: Tensor, minutes: float, rng: random.Random
) -> tuple[int, float]:
    """Trains a head; returns the steps taken and the times that each row was seen."""
    optimizer = torch.optim.AdamW(head.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.05)
    order, step, seen, start = list[Tensor](), 0, 0, time.process_time()
    while (elapsed := (time.process_time() - start) / 60) < minutes:
        order = order or batches(text.length_R, rng)
        rows = order.pop()
        for group in optimizer.param_groups:
            cosine = 0.5 * (1 + math.cos(math.pi * elapsed / minutes))
            group["lr"] = RATE * min(1, (step + 1) / 50) * (0.02 + 0.98 * cosine)
        loss, shares = loss_of(model, head, text.rows(rows), tokens)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(head.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step, seen = step + 1, seen + len(rows)
        if step % 50 == 0:
            said = " ".join(f"{share:.3f}" for share in shares)
            print(f"{elapsed:5.1f} min  step {step}  loss {loss.item():.3f}  right {said}", flush=True)
    return step, seen / len(text.length_R)


def write_head(head: Head, tokens: Tensor, vocabulary: int, output: Path) -> None:
    """Writes the head as `speculators` does; the embedding is the model's and stays there."""
    output.mkdir(parents=True, exist_ok=True)
    own = head.geometry
    tensors = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in head.state_dict().items()}
    tensors["d2t"] = tokens - torch.arange(len(tokens))
    tensors["t2d"] = torch.zeros(vocabulary, dtype=torch.bool)
    tensors["t2d"][tokens] = True
    save_file(tensors, output / "model.safetensors", {"format": "pt"})
    layers = {
        "model_type": "llama",
        "vocab_size": vocabulary,
        "hidden_size": own.hidden,
        "intermediate_size": own.mlp,
        "num_hidden_layers": 1,
        "num_attention_heads": own.heads,
        "num_key_value_heads": own.kv_heads,
        "head_dim": own.head_dim,
        "rms_norm_eps": own.eps,
        "max_position_embeddings": 4096,
        "rope_parameters": {"rope_type": "default", "rope_theta": own.theta},
    }
    config = {
        "architectures": ["Eagle3Speculator"],
        "speculators_model_type": "eagle3",
        "speculators_version": "0.9.0",
        "draft_vocab_size": own.vocabulary,
        "eagle_aux_hidden_state_layer_ids": list(STATES),
        "norm_before_fc": True,
        "norm_before_residual": False,
        "transformer_layer_config": layers,
    }
    (output / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train an EAGLE-3 head for the tiny Llama 4.")
    parser.add_argument("--minutes", type=float, default=25, help="of processor time, behind the preparation")
    parser.add_argument("--rows", type=int, default=2400, help="sequences that the model writes")
    parser.add_argument("--text", type=Path, help="a file that keeps them and their states for the next time")
    parser.add_argument("--start", type=Path, help="a head to go on from")
    parser.add_argument("--output", type=Path, default=HERE)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    train(arguments.minutes, arguments.rows, arguments.text, arguments.start, arguments.output, arguments.seed)
