"""Read an image of a digit from any file and normalize it to the form of MNIST's images.

Imports only Pillow, NumPy and SciPy, so that worker processes start quickly.
"""

import io
import os
import stat
import struct
import zlib
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, ImageStat, UnidentifiedImageError
from scipy import ndimage

FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP")
ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
MAX_PIXELS = 80_000_000  # four times a phone camera's resolution; up to 1.7 GB while one is read
MAX_BYTES = 2**26  # of a file: 20 million uncompressed pixels in colour
MAX_SCANS = 50  # of a progressive JPEG with as many pixels as allowed; cameras and editors write ten

SIDE, BOX = 28, 20  # pixels: an MNIST image, and the box within it that the digit is fitted into
WORKING_SIDE = 256  # larger images are first reduced by a whole factor to about this size
MIN_CONTRAST = 12.0  # how far ink must differ from the paper, in grey values of 0..255
MIN_STROKE = 1.6  # thinner strokes are thickened to this many pixels of the box; MNIST's have 2 to 3

# What Pillow raises for truncated or corrupted files.
DECODE_ERRORS = (
    OSError, SyntaxError, ValueError, TypeError, IndexError, EOFError, MemoryError, struct.error, zlib.error
)  # fmt: skip


class ImageError(Exception):
    """The image cannot be read or is blank. The message is a single line that does not name the file."""


def prepare(file: str | Path | BinaryIO, preprocess: str = "mnist") -> np.ndarray:
    """Read ``file`` as input for the network: uint8 [28, 28], light on dark.

    Args:
        preprocess: ``mnist`` normalizes the image with ``to_mnist``; ``none`` uses its 28x28 pixels unchanged.

    Raises:
        ImageError: The image cannot be read, is blank, or with ``none`` is not 28x28.
    """
    grey = read_grey(file)
    if preprocess == "mnist":
        return to_mnist(grey)
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
        with Image.open(io.BytesIO(content), formats=formats) as image:
            _check_size(image, content, max_pixels)
            image.draft(None, (2 * WORKING_SIDE, 2 * WORKING_SIDE))  # JPEG: decode at down to 1/8 scale
            image.load()
            grey = _grey(ImageOps.exif_transpose(image))
            factor = max(grey.size) // WORKING_SIDE
            return np.asarray(grey.reduce(factor) if factor > 1 else grey, dtype=np.float32)
    except UnidentifiedImageError as error:
        raise ImageError(f"is not an image in {', '.join(formats[:-1])} or {formats[-1]} format") from error
    except Image.DecompressionBombError as error:
        raise ImageError(f"has more than {max_pixels:,} pixels") from error
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise ImageError(f"cannot be read ({error.strerror})") from error
    except DECODE_ERRORS as error:
        raise ImageError(f"is damaged ({' '.join(str(error).split()) or type(error).__name__})") from error


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


def _check_size(image: Image.Image, content: bytes, max_pixels: int) -> None:
    """
    Raises:
        ImageError: Decoding the image would take too much memory or time.
    """
    if image.width * image.height > max_pixels:
        raise ImageError(f"has {image.width}x{image.height} pixels, more than {max_pixels:,}")
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
        values = np.nan_to_num(np.asarray(image, dtype=np.float32), nan=0.0, posinf=0.0, neginf=0.0)
        low, high = min(float(values.min()), 0.0), float(values.max())
        tops = (65535.0,) if image.mode.startswith("I;16") else (1.0, 255.0, 65535.0)
        top = next((top for top in tops if low == 0 and high <= top), high)
        return Image.fromarray((values - low) * (255 / ((top - low) or 1)))
    if image.mode in ("1", "L") and not image.has_transparency_data:
        return image.convert("L")
    return _clearest_channel(_on_paper(image.convert("RGBA")) if image.has_transparency_data else image.convert("RGB"))


def _on_paper(image: Image.Image) -> Image.Image:
    """An RGBA image composited on paper: black if the ink is light, otherwise white."""
    alpha = image.getchannel("A")
    ink = ImageStat.Stat(image.convert("L"), alpha)
    paper = Image.new("RGB", image.size, "black" if ink.sum[0] > 127.5 * ink.count[0] else "white")
    paper.paste(image, mask=alpha)
    return paper


def _clearest_channel(image: Image.Image) -> Image.Image:
    """The lightness of an RGB image, or the colour channel with the most contrast if that is far higher."""
    lightness = image.convert("L")
    contrasts = ImageStat.Stat(image).stddev
    best = max(range(3), key=contrasts.__getitem__)
    return image.getchannel(best) if contrasts[best] > 2 * ImageStat.Stat(lightness).stddev[0] else lightness


def to_mnist(grey: np.ndarray) -> np.ndarray:
    """Normalize an image of one digit as MNIST's were: crop, fit into 20x20, centre by mass in 28x28.

    The ink may be light or dark and the paper unevenly lit. Specks are removed, and strokes much thinner than MNIST's
    are thickened. An image that is already 28x28 and light on dark is returned unchanged.

    Args:
        grey: Values 0..255 [H, W].

    Returns:
        uint8 [28, 28], light on dark.

    Raises:
        ImageError: No ink stands out from the paper.
    """
    if grey.max() - grey.min() < MIN_CONTRAST:
        raise ImageError("is blank")
    if grey.shape == (SIDE, SIDE) and np.median(_border(grey)) < (grey.min() + grey.max()) / 2:
        return np.asarray(grey.round().astype(np.uint8))
    ink = _without_specks(_ink(grey))
    rows, columns = (np.flatnonzero(ink.any(axis=axis)) for axis in (1, 0))
    ink = _thickened(ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1])
    scale = BOX / max(ink.shape)
    height, width = (max(1, round(side * scale)) for side in ink.shape)
    fitted = np.asarray(Image.fromarray(ink).resize((width, height), Image.Resampling.HAMMING))
    fitted = (fitted * (255 / fitted.max())).clip(0, 255)
    image = np.zeros((SIDE, SIDE), np.uint8)
    top, left = (
        min(max(round((SIDE - 1) / 2 + 0.5 - center), 0), SIDE - side)
        for center, side in zip(ndimage.center_of_mass(fitted), fitted.shape, strict=True)
    )
    image[top : top + height, left : left + width] = fitted.round()
    return image


def _border(grey: np.ndarray) -> np.ndarray:
    return np.concatenate([grey[0], grey[-1], grey[1:-1, 0], grey[1:-1, -1]])


def _ink(grey: np.ndarray) -> np.ndarray:
    """How much ink each pixel has, float32 [H, W] from 0 to 1, exactly 0 on the paper; an ImageError if none stands out."""
    paper, noise = _paper(grey)
    difference = grey - paper
    if float((difference * difference * difference).sum()) < 0:  # the largest differences are negative: dark ink
        difference = -difference
    highest = float(difference.max())
    if highest < max(MIN_CONTRAST, 6 * noise):
        raise ImageError("is blank")
    full = float(np.percentile(difference[difference > max(0.3 * highest, 4 * noise)], 75))
    ink = difference / (0.9 * full)
    ink[ink < max(0.2, 3 * noise / full)] = 0
    return np.asarray(ink.clip(0, 1), dtype=np.float32)


def _paper(grey: np.ndarray) -> tuple[np.ndarray, float]:
    """The grey value of the paper, broadcastable to [H, W], and its standard deviation.

    If the image has essentially two greys, as drawings and close crops do, the paper is the one closer to the corners.
    Otherwise the paper may be unevenly lit: a quadratic surface is fitted to the pixels without ink.
    """
    corners = np.median(grey[:: len(grey) - 1 or 1, :: len(grey[0]) - 1 or 1])
    dark, light, explained = _two_greys(grey)
    if explained > 0.93 or min(grey.shape) < 8:
        return np.full((1, 1), dark if corners < (dark + light) / 2 else light), 0.0
    y, x = (np.arange(side, dtype=np.float32) / max(grey.shape) for side in grey.shape)
    step = max(1, min(grey.shape) // 24)
    values, sy, sx = grey[::step, ::step], y[::step], x[::step]
    grid = np.broadcast_arrays(1, sx, sy[:, None], sx * sx, sx * sy[:, None], (sy * sy)[:, None])
    terms, values = np.stack(grid, axis=-1).reshape(-1, 6).astype(np.float32), values.reshape(-1)
    distance = np.abs(values - np.median(_border(grey)))
    for _ in range(4):
        # At least 30 % of the pixels are paper; how close those are to the surface scales the threshold for the others.
        close = np.partition(distance, int(0.3 * len(distance)))[int(0.3 * len(distance))]
        near = distance <= max(8 * float(close), 2.0)
        paper = terms[near]
        c = np.linalg.solve(paper.T @ paper + 1e-4 * np.eye(6, dtype=np.float32), paper.T @ values[near])
        distance = np.abs(values - terms @ c)
    surface = (c[0] + c[1] * x + c[3] * x * x) + (c[2] * y + c[5] * y * y)[:, None] + c[4] * x * y[:, None]
    return surface, 1.4826 * float(np.median(distance[near]))


def _two_greys(grey: np.ndarray) -> tuple[float, float, float]:
    """Otsu's method: the mean greys of the two classes, and the fraction of the variance that they explain."""
    counts = np.bincount(grey.astype(np.uint8).reshape(-1), minlength=256).astype(np.float64)
    below, sums = counts.cumsum(), (counts * np.arange(256)).cumsum()
    above = below[-1] - below
    split = (below > 0) & (above > 0)
    dark, light = sums[split] / below[split], (sums[-1] - sums[split]) / above[split]
    explained = below[split] * above[split] * (light - dark) ** 2 / below[-1] ** 2
    best = int(explained.argmax())
    return float(dark[best]), float(light[best]), float(explained[best] / grey.var())


def _without_specks(ink: np.ndarray) -> np.ndarray:
    """Remove the connected components that are tiny compared with the largest one."""
    parts, count = ndimage.label(ink > 0, structure=np.ones((3, 3)))
    if count == 1:
        return ink
    masses = ndimage.sum_labels(ink, parts, np.arange(count + 1))
    return ink * (masses >= 0.06 * masses[1:].max())[parts] * (parts > 0)


def _thickened(ink: np.ndarray) -> np.ndarray:
    """Dilate strokes that would be too thin in the 20x20 box."""
    box_pixel = max(ink.shape) / BOX
    inside = np.pad(ink > 0.5, 1)
    edge = inside & ~ndimage.binary_erosion(inside)
    thickness = 2 * inside.sum() / max(edge.sum(), 1)
    missing = round((MIN_STROKE * box_pixel - thickness) / 2)
    return ndimage.grey_dilation(np.pad(ink, missing), size=2 * missing + 1) if missing > 0 else ink
