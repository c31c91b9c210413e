"""How many questions about held-out pictures the tiny multimodal Llama 4 answers rightly, through every stage.

The same questions go to the checkpoint in PyTorch (`transformers`, its bfloat16 weights in float32 arithmetic), to its
export on ONNX Runtime, and to the models calibrated to INT8 and FP8 on pictures and text that it was trained on. An
answer is right where it is exactly the one right answer. An interval of 95 % of a share is Wilson's (1927).

    python benchmarks/scene_accuracy.py [--questions 600] [--recipes int8,fp8,int4] [--json FILE]
"""

import argparse
import itertools
import json
import math
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from transformers import Llama4ForConditionalGeneration

import arriero
from arriero.calibration import calibrate_model
from arriero.export import export_checkpoint
from arriero.runtime import Session

EXAMPLES = Path(__file__).parent.parent / "examples"
sys.path += [str(EXAMPLES / "tiny-llama4-vision"), str(EXAMPLES / "tiny-llama4")]

from chats import Reader, generate_answer  # noqa: E402
from corpus import documents  # noqa: E402
from scenes import KINDS, score_answers, training_sheets  # noqa: E402

CHECKPOINT = EXAMPLES / "tiny-llama4-vision"
LONGEST = 80
"""Tokens of an answer at most; the longest right one has about 60."""

CALIBRATION_SEED, CALIBRATION_TALKS = 10_000_000, 96
"""Of the pictures to calibrate on: training never came so far. How many conversations about them there are."""


def write_calibration(folder: Path) -> list[Path]:
    """Writes conversations about pictures that are not held out, and some of the training's text."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, cases in enumerate(itertools.islice(training_sheets(CALIBRATION_SEED), CALIBRATION_TALKS)):
        paths = [f"{number:03}-{index}.png" for index in range(len(cases[0].scenes))]
        for path, image in zip(paths, cases[0].draw(), strict=True):
            image.save(folder / path)
        turns = [(case.question, case.answer) for case in cases]
        messages = [{"role": role, "content": said} for turn in turns for role, said in zip(ROLES, turn, strict=True)]
        lines.append(json.dumps({"messages": messages, "images": paths}) + "\n")
    (folder / "scenes.jsonl").write_text("".join(lines), "utf-8")
    training = [document.text for document in documents() if not document.is_held_out][::40]
    (folder / "training.txt").write_text("\n\n\n".join(training), "utf-8")
    return [folder / "scenes.jsonl", folder / "training.txt"]


ROLES = ("user", "assistant")


def ask_session(session: Session) -> Callable[[list[Image.Image], str], str]:
    """A session as what answers questions."""
    return lambda images, question: session.generate(question, LONGEST, images, temperature=0).text


def wilson(share: float, count: int) -> tuple[float, float]:
    """The 95 % interval of a share of so many."""
    z = 1.96
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count)) / (1 + z * z / count)
    return middle - half, middle + half


def main() -> None:
    parser = argparse.ArgumentParser(description="Answers to held-out pictures, through every stage.")
    parser.add_argument("--questions", type=int, default=600)
    parser.add_argument("--recipes", default="int8,fp8,int4")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        reader = Reader(CHECKPOINT)
        model = Llama4ForConditionalGeneration.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()
        found["PyTorch"] = score_answers(
            lambda images, question: generate_answer(model, reader, images, question), arguments.questions
        )
        exported = export_checkpoint(CHECKPOINT, Path(folder) / "model")
        found["ONNX"] = score_answers(ask_session(arriero.load(exported)), arguments.questions)
        data = write_calibration(Path(folder) / "data")
        for recipe in filter(None, arguments.recipes.split(",")):
            quantised = calibrate_model(exported, Path(folder) / recipe, recipe=recipe, data=data, samples=64)
            found[recipe.upper()] = score_answers(ask_session(arriero.load(quantised)), arguments.questions)
    table = Table("", *KINDS, "all", "95 % interval", title=f"Right answers of {arguments.questions}, %")
    for name, shares in found.items():
        low, high = wilson(shares["all"], arguments.questions)
        figures = (f"{100 * shares[kind]:.1f}" for kind in (*KINDS, "all"))
        table.add_row(name, *figures, f"{100 * low:.1f} to {100 * high:.1f}")
    Console().print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
