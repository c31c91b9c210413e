"""Teaches the tiny Llama 4 to see: a vision tower from nothing, and the text model beside this folder, go on together.

Enters: `../tiny-llama4`, and scenes drawn as they are needed, each with questions and their answers. Leaves: this
folder's Hugging Face checkpoint (config, bf16 shards, tokenizer, chat template, preprocessor) and `training.json` with
the share of right answers about held-out scenes. What the text model knows is kept by distillation: on its own corpus
it is held to the distributions of the model that it was.

    python train_scenes.py --minutes 4.5                      # on a GPU; a CPU takes many hours
    python train_scenes.py --minutes 2.5 --start . --seed 1   # goes on
"""

import argparse
import json
import math
import os
import random
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scenes import KINDS, Question, held_out_questions, random_questions, random_scene, random_size
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    Llama4Config,
    Llama4ForCausalLM,
    Llama4ForConditionalGeneration,
    Llama4TextConfig,
    Llama4VisionConfig,
)
from transformers.models.llama4.modeling_llama4 import Llama4TextMoe

HERE = Path(__file__).parent
TEXT_MODEL = HERE.parent / "tiny-llama4"
sys.path.insert(0, str(TEXT_MODEL))

from corpus import documents, held_out_text  # noqa: E402
from train import EOT, HEADER_END, HEADER_START, balance_loss, epoch_ids, perplexity  # noqa: E402

from arriero.runtime.images.placeholders import ImagePrompts  # noqa: E402
from arriero.runtime.images.sources import read_image  # noqa: E402
from arriero.runtime.images.tiles import cut_tiles  # noqa: E402
from arriero.runtime.text import Text  # noqa: E402

IMAGE_TOKENS = [
    f"<|{name}|>" for name in ("image_start", "image_end", "tile_x_separator", "tile_y_separator", "image", "patch")
]
TILE, PATCH, SHUFFLE, MOST_TILES = 64, 8, 0.5, 4
ANSWER_TURN = f"{HEADER_START}assistant{HEADER_END}\n\n"
TEXT_LENGTH = 512
IGNORED = -100
"""The label of a token that is no answer's, as `cross_entropy` has it."""


def multimodal_config(text: Llama4TextConfig) -> Llama4Config:
    """The text model's config, made wider by the image tokens, and Llama 4's vision tower in small."""
    first = text.vocab_size
    text.vocab_size, text.name_or_path = first + len(IMAGE_TOKENS), ""
    vision = Llama4VisionConfig(
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=512,
        image_size=TILE,
        patch_size=PATCH,
        pixel_shuffle_ratio=SHUFFLE,
        projector_input_dim=192,
        projector_output_dim=192,
        vision_output_dim=192,
    )
    return Llama4Config(
        text_config=text,
        vision_config=vision,
        image_token_index=first + IMAGE_TOKENS.index("<|patch|>"),
        boi_token_index=first,
        eoi_token_index=first + 1,
        tie_word_embeddings=False,
    )


def write_companions(folder: Path) -> None:
    """Writes what lies beside the weights: the tokenizer with Llama 4's image tokens, template, preprocessor."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(TEXT_MODEL)
    tokenizer.add_special_tokens({"additional_special_tokens": IMAGE_TOKENS})
    tokenizer.chat_template = (HERE / "chat_template.jinja").read_text("utf-8")
    tokenizer.save_pretrained(folder)
    if folder.resolve() != HERE:
        shutil.copy(HERE / "chat_template.jinja", folder)
    preprocessor = {"size": {"height": TILE, "width": TILE}, "max_patches": MOST_TILES}
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor, indent=2) + "\n", "utf-8")
    patches = {"patch_size": PATCH, "pixel_shuffle_ratio": SHUFFLE}
    (folder / "processor_config.json").write_text(json.dumps(patches, indent=2) + "\n", "utf-8")


def new_model() -> Llama4ForConditionalGeneration:
    """The text model's weights, and new ones where it has none."""
    text = Llama4ForCausalLM.from_pretrained(TEXT_MODEL, dtype=torch.float32)
    known = text.state_dict()
    model = Llama4ForConditionalGeneration(multimodal_config(text.config)).float()
    own = model.language_model.state_dict()
    for name, value in known.items():
        own[name][: len(value)] = value  # the embedding and the head have more rows now
    model.language_model.load_state_dict(own)
    return model


@dataclass(frozen=True, slots=True)
class Batch:
    """Conversations about scenes, padded on the right, and their tiles.

    Attributes:
        ids_BS: Tokens.
        labels_BS: Tokens where an answer stands, `IGNORED` elsewhere.
        pixels_N3PP: The tiles, in float16, which holds their values exactly.
    """

    ids_BS: torch.Tensor
    labels_BS: torch.Tensor
    pixels_N3PP: torch.Tensor

    def to(self, device: str) -> "Batch":
        """Moves it."""
        return Batch(*(getattr(self, name).to(device) for name in self.__slots__))


class Reader:
    """Reads scenes as a session reads prompts with images."""

    def __init__(self, folder: Path) -> None:
        self.text = Text(folder)
        self.prompts = ImagePrompts(self.text)

    def conversation(self, image: Any, questions: list[Question]) -> tuple[list[int], list[int], np.ndarray]:
        """Ids, labels and tiles of a conversation that asks these questions one after another."""
        tiles_N3PP, grid = cut_tiles(read_image(image), self.prompts.settings)
        first = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": questions[0].text}]}
        ids = self.prompts.expand(self.text.encode_chat([first]), [grid])
        labels = [IGNORED] * len(ids)
        for number, question in enumerate(questions):
            if number:
                turn = f"{HEADER_START}user{HEADER_END}\n\n{question.text}{EOT}{ANSWER_TURN}"
                asked = self.text.encode(turn, special_tokens=False)
                ids, labels = ids + asked, labels + [IGNORED] * len(asked)
            answer = self.text.encode(question.answer + EOT, special_tokens=False)
            ids, labels = ids + answer, labels + answer
        return ids, labels, tiles_N3PP.astype(np.float16)

    def batch(self, conversations: list[tuple[Any, list[Question]]]) -> Batch:
        """Conversations as one batch."""
        read = [self.conversation(*each) for each in conversations]
        longest = max(len(ids) for ids, _, _ in read)
        ids_BS = torch.zeros(len(read), longest, dtype=torch.long)
        labels_BS = torch.full_like(ids_BS, IGNORED)
        for row, (ids, labels, _) in enumerate(read):
            ids_BS[row, : len(ids)], labels_BS[row, : len(ids)] = torch.tensor(ids), torch.tensor(labels)
        return Batch(ids_BS, labels_BS, torch.from_numpy(np.concatenate([tiles for _, _, tiles in read])))


class Conversations(torch.utils.data.IterableDataset):
    """Batches about scenes that are not held out, without end, other ones in each worker."""

    def __init__(self, folder: Path, rows: int, seed: int) -> None:
        self.folder, self.rows, self.seed = folder, rows, seed

    def __iter__(self) -> Iterator[Batch]:
        torch.set_num_threads(1)
        worker = torch.utils.data.get_worker_info()
        rng = random.Random(f"{self.seed} {worker.id if worker else 0}")
        reader = Reader(self.folder)
        while True:
            size, turns = random_size(rng), rng.randint(1, 3)  # alike in a batch, so that little is padded
            scenes = [random_scene(rng, held_out=False) for _ in range(self.rows)]
            yield reader.batch([(scene.draw(*size, rng), random_questions(scene, turns, rng)) for scene in scenes])


def kept_text_loss(teacher: Llama4ForCausalLM, model: Llama4ForConditionalGeneration, ids_BS: torch.Tensor) -> Any:
    """KL divergence from the text model that it was, a mean over tokens."""
    with torch.no_grad():
        known = teacher(ids_BS, use_cache=False).logits.float().log_softmax(-1)
    found = model(input_ids=ids_BS, use_cache=False).logits.float().log_softmax(-1)[..., : known.shape[-1]]
    return (known.exp() * (known - found)).sum(-1).mean()


@torch.no_grad()
def right_answers(
    model: Llama4ForConditionalGeneration, reader: Reader, asked: list[tuple[Any, Question]], device: str
) -> list[bool]:
    """Whether each answer is right: each of its tokens is the likeliest after the right ones before it.

    That is when greedy generation writes it.
    """
    right: list[bool] = []
    for start in range(0, len(asked), 100):
        batch = reader.batch([(image, [question]) for image, question in asked[start : start + 100]]).to(device)
        logits = model(input_ids=batch.ids_BS, pixel_values=batch.pixels_N3PP.float(), use_cache=False).logits
        labels_BS = batch.labels_BS[:, 1:]
        wrong_BS = (logits[:, :-1].argmax(-1) != labels_BS) & (labels_BS != IGNORED)
        right += (~wrong_BS.any(-1)).tolist()
    return right


def score(model: Llama4ForConditionalGeneration, reader: Reader, asked: int, device: str) -> dict[str, float]:
    """The share of right answers about held-out scenes, by kind."""
    questions = held_out_questions(asked)
    right = right_answers(model, reader, questions, device)
    shares = {}
    for kind in KINDS:
        of_kind = [answer for answer, (_, question) in zip(right, questions, strict=True) if question.kind == kind]
        shares[kind] = round(sum(of_kind) / len(of_kind), 4)
    return {"all": round(sum(right) / asked, 4), **shares}


def train(minutes: float, rows: int, peak_rate: float, start: Path, output: Path, seed: int, device: str) -> None:
    """Trains for a number of minutes with AdamW and a cosine that ends with the time, then writes the checkpoint."""
    torch.manual_seed(seed)
    torch.set_float32_matmul_precision("high")
    before = {} if start == TEXT_MODEL else json.loads((start / "training.json").read_text("utf-8"))
    write_companions(output)
    reader = Reader(output)
    if start == TEXT_MODEL:
        model = new_model().to(device)
    else:
        model = Llama4ForConditionalGeneration.from_pretrained(start, dtype=torch.float32).to(device)
    teacher = Llama4ForCausalLM.from_pretrained(TEXT_MODEL, dtype=torch.float32).to(device).eval()
    router_logits: list[torch.Tensor] = []
    hooks = [
        module.register_forward_hook(lambda module, given, result: router_logits.append(result[1].flatten(0, -2)))
        for module in model.modules()
        if isinstance(module, Llama4TextMoe)
    ]
    parameters = list(model.parameters())
    print(f"{sum(each.numel() for each in parameters) / 1e6:.2f} M parameters", flush=True)
    groups = [
        {"params": [each for each in parameters if each.ndim >= 2], "weight_decay": 0.05},
        {"params": [each for each in parameters if each.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=device == "cuda")

    workers = max(1, len(os.sched_getaffinity(0)) - 2)
    loader = torch.utils.data.DataLoader(Conversations(output, rows, seed), batch_size=None, num_workers=workers)
    rng = random.Random(seed)
    training = [document for document in documents() if not document.is_held_out]
    tokenizer = AutoTokenizer.from_pretrained(TEXT_MODEL)
    text_ids = epoch_ids(training, tokenizer, rng)

    warm_up, step = 300, 0
    started = time.monotonic()
    for step, batch in enumerate(loader):
        elapsed = (time.monotonic() - started) / 60
        if elapsed >= minutes:
            break
        for group in optimizer.param_groups:
            cosine = 0.5 * (1 + math.cos(math.pi * elapsed / minutes))
            group["lr"] = peak_rate * min(1, (step + 1) / warm_up) * (0.01 + 0.99 * cosine)
        starts = [rng.randrange(len(text_ids) - TEXT_LENGTH) for _ in range(max(1, rows // 64))]
        text_BS = torch.stack([text_ids[start : start + TEXT_LENGTH] for start in starts]).to(device)
        batch = batch.to(device)
        router_logits.clear()
        with torch.autocast(device, torch.bfloat16):
            logits = model(input_ids=batch.ids_BS, pixel_values=batch.pixels_N3PP.float(), use_cache=False).logits
            kept = kept_text_loss(teacher, model, text_BS)
        answers = torch.nn.functional.cross_entropy(
            logits[:, :-1].float().flatten(0, 1), batch.labels_BS[:, 1:].flatten(), ignore_index=IGNORED
        )
        (answers + kept + 0.01 * balance_loss(router_logits)).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            print(f"{elapsed:5.2f} min  step {step}  answers {answers.item():.4f}  text {kept.item():.4f}", flush=True)
        if step % 1000 == 999:
            print(score(model.eval(), reader, 500, device), flush=True)
            model.train()
    for hook in hooks:
        hook.remove()

    write_weights(model.eval(), output)
    reloaded = Llama4ForConditionalGeneration.from_pretrained(output, dtype=torch.float32).to(device)
    record = {
        "parameters": sum(each.numel() for each in parameters),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "minutes": minutes + before.get("minutes", 0),
        "steps": step + before.get("steps", 0),
        "scenes_seen": step * rows + before.get("scenes_seen", 0),
        "held_out_answers_right_bf16_weights_fp32_arithmetic": score(reloaded, reader, 2000, device),
        "held_out_text_perplexity": round(perplexity(reloaded.cpu(), tokenizer, held_out_text()), 4),
        "python": sys.version.split()[0],
    }
    (output / "training.json").write_text(json.dumps(record, indent=2) + "\n", "utf-8")
    print(json.dumps(record, indent=2))


def write_weights(model: Llama4ForConditionalGeneration, output: Path) -> None:
    """Writes config and sharded safetensors, in bf16."""
    ids = model.config.text_config
    model.generation_config = GenerationConfig(
        bos_token_id=ids.bos_token_id, eos_token_id=ids.eos_token_id, pad_token_id=ids.pad_token_id
    )
    model.bfloat16().save_pretrained(output, max_shard_size="4MB")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Teach the tiny Llama 4 to see.")
    parser.add_argument("--minutes", type=float, default=6)
    parser.add_argument("--rows", type=int, default=256, help="Conversations in a batch.")
    parser.add_argument("--rate", type=float, default=1e-3, help="Peak learning rate.")
    parser.add_argument("--start", type=Path, default=TEXT_MODEL, help="A checkpoint of this script goes on.")
    parser.add_argument("--output", type=Path, default=HERE)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    train(
        arguments.minutes,
        arguments.rows,
        arguments.rate,
        arguments.start,
        arguments.output,
        arguments.seed,
        arguments.device,
    )
