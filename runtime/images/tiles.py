"""Tiles: an image of any size as the squares that the vision tower reads.

Enters: an RGB image. Leaves: its tiles, row by row, and after several of them the whole image once more as one, the
global tile. Invariant: grid and sizes are those of `transformers`, and each pixel is within one step of 255 of its own:
its resize keeps weights of 16 bits, ours of float32.

Shapes: N tiles, P pixels a tile's side.
"""

import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ...errors import FolderError, SessionError, shortened
from ...files.folders import read_json
from ...plugins.narrow_types import narrow, widen
from .resampling import resample

FIXED = {"do_convert_rgb": True, "do_normalize": True, "do_rescale": True, "do_resize": True, "resample": 2}
"""Settings that have one value in Llama 4's preprocessors; a resample of 2 is bilinear."""

MOST_SIDE, MOST_PIXELS = 4096, 1 << 27
"""The largest side of a tile and number of tiles, and pixels of an image's tiles together; Llama 4's have 2^21."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TileSettings:
    """A checkpoint's settings of its preprocessor, which cuts images into tiles.

    Attributes:
        side: A tile's side in pixels (P).
        max_tiles: The most tiles in a grid, the global tile not counted.
        fill: Whether an image is enlarged as far as the grids allow, not just to a tile's side.
        rescale: Factor of a pixel of 0 to 255.
        mean: Means of the rescaled red, green and blue, subtracted from them.
        std: Standard deviations of the same, by which they are divided then.
        values_3x256: Values of a pixel of 0 to 255 in each channel.
        runs: Values of neighbouring pixels, looked up together; see `_runs`.
    """

    side: int = 336
    max_tiles: int = 16
    fill: bool = False
    rescale: float = 1 / 255
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    values_3x256: NDArray[np.float32] = field(init=False, repr=False, compare=False)
    runs: tuple[type, NDArray[np.generic]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if type(self.side) is not int or self.side < 1 or type(self.max_tiles) is not int or self.max_tiles < 1:
            found = f"tiles of side {shortened(self.side)}, at most {shortened(self.max_tiles)}"
            raise FolderError(f"{found}: expected whole numbers from 1 up")
        if max(self.side, self.max_tiles) > MOST_SIDE or (self.max_tiles + 1) * self.side**2 > MOST_PIXELS:
            found = f"tiles of side {shortened(self.side)}, at most {shortened(self.max_tiles)}"
            raise FolderError(f"{found}: more pixels than {MOST_PIXELS}, or a number above {MOST_SIDE}")
        numbers = (self.rescale, *self.mean, *self.std)
        if not all(type(number) in (int, float) and math.isfinite(number) for number in numbers) or 0 in self.std:
            raise FolderError(f"{self.numbers}: expected numbers, std not 0")
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            object.__setattr__(self, "values_3x256", self._values())
        if not np.isfinite(self.values_3x256).all():
            raise FolderError(f"{self.numbers}: pixels of them are no finite numbers")
        object.__setattr__(self, "runs", self._runs())

    @classmethod
    def of(cls, config: dict[str, Any]) -> Self:
        """Takes the settings of an image processor in `transformers`' words; a missing or null one is Llama 4's.

        Raises:
            FolderError: A setting is one that Llama 4 does not have.
        """
        config = {name: value for name, value in config.items() if value is not None}
        for name, expected in FIXED.items():
            if config.get(name, expected) != expected:
                raise FolderError(
                    f"{name} is {shortened(config[name])}, expected {shortened(expected)} as in Llama 4's own"
                )
        size = config.get("size", {"height": 336, "width": 336})
        if not isinstance(size, dict) or size.keys() != {"height", "width"} or size["height"] != size["width"]:
            raise FolderError(f"size is {shortened(size)}, expected one height and width")
        return cls(
            side=size["height"],
            max_tiles=config.get("max_patches", 16),
            fill=bool(config.get("resize_to_max_canvas", False)),
            rescale=config.get("rescale_factor", 1 / 255),
            mean=_three(config.get("image_mean", 0.5)),
            std=_three(config.get("image_std", 0.5)),
        )

    @property
    def numbers(self) -> str:
        """The numbers by which pixels are normalised, in words."""
        return ", ".join(f"{name} {shortened(getattr(self, name))}" for name in ("rescale", "mean", "std"))

    def _values(self) -> NDArray[np.float32]:
        """Values of a pixel of 0 to 255 in each channel; each step is rounded to bf16, as Llama 4's own is."""
        mean_3x1, std_3x1 = (_bfloat16(np.array([each], np.float32).T) for each in (self.mean, self.std))
        rescaled_256 = _bfloat16(np.arange(256, dtype=np.float32) * np.float32(self.rescale))
        return _bfloat16(_bfloat16(rescaled_256 - mean_3x1) / std_3x1)

    def _runs(self) -> tuple[type, NDArray[np.generic]]:
        """Values of neighbouring pixels by the number that their bytes make: two are looked up in the time of one.

        Returns:
            The numbers' type, and for each of them in each channel its values' bytes, again as one number. A side that
            is not even is looked up by single pixels.
        """
        indices, values = (np.uint8, np.uint32) if self.side % 2 else (np.uint16, np.uint64)
        pixels = np.arange(np.iinfo(indices).max + 1, dtype=indices)[:, None].view(np.uint8)
        return indices, np.take(self.values_3x256, pixels, axis=1).view(values)[:, :, 0]


def read_tile_settings(folder: Path) -> TileSettings:
    """Reads the settings by which a folder's preprocessor cuts images.

    The settings are a part of `processor_config.json`, or in `preprocessor_config.json`, where older checkpoints have
    them.

    Raises:
        SessionError: The folder has neither.
        FolderError: A file is damaged, or is not a Llama 4's.
    """
    path = folder / "processor_config.json"
    config = read_json(path).get("image_processor")
    if config is None:
        path = folder / "preprocessor_config.json"
        if not os.path.lexists(path):
            raise SessionError(
                f"{folder} has no processor_config.json or preprocessor_config.json, by which images are cut: export "
                "again with --tokenizer DIR, a folder that has it, or give text only"
            )
        config = read_json(path)
    try:
        if not isinstance(config, dict):
            raise FolderError(f"image_processor is {shortened(config)}, expected an object")
        return TileSettings.of(config)
    except FolderError as error:
        raise FolderError(f"{path}: {error}: correct it") from error


@dataclass(frozen=True, slots=True)
class Grid:
    """Rows and columns of tiles."""

    rows: int
    columns: int

    @property
    def tiles(self) -> int:
        """Number of tiles (N), with the global tile that several have."""
        return self.rows * self.columns + (self.rows * self.columns > 1)


def choose_grid(height: int, width: int, settings: TileSettings) -> Grid:
    """Chooses the grid that suits an image.

    This is the grid that enlarges it least (most, to fill) among those that hold it at its size or larger; where none
    does, the one that reduces it least; of equals, the smallest. Scales are compared in float32, as in `transformers`.
    """
    most = settings.max_tiles
    grids = [Grid(rows, columns) for rows in range(1, most + 1) for columns in range(1, most // rows + 1)]
    sides = np.array([(grid.rows, grid.columns) for grid in grids], np.float32) * settings.side
    scales = (sides / np.array([height, width], np.float32)).min(axis=1)
    larger = scales[scales >= 1]
    scale = larger.min() if larger.size and not settings.fill else scales.max()
    suited = [grid for grid, each in zip(grids, scales, strict=True) if each == scale]
    return min(suited, key=lambda grid: grid.tiles)


def fit_size(height: int, width: int, grid: Grid, settings: TileSettings) -> tuple[int, int]:
    """Computes height and width at which an image lies in its grid, from the upper left; its aspect is kept.

    The scale is a float32 where the grid limits a side and a float64 where the image does, as it comes about in
    `transformers`; the floor would make a pixel's difference of that.
    """

    def limit(pixels: int, tiles: int) -> float | np.float32:
        canvas, wanted = tiles * settings.side, max(pixels, settings.side)
        return np.float32(canvas) if settings.fill or canvas < wanted else float(wanted)

    most_high, most_wide = limit(height, grid.rows), limit(width, grid.columns)
    by_height, by_width = most_high / height, most_wide / width
    if by_width < by_height:
        return max(1, min(math.floor(height * by_width), int(most_high))), int(most_wide)
    return int(most_high), max(1, min(math.floor(width * by_height), int(most_wide)))


def cut_tiles(
    image: Image.Image, settings: TileSettings, room: NDArray[np.float32] | None = None
) -> tuple[NDArray[np.float32], Grid]:
    """Cuts an image into normalised tiles.

    Args:
        image: An image of mode RGB.
        settings: The preprocessor's settings.
        room: An array that takes the tiles, of their shape or with more of them; None is new memory.

    Returns:
        The tiles [N, 3, P, P], whose values are bf16's, black where the image does not fill the grid; and the grid.
    """
    side = settings.side
    grid = choose_grid(image.height, image.width, settings)
    height, width = fit_size(image.height, image.width, grid, settings)
    canvas = np.zeros((grid.rows * side, 3, grid.columns * side), np.uint8)
    globe = [np.empty((side, 3, side), np.uint8)] if grid.tiles > 1 else []
    resample(image, [canvas[:height, :, :width], *globe])
    corners = [(side * row, side * column) for row in range(grid.rows) for column in range(grid.columns)]
    tiles = [canvas[top : top + side, :, left : left + side] for top, left in corners] + globe
    pixels_N3PP = np.empty((len(tiles), 3, side, side), np.float32) if room is None else room[: len(tiles)]
    indices, values_3V = settings.runs
    for pixels_3PP, tile_P3P in zip(pixels_N3PP, tiles, strict=True):
        for pixels_PP, values_V, tile_PP in zip(pixels_3PP, values_3V, tile_P3P.transpose(1, 0, 2), strict=True):
            np.take(values_V, tile_PP.view(indices), out=pixels_PP.view(values_V.dtype), mode="wrap")
    return pixels_N3PP, grid


def _bfloat16(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """Rounds to the nearest bf16, ties to even."""
    return widen(narrow(x, "bfloat16"), "bfloat16")


def _three(value: Any) -> tuple[float, float, float]:
    """One number for each channel; a config may give one for all."""
    values = value if isinstance(value, list) else [value] * 3
    if len(values) != 3:
        raise FolderError(f"image_mean or image_std is {shortened(value)}, expected three numbers")
    return values[0], values[1], values[2]
