import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llama4_processor import Answer, Case, ask_processor
from pictures import drawn, photo
from transformers import AutoTokenizer

from arriero.errors import FolderError, SessionError
from arriero.runtime.images.placeholders import ImagePrompts, count_patches
from arriero.runtime.images.tiles import Grid
from arriero.runtime.text import Text

SMALL = {"size": {"height": 56, "width": 56}}
CASES = [
    Case([photo("sklearn")], prompt="<|image|>What is this?"),
    Case([drawn(300, 200)], prompt="Before <|image|> and\n\nafter"),
    Case([drawn(1000, 40), drawn(40, 40), drawn(56, 200)], SMALL, "<|image|><|image|> naïve 🦙 <|image|>"),
    Case([drawn(168, 112)] * 2, SMALL, "<|header_start|>user<|header_end|>\n\n<|image|>A<|image|>B<|eot|>"),
]


@pytest.fixture(scope="module")
def answered(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Answer]]:
    """A folder with a tokenizer for images and the processor's files, and what `transformers` makes of the cases."""
    folder = tmp_path_factory.mktemp("processor")
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    names = ("image", "patch", "image_start", "image_end", "tile_x_separator", "tile_y_separator")
    tokenizer.add_special_tokens({"additional_special_tokens": [f"<|{name}|>" for name in names]})
    tokenizer.save_pretrained(folder)
    return folder, ask_processor(CASES, folder)


@pytest.fixture
def folder(answered: tuple[Path, list[Answer]], tmp_path: Path) -> Path:
    """A copy of that folder with the settings of small tiles, free to be changed."""
    for path in answered[0].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(SMALL))
    (tmp_path / "processor_config.json").write_text(json.dumps({"patch_size": 14, "pixel_shuffle_ratio": 0.5}))
    return tmp_path


@pytest.mark.parametrize("number", range(len(CASES)))
def test_ids_are_those_of_transformers(answered: tuple[Path, list[Answer]], folder: Path, number: int) -> None:
    case, answer = CASES[number], answered[1][number]
    (folder / "preprocessor_config.json").write_text(json.dumps(case.settings))
    text = Text(folder)
    ids, tiles = ImagePrompts(text).prepare(text.encode(case.prompt), case.images)
    assert ids == answer.ids
    assert tiles.shape == np.concatenate(answer.pixels).shape
    patch = text.encode("<|patch|>", special_tokens=False)[0]
    assert ids.count(patch) == len(tiles) * count_patches(tiles.shape[-1])


def test_the_files_that_transformers_writes_are_read(answered: tuple[Path, list[Answer]]) -> None:
    folder, answers = answered
    assert "image_processor" in json.loads((folder / "processor_config.json").read_text())
    text = Text(folder)
    ids, _ = ImagePrompts(text).prepare(text.encode(CASES[-1].prompt), CASES[-1].images)
    assert ids == answers[-1].ids


def test_a_tile_of_scout_is_144_tokens_and_an_image_of_one_147(folder: Path) -> None:
    (folder / "preprocessor_config.json").write_text("{}")
    text = Text(folder)
    placeholder = text.encode("<|image|>", special_tokens=False)
    assert len(ImagePrompts(text).expand(placeholder, [Grid(1, 1)])) == 147
    assert count_patches(336) == 144
    assert count_patches(336, 14, 1.0) == 576


def test_a_prompt_without_images_stays_as_it_is(folder: Path) -> None:
    ids, tiles = ImagePrompts(Text(folder)).prepare([5, 6], [])
    assert ids == [5, 6]
    assert tiles.shape == (0, 3, 56, 56)


@pytest.mark.parametrize(("placeholders", "images"), [(0, 1), (1, 0), (1, 2), (3, 2)])
def test_images_and_placeholders_must_be_as_many(folder: Path, placeholders: int, images: int) -> None:
    text = Text(folder)
    message = f"the prompt has {placeholders} <|image|> and {images} images came with it: give one image for each"
    with pytest.raises(SessionError, match=re.escape(message)):
        ImagePrompts(text).prepare(text.encode("<|image|>" * placeholders), [b"never read"] * images)


def test_an_image_that_cannot_be_read_is_told_by_its_number(folder: Path) -> None:
    text = Text(folder)
    with pytest.raises(SessionError, match=r"^image 2: not an image"):
        ImagePrompts(text).prepare(text.encode("<|image|><|image|>"), [drawn(9, 9), b"text"])


def test_patches_written_in_a_prompt_are_refused(folder: Path) -> None:
    text = Text(folder)
    with pytest.raises(SessionError, match=r"has 2 <\|patch\|> of its own: write <\|image\|> where an image belongs"):
        ImagePrompts(text).prepare(text.encode("<|patch|>x<|patch|><|image|>"), [drawn(9, 9)])


def test_a_tokenizer_without_image_tokens_takes_no_images(tiny: Path, folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((tiny / name).read_bytes())
    with pytest.raises(SessionError, match=r"the tokenizer has no <\|image\|>, .* --tokenizer DIR"):
        ImagePrompts(Text(folder))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"patch_size": 57}, "patch_size is 57, expected a whole number from 1 to the tile's 56"),
        ({"patch_size": "14"}, "patch_size is '14', expected"),
        ({"pixel_shuffle_ratio": 0}, "pixel_shuffle_ratio is 0, expected more than 0 and at most 1"),
    ],
)
def test_patch_settings_out_of_range_are_refused(folder: Path, config: dict[str, Any], message: str) -> None:
    (folder / "processor_config.json").write_text(json.dumps(config))
    with pytest.raises(FolderError, match=rf"processor_config\.json: {message}.*: correct it$"):
        ImagePrompts(Text(folder))
