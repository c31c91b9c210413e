"""Text and conversations as windows: where they are cut, and which image features belong to which."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from pictures import drawn

from arriero.errors import DataError
from arriero.export.checkpoint import open_checkpoint
from arriero.runtime.images.placeholders import ImagePrompts
from arriero.runtime.text import Text
from arriero.walk.windows import Windows, read_windows

Write = Callable[[list[object]], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a JSONL file beside two pictures, `wide.png` and `small.png`."""
    drawn(90, 40).save(tmp_path / "wide.png")
    drawn(20, 20).save(tmp_path / "small.png")

    def lines(values: list[object]) -> Path:
        path = tmp_path / "talks.jsonl"
        path.write_text("\n".join(json.dumps(value) for value in values))
        return path

    return lines


def asked(question: str, answer: str, **more: object) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], **more}


def windows_of(folder: Path, data: list[Path], samples: int = 100, window: int | None = None) -> Windows:
    opened = open_checkpoint(folder)
    return read_windows(folder, data, opened.spec, samples, window, opened.vision)


def test_each_window_begins_with_a_conversation_and_holds_its_features(
    multimodal_checkpoint: Path, write: Write
) -> None:
    talks = [asked(f"What is number {at}?", "A photo. " * (2 + at % 3), images=["wide.png"]) for at in range(12)]
    path = write([*talks, asked("And?", "Nothing more.")])
    found = windows_of(multimodal_checkpoint, [path], window=150)
    prompts = ImagePrompts(Text(multimodal_checkpoint))
    assert found.vision is not None
    bos = Text(multimodal_checkpoint).special_id("bos_token")
    assert set(found.ids_WS[:, 0]) == {bos}
    features = np.arange(int(found.tiles_W.sum()) * found.vision.features, dtype=np.float32)[:, None]
    first = 0
    for window, ids_S in enumerate(found.ids_WS):
        count = int((ids_S == found.vision.image_token).sum())
        assert np.array_equal(found.features_of(window, features)[:, 0], first + np.arange(count))  # type: ignore[index]
        first += int(found.tiles_W[window]) * found.vision.features
        assert np.array_equal(found.is_image_WS[window], np.isin(ids_S, list(prompts.ids.values())))
    assert len(found.pixels_N3PP) == found.tiles_W.sum()
    joined = found.features_in_order(features)
    assert joined is not None
    assert len(joined) == (found.ids_WS == found.vision.image_token).sum()


def test_every_conversation_but_the_last_is_whole_in_some_window(multimodal_checkpoint: Path, write: Write) -> None:
    path = write([asked(f"Say {at}.", f"It is {at}. " * (1 + at % 4)) for at in range(40)])
    text = Text(multimodal_checkpoint)
    found = windows_of(multimodal_checkpoint, [path], window=128)
    said = [text.decode(ids_S.tolist()) for ids_S in found.ids_WS]
    for at in range(39):  # the last may be cut
        assert any(f"Say {at}." in each and f"It is {at}. " * (1 + at % 4) in each + " " for each in said), at


def test_text_and_conversations_take_turns(multimodal_checkpoint: Path, write: Write, texts: tuple[Path, Path]) -> None:
    talks = write([asked("What is this?", "A photo.", images=["small.png"])] * 30)
    found = windows_of(multimodal_checkpoint, [texts[0], talks], samples=8, window=128)
    has_images = found.is_image_WS.any(1)
    assert found.ids_WS.shape == (8, 128)
    assert 0 < has_images.sum() < 8
    assert np.array_equal(found.tiles_W > 0, has_images)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("no object", "line 1: no JSON object"),
        ({"messages": []}, "line 1: messages is no list of objects with role and content"),
        (asked("What?", "A.", images=["gone.png"]), "line 1: .*gone.png: cannot be read"),
        (asked("What?", "A.", images="wide.png"), "line 1: images is no list of paths"),
        ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, "line 1: a message has the part"),
        (asked("<|image|>What?", "A.", images=["small.png"]), "line 1: the prompt has 2 "),
    ],
)
def test_a_bad_line_is_named(multimodal_checkpoint: Path, write: Write, line: object, said: str) -> None:
    with pytest.raises(DataError, match=said):
        windows_of(multimodal_checkpoint, [write([line])])


def test_images_for_a_text_model_are_refused(tiny: Path, write: Write) -> None:
    path = write([asked("What is this?", "A photo.", images=["small.png"])])
    with pytest.raises(DataError, match="line 1 has an image, the model takes text only"):
        windows_of(tiny, [path])
