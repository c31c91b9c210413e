import base64
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import drawn

from arriero.errors import SessionError
from arriero.export.checkpoint import open_checkpoint
from arriero.runtime.prompt import PromptReader
from arriero.runtime.text import Text

PIXELS = np.asarray(drawn(40, 40))
CHANNELS_LAST = np.full((40, 40, 3), 200, np.uint8)


@pytest.fixture(scope="module")
def reader(multimodal_checkpoint: Path) -> PromptReader:
    return PromptReader(Text(multimodal_checkpoint), open_checkpoint(multimodal_checkpoint).vision)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("images") / "scene.png"
    drawn(40, 40).save(path)
    return path


def test_one_image_is_one_image(reader: PromptReader, file: Path) -> None:
    one = reader.read("What?", [file])
    data = "data:image/png;base64," + base64.b64encode(file.read_bytes()).decode()
    for images in (
        file,
        str(file),
        data,
        file.read_bytes(),
        bytearray(file.read_bytes()),
        PIXELS,
        drawn(40, 40),
        (file,),
    ):
        found = reader.read("What?", images)  # type: ignore[arg-type]
        assert found.ids == one.ids
        assert np.array_equal(found.pixels_N3PP, one.pixels_N3PP)  # type: ignore[arg-type]
    assert reader.read("What?", CHANNELS_LAST).ids == one.ids
    assert reader.read("What?", np.stack([PIXELS] * 2)).ids == reader.read("What?", [PIXELS, PIXELS]).ids  # type: ignore[arg-type]
    assert reader.read("What?", None).ids == reader.read("What?").ids


def test_every_form_of_a_message_is_the_same_prompt(reader: PromptReader, file: Path) -> None:
    image, said = {"type": "image", "path": str(file)}, {"type": "text", "text": "What?"}
    expected = reader.read([{"role": "user", "content": [image, said]}])
    data = "data:image/png;base64," + base64.b64encode(file.read_bytes()).decode()
    parts: list[Any] = [
        {"type": "image_url", "image_url": {"url": data}},
        {"type": "image_url", "image_url": str(file)},
    ]
    parts += [{"type": "image", name: value} for name, value in (("url", data), ("image", PIXELS), ("image", file))]
    forms: list[Any] = [[{"role": "user", "content": [part, said]}] for part in parts]
    forms += [{"role": "user", "content": (image, said)}, ({"role": "user", "content": [image, said]},)]
    for form in forms:
        found = reader.read(form)
        assert found.ids == expected.ids
        assert np.array_equal(found.pixels_N3PP, expected.pixels_N3PP)  # type: ignore[arg-type]
    beside = reader.read([{"role": "user", "content": [{"type": "image"}, said]}], file)
    assert beside.ids == expected.ids
    assert reader.read("What?", file).ids == expected.ids


def test_a_written_placeholder_is_text_in_a_message_and_an_images_place_in_a_raw_prompt(
    reader: PromptReader, file: Path
) -> None:
    written = [{"role": "user", "content": "<|image|><|patch|> What?"}]
    assert reader.read(written).pixels_N3PP is None
    with pytest.raises(SessionError, match="0 images came with it"):
        reader.read(written, sanitize_control_tokens=False)
    with pytest.raises(SessionError, match="0 images came with it"):
        reader.read("<|image|>")
    assert reader.read("<|image|>", file).pixels_N3PP is not None


def test_bos_is_written_once(reader: PromptReader) -> None:
    bos = reader.text.special_id("bos_token")
    for prompt in ("Hi", "<|begin_of_text|>Hi", [{"role": "user", "content": "Hi"}], {"role": "user", "content": "Hi"}):
        assert reader.read(prompt).ids.count(bos) == 1
    assert reader.read("<|begin_of_text|>" * 2).ids.count(bos) == 2  # as it is written
    assert reader.read("<|begin_of_text|>Hi").ids == reader.read("Hi").ids
    said: dict[str, Any] = {"prompt": [{"role": "user", "content": "Hi"}], "chat_template": "{{ messages[0].content }}"}
    assert reader.read(**said).ids == reader.read("Hi").ids  # a folder with a processor, as `transformers`' own


def test_bos_is_the_templates_where_there_is_no_processor(tiny: Path) -> None:
    said: dict[str, Any] = {"prompt": [{"role": "user", "content": "Hi"}], "chat_template": "{{ messages[0].content }}"}
    assert PromptReader(Text(tiny), None).read(**said).ids == Text(tiny).encode("Hi", special_tokens=False)


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        (None, "the prompt is None, expected a text, messages, or one list of token ids"),
        (5, "the prompt is 5"),
        (b"text", "the prompt is b'text'"),
        ({"a": 1}, "the prompt is {'a': 1}"),
        ({1, 2}, "the prompt is {1, 2}"),
        ([1.5, 2], r"the prompt is float64 \[2\]"),
        ([True, False], r"the prompt is bool \[2\]"),
        ([[1, 2]], r"the prompt is int64 \[1, 2\]"),
        ([1, [2]], r"the prompt is \[1, \[2\]\]"),
        (["a", "b"], r"the prompt is \['a', 'b'\]"),
        ([10**30], "the prompt is"),
        ([1, {"role": "user"}], "the prompt is"),
        ([[{"role": "user", "content": "x"}]], "the prompt is"),
        ([{"content": "x"}], "the role of message 1 is None"),
        ({"role": "user", "content": {"type": "video"}}, "message 1 has the part"),
        ("\ud800", "not valid Unicode"),
    ],
    ids=str,
)
def test_prompts_that_are_none_are_named(reader: PromptReader, prompt: Any, said: str) -> None:
    with pytest.raises(SessionError, match=said):
        reader.read(prompt)


@pytest.mark.parametrize("images", [5, {"image": "x"}, {"x"}, object(), [5], [None], [[PIXELS]], iter([])])
def test_images_that_are_none_are_named(reader: PromptReader, images: Any) -> None:
    with pytest.raises(SessionError, match="give"):
        reader.read("What?", images)


LEAVES: Any = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.binary(max_size=5),
    st.sampled_from(["user", "text", "image", "image_url", "data:,x", "http://x", "<|image|>", "x" * 10_000]),
    st.sampled_from(
        [PIXELS, np.zeros(0, np.uint8), np.int64(3), Path("gone.png"), BytesIO(), object(), print, str, ...]
    ),
)
KEYS: Any = st.sampled_from(
    ["role", "content", "type", "text", "image", "url", "path", "tool_calls", "images", 5, None, ()]
)
JUNK: Any = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.tuples(inner, inner), st.dictionaries(KEYS, inner, max_size=4)
    ),
    max_leaves=8,
)
PART = st.fixed_dictionaries(
    {"type": st.sampled_from(["text", "image", "image_url", "video"])},
    optional=dict.fromkeys(("text", "image", "url", "path", "base64", "image_url"), JUNK),
)
MESSAGE = st.fixed_dictionaries(
    {"role": st.one_of(st.sampled_from(["user", "assistant", "tool", "system"]), JUNK)},
    optional={"content": st.one_of(JUNK, st.lists(PART, max_size=3)), "tool_calls": JUNK, "images": JUNK},
)
CHAT = ("tools", "documents", "chat_template", "chat_template_kwargs", "continue_final_message")
SETTINGS = st.fixed_dictionaries({}, optional=dict.fromkeys(CHAT, JUNK))
PROMPTS = st.one_of(JUNK, st.lists(MESSAGE, max_size=3), MESSAGE)


@settings(max_examples=250)
@given(prompt=PROMPTS, images=st.one_of(st.just(()), JUNK), chat=SETTINGS)
def test_whatever_is_given_is_taken_or_refused(reader: PromptReader, prompt: Any, images: Any, chat: Any) -> None:
    said = ""
    try:
        reader.read(prompt, images, **chat)
    except SessionError as error:
        said = str(error)
    assert len(said) < 700


@pytest.mark.parametrize(
    "beside",
    [drawn(40, 40), np.zeros((40, 40, 3), np.uint8), [b"image"], {}, "", 0],
    ids=["picture", "array", "list", "dict", "text", "number"],
)
def test_images_beside_a_message_s_content_are_refused(reader: PromptReader, beside: Any) -> None:
    with pytest.raises(SessionError, match="message 1 has images beside its content"):
        reader.read([{"role": "user", "content": "x", "images": beside}])


def test_a_message_may_say_that_nothing_is_beside_it(reader: PromptReader) -> None:
    for nothing in (None, [], ()):
        reader.read([{"role": "user", "content": "x", "images": nothing}])
