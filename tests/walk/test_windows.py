"""Text and conversations as windows: where they are cut, and which image features belong to which."""

import base64
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from pictures import drawn

from arriero.errors import DataError
from arriero.export.checkpoint import open_checkpoint
from arriero.runtime.images.placeholders import ImagePrompts
from arriero.runtime.prompt import PromptReader
from arriero.runtime.text import Text
from arriero.walk import windows
from arriero.walk.conversations import cut_images, read_conversations
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
        ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, "line 1: message 1 has the part"),
        ({"messages": [{"role": "user", "content": "x"}], "tools": 5}, "line 1: tools is 5, expected a list"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}] * 2}], "images": ["small.png"]}, "2 parts"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "image": 5}]}]}, "line 1: an image is 5"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "url": "https://x/y"}]}]}, "from a network"),
    ],
)
def test_a_bad_line_is_named(multimodal_checkpoint: Path, write: Write, line: object, said: str) -> None:
    with pytest.raises(DataError, match=said):
        windows_of(multimodal_checkpoint, [write([line])])


def test_images_for_a_text_model_are_refused(tiny: Path, write: Write) -> None:
    path = write([asked("What is this?", "A photo.", images=["small.png"])])
    with pytest.raises(DataError, match="line 1 has an image, the model takes text only"):
        windows_of(tiny, [path])


def test_a_line_is_read_as_a_session_reads_it(multimodal_checkpoint: Path, write: Write, tmp_path: Path) -> None:
    text, prompts = Text(multimodal_checkpoint), ImagePrompts(Text(multimodal_checkpoint))
    data = "data:image/png;base64," + base64.b64encode((tmp_path / "small.png").read_bytes()).decode()
    parts = [
        [{"type": "image", "path": "small.png"}],
        [{"type": "image", "image": "small.png"}],
        [{"type": "image_url", "image_url": {"url": data}}],
        [{"type": "image", "base64": data.partition(",")[2]}],
    ]
    said = {"type": "text", "text": "What <|image|> is <|eot|> this?"}
    lines = [{"messages": [{"role": "user", "content": [*part, said]}]} for part in parts]
    lines.append({"messages": [{"role": "user", "content": [{"type": "image"}, said]}], "images": ["small.png"]})  # type: ignore[dict-item]
    lines.append({"messages": [{"role": "user", "content": [said]}], "images": ["small.png"]})  # type: ignore[dict-item]
    found = list(read_conversations(write(lines), text, prompts))
    reader = PromptReader(text, open_checkpoint(multimodal_checkpoint).vision)
    tokens = reader.read(lines[2]["messages"])
    for conversation in found:
        assert conversation.ids_S.tolist() == tokens.ids
        assert np.array_equal(cut_images(conversation.images, prompts), tokens.pixels_N3PP)


def test_tools_and_calls_without_content_are_read(tiny: Path, write: Write) -> None:
    template = "{{ tools | tojson }}{% for m in messages %}{{ m.tool_calls | tojson if m.tool_calls }}{% endfor %}"
    line = {
        "messages": [{"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}],
        "tools": [{"name": "f"}],
    }
    folder = write([line]).parent
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny / name, folder)
    (folder / "chat_template.jinja").write_text(template)
    (found,) = read_conversations(write([line]), Text(folder), None)
    assert found.ids_S.tolist() == Text(folder).encode('[{"name": "f"}]' * 2, special_tokens=False)


def test_long_texts_are_tokenised_in_pieces_to_the_same_tokens(
    tiny: Path, texts: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pieces end with words; one that is far longer is cut."""
    whole = windows_of(tiny, [texts[0]], window=64)
    monkeypatch.setattr(windows, "PIECE", 1500)
    assert len(list(windows._pieces(texts[0].read_text()))) > 10
    assert np.array_equal(windows_of(tiny, [texts[0]], window=64).ids_WS, whole.ids_WS)
    assert [len(piece) for piece in windows._pieces("a" * 3500)] == [1500, 1500, 500]


def test_data_that_is_too_much_in_all_is_refused(
    tiny: Path, write: Write, texts: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = write([asked("What?", "That.")] * 40)
    alone = windows_of(tiny, [texts[0]]), windows_of(tiny, [rows])
    tokens = len(Text(tiny).encode(texts[0].read_text(), special_tokens=False))
    monkeypatch.setattr(windows, "MOST_KEPT", 8 * tokens + 300)
    windows_of(tiny, [texts[0]])
    said = (
        r"talks.jsonl: up to here the data has \d+ bytes of tokens and images, of 2 files, expected \d+ at most: give"
    )
    with pytest.raises(DataError, match=said):
        windows_of(tiny, [texts[0], rows])
    monkeypatch.setattr(windows, "MOST_KEPT", 5000)
    with pytest.raises(DataError, match=r"up to here the data has \d+ bytes of tokens and images, expected 5000"):
        windows_of(tiny, [rows])
    assert all(len(each.ids_WS) for each in alone)


def test_a_row_that_is_too_long_is_refused(tiny: Path, write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(windows, "MOST_CHARACTERS", 500)
    for long in ({"text": "a b " * 200}, asked("a b " * 200, "c")):
        with pytest.raises(
            DataError, match=r"line 2: the text has \d+ characters, 500 are read at once at most: shorten"
        ):
            windows_of(tiny, [write([{"text": "fine"}, long])])


def test_images_behind_a_windows_end_are_not_cut_into_tiles(multimodal_checkpoint: Path, write: Write) -> None:
    line = {"messages": [{"role": "user", "content": [{"type": "image", "path": "small.png"}] * 60}]}
    found = windows_of(multimodal_checkpoint, [write([line] * 3)], window=128)
    begun = (found.ids_WS == ImagePrompts(Text(multimodal_checkpoint)).ids["<|image_start|>"]).sum(1)
    assert found.tiles_W.tolist() == begun.tolist()
    assert 0 < begun.max() < 60
