"""Trains an EAGLE-3 head for the tiny Llama 4 on text that the model itself writes.

Enters: the model of `../tiny-llama4` and its training documents. Leaves: this folder's head in the form of the
`speculators` library (config and bf16 safetensors, 2 MB at most) and `training.json`. The model stays as it is.

1. The model goes on greedily from comments in the standard library's source, which it never saw; from beginnings that
   it drew itself; and from pieces of its training documents, of which it is surer than of new text.
2. Its hidden states behind layers 2, 5 and 8 are computed once and kept in memory, in fp16.
3. The head learns the model's next tokens from these states and, for some steps more, from its own (EAGLE-3's
   training-time test, Li et al. 2025): half of each target is the model's distribution, half its likeliest token.

Held-out documents and `unseen.txt` are never read here: `benchmarks/draft_speed.py` measures on them.

    python train_draft.py --minutes 40 --output .
"""

import argparse
import functools
import json
import math
import random
import sys
import sysconfig
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from draft_head import Geometry, Head
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoTokenizer, Llama4ForCausalLM, PreTrainedTokenizerFast
from transformers.models.llama4.modeling_llama4 import Llama4TextMoe

import arriero
from arriero.export import export_checkpoint

HERE = Path(__file__).parent
MODEL = HERE.parent / "tiny-llama4"
sys.path.insert(0, str(MODEL))

from corpus import documents  # noqa: E402
from train import sparse_moe  # noqa: E402

STATES = (2, 5, 8)
PROMPT, SEED_TOKENS, CONTINUATION = 64, 16, 128
"""Tokens of a beginning, those of it that come from a document where the model drew the rest, and those after it."""

VOCABULARY, MLP = 1280, 768
FIRST, STEPS, DECAY = 8, (1, 2, 3), 0.8
"""The slot where the first chain begins, the steps of a chain in each part of the training, and the weight of each step
against the one before."""

BATCH, RATE, MATRIX_RATE = 2048, 2e-3, 0.02
"""Tokens of a batch, and the highest rates of learning: AdamW's of norms and LM head, and Muon's of other matrices."""

APART = 240
"""Sequences that are not learned from, to measure on."""

CUT, SHORTEST = 4000, 200
"""Letters of a document that are encoded at once, and the fewest of a comment."""


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


def comments() -> list[str]:
    """The longer comments of the standard library's source, each once: prose that the model never saw."""
    found, block = list[str](), list[str]()
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(library.rglob("*.py")):
        if "site-packages" in path.parts:
            continue
        try:
            lines = path.read_text("utf-8").splitlines()
        except UnicodeDecodeError:
            continue
        for line in [*lines, ""]:
            if line.lstrip().startswith("#"):
                block.append(line.lstrip().lstrip("#").removeprefix(" "))
            else:
                found.append("\n".join(block).strip())
                block = []
    return [text for text in dict.fromkeys(found) if len(text) >= SHORTEST]


def pieces(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[list[int]]:
    """Texts in pieces of `PROMPT` tokens, of which the first begins a sequence; half of each is the next one's."""
    cuts = [text[start : start + CUT] for text in texts for start in range(0, len(text), CUT)]
    ids = tokenizer(cuts, add_special_tokens=False).input_ids
    return [
        [tokenizer.bos_token_id, *one[start : start + PROMPT - 1]]
        for one in ids
        for start in range(0, len(one) - PROMPT + 2, PROMPT // 2)
    ]


def written(rows: int, rng: random.Random) -> tuple[Tensor, Tensor]:
    """Sequences that the model went on with, up to where it ends them.

    Args:
        rows: Sequences.
        rng: Chooses where they begin.

    Returns:
        Beginnings and greedy continuations [rows, PROMPT + CONTINUATION], padded with zeros; their lengths.
    """
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    new = rng.sample(pieces(tokenizer, comments()), rows // 2)
    texts = [document.text for document in documents() if not document.is_held_out]
    known = rng.sample(pieces(tokenizer, texts), rows // 2)
    with tempfile.TemporaryDirectory() as folder:
        session = arriero.load(export_checkpoint(MODEL, Path(folder) / "model"), max_seq=PROMPT + CONTINUATION)
        seeds = [piece[:SEED_TOKENS] for piece in known[: rows // 4]]
        settings = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "eos_token_id": []}
        found = session.generate_many(seeds, PROMPT - SEED_TOKENS, slots=64, seed=0, **settings)
        drawn = [[*seed, *each.ids] for seed, each in zip(seeds, found, strict=True)]
        beginnings = [*new, *drawn, *known[rows // 4 :]]
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


def loss_of(model: Llama4ForCausalLM, head: Head, text: Text, tokens: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """The loss over some rows in chains of some steps, and the share of chains that are right up to each step.

    The head's products are of bfloat16, its weights and its sums of float32.
    """
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
        is_counted = is_there & (torch.arange(FIRST + 1, longest) >= PROMPT - 1)
        embedded = model.model.embed_tokens(ids[:, 1:])
    with torch.autocast("cpu", torch.bfloat16):
        predicted = head(embedded, states[:, :-1], FIRST, steps)
    total, shares, are_right = torch.zeros(()), [], torch.ones_like(hard, dtype=torch.bool)
    for step, found in enumerate(predicted):
        target, right, counts = soft[:, step:], hard[:, step:], is_there[:, step:]
        losses = -(target * found.float().log_softmax(-1)).sum(-1)
        total = total + DECAY**step * (losses * (counts & (right >= 0))).sum() / counts.sum()
        are_right = are_right[:, : right.shape[1]] & (found.detach().argmax(-1) == right)
        shares.append(are_right[is_counted[:, : right.shape[1]] & counts].float().mean())
    return total, torch.stack(shares)


def train(minutes: float, rows: int, kept_text: Path | None, output: Path, seed: int) -> None:
    """Trains for minutes with a cosine that ends with them, then writes the head."""
    torch.manual_seed(seed)
    rng, began = random.Random(seed), time.process_time()
    model = Llama4ForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval().requires_grad_(False)
    for module in model.modules():
        if isinstance(module, Llama4TextMoe):
            module.forward = functools.partial(sparse_moe, module)
    if kept_text is not None and kept_text.exists():
        *kept, prepared = torch.load(kept_text)
        whole = Text(*kept)
    else:
        ids, length = written(rows, rng)
        whole = Text(ids, length, states_of(model, ids))
        prepared = (time.process_time() - began) / 60
        if kept_text is not None:
            torch.save((ids, length, whole.states_RSW, prepared), kept_text)
    ids, length = whole.ids_RS, whole.length_R
    print(f"{prepared:.1f} min: {int(length.sum())} tokens and their states", flush=True)
    is_written = (torch.arange(ids.shape[1]) >= PROMPT) & (torch.arange(ids.shape[1]) < length[:, None])
    counts = ids[is_written].bincount(minlength=model.config.vocab_size)
    tokens = counts.argsort(descending=True, stable=True)[:VOCABULARY].sort().values
    apart, learned = whole.rows(slice(None, APART)), whole.rows(slice(APART, None))
    head, start = started(model, tokens, learned.states_RSW), time.process_time()
    step, passes = descend(model, head, learned, tokens, minutes, random.Random(seed))
    taken = (time.process_time() - start) / 60
    head.to(torch.bfloat16).float()
    with torch.no_grad():
        shares = loss_of(model, head, apart, tokens, 5)[1]
    write_head(head, tokens, model.config.vocab_size, output)
    record = {
        "parameters": sum(parameter.numel() for parameter in head.parameters()),
        "rows": len(ids),
        "tokens_written_by_the_model": int(counts.sum()),
        "share_within_draft_vocabulary": round(float(counts[tokens].sum() / counts.sum()), 4),
        "steps": step,
        "passes": round(passes, 1),
        "minutes_of_processor_time_for_text_and_states": round(prepared, 1),
        "minutes_of_processor_time_for_training": round(taken, 1),
        "rows_kept_apart": APART,
        "chains_right_up_to_each_step_on_rows_kept_apart": [round(float(share), 3) for share in shares],
    }
    (output / "training.json").write_text(json.dumps(record, indent=2) + "\n", "utf-8")
    print(json.dumps(record, indent=2))


def descend(
    model: Llama4ForCausalLM, head: Head, text: Text, tokens: Tensor, minutes: float, rng: random.Random
) -> tuple[int, float]:
    """Trains a head; returns the steps taken and the times that each row was seen."""
    matrices = [parameter for parameter in (*head.fc.parameters(), *head.layers.parameters()) if parameter.ndim > 1]
    known = {id(matrix) for matrix in matrices}
    others = [parameter for parameter in head.parameters() if id(parameter) not in known]
    optimizers = {
        torch.optim.Muon(matrices, lr=MATRIX_RATE, weight_decay=0.05): MATRIX_RATE,
        torch.optim.AdamW(others, lr=RATE, betas=(0.9, 0.95), weight_decay=0.05): RATE,
    }
    order, step, seen, start = list[Tensor](), 0, 0, time.monotonic()
    while (part := (time.monotonic() - start) / 60 / minutes) < 1:
        order = order or batches(text.length_R, rng)
        rows = order.pop()
        for optimizer, rate in optimizers.items():
            for group in optimizer.param_groups:
                cosine = 0.5 * (1 + math.cos(math.pi * part))
                group["lr"] = rate * min(1, (step + 1) / 50) * (0.02 + 0.98 * cosine)
        loss, shares = loss_of(model, head, text.rows(rows), tokens, STEPS[int(part * len(STEPS))])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(head.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        step, seen = step + 1, seen + len(rows)
        if step % 50 == 0:
            said = " ".join(f"{share:.3f}" for share in shares)
            print(f"{part * minutes:5.1f} min  step {step}  loss {loss.item():.3f}  right {said}", flush=True)
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
    parser.add_argument("--minutes", type=float, default=40, help="of training, behind the preparation")
    parser.add_argument("--rows", type=int, default=5200, help="sequences that the model writes")
    parser.add_argument("--text", type=Path, help="a file that keeps them and their states for the next time")
    parser.add_argument("--output", type=Path, default=HERE)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    train(arguments.minutes, arguments.rows, arguments.text, arguments.output, arguments.seed)
