"""Images in a prompt: placeholders become the tokens whose embeddings the image features replace.

Enters: a prompt's token ids with one `<|image|>` for each image. Leaves: the ids that the decoder is given, and the
tiles that the vision tower is given. Invariant: there are as many `<|patch|>` tokens as the tower will give features,
in the same order.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import FolderError, SessionError, shortened
from ...files.folders import read_json
from ..text import Text
from .sources import ImageSource, read_image
from .tiles import Grid, cut_tiles, read_tile_settings

IMAGE, PATCH = "<|image|>", "<|patch|>"
START, END = "<|image_start|>", "<|image_end|>"
NEXT_COLUMN, NEXT_ROW = "<|tile_x_separator|>", "<|tile_y_separator|>"


class ImagePrompts:
    """Puts images into prompts as a folder's preprocessor and tokenizer say.

    Args:
        text: The folder's tokenizer.

    Raises:
        SessionError: The folder's preprocessor or its tokenizer's image tokens are missing.
        FolderError: A file is damaged, or is not a Llama 4's.
    """

    def __init__(self, text: Text) -> None:
        self.folder = text.folder
        self.settings = read_tile_settings(text.folder)
        self.ids: dict[str, int] = {}
        for token in (IMAGE, PATCH, START, END, NEXT_COLUMN, NEXT_ROW):
            found = text.encode(token, special_tokens=False)
            if len(found) != 1:
                raise SessionError(
                    f"{text.folder}: the tokenizer has no {token}, so images cannot be put into prompts: export again "
                    "with --tokenizer DIR, a folder whose tokenizer has it, or give text only"
                )
            self.ids[token] = found[0]
        path = text.folder / "processor_config.json"
        config = {name: value for name, value in read_json(path).items() if value is not None}
        try:
            self.patches = count_patches(self.settings.side, **_patch_settings(config))
        except FolderError as error:
            raise FolderError(f"{path}: {error}: correct it") from error

    @property
    def patch_id(self) -> int:
        """Id of the token that stands for one image feature."""
        return self.ids[PATCH]

    def prepare(self, ids: Sequence[int], sources: Sequence[ImageSource]) -> tuple[list[int], NDArray[np.float32]]:
        """Reads a prompt's images and puts them into it.

        Args:
            ids: The prompt, with a placeholder for each image.
            sources: The images, in the order of their placeholders.

        Returns:
            The prompt's ids, and all images' tiles [N, 3, P, P] in float32.

        Raises:
            SessionError: An image cannot be read, or the placeholders are not as many.
        """
        self._check(ids, len(sources))
        side, most = self.settings.side, self.settings.max_tiles + 1
        pixels_N3PP = np.empty((most * len(sources), 3, side, side), np.float32)  # no memory until written
        used = 0
        grids = []
        for number, source in enumerate(sources, 1):
            _, grid = cut_tiles(read_image(source, f"image {number}"), self.settings, pixels_N3PP[used:])
            used += grid.tiles
            grids.append(grid)
        return self.expand(ids, grids), pixels_N3PP[:used]

    def expand(self, ids: Sequence[int], grids: Sequence[Grid]) -> list[int]:
        """Replaces each placeholder by the tokens of its image.

        Args:
            ids: The prompt, with a placeholder for each image.
            grids: The images' grids, in order.

        Raises:
            SessionError: The placeholders are not as many, or the prompt holds image patches of its own.
        """
        self._check(ids, len(grids))
        remaining = iter(grids)
        expanded: list[int] = []
        for token in ids:
            expanded += self._image(next(remaining)) if token == self.ids[IMAGE] else [token]
        return expanded

    def _check(self, ids: Sequence[int], images: int) -> None:
        placeholders, patches = ids.count(self.ids[IMAGE]), ids.count(self.ids[PATCH])
        if placeholders != images:
            raise SessionError(
                f"the prompt has {placeholders} {IMAGE} and {images} images came with it: give one image for each"
            )
        if patches:
            raise SessionError(f"the prompt has {patches} {PATCH} of its own: write {IMAGE} where an image belongs")

    def _image(self, grid: Grid) -> list[int]:
        """One image's tokens: its tiles row by row, then the global tile, or the only tile."""
        tile, ids = [self.ids[PATCH]] * self.patches, self.ids
        expanded = [ids[START]]
        if grid.tiles > 1:
            row = tile + [ids[NEXT_COLUMN], *tile] * (grid.columns - 1)
            expanded += [*row, ids[NEXT_ROW]] * grid.rows
        return [*expanded, ids[IMAGE], *tile, ids[END]]


def count_patches(side: int, patch_size: int = 14, pixel_shuffle_ratio: float = 0.5) -> int:
    """Counts a tile's tokens: its patches, of which pixel shuffle makes one of each few.

    Args:
        side: A tile's side, in pixels.
        patch_size: A patch's side, in pixels.
        pixel_shuffle_ratio: Side of the grid of patches after pixel shuffle, over the side before.

    Raises:
        FolderError: A number is out of range.
    """
    if type(patch_size) is not int or not 1 <= patch_size <= side:
        raise FolderError(f"patch_size is {shortened(patch_size)}, expected a whole number from 1 to the tile's {side}")
    if type(pixel_shuffle_ratio) not in (int, float) or not 0 < pixel_shuffle_ratio <= 1:
        raise FolderError(
            f"pixel_shuffle_ratio is {shortened(pixel_shuffle_ratio)}, expected more than 0 and at most 1"
        )
    return (side // patch_size) ** 2 // round(1 / pixel_shuffle_ratio**2)


def _patch_settings(config: dict[str, Any]) -> dict[str, Any]:
    return {name: config[name] for name in ("patch_size", "pixel_shuffle_ratio") if name in config}
