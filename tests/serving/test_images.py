"""Images through the server: answered as the session does, and known when they come again."""

import base64
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import arriero

GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 8, "extra_body": {"logit_bias": {"1": -100}}}


def test_images_are_answered_as_the_session_does(multimodal_model: Path, serve: Callable[..., Any]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    file = BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    text = {"type": "text", "text": "What is this?"}
    asked: Any = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}, text]}]
    written = [{"role": "user", "content": [{"type": "image", "image": file.getvalue()}, text]}]
    session = arriero.load(multimodal_model, threads=1)
    alone = session.generate(written, 8, do_sample=False, logit_bias={1: -100})
    server = serve(folder=multimodal_model)
    client = server.client()
    found = [client.chat.completions.create(model=server.about["model"], messages=asked, **GREEDY) for _ in range(2)]
    assert [each.choices[0].message.content for each in found] == [alone.text] * 2
    items: Any = [
        {"role": "user", "content": [{"type": "input_image", "image_url": url}, {**text, "type": "input_text"}]}
    ]
    response = client.responses.create(model=server.about["model"], input=items, temperature=0, max_output_tokens=8)
    assert response.usage is not None
    assert response.usage.input_tokens == found[0].usage.prompt_tokens
    good, bad = {"type": "image_url", "image_url": {"url": url}}, {"type": "image_url", "image_url": {"url": url[:60]}}
    parts = [{"role": "user", "content": [good, text, bad]}]
    with server.http() as http:
        for path, body, param in (
            ("/v1/chat/completions", {"messages": parts}, "messages[0].content[2].image_url"),
            ("/tokenize", {"messages": parts}, "messages[0].content[2].image_url"),
            ("/v1/completions", {"prompt": "<|image|>"}, "prompt"),
        ):
            refused = http.post(path, json=body)
            assert refused.status_code == 400
            assert refused.json()["error"]["param"] == param
    assert server.end() == 0


def test_an_image_is_seen_in_the_detail_that_is_asked_for(multimodal_model: Path, serve: Callable[..., Any]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    session = arriero.load(multimodal_model, threads=1)
    server = serve(folder=multimodal_model)
    client: Any = server.client()
    large = BytesIO()
    Image.fromarray(np.tile(pixels, (10, 4, 1))).save(large, "PNG")
    wide = "data:image/png;base64," + base64.b64encode(large.getvalue()).decode()
    counts = {}
    for detail in ("low", "high", "auto"):
        part = {"type": "image_url", "image_url": {"url": wide, "detail": detail}}
        item = {"type": "input_image", "image_url": wide, "detail": detail}
        chatted = client.chat.completions.create(
            model=server.about["model"], messages=[{"role": "user", "content": [part]}], **GREEDY
        )
        counts[detail] = chatted.usage.prompt_tokens
        items = [{"role": "user", "content": [item]}]
        answered = client.responses.create(model=server.about["model"], input=items, max_output_tokens=1)
        assert answered.usage.input_tokens == counts[detail]
    one = [{"role": "user", "content": [{"type": "image", "image": pixels[:20, :28]}]}]
    assert len(session.read(one).ids) == counts["low"] < counts["high"] == counts["auto"]
    with server.http() as http:
        assert http.get("/v1/models").json()["data"][0]["input_modalities"] == ["text", "image"]
    refused = {"type": "image_url", "image_url": {"url": wide, "detail": "original"}}
    with server.http() as http:
        answer = http.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": [refused]}]})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "messages[0].content[0].image_url.detail"
    assert server.end() == 0
