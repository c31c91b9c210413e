import numpy as np
import pytest
from numpy.typing import NDArray
from pictures import drawn, noise, photo
from PIL import Image

from arriero.runtime.images.resampling import resample

BILINEAR = Image.Resampling.BILINEAR


def resampled(image: Image.Image, height: int, width: int) -> NDArray[np.uint8]:
    """[height, width, 3], as Pillow has it."""
    pixels = np.full((height, 3, width), 77, np.uint8)
    resample(image, [pixels])
    return pixels.transpose(0, 2, 1)


@pytest.mark.parametrize(
    ("image", "height", "width"),
    [
        (photo("sklearn"), 336, 336),
        (photo("sklearn"), 426, 639),
        (photo("sklearn"), 427, 336),
        (photo("sklearn"), 214, 640),
        (photo("sklearn"), 901, 700),
        (photo("matplotlib"), 5, 3),
        (drawn(700, 1000), 333, 1001),
        (noise(17, 700), 703, 15),
        (noise(5000, 3), 1, 1),
        (noise(1, 1), 20, 40),
    ],
)
def test_other_sizes_are_pillows_columns_first(image: Image.Image, height: int, width: int) -> None:
    expected = np.asarray(image.resize((width, image.height), BILINEAR).resize((width, height), BILINEAR))
    apart = np.abs(resampled(image, height, width).astype(int) - expected)
    assert apart.max() <= 1
    assert (apart > 0).mean() < 0.01


def test_an_image_of_the_same_size_is_not_touched() -> None:
    image = photo("sklearn")
    assert np.array_equal(resampled(image, image.height, image.width), np.asarray(image))


def test_several_sizes_are_those_of_each_alone() -> None:
    image = drawn(500, 400)
    sizes = [(400, 500), (100, 90), (400, 30)]
    together = [np.zeros((height, 3, width), np.uint8) for height, width in sizes]
    resample(image, together)
    for pixels, (height, width) in zip(together, sizes, strict=True):
        assert np.array_equal(pixels.transpose(0, 2, 1), resampled(image, height, width))


def test_only_the_place_given_is_written() -> None:
    canvas = np.full((60, 3, 60), 9, np.uint8)
    resample(Image.new("RGB", (200, 100), (1, 2, 3)), [canvas[:20, :, :40]])
    assert (canvas[:20, :, :40] == np.array([1, 2, 3])[:, None]).all()
    assert (canvas[20:] == 9).all()
    assert (canvas[:, :, 40:] == 9).all()


def test_halves_are_rounded_up() -> None:
    image = Image.fromarray(np.array([[[4] * 3, [5] * 3]], np.uint8))
    assert resampled(image, 1, 1).tolist() == [[[5, 5, 5]]]
