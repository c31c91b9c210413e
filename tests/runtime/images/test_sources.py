import os
import re
import threading
import time
import tracemalloc
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pictures import drawn, noise, photo_path
from PIL import Image, ImageOps

from arriero.errors import SessionError
from arriero.runtime.images import sources
from arriero.runtime.images.sources import MAX_BYTES, ImageSource, read_image

SCENE = drawn(60, 40)


def encoded(image: Image.Image, form: str, **options: Any) -> bytes:
    buffer = BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def same(read: Image.Image, expected: Image.Image) -> bool:
    return read.mode == "RGB" and np.array_equal(np.asarray(read), np.asarray(expected))


def test_paths_bytes_images_and_arrays_give_the_same(tmp_path: Path) -> None:
    path = tmp_path / "scene.png"
    path.write_bytes(encoded(SCENE, "PNG"))
    pixels = np.asarray(SCENE)
    deep = pixels.astype(np.uint16) << 8 | 99
    sources: list[ImageSource] = [path, str(path), path.read_bytes(), SCENE, Image.open(path), pixels, deep]
    sources += [pixels.transpose(2, 0, 1), pixels[::-1][::-1]]
    assert all(same(read_image(source), SCENE) for source in sources)


@pytest.mark.parametrize("form", ["BMP", "GIF", "PNG", "PPM", "TIFF", "WEBP"])
def test_each_format_is_read(form: str) -> None:
    scene = SCENE.quantize(32).convert("RGB") if form == "GIF" else SCENE
    assert same(read_image(encoded(scene, form, **({"lossless": True} if form == "WEBP" else {}))), scene)


@pytest.mark.parametrize("form", ["JPEG", "AVIF"])
def test_each_lossy_format_is_read_as_pillow_reads_it(form: str) -> None:
    data = encoded(SCENE, form)
    assert same(read_image(data), Image.open(BytesIO(data)))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photos_are_turned_upright(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned = encoded(SCENE, "PNG", exif=exif)
    expected = ImageOps.exif_transpose(Image.open(BytesIO(turned)))
    assert (orientation == 1) == same(SCENE, expected)
    assert expected.size == ((60, 40) if orientation < 5 else (40, 60))
    assert same(read_image(turned), expected)
    assert same(read_image(Image.open(BytesIO(turned))), expected)


def test_transparency_is_laid_over_white() -> None:
    alpha = Image.new("L", SCENE.size, 0)
    alpha.paste(255, (0, 0, 30, 40))
    clear = SCENE.copy()
    clear.putalpha(alpha)
    expected = Image.new("RGB", SCENE.size, "white")
    expected.paste(SCENE.crop((0, 0, 30, 40)), (0, 0))
    assert same(read_image(encoded(clear, "PNG")), expected)
    assert same(read_image(np.asarray(clear)), expected)
    half = read_image(Image.new("LA", (1, 1), (0, 128)))
    assert half.getpixel((0, 0)) == (127, 127, 127)


def test_a_transparent_colour_becomes_white() -> None:
    palette = Image.new("P", (2, 1), 0)
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    read = read_image(encoded(palette, "PNG", transparency=1))
    assert [read.getpixel((0, 0)), read.getpixel((1, 0))] == [(10, 20, 30), (255, 255, 255)]


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "HSV"])
def test_other_colour_modes_become_rgb_as_pillow_does_it(mode: str) -> None:
    image = SCENE.convert(mode)
    assert same(read_image(image), image.convert("RGB"))


def test_a_cmyk_photo_keeps_its_colours() -> None:
    data = encoded(SCENE.convert("CMYK"), "JPEG", quality=95, subsampling=0)
    assert np.abs(np.asarray(read_image(data), int) - np.asarray(SCENE, int)).mean() < 8


@pytest.mark.parametrize("form", ["PNG", "TIFF", "PPM"])
def test_16_bits_of_grey_keep_their_high_byte(form: str) -> None:
    grey = np.array([[0, 255, 256, 40000, 65535]], np.uint16)
    read = np.asarray(read_image(encoded(Image.fromarray(grey), form)))
    assert read[0].tolist() == [[level] * 3 for level in (0, 0, 1, 156, 255)]
    assert np.array_equal(np.asarray(read_image(grey)), read)


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG"])
def test_of_an_animation_the_first_frame_is_read(form: str) -> None:
    frames = [Image.new("RGB", (20, 10), colour) for colour in ("red", "lime", "blue")]
    data = encoded(
        frames[0], form, save_all=True, append_images=frames[1:], **({"lossless": True} if form == "WEBP" else {})
    )
    opened = Image.open(BytesIO(data))
    assert opened.n_frames == 3
    assert read_image(data).getpixel((3, 3)) == (255, 0, 0)
    opened.seek(2)
    assert read_image(opened).getpixel((3, 3)) == (0, 0, 255)


def test_a_file_that_is_no_image_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "notes.jpg"
    path.write_text("not a picture")
    with pytest.raises(SessionError, match=rf"^{re.escape(str(path))}: not an image: give one of JPEG, PNG, "):
        read_image(path)
    with pytest.raises(SessionError, match=r"^image 2: not an image: "):
        read_image(b"", "image 2")
    with pytest.raises(SessionError, match="not an image"):  # Pillow would run Ghostscript
        read_image(encoded(SCENE, "EPS"))


def test_a_path_without_a_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SessionError, match=r"gone\.png: cannot be read \(No such file or directory\): give the path"):
        read_image(tmp_path / "gone.png")
    with pytest.raises(SessionError, match=r"is not a file: give the path of an image file"):
        read_image(tmp_path)
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(SessionError, match=r"pipe\.png is not a file"):
        read_image(tmp_path / "pipe.png")


@pytest.mark.parametrize("kept", [0.02, 0.3, 0.9])
def test_a_truncated_photo_is_refused(kept: float) -> None:
    data = photo_path("sklearn").read_bytes()
    with pytest.raises(SessionError, match=r"^the image: (damaged|cannot be read|not an image).*: give [^\n]*$"):
        read_image(data[: int(len(data) * kept)])


def test_a_damaged_png_is_refused() -> None:
    data = bytearray(encoded(noise(64, 64), "PNG"))
    data[len(data) // 2] ^= 0xFF
    with pytest.raises(SessionError, match=r"^the image: damaged \(.*\): give an intact image$"):
        read_image(bytes(data))


@pytest.mark.parametrize("size", [(30000, 30000), (12000, 12000), (70000, 1)])
def test_an_image_that_is_too_large_is_refused_before_it_is_decoded(size: tuple[int, int]) -> None:
    bomb = bytearray(encoded(Image.new("1", (1, 1)), "PNG"))
    bomb[16:24] = size[0].to_bytes(4, "big") + size[1].to_bytes(4, "big")
    bomb[29:33] = zlib.crc32(bomb[12:29]).to_bytes(4, "big")
    with pytest.raises(
        SessionError, match=r"(too large|\d+ × \d+ pixels, expected at most \d+ in all).*: scale it down"
    ):
        read_image(bytes(bomb))


def test_a_file_that_is_too_large_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "big.bmp"
    with path.open("wb") as file:
        file.truncate(MAX_BYTES + 1)
    with pytest.raises(SessionError, match=r"big\.bmp: 1073741825 bytes, expected at most 1073741824: scale it down"):
        read_image(path)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (None, "image 3 is of type NoneType: give a path, bytes, a PIL image or an array"),
        (np.zeros((4, 4, 3), np.float32), r"image 3 is an array \[4, 4, 3\] of float32, expected uint8 or uint16"),
        (np.zeros((5, 4, 2), np.uint8), r"image 3 is an array \[5, 4, 2\] of uint8, expected"),
        (np.zeros((1, 4, 4, 3), np.uint8), r"image 3 is an array \[1, 4, 4, 3\] of uint8, expected"),
        (np.zeros((0, 4, 3), np.uint8), r"image 3 is an array \[0, 4, 3\], expected at least one pixel"),
        (Image.new("RGB", (0, 4)), "image 3: 0 × 4 pixels, expected at least one"),
        (Image.new("F", (4, 4)), "image 3: floating-point pixels, expected 8 or 16 bits a channel: convert it"),
        (Image.new("I", (4, 4), 70000), "image 3: values 70000 to 70000, expected 16 bits at most"),
    ],
)
def test_what_is_no_image_of_8_or_16_bits_is_refused(source: Any, message: str) -> None:
    with pytest.raises(SessionError, match=message):
        read_image(source, "image 3")


def scanned_again(width: int, height: int, times: int) -> bytes:
    """A progressive JPEG whose last scan is there many times."""
    data = encoded(Image.new("L", (width, height)), "JPEG", progressive=True)
    start = data.rindex(b"\xff\xda")
    return data[:start] + data[start:-2] * times + data[-2:]


PALETTE = bytes(range(256)) * 4
RLE = b"BM" + (1078).to_bytes(4, "little") + bytes(4) + (1078).to_bytes(4, "little") + (40).to_bytes(4, "little")
RLE += (3000).to_bytes(4, "little") * 2 + b"\1\0\x08\0\1" + bytes(23) + PALETTE


def plain(side: int, form: str, **options: Any) -> bytes:
    """A square of one colour in some bytes."""
    return encoded(Image.new("RGB", (side, side)), form, **options)


SLOW: dict[str, tuple[Callable[[], bytes], str]] = {
    "scans of a small JPEG": (lambda: scanned_again(16, 16, 200), r"20\d scans of 16 × 16 pixels, expected at most 12"),
    "scans of a large JPEG": (lambda: scanned_again(8000, 8000, 30), r"3\d scans of 8000 × 8000 pixels, expected"),
    "a long comment": (lambda: b"P6 #" + b"a" * 30_000_000 + b"\n1 1 255 abc", "no pixels in its first 65536 bytes"),
    "many comments": (lambda: b"P2\n" + b"#\n" * 9_000_000 + b"1 1 255 7", "no pixels in its first 65536 bytes"),
    "numbers as text": (lambda: b"P3 3000 3000 255 " + b"1 " * 27_000_000, "3000 × 3000 pixels as PPM in a form that"),
    "an odd depth": (lambda: b"P6 3000 3000 99 " + bytes(27_000_000), "3000 × 3000 pixels as PPM in a form that is"),
    "WebP of one colour": (lambda: plain(7000, "WEBP", lossless=True), "7000 × 7000 pixels as WEBP, which is decoded"),
    "AVIF of one colour": (lambda: plain(7000, "AVIF", speed=10), "7000 × 7000 pixels as AVIF, which is decoded"),
    "runs of one pixel": (lambda: RLE + b"\1\7" * 9_000_000, "3000 × 3000 pixels as BMP in a form that is read slowly"),
}


@pytest.mark.parametrize("name", SLOW)
def test_an_image_that_takes_far_longer_than_others_is_refused(name: str) -> None:
    make, said = SLOW[name]
    data = make()
    started = time.thread_time()
    with pytest.raises(SessionError, match=said):
        read_image(data)
    assert time.thread_time() - started < 3


def test_large_images_are_decoded_one_after_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "LARGE", 1000)
    at_once, most, load = [0], [0], Image.Image.load

    def slow_load(self: Image.Image) -> Any:
        at_once[0] += 1
        most[0] = max(most[0], at_once[0])
        time.sleep(0.05)
        at_once[0] -= 1
        return load(self)

    monkeypatch.setattr(Image.Image, "load", slow_load)
    for side, expected in ((40, 1), (10, 4)):
        most[0] = 0
        with ThreadPoolExecutor(4) as threads:
            list(threads.map(read_image, [Image.new("RGB", (side, side)) for _ in range(4)]))
        assert most[0] == expected


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "CMYK", "LAB", "P", "RGB", "L"])
def test_images_are_converted_in_strips_as_pillow_converts_them_whole(
    mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A strip of two rows and one of the row that is left; of modes without an alpha one colour is clear."""
    monkeypatch.setattr(sources, "STRIP", 150)
    image = Image.new("LAB", (60, 41), (90, 140, 60)) if mode == "LAB" else drawn(60, 41).convert(mode)
    if image.getbands()[-1] == "A":
        image.putalpha(Image.linear_gradient("L").resize(image.size))
    elif mode in ("P", "RGB", "L"):
        image.info["transparency"] = image.getpixel((0, 0))
    expected = image.convert("RGB")
    if image.has_transparency_data:
        clear = image.convert("RGBA")
        expected = Image.alpha_composite(Image.new("RGBA", clear.size, "white"), clear).convert("RGB")
        assert not same(image.convert("RGB"), expected)
    assert same(read_image(image), expected)


@pytest.mark.skipif(not hasattr(time, "pthread_getcpuclockid"), reason="times of threads are of Linux")
def test_other_threads_run_while_a_large_clear_image_is_read() -> None:
    """Processor time that the reading thread takes between two moments of another's."""
    clock, gaps, image = (
        time.pthread_getcpuclockid(threading.get_ident()),
        [0.0],
        Image.new("RGBA", (5000, 5000), (9, 9, 9, 99)),
    )
    has_ended = threading.Event()

    def watch() -> None:
        last = time.clock_gettime(clock)
        while not has_ended.wait(0.001):
            now = time.clock_gettime(clock)
            gaps.append(now - last)
            last = now

    watcher = threading.Thread(target=watch)
    watcher.start()
    read_image(image)
    has_ended.set()
    watcher.join()
    assert max(gaps) < 0.1


def test_bytes_of_an_image_are_not_copied() -> None:
    data = encoded(SCENE, "PPM") + bytes(1 << 24)
    tracemalloc.start()
    with sources._opened(BytesIO(data), "it"):
        assert tracemalloc.get_traced_memory()[1] < 1 << 22
    tracemalloc.stop()


def test_slow_forms_of_a_usual_size_are_read() -> None:
    scene = encoded(SCENE, "JPEG", progressive=True)
    assert same(read_image(scene), Image.open(BytesIO(scene)))
    text = b"P3 # by hand\n60 40\n255\n" + b" ".join(b"%d" % each for each in np.asarray(SCENE).reshape(-1))
    assert same(read_image(text), SCENE)


def test_an_array_that_is_too_large_is_not_copied() -> None:
    with pytest.raises(
        SessionError, match=r"is an array \[60000, 60000, 3\], expected at most 134217728 pixels in all"
    ):
        read_image(np.broadcast_to(np.uint8(1), (60000, 60000, 3)))
