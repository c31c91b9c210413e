"""Pictures for the tests: two photographs that libraries bring along, drawn scenes, and noise."""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

PHOTOS = {"matplotlib": "mpl-data/sample_data/grace_hopper.jpg", "sklearn": "datasets/images/china.jpg"}


def photo(library: str) -> Image.Image:
    return Image.open(photo_path(library)).convert("RGB")


def photo_path(library: str) -> Path:
    spec = find_spec(library)
    return Path(str(spec and spec.origin)).parent / PHOTOS[library]


def drawn(width: int, height: int) -> Image.Image:
    """Hard edges and thin lines on a plain ground, and nothing that is the same mirrored or turned."""
    image = Image.new("RGB", (width, height), (250, 240, 20))
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 0, width // 3, height // 4), fill=(200, 0, 30))
    draw.ellipse((width // 2, height // 3, width - 1, height - 1), fill=(0, 60, 220))
    for step in range(0, width, 7):
        draw.line((step, 0, width - 1, step), fill=(0, 0, 0))
    return image


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(width * height).integers(0, 256, (height, width, 3), dtype=np.uint8))
