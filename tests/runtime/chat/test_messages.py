import dataclasses
import enum
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from arriero.errors import SessionError
from arriero.runtime.chat.messages import read_messages, with_images_beside

PNG = "data:image/png;base64,iVBORw0KGgo="
PIXELS = np.zeros((1, 1, 3), np.uint8)


class Role(enum.StrEnum):
    USER = "user"


@dataclasses.dataclass
class Said:
    role: str
    content: str
    tool_calls: Any = None


class Dumped(SimpleNamespace):
    def model_dump(self) -> dict[str, Any]:
        return vars(self)


@pytest.mark.parametrize(
    ("given", "turns"),
    [
        ({"role": "user", "content": "x"}, [{"role": "user", "content": "x"}]),
        (({"role": "user", "content": "x"},), [{"role": "user", "content": "x"}]),
        ([Said("user", "x")], [{"role": "user", "content": "x"}]),
        ([Dumped(role=Role.USER, content="x", name=None)], [{"role": "user", "content": "x"}]),
        (
            [
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [Dumped(function=Dumped(name="f", arguments={"a": 1}))],
                }
            ],
            [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}]}],
        ),
        ([{"role": "user", "tool_calls": None}], [{"role": "user"}]),
        ([{"role": "tool", "content": {"a": (1, np.float32(0.5))}}], [{"role": "tool", "content": {"a": [1, 0.5]}}]),
        (
            [{"role": "user", "content": {"type": "text", "text": "x"}}],
            [{"role": "user", "content": [{"type": "text", "text": "x"}]}],
        ),
    ],
    ids=str,
)
def test_messages_become_plain_data(given: Any, turns: list[dict[str, Any]]) -> None:
    found, images = read_messages(given)
    assert found == turns
    assert not images
    assert type(found[0]["role"]) is str


@pytest.mark.parametrize(
    ("part", "image"),
    [
        ({"type": "image", "image": PIXELS}, PIXELS),
        ({"type": "image", "path": "a.png"}, "a.png"),
        ({"type": "image", "url": PNG}, PNG),
        ({"type": "image", "base64": "iVBORw0KGgo="}, b"\x89PNG\r\n\x1a\n"),
        ({"type": "image_url", "image_url": {"url": PNG, "detail": "low"}}, PNG),
        ({"type": "image_url", "image_url": "a.png"}, "a.png"),
        ({"type": "image"}, None),
        (Dumped(type="image", path="a.png", image=None), "a.png"),
    ],
    ids=str,
)
@pytest.mark.parametrize("of", [list, tuple])
def test_a_part_gives_its_image_and_keeps_its_place(part: Any, image: Any, of: type) -> None:
    (turn,), images = read_messages([{"role": "user", "content": of([part, {"type": "text", "text": "x"}])}])
    assert len(images) == 1
    assert images[0] is image or images[0] == image
    assert [each["type"] for each in turn["content"]] == ["image", "text"]


def test_images_beside_messages_go_where_parts_have_none() -> None:
    parts = [{"type": "image"}, {"type": "image", "path": "b"}, {"type": "image"}]
    _, images = read_messages([{"role": "user", "content": parts}])
    assert with_images_beside(images, ["a", "c"]) == ["a", "b", "c"]
    with pytest.raises(
        SessionError, match=r'2 parts {"type": "image"} without an image, and 1 images came beside them'
    ):
        with_images_beside(images, ["a"])


endless: list[Any] = []
endless.append(endless)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([], "no messages"),
        ("text", "message 1 is 'text', expected a dictionary with role and content"),
        ([{"role": "user", "content": "x"}, 5], "message 2 is 5"),
        ([{"content": "x"}], "the role of message 1 is None, expected a text"),
        ([{"role": 5, "content": "x"}], "the role of message 1 is 5"),
        ([{"role": "user", "content": 5}], "the content of message 1 is 5, expected a text or a list of parts"),
        ([{"role": "user", "content": {"a": 1}}], "the content of message 1 is {'a': 1}"),
        ([{"role": "user", "content": ["x"]}], "message 1 has the part 'x', expected a type of 'text'"),
        ([{"role": "user", "content": [{"type": "text"}]}], "message 1 has the part"),
        ([{"role": "user", "content": [{"type": "text", "text": 5}]}], "message 1 has the part"),
        ([{"role": "user", "content": [{"type": "video", "path": "x"}]}], "message 1 has the part"),
        ([{"role": "user", "content": [{"type": "image", "path": "x", "url": "y"}]}], "message 1 has the part"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "message 1 has the part"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": 5}}]}], "whose image_url is"),
        ([{"role": "user", "content": [{"type": "image", "url": 5}]}], "whose url is 5, expected a data URL or a path"),
        ([{"role": "user", "content": "x", "images": ["a"]}], "message 1 has images beside its content"),
        ([{"role": "tool", "content": {"a": PIXELS}}], "message 1 holds array.*, of type ndarray"),
        ([{"role": "tool", "content": endless}], "message 1 has lists within lists"),
        ([{"role": "tool", "content": {(): 1}}], "message 1 holds .*of type tuple"),
        ([{"role": "user", "content": "x", "at": object()}], "message 1 holds <object object"),
        ([Dumped], "message 1 is <class"),
        ([{"role": "user", "content": [{"type": "x" * 10_000}]}], "message 1 has the part"),
        ([{"role": "user", "content": list(range(10_000))}], "message 1 has the part 0"),
    ],
    ids=[*map(str, range(23))],
)
def test_messages_that_are_none_are_named(given: Any, said: str) -> None:
    with pytest.raises(SessionError, match=said) as caught:
        read_messages(given)
    assert len(str(caught.value)) < 400
