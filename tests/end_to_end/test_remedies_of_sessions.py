"""The remedies of refusals, each followed literally: sessions, prompts, images, settings and missing extras."""

import re
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from remedies import Place, Remedy, follow

import arriero
from arriero.cli.app import VERBS
from arriero.cli.terminal import one_line
from arriero.engine.polygraphy import RTX
from arriero.plugins.tensorrt_plugin import REMEDIES

PICTURE = np.zeros((28, 28, 3), np.uint8)
ROOT = Path(__file__).parent.parent.parent
TURN = {"role": "user", "content": "The list type"}


def says(folder: Path, prompt: Any, max_seq: int = 32, **settings: Any) -> bool:
    """Whether a folder continues a prompt by two tokens."""
    session = arriero.load(folder, max_seq=max_seq)
    return session.generate(prompt, **{"max_new_tokens": 2, **settings}).finish != ""


def without(place: Place, file: str) -> Path:
    folder = place.copy(place.model)
    (folder / file).unlink()
    return folder


SESSIONS = (
    Remedy(
        name="a long prompt, shorter",
        provoke=lambda place: says(place.model, [5] * 40),
        says="the session holds 32: shorten it",
        follow=lambda place: says(place.model, [5] * 20),
    ),
    Remedy(
        name="a long prompt, a larger max_seq",
        provoke=lambda place: says(place.model, [5] * 40),
        says="or load with a larger max_seq",
        follow=lambda place: says(place.model, [5] * 40, max_seq=64),
    ),
    Remedy(
        name="a prompt that fills the session",
        provoke=lambda place: says(place.model, [5] * 32),
        says="shorten it, or load with a larger max_seq",
        follow=lambda place: says(place.model, [5] * 31) and says(place.model, [5] * 32, max_seq=33),
    ),
    Remedy(
        name="a prompt that fills the context",
        provoke=lambda place: says(place.seeing, [5] * 512, max_seq=512),
        says="shorten it$",
        follow=lambda place: says(place.seeing, [5] * 500, max_seq=512),
    ),
    Remedy(
        name="more than the context",
        provoke=lambda place: arriero.load(place.model, max_seq=5000),
        says="expected 1 to 4096",
        follow=lambda place: arriero.load(place.model, max_seq=4096),
    ),
    Remedy(
        name="more rows than max_batch",
        provoke=lambda place: arriero.load(place.model, max_seq=32, max_batch=1).start(2),
        says="load with a larger one",
        follow=lambda place: arriero.load(place.model, max_seq=32, max_batch=2).start(2),
    ),
    Remedy(
        name="more positions than max_seq",
        provoke=lambda place: arriero.load(place.model, max_seq=32).start(1, 33),
        says="load with more",
        follow=lambda place: arriero.load(place.model, max_seq=33).start(1, 33),
    ),
    Remedy(
        name="an empty prompt",
        provoke=lambda place: says(place.model, []),
        says="give some text or ids",
        follow=lambda place: says(place.model, "The") and says(place.model, [5]),
    ),
    Remedy(
        name="an unknown setting",
        provoke=lambda place: says(place.model, [5], temprature=0.5),
        says="unknown setting 'temprature': choose from .*temperature",
        follow=lambda place: says(place.model, [5], temperature=0.5),
    ),
    Remedy(
        name="draws at a temperature of 0, another",
        provoke=lambda place: says(place.model, [5], do_sample=True, temperature=0),
        says="give a number above 0, or leave one out",
        follow=lambda place: (
            says(place.model, [5], do_sample=True, temperature=0.5)
            and says(place.model, [5], do_sample=True)
            and says(place.model, [5], temperature=0)
        ),
    ),
    Remedy(
        name="a max_length that the prompt has",
        provoke=lambda place: says(place.model, [5] * 8, max_new_tokens=None, max_length=8),
        says="give max_new_tokens instead",
        follow=lambda place: says(place.model, [5] * 8, max_new_tokens=3),
    ),
    Remedy(
        name="likeliest tokens without log-probabilities",
        provoke=lambda place: says(place.model, [5], top_logprobs=2),
        says="give logprobs=True as well",
        follow=lambda place: says(place.model, [5], top_logprobs=2, logprobs=True),
    ),
    Remedy(
        name="stop strings without a tokenizer",
        provoke=lambda place: says(without(place, "tokenizer.json"), [5], stop_strings=["a"]),
        says="give eos_token_id instead of stop_strings",
        follow=lambda place: says(without(place, "tokenizer.json"), [5], eos_token_id=7),
    ),
    Remedy(
        name="text without a tokenizer",
        provoke=lambda place: says(without(place, "tokenizer.json"), "The"),
        says="give token ids instead of text",
        follow=lambda place: says(without(place, "tokenizer.json"), [5]),
    ),
    Remedy(
        name="messages without a chat template",
        provoke=lambda place: says(without(place, "chat_template.jinja"), [TURN]),
        says="give a plain prompt instead",
        follow=lambda place: says(without(place, "chat_template.jinja"), TURN["content"]),
    ),
    Remedy(
        name="images for a model of text",
        provoke=lambda place: says(place.model, "What is it?", images=[PICTURE]),
        says="takes text only, leave the images out",
        follow=lambda place: says(place.model, "What is it?"),
    ),
    Remedy(
        name="fewer images than places",
        provoke=lambda place: says(place.seeing, "<|image|><|image|>", 128, images=[PICTURE]),
        says="give one image for each",
        follow=lambda place: says(place.seeing, "<|image|><|image|>", 128, images=[PICTURE, PICTURE]),
    ),
    Remedy(
        name="images beside messages",
        provoke=lambda place: says(place.seeing, [TURN], 128, images=[PICTURE]),
        says="put the images into the parts",
        follow=lambda place: says(
            place.seeing, [{"role": "user", "content": [{"type": "image", "image": PICTURE}]}], 128
        ),
    ),
    Remedy(
        name="an image of floating point",
        provoke=lambda place: says(place.seeing, "What?", 128, images=[PICTURE.astype(np.float32)]),
        says="expected uint8 or uint16 .*: convert it",
        follow=lambda place: says(place.seeing, "What?", 128, images=[PICTURE.astype(np.float32).astype(np.uint8)]),
    ),
)


@pytest.mark.parametrize("remedy", SESSIONS, ids=lambda remedy: remedy.name)
def test_what_a_refusal_advises_helps(remedy: Remedy, place: Place) -> None:
    follow(remedy, place)


def extras() -> dict[str, list[str]]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


def test_every_extra_that_a_message_names_is_one() -> None:
    sources = [path.read_text() for room in ("cli", "engine", "plugins", "loading.py") for path in python(ROOT / room)]
    named = {name for text in sources for name in re.findall(r"extra\s*=\s*\"(\w+)\"", text)}
    named |= {name for text in (*REMEDIES.values(), *sources) for name in re.findall(r"arriero\[(\w+)\]", text)}
    assert {"accuracy", "calibration", "export", "tensorrt"} <= named <= extras().keys()


def python(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(path.rglob("*.py"))


WITHOUT_ONNX = {"bench", "check", "golden", "trend", "compare", "serve", "doctor", "pack"}
"""Verbs that need other packages than onnx, or name the one that is missing where it is missing."""


@pytest.mark.parametrize("verb", [verb.__name__ for verb in VERBS])
def test_a_verb_names_an_extra_and_that_of_onnx_where_it_needs_it(verb: str) -> None:
    text = (ROOT / "cli" / f"{verb}.py").read_text()
    assert re.search(r"Terminal\(extra=" if verb != "pack" else r"Terminal\(", text)  # which needs no extra
    for extra in re.findall(r"Terminal\(extra=\"(\w+)\"", text):
        needed = extras()[extra]
        assert verb in WITHOUT_ONNX or "arriero[export]" in needed or any(each.startswith("onnx>") for each in needed)
    line = one_line(ModuleNotFoundError("No module named 'onnx'"), "export")
    assert line.endswith("pip install 'arriero[export]'")


def test_polygraphys_variable_is_its_own() -> None:
    polygraphy = pytest.importorskip("polygraphy.config")
    assert hasattr(polygraphy, RTX.removeprefix("POLYGRAPHY_")), RTX
