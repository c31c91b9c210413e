import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llama4_processor import Case, ask_processor, ask_sizes
from pictures import drawn, noise, photo
from PIL import Image

from arriero.errors import FolderError, SessionError
from arriero.runtime.images.tiles import TileSettings, choose_grid, cut_tiles, fit_size, read_tile_settings

PUBLISHED = {
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "image_processor_type": "Llama4ImageProcessorFast",
    "input_data_format": None,
    "max_patches": 16,
    "resample": 2,
    "rescale_factor": 1 / 255,
    "resize_to_max_canvas": False,
    "size": {"height": 336, "width": 336},
}


def test_grids_and_sizes_are_those_of_transformers() -> None:
    rng = random.Random(0)
    sizes = [(rng.randint(1, 2500), rng.randint(1, 2500)) for _ in range(200)]
    sizes += [(int(2 ** rng.uniform(0, 15.5)), int(2 ** rng.uniform(0, 15.5))) for _ in range(200)]
    sizes += [(336 * rows + rng.randint(-1, 1), 336 * columns) for rows in range(1, 18) for columns in range(1, 18)]
    settings: list[dict[str, Any]] = [{}, {"resize_to_max_canvas": True}, {"max_patches": 5}]
    for each, answers in zip(settings, ask_sizes(sizes, settings), strict=True):
        ours = TileSettings.of(each)
        for (height, width), (grid, size) in zip(sizes, answers, strict=True):
            found = choose_grid(height, width, ours)
            assert (found.rows, found.columns) == grid, (height, width)
            assert fit_size(height, width, found, ours) == size, (height, width)


def test_tiles_are_those_of_transformers_to_a_step_of_the_resize(tiny: Path, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((tiny / name).read_bytes())
    china, hopper = photo("sklearn"), photo("matplotlib")
    pictures = [
        *(china, hopper, china.crop((0, 0, 640, 90)), hopper.crop((0, 0, 40, 600)), china.resize((1500, 1000))),
        *(drawn(1, 1), drawn(336, 336), drawn(50, 20), drawn(335, 673), drawn(30000, 1), drawn(1200, 1600)),
        *(noise(337, 336), noise(900, 250), noise(100, 1000)),
    ]
    odd = {"size": {"height": 112, "width": 112}, "max_patches": 7, "image_mean": [0.48, 0.45, 0.4]}
    odd |= {"image_std": [0.26, 0.27, 0.3], "resize_to_max_canvas": True}
    cases = [Case([each], settings) for settings in ({}, odd) for each in pictures]
    for case, answer in zip(cases, ask_processor(cases, tmp_path), strict=True):
        ours, picture = TileSettings.of(case.settings), case.images[0]
        tiles, grid = cut_tiles(picture, ours)
        assert (grid.rows, grid.columns) == answer.grids[0]
        assert tiles.shape == answer.pixels[0].shape == (grid.tiles, 3, ours.side, ours.side)
        for channel, values_256 in enumerate(ours.values_3x256):
            found, expected = tiles[:, channel], answer.pixels[0][:, channel]
            assert np.isin(expected, values_256).all()  # normalised bit for bit
            lowest = values_256[np.maximum(np.searchsorted(values_256, expected) - 1, 0)]
            highest = values_256[np.minimum(np.searchsorted(values_256, expected, "right"), 255)]
            assert ((lowest <= found) & (found <= highest)).all(), picture.size
            assert (found != expected).mean() < 0.01, picture.size


def test_an_image_that_does_not_fill_its_grid_is_black_beyond() -> None:
    tiles, grid = cut_tiles(Image.new("RGB", (336, 400), "white"), TileSettings())
    assert (grid.rows, grid.columns, grid.tiles) == (2, 1, 3)
    assert (tiles[0] == 1).all()
    assert (tiles[1, :, :64] == 1).all()
    assert (tiles[1, :, 64:] == -1).all()
    assert (tiles[2] == 1).all()


@pytest.mark.parametrize("side", [34, 35])
def test_pixels_of_even_and_odd_sides_are_normalised(side: int) -> None:
    settings = TileSettings(side=side, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
    picture = noise(side, side)
    room = np.full((2, 3, side, side), 7, np.float32)
    tiles, grid = cut_tiles(picture, settings, room)
    assert grid.tiles == len(tiles) == 1
    assert np.shares_memory(tiles, room)
    assert (room[1] == 7).all()
    for channel, values_256 in enumerate(settings.values_3x256):
        assert np.array_equal(tiles[0, channel], values_256[np.asarray(picture)[:, :, channel]])


@pytest.mark.parametrize("nested", [False, True])
def test_settings_come_from_either_file(tmp_path: Path, nested: bool) -> None:
    config = {**PUBLISHED, "size": {"height": 28, "width": 28}, "max_patches": 4}
    if nested:
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(PUBLISHED))
        (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": config}))
    else:
        (tmp_path / "processor_config.json").write_text(json.dumps({"patch_size": 14}))
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
    assert read_tile_settings(tmp_path) == TileSettings(side=28, max_tiles=4)


def test_a_folder_without_settings_takes_no_images(tmp_path: Path) -> None:
    with pytest.raises(SessionError, match=r"has no processor_config.json or prep.* --tokenizer DIR"):
        read_tile_settings(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"do_resize": False}, "do_resize is False, expected True"),
        ({"resample": 3}, "resample is 3, expected 2"),
        ({"size": {"shortest_edge": 336}}, r"size is {'shortest_edge': 336}, expected one height and width"),
        ({"size": {"height": 336, "width": 224}}, "expected one height and width"),
        ({"size": {"height": 0, "width": 0}}, "tiles of side 0, at most 16: expected whole numbers from 1 up"),
        ({"max_patches": "16"}, "at most '16': expected whole numbers"),
        ({"image_mean": [0.5, 0.5]}, r"image_mean or image_std is \[0.5, 0.5\], expected three numbers"),
        ({"image_std": 0}, r"std \(0, 0, 0\): expected numbers, std not 0"),
        ({"image_std": "a" * 5000}, r"std \('a{50,60}…: expected numbers"),
        ({"size": {"height": "a" * 5000, "width": "a" * 5000}}, r"tiles of side 'a{50,60}…, at most 16: expected"),
        ({"size": {"height": "a" * 5000, "width": 1}}, r"size is {'height': 'a{20,60}.*…, expected one height"),
        (
            {"size": {"height": 10**9, "width": 10**9}},
            "tiles of side 1000000000, at most 16: more pixels than",
        ),
        ({"max_patches": 10**9}, "at most 1000000000: more pixels than 134217728, or a number above 4096"),
        ({"size": {"height": 4000, "width": 4000}}, "tiles of side 4000, at most 16: more pixels than 134217728"),
        ({"rescale_factor": 1e39}, r"rescale 1e\+39, mean .*: pixels of them are no finite numbers"),
        ({"image_mean": [1e300, 0, 0]}, r"mean \(1e\+300, 0, 0\), std .*: pixels of them are no finite numbers"),
        ({"image_std": 1e-300}, "pixels of them are no finite numbers"),
        ({"rescale_factor": 10**39}, "pixels of them are no finite numbers"),
        ({"resample": ["a" * 5000]}, r"resample is \['a{20,60}.*…, expected 2"),
        ({"rescale_factor": None, "image_mean": "grey"}, r"mean \('grey', 'grey', 'grey'\)"),
    ],
)
def test_settings_that_are_not_llama_4s_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**PUBLISHED, **change}))
    with pytest.raises(FolderError, match=rf"preprocessor_config.json: .*{message}.*: correct it$"):
        read_tile_settings(tmp_path)
