"""Right answers of the tiny multimodal Llama 4 about held-out scenes: in PyTorch, exported, INT8, FP8.

Every contender is asked the same questions about the same drawings, the five kinds in turn, and its greedy answer is
right where it is the right one word for word. `transformers` gets our tiles and the bf16 weights in float32; for it the
greedy answer is found by teacher forcing, which comes to the same. The folders answer as a user runs them. Calibration
sees scenes that the model was trained on and some of its text. The interval is Wilson's, 95 %; as all answer the same
questions, the answers that a folder changes say more than the intervals.

    python benchmarks/scene_accuracy.py [--questions 1000] [--threads 2] [--json figures.json]
"""

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

import arriero
from arriero.calibration import calibrate_model
from arriero.export import export_checkpoint

EXAMPLES = Path(__file__).parent.parent / "examples"
MODEL = EXAMPLES / "tiny-llama4-vision"
sys.path[:0] = [str(MODEL), str(EXAMPLES / "tiny-llama4")]

import torch  # noqa: E402
from corpus import documents  # noqa: E402
from scenes import KINDS, held_out_questions, is_right, write_conversations  # noqa: E402
from train_scenes import Reader, right_answers  # noqa: E402
from transformers import Llama4ForConditionalGeneration  # noqa: E402


@dataclass(frozen=True, slots=True)
class Answers:
    """One contender's answers, whether each is right, in the order of the questions."""

    name: str
    right: list[bool]


def transformers_answers(questions: int) -> Answers:
    model = Llama4ForConditionalGeneration.from_pretrained(MODEL, dtype=torch.float32).eval()
    return Answers("PyTorch", right_answers(model, Reader(MODEL), held_out_questions(questions), "cpu"))


def folder_answers(name: str, folder: Path, questions: int, threads: int) -> Answers:
    session = arriero.load(folder, max_seq=512, threads=threads)
    answers = [
        (session.generate(question.text, images=[image], max_new_tokens=64, temperature=0).text, question)
        for image, question in held_out_questions(questions)
    ]
    return Answers(name, [is_right(answer, question) for answer, question in answers])


def contenders(questions: int, threads: int, folder: Path) -> Iterator[Answers]:
    yield transformers_answers(questions)
    model = export_checkpoint(MODEL, folder / "model")
    yield folder_answers("exported", model, questions, threads)
    scenes = write_conversations(folder / "scenes", 96)
    text = folder / "training.txt"
    text.write_text("\n\n\n".join(each.text for each in documents() if not each.is_held_out)[:80_000], "utf-8")
    for recipe in ("int8", "fp8"):
        quantised = calibrate_model(model, folder / recipe, recipe=recipe, data=[scenes, text], samples=64)
        yield folder_answers(recipe, quantised, questions, threads)


def interval(right: int, asked: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's score interval of a share (Wilson 1927)."""
    share, square = right / asked, z * z / asked
    middle = (share + square / 2) / (1 + square)
    half = z / (1 + square) * math.sqrt(share * (1 - share) / asked + square / (4 * asked))
    return middle - half, middle + half


def percent(answers: Sequence[bool]) -> str:
    return f"{100 * sum(answers) / len(answers):.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Right answers about held-out scenes.")
    parser.add_argument("--questions", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    kinds = [question.kind for _, question in held_out_questions(arguments.questions)]
    table = Table("model", "right, %", "95 %", *KINDS, "answers changed")
    found: list[Answers] = []
    with tempfile.TemporaryDirectory() as folder:
        for each in contenders(arguments.questions, arguments.threads, Path(folder)):
            found.append(each)
            low, high = interval(sum(each.right), len(each.right))
            by_kind = [
                percent([right for right, kind in zip(each.right, kinds, strict=True) if kind == one]) for one in KINDS
            ]
            changed = sum(a != b for a, b in zip(each.right, found[0].right, strict=True))
            table.add_row(each.name, percent(each.right), f"{100 * low:.1f} – {100 * high:.1f}", *by_kind, str(changed))
    Console().print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps({"kinds": kinds, "answers": [asdict(each) for each in found]}), "utf-8")


if __name__ == "__main__":
    main()
