"""Images as they are meant to be seen: from a path, bytes, a PIL image or an array to upright RGB.

Enters: any colour mode, depth and orientation. Leaves: a PIL image of 8-bit RGB. Invariant: sizes are checked before
anything is decoded, so memory is bounded by a few times four bytes a pixel, of at most `MAX_PIXELS`.
"""

import os
import re
import stat
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from PIL.ImageFile import ImageFile

from ...errors import SessionError, shortened_text
from ...files.reading import open_regular
from .data_urls import MAX_BYTES, read_data_url, scheme_of

ImageSource = str | os.PathLike[str] | bytes | bytearray | Image.Image | NDArray[np.generic]
"""An image as a caller gives it: a path or a data URL, a file's bytes, a PIL image, or an array of its pixels."""

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "AVIF", "TIFF", "BMP", "PPM")
"""Formats that are decoded. Others of Pillow's are not pictures (PDF), or run other programs (EPS)."""

MAX_PIXELS = 1 << 27
"""The largest area: 134 megapixels, more than a medium-format camera's, and 0.5 GB decoded."""

MAX_SCANS, USUAL_SCANS = 100, 12
"""Scans of a JPEG at most, and of the largest: cameras write one, programs for the web about ten."""

LONGEST_START = 1 << 16
"""Bytes of a PPM before its pixels at most, comments among them; Pillow reads them one by one."""

COMMENT = re.compile(rb"#[^\r\n]*")

START_OF_SCAN = b"\xff\xda"

SLOW, MAX_SLOW = ("bmp_rle", "ppm", "ppm_plain"), 1 << 22
"""Pillow's decoders that are written in Python, and pixels at most that these are given: 3 s."""

WHOLE, MAX_WHOLE = ("WEBP", "AVIF"), 1 << 25
"""Formats that Pillow decodes in one piece, while no other thread of Python's runs, and pixels at most: 0.5 s."""

LARGE = 1 << 25
"""Pixels from which on images are decoded one after another, whoever asks for them: memory is bounded by one's."""

STRIP = 1 << 20
"""Pixels that are converted at once: Pillow lets no other thread of Python's run while it lays some modes over white
or takes them out of their colour space. 30 ms."""

MAX_SIDE = 65535
"""The largest side, a JPEG's. A resize keeps numbers for each pixel of a side, whatever the area."""

FILE_URL = re.compile(r"file:(//[^/]*)?", re.IGNORECASE)
"""The beginning of a file's address, up to its path."""


def read_image(source: ImageSource, name: str = "the image") -> Image.Image:
    """An image as upright RGB.

    EXIF orientation is applied, also a PIL image's own. Transparency is laid over white. A channel of 16 bits keeps its
    high byte. An animation gives a file's first frame, and a PIL image's current one.

    Args:
        source: Arrays are uint8 or uint16: [height, width], or with 1, 3 (RGB) or 4 (RGBA) channels last or else first.
        name: Name of an image that has no path, in errors.

    Raises:
        SessionError: There is no such file, it is no image or damaged, it is too large, elsewhere on a network,
            or the array is none of these.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's warnings are of things that are refused below, or harmless
        if isinstance(source, Image.Image):
            return _decode(source, name)
        if isinstance(source, np.ndarray):
            return _decode(_from_array(source, name), name)
        file = _file(source, name)
        if isinstance(file, Path):
            name = shortened_text(str(file))
        with _opened(file, name) as image:
            return _decode(image, name)


def _file(source: Any, name: str) -> Path | BytesIO:
    """The file that an image stands in: a path, or bytes as one."""
    if isinstance(source, bytes | bytearray):
        return BytesIO(source)
    if not isinstance(source, str | os.PathLike):
        raise SessionError(f"{name} is of type {type(source).__name__}: give a path, bytes, a PIL image or an array")
    scheme = scheme_of(source) if isinstance(source, str) else None
    if scheme == "data":
        return BytesIO(read_data_url(str(source), name))
    if scheme == "file":
        source = unquote(FILE_URL.sub("", str(source)))
    elif scheme is not None:
        raise SessionError(
            f"{name} is at {shortened_text(str(source), 100)}: nothing is fetched from a network, give a file's path, "
            "its bytes or a data: URL"
        )
    path = Path(os.fsdecode(source))
    _check_file(path, shortened_text(str(path)))
    return path


def _check_file(path: Path, name: str) -> None:
    try:
        found = path.stat()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise SessionError(f"{name}: cannot be read ({reason}): give the path of an image file") from error
    if not stat.S_ISREG(found.st_mode):
        raise SessionError(f"{name} is not a file: give the path of an image file")
    if found.st_size > MAX_BYTES:
        raise SessionError(f"{name}: {found.st_size} bytes, expected at most {MAX_BYTES}: scale it down")


@contextmanager
def _opened(file: Path | BytesIO, name: str) -> Iterator[Image.Image]:
    """Opens an image and reads its header."""
    Image.init()
    try:
        _check_start(file, name)
        image = Image.open(file, formats=[form for form in FORMATS if form in Image.OPEN])
    except UnidentifiedImageError as error:
        raise SessionError(f"{name}: not an image: give one of {', '.join(FORMATS)}") from error
    except SessionError:
        raise
    except Image.DecompressionBombError as error:
        raise SessionError(f"{name}: too large ({error}): scale it down to {MAX_PIXELS} pixels") from error
    except Exception as error:  # each format's reader fails in its own ways
        raise SessionError(f"{name}: cannot be read ({error}): give an intact image file") from error
    with image:
        _check_effort(image, name)
        yield image


def _check_start(file: Path | BytesIO, name: str) -> None:
    """Refuses a PPM whose pixels begin late.

    Raises:
        SessionError: It does.
    """
    if isinstance(file, BytesIO):
        start = file.read(LONGEST_START + 1)  # its buffer would be a copy of all of it
        file.seek(0)
    else:
        with open_regular(file) as opened:
            start = opened.read(LONGEST_START + 1)
    if start[:1] == b"P" and len(start) > LONGEST_START:
        words = len(COMMENT.sub(b"", start).split())
        if words < (3 if start[1:2] in b"14" else 4):
            raise SessionError(f"{name}: no pixels in its first {LONGEST_START} bytes: save it as a PNG")


def _check_effort(image: Image.Image, name: str) -> None:
    """Refuses what takes far longer to decode than others of its size.

    Raises:
        SessionError: It is a JPEG that draws each pixel again and again, or large and decoded by Python or in one
            piece.
    """
    pixels = image.width * image.height
    if pixels > MAX_WHOLE and image.format in WHOLE:
        raise SessionError(
            f"{name}: {image.width} × {image.height} pixels as {image.format}, which is decoded in one piece, expected "
            f"at most {MAX_WHOLE}: scale it down, or save it as a PNG"
        )
    decoders = {tile[0] for tile in getattr(image, "tile", ())}
    if pixels > MAX_SLOW and not decoders.isdisjoint(SLOW):
        raise SessionError(
            f"{name}: {image.width} × {image.height} pixels as {image.format} in a form that is read slowly, expected "
            f"at most {MAX_SLOW}: save it as a PNG"
        )
    if image.format not in ("JPEG", "MPO") or not isinstance(image, ImageFile) or image.fp is None:
        return
    at, scans, last = image.fp.tell(), 0, b""
    image.fp.seek(0)
    while block := image.fp.read(1 << 20):
        scans += (last + block).count(START_OF_SCAN)
        last = block[-1:]
    image.fp.seek(at)
    if scans > MAX_SCANS or (scans > USUAL_SCANS and scans * pixels > USUAL_SCANS * MAX_PIXELS):
        raise SessionError(
            f"{name}: {scans} scans of {image.width} × {image.height} pixels, expected at most {USUAL_SCANS} of large "
            f"pictures and {MAX_SCANS} of any: save it anew"
        )


def _decode(image: Image.Image, name: str) -> Image.Image:
    """Decodes an opened image, turns it upright, and makes it RGB."""
    width, height = image.size
    if not width or not height:
        raise SessionError(f"{name}: {width} × {height} pixels, expected at least one: give another image")
    if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
        raise SessionError(
            f"{name}: {width} × {height} pixels, expected at most {MAX_PIXELS} in all and {MAX_SIDE} a side: "
            "scale it down"
        )
    with _one_large if width * height > LARGE else nullcontext():
        return _upright(image, name)


_one_large = threading.Lock()
"""Held while a large image is decoded."""


def _upright(image: Image.Image, name: str) -> Image.Image:
    """Decodes an image whose size is known to be right."""
    try:
        image.load()
        if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
            image = ImageOps.exif_transpose(image)
        if image.mode == "F":
            raise SessionError(f"{name}: floating-point pixels, expected 8 or 16 bits a channel: convert it")
        if image.mode == "I" or image.mode.startswith("I;16"):
            image = _high_byte(image, name)
        is_clear = "A" in image.getbands() or image.info.get("transparency") is not None
        return _convert(image, is_clear) if is_clear or image.mode != "RGB" else image
    except SessionError:
        raise
    except Exception as error:  # each format's decoder fails in its own ways
        raise SessionError(f"{name}: damaged ({error}): give an intact image") from error


def _convert(image: Image.Image, is_clear: bool) -> Image.Image:
    """An image in RGB, over white where it is clear. It is taken in strips, between which other threads may run."""
    whole = Image.new("RGB", image.size)
    rows = max(1, STRIP // image.width)
    for top in range(0, image.height, rows):
        strip = image.crop((0, top, image.width, min(top + rows, image.height)))
        if is_clear:
            strip = strip.convert("RGBA")
            strip = Image.alpha_composite(Image.new("RGBA", strip.size, "white"), strip)
        whole.paste(strip.convert("RGB"), (0, top))
    return whole


def _high_byte(image: Image.Image, name: str) -> Image.Image:
    """A grey image of 16 bits in 8; Pillow does the same to 16-bit colour, but cuts grey off at 255."""
    pixels = np.asarray(image)
    if pixels.min() < 0 or pixels.max() > 0xFFFF:
        raise SessionError(f"{name}: values {pixels.min()} to {pixels.max()}, expected 16 bits at most: convert it")
    return Image.fromarray((pixels >> 8).astype(np.uint8))


def _from_array(pixels: NDArray[np.generic], name: str) -> Image.Image:
    shape, dtype = pixels.shape, pixels.dtype
    if pixels.size > 4 * MAX_PIXELS:
        raise SessionError(
            f"{name} is an array {list(shape)}, expected at most {MAX_PIXELS} pixels in all: scale it down"
        )
    if pixels.ndim == 3 and shape[2] not in (1, 3, 4) and shape[0] in (1, 3, 4):
        pixels = np.moveaxis(pixels, 0, 2)
    if (
        dtype not in (np.uint8, np.uint16)
        or pixels.ndim not in (2, 3)
        or pixels.shape[2:] not in ((), (1,), (3,), (4,))
    ):
        raise SessionError(
            f"{name} is an array {list(shape)} of {dtype}, expected uint8 or uint16 [height, width] with 1, 3 or 4 "
            "channels last or first: convert it"
        )
    if not pixels.size:
        raise SessionError(f"{name} is an array {list(shape)}, expected at least one pixel: give another image")
    if pixels.shape[2:] == (1,):
        pixels = pixels[:, :, 0]
    depth = 8 * (dtype.itemsize - 1)
    return Image.fromarray(np.ascontiguousarray(np.right_shift(pixels, depth), dtype=np.uint8))
