import base64
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from pictures import drawn

from arriero.errors import SessionError
from arriero.runtime.images.sources import read_image

SCENE = drawn(30, 20)


def png() -> bytes:
    buffer = BytesIO()
    SCENE.save(buffer, "PNG")
    return buffer.getvalue()


PACKED = base64.b64encode(png()).decode()


@pytest.mark.parametrize(
    "url",
    [
        f"data:image/png;base64,{PACKED}",
        f"DATA:image/png;charset=utf-8;BASE64,{PACKED}",
        f"data:;base64,{PACKED.rstrip('=')}",
        f"data:image/png;base64,{base64.urlsafe_b64encode(png()).decode()}",
        f"data:image/png;base64,{PACKED.replace('+', '%2B').replace('/', '%2F').replace('=', '%3D')}",
        "data:image/png;base64," + "\n".join(PACKED[at : at + 76] for at in range(0, len(PACKED), 76)),
        "data:image/png," + "".join(f"%{byte:02x}" for byte in png()),
    ],
    ids=[*map(str, range(7))],
)
def test_a_data_url_is_its_image(url: str) -> None:
    assert np.array_equal(np.asarray(read_image(url)), np.asarray(SCENE))


def test_files_have_addresses_as_well(tmp_path: Path) -> None:
    path = tmp_path / "a scene: 1%.png"
    path.write_bytes(png())
    for source in (path, str(path), path.as_uri(), bytearray(png())):
        assert np.array_equal(np.asarray(read_image(source)), np.asarray(SCENE))


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("data:image/png;base64,", "holds no data: give data:image/png;base64"),
        ("data:image/png", "holds no data"),
        ("data:image/png;base64,@@@@", "is damaged base64"),
        ("data:image/png;base64,éé", "is damaged base64"),
        (f"data:image/png;base64,{PACKED[:40]}", "the image: "),
        ("data:image/png;base64," + "A" * 100_000, "not an image"),
        ("data:image/png,\ud800", "is damaged"),
        ("data:text/plain,hello", "not an image"),
        ("http://example.org/a.png", "nothing is fetched from a network, give a file's path, its bytes or a data: URL"),
        ("HTTPS://example.org/" + "a" * 10_000, "nothing is fetched from a network"),
        ("s3://bucket/a.png", "nothing is fetched from a network"),
        ("file:///gone.png", "/gone.png: cannot be read"),
        ("file://[", "is not a file"),
        ("a" * 100_000, "cannot be read"),
        ("iVBORw0KGgo" * 1000, "cannot be read"),
        ("", "is not a file"),
        ("\0", "cannot be read"),
    ],
    ids=[*map(str, range(17))],
)
def test_addresses_of_no_image_are_one_short_line(source: str, said: str) -> None:
    with pytest.raises(SessionError) as caught:
        read_image(source)
    assert said in str(caught.value)
    assert len(str(caught.value)) < 500
    assert "\n" not in str(caught.value)
