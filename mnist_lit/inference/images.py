"""Read an image of a digit from any file and normalize it to the form of MNIST's images.

Imports only Pillow, NumPy and SciPy, so that worker processes start quickly.
"""

import importlib
import io
import os
import stat
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageChops, ImageOps, ImageStat, UnidentifiedImageError

from mnist_lit.inference.digit import to_mnist
from mnist_lit.inference.ink import SIDE, ImageError
from mnist_lit.storage.tables import one_line

FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP", "GIF", "AVIF", "JPEG2000")  # MPO is a JPEG
EXTENSIONS = (
    *(".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".bmp", ".dib", ".tif", ".tiff", ".webp", ".gif", ".avif"),
    *(".jp2", ".j2k", ".jpx", ".heic", ".heif"),
)
HEIC = (b"ftypheic", b"ftypheix", b"ftyphevc", b"ftypmif1", b"ftypmsf1")  # how the content of such a file begins
MAX_PIXELS = 80_000_000  # four times a phone camera's resolution; up to 1.7 GB while one is read
MAX_BYTES = 2**26  # of a file: 20 million uncompressed pixels in colour
MAX_SCANS = 50  # of a progressive JPEG with as many pixels as allowed; cameras and editors write ten

MAX_VALUES = (1.0, 255.0, 65535.0)  # of floats, bytes and 16-bit numbers
WORKING_SIDE = 256  # larger images are first reduced, by an integer factor, to about the area of this square
MAX_WORKING_SIDE = 8 * WORKING_SIDE  # narrow ones are reduced until their longer side is below twice this


def prepare(file: str | Path | BinaryIO, preprocess: str = "mnist", refuse: bool = True) -> np.ndarray:
    """Read ``file`` as input for the network: uint8 [28, 28], light on dark.

    Args:
        preprocess: ``mnist`` normalizes the image with ``to_mnist``; ``none`` uses its 28x28 pixels unchanged.
        refuse: For ``to_mnist``.

    Raises:
        ImageError: The image cannot be read or shows no digit, or with ``none`` is not 28x28.
    """
    return normalized(read_grey(file), preprocess, refuse)


def normalized(grey: np.ndarray, preprocess: str = "mnist", refuse: bool = True) -> np.ndarray:
    """``prepare`` for an image that has been read: float32 [H, W], 0..255."""
    if preprocess == "mnist":
        return to_mnist(grey, refuse)
    if grey.shape != (SIDE, SIDE):
        raise ImageError(f"has {grey.shape[1]}x{grey.shape[0]} pixels, but preprocess=none requires {SIDE}x{SIDE}")
    return grey.round().astype(np.uint8)


def read_grey(
    file: str | Path | BinaryIO, formats: tuple[str, ...] = FORMATS, max_pixels: int = MAX_PIXELS
) -> np.ndarray:
    """Read an image as grey values 0..255, float32 [H, W], upright and reduced in size if it is large.

    Transparent pixels become the paper: dark if the ink is light, otherwise light. If the colours contrast far more
    than their lightness does, as with red ink on green paper, the channel with the most contrast is used.

    Raises:
        ImageError: The file does not exist, has none of the ``formats``, is damaged, animated or too large.
    """
    try:
        content = _content(file)
        is_heic = content[4:12] in HEIC and b"avif" not in content[16:64]  # among the kinds that it says it is, too
        if is_heic and formats is FORMATS:
            formats = (*formats, _registered_heif())
        with Image.open(io.BytesIO(content), formats=formats) as image:
            _check_size(image, content, max_pixels)
            image.draft(None, (2 * WORKING_SIDE, 2 * WORKING_SIDE))  # JPEG: decode at down to 1/8 scale
            image.load()
            return reduced_grey(_upright(image))
    except UnidentifiedImageError as error:
        raise ImageError(f"is not an image in {', '.join(formats[:-1])} or {formats[-1]} format") from error
    except Image.DecompressionBombError as error:
        raise ImageError(f"has more than {max_pixels:,} pixels") from error
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise ImageError(f"cannot be read ({error.strerror})") from error
    except ImageError:
        raise
    except Exception as error:  # Pillow raises what comes, for truncated and corrupted files
        raise ImageError(f"is damaged ({one_line(error) or type(error).__name__})") from error


def _upright(image: Image.Image) -> Image.Image:
    with suppress(Exception):  # damaged EXIF data: other programs show such a picture as it is
        ImageOps.exif_transpose(image, in_place=True)  # else a copy is made of an upright one, too
    return image


def reduced_grey(image: Image.Image) -> np.ndarray:
    """The second half of ``read_grey``, for a decoded image."""
    grey = _grey(image)
    factor = max(int((grey.width * grey.height) ** 0.5) // WORKING_SIDE, max(grey.size) // MAX_WORKING_SIDE)
    return np.asarray(grey.reduce(factor) if factor > 1 else grey, dtype=np.float32)


def _content(file: str | Path | BinaryIO) -> bytes:
    if not isinstance(file, (str, Path)):
        content = file.read(MAX_BYTES + 1)
        size = len(content)
    else:
        status = os.stat(file)
        if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):  # a pipe would wait for a writer
            raise ImageError("is not a regular file")
        size = status.st_size
        content = Path(file).read_bytes() if size <= MAX_BYTES else b""
    if size > MAX_BYTES:
        raise ImageError(f"has more than {MAX_BYTES:,} bytes")
    return content


def _registered_heif() -> str:
    """
    Raises:
        ImageError: The package that reads HEIC is not installed.
    """
    try:
        importlib.import_module("pillow_heif").register_heif_opener()
    except ImportError as error:
        raise ImageError("is a HEIC image, which needs a package: pip install pillow-heif") from error
    return "HEIF"


def _check_size(image: Image.Image, content: bytes, max_pixels: int) -> None:
    """
    Raises:
        ImageError: Decoding the image would take too much memory or time.
    """
    if image.width * image.height > max_pixels:
        raise ImageError(f"has {image.width}x{image.height} pixels, more than {max_pixels:,}")
    if image.format == "JPEG2000" and 4 * image.width * image.height > max_pixels:  # each takes four times the memory
        raise ImageError(f"has {image.width}x{image.height} pixels, more than {max_pixels // 4:,} in JPEG 2000")
    # Not n_frames: to count a TIFF's pages takes a time that grows with their square. MPO: a camera's JPEG with a preview.
    if getattr(image, "is_animated", False) and image.format != "MPO":
        raise ImageError("contains several images instead of one")
    # Each scan of a JPEG takes as few as twelve bytes, and decoding it goes over all pixels.
    scans = content.count(b"\xff\xda") if image.format in ("JPEG", "MPO") else 0
    if scans * image.width * image.height > MAX_SCANS * max_pixels:
        raise ImageError(f"has {scans:,} scans, too many for {image.width}x{image.height} pixels")
    tags = getattr(image, "tag_v2", {})  # a TIFF's tile (322, 323: its width and length) can be larger than the image
    if float(tags.get(322, 0)) * float(tags.get(323, 0)) > max_pixels:
        raise ImageError(f"is stored in tiles of more than {max_pixels:,} pixels")


def _grey(image: Image.Image) -> Image.Image:
    if image.mode.startswith(("I", "F")):  # 16- or 32-bit integers, or floating point
        return Image.fromarray(scaled(np.asarray(image), (65535.0,) if image.mode.startswith("I;16") else MAX_VALUES))
    if image.mode in ("1", "L") and not image.has_transparency_data:
        return image.convert("L")
    mode = "RGBA" if image.has_transparency_data else "RGB"
    image = image if image.mode == mode else image.convert(mode)  # which would be a copy
    red = image.getchannel("R")
    is_grey = not any(ImageChops.difference(red, image.getchannel(other)).getbbox() for other in "GB")
    colours = red if is_grey else image.convert("RGB") if mode == "RGBA" else image
    if image.mode == "RGBA":
        colours = _on_paper(colours, image.getchannel("A"))
    return colours if is_grey else _clearest_channel(colours)


def scaled(values: np.ndarray, max_values: tuple[float, ...] = MAX_VALUES) -> np.ndarray:
    """Brightness in whatever numbers as float32 from 0 to 255.

    Args:
        max_values: What full brightness may be: if no value is negative, the first of these that none exceeds.
    """
    finite = np.nan_to_num(values.astype(np.float32), nan=0.0, posinf=0.0, neginf=0.0)
    finite = finite.clip(-1e38, 1e38)  # a difference of larger ones would not be finite
    low, high = float(finite.min()), float(finite.max())
    top = next((top for top in max_values if low >= 0 and high <= top), high)
    if high - low > top / 3:  # otherwise they are of fewer bits, as cameras and microscopes have them
        low = min(low, 0.0)
    else:
        top = high
    return (finite - low) * np.float32(min(255 / ((top - low) or 1), 1e38))


def _on_paper(image: Image.Image, alpha: Image.Image) -> Image.Image:
    """An image composited on paper: black if the ink is light, otherwise white."""
    ink = ImageStat.Stat(image.convert("L"), alpha)
    paper = Image.new(image.mode, image.size, "black" if ink.sum[0] > 127.5 * ink.count[0] else "white")
    paper.paste(image, mask=alpha)
    return paper


def _clearest_channel(image: Image.Image) -> Image.Image:
    """The lightness of an RGB image, or the colour channel with the most contrast if that is far higher."""
    lightness = image.convert("L")
    contrasts = ImageStat.Stat(image).stddev
    best = max(range(3), key=contrasts.__getitem__)
    return image.getchannel(best) if contrasts[best] > 2 * ImageStat.Stat(lightness).stddev[0] else lightness
