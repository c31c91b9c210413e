"""The trained tiny multimodal Llama 4: its answers about held-out scenes, from checkpoint to text."""

import json
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Llama4ForConditionalGeneration

import arriero
from arriero.export import export_checkpoint
from arriero.runtime import Session
from arriero.runtime.prompt import Tokens

SCENES = Path(__file__).parent.parent.parent / "examples" / "tiny-llama4-vision"
sys.path.append(str(SCENES))

from scenes import held_out_questions, is_right, random_scene, write_conversations  # noqa: E402

ASKED = 40


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Session:
    return arriero.load(export_checkpoint(SCENES, tmp_path_factory.mktemp("scenes") / "model"), max_seq=512, threads=1)


def test_it_is_small() -> None:
    assert sum(path.stat().st_size for path in SCENES.iterdir() if path.is_file()) <= 15e6


def test_held_out_scenes_are_not_trained_on(tmp_path: Path) -> None:
    rng = random.Random(0)
    held_out = {random_scene(rng, held_out=True).caption for _ in range(2000)}
    trained = {random_scene(rng, held_out=False).caption for _ in range(2000)}
    assert not held_out & trained
    path = write_conversations(tmp_path, 20)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(lines) == 20
    assert all((tmp_path / image).is_file() for line in lines for image in line["images"])
    assert not held_out & {message["content"] for line in lines for message in line["messages"]}


def test_its_answers_are_those_of_transformers_and_as_right_as_recorded(session: Session) -> None:
    reference = Llama4ForConditionalGeneration.from_pretrained(SCENES, dtype=torch.float32).eval()
    asked = held_out_questions(ASKED)
    right = []
    for image, question in asked:
        answer = session.generate(question.text, images=[image], max_new_tokens=64, temperature=0)
        assert answer.finish == "eos"
        assert answer.ids == greedy_answer(reference, session.read(question.text, [image]), answer.ids)
        right.append(is_right(answer.text, question))
    recorded = json.loads((SCENES / "training.json").read_text())
    expected = recorded["held_out_answers_right_bf16_weights_fp32_arithmetic"]["all"]
    assert abs(np.mean(right) - expected) < 3 * np.sqrt(expected * (1 - expected) / ASKED)


@torch.no_grad()
def greedy_answer(reference: Llama4ForConditionalGeneration, prompt: Tokens, answer: list[int]) -> list[int]:
    """The token that the reference finds likeliest at each place of an answer: greedy text, where they are equal."""
    assert prompt.pixels_N3PP is not None
    ids = torch.tensor([prompt.ids + answer])
    logits = reference(ids, torch.from_numpy(prompt.pixels_N3PP)).logits[0]
    found: list[int] = logits.argmax(-1)[len(prompt.ids) - 1 : -1].tolist()
    return found
