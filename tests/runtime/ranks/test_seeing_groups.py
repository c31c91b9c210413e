"""A group of two ranks of a model that sees: `run`, a flight, the server and `check` with images and without.

`benchmarks/ranks.py --parts ways` does the same with the tiny models in all formats and splits.
"""

import asyncio
import base64
import io
import json
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from endless import ENDLESS
from pictures import drawn
from typer.testing import CliRunner

import arriero
from arriero.accuracy import check
from arriero.cli.app import app
from arriero.engine import build_bundle
from arriero.export import export_checkpoint
from arriero.runtime import Session
from arriero.serving.app import make_app
from arriero.serving.logs import Log
from arriero.serving.pilot import FlightSettings
from arriero.serving.service import Limits, Service

GREEDY: dict[str, Any] = {"max_new_tokens": 6, "temperature": 0, "eos_token_id": []}
QUESTION = "What is this?"


def picture(width: int) -> bytes:
    file = io.BytesIO()
    drawn(width, 28).save(file, "PNG")
    return file.getvalue()


def as_url(image: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(image).decode()


@pytest.fixture(scope="module")
def talks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Conversations about drawn pictures, and some without."""
    folder = tmp_path_factory.mktemp("talks")
    lines = []
    for number in range(8):
        (folder / f"{number}.png").write_bytes(picture(20 + 5 * number))
        said = [{"role": "user", "content": f"What is {number}?"}, {"role": "assistant", "content": "A drawing."}]
        lines.append(json.dumps({"messages": said, "images": [f"{number}.png"] if number % 4 else []}))
    (folder / "talks.jsonl").write_text("\n".join(lines))
    return folder / "talks.jsonl"


@pytest.fixture(scope="module")
def group(multimodal_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bundles of two ranks that share widths and experts."""
    folder = tmp_path_factory.mktemp("seeing")
    return build_bundle(export_checkpoint(multimodal_model, folder / "group", tp=2, ep=2), folder / "bundles")


def test_images_are_seen_by_all_ranks(multimodal_model: Path, group: Path) -> None:
    pixels = np.random.default_rng(3).standard_normal((2, 3, 28, 28)).astype(np.float32)
    found = []
    for folder in (multimodal_model, group):
        session = arriero.load(folder, max_seq=64, threads=2)
        features_MH = session.encode(pixels)
        assert features_MH is not None
        assert session.image_token is not None
        ids = [5, *[session.image_token] * len(features_MH), 9, 11]
        state = session.start(1)
        found.append([session.prefill(state, [ids], [features_MH]), session.decode(state, [7])])
    for expected, part in zip(*found, strict=True):
        assert np.abs(part - expected).max() < 1e-4
    assert [(group / f"rank-{rank}" / "vision.onnx").exists() for rank in (0, 1)] == [True, False]


async def served(session: Session, bodies: list[dict[str, Any]]) -> list[str]:
    """Texts of chats that come all at once."""
    faults: list[BaseException] = []
    service = Service("tiny", Limits(), shares_prefixes=True, report=faults.append)
    transport = httpx.ASGITransport(make_app(service, Log(io.StringIO())))
    settings = FlightSettings(slots=2, prefill_budget=8, cache_bytes=None, queue=8)
    service.open(session, settings, asyncio.get_running_loop())
    try:
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as http:
            answers = await asyncio.gather(*(http.post("/v1/chat/completions", json=body) for body in bodies))
    finally:
        service.close()
    assert not faults
    return [answer.json()["choices"][0]["message"]["content"] for answer in answers]


def asked(question: str, image: bytes | None) -> list[dict[str, Any]]:
    """A message, as the session takes it."""
    seen = [{"type": "image", "image": image}] if image else []
    return [{"role": "user", "content": [*seen, {"type": "text", "text": question}]}]


def body(question: str, image: bytes | None) -> dict[str, Any]:
    """The same, as the server takes it."""
    seen = [{"type": "image_url", "image_url": {"url": as_url(image)}}] if image else []
    content = [*seen, {"type": "text", "text": question}]
    return {"messages": [{"role": "user", "content": content}], "max_tokens": 6, "temperature": 0, **ENDLESS}


def test_images_and_text_are_answered_alike_in_every_way(group: Path, tmp_path: Path) -> None:
    images = [picture(28), None, picture(60)]
    settings: dict[str, Any] = {**GREEDY, "logit_bias": {int(end): -100 for end in ENDLESS["logit_bias"]}}
    session = arriero.load(group, max_seq=256, threads=2, prefix_bytes=1 << 22)
    prompts: list[Any] = [asked(QUESTION, image) for image in images]
    alone = [session.generate(prompt, **settings) for prompt in prompts]
    assert alone[0].ids != alone[2].ids or alone[0].prompt_tokens != alone[2].prompt_tokens
    in_flight = session.generate_many(prompts, slots=2, prefill_budget=8, **settings)
    assert [each.ids for each in in_flight] == [each.ids for each in alone]
    answers = asyncio.run(served(session, [body(QUESTION, image) for image in images]))
    assert answers == [each.text for each in alone]
    (tmp_path / "seen.png").write_bytes(picture(28))
    command = ["run", str(group), "--prompt", QUESTION, "--image", str(tmp_path / "seen.png"), "--ignore-eos"]
    run = CliRunner().invoke(app, [*command, "--max-new-tokens", "6", "--temperature", "0", "--json", "--threads", "2"])
    assert run.exit_code == 0, run.stderr
    expected = session.generate(QUESTION, images=[picture(28)], **GREEDY)
    assert json.loads(run.stdout)["ids"] == expected.ids


def test_a_check_of_a_group_sees_the_images(multimodal_model: Path, group: Path, talks: Path) -> None:
    verdict = check(group, multimodal_model, data=[talks], window=120, threads=2)
    assert verdict.metrics["kl"].value < 1e-6
    assert verdict.comparison.golden.tiles_W is not None
