"""From any picture of a digit to MNIST's form. Only Pillow, NumPy and SciPy: processes that read pictures start fast."""

import struct
import zlib
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, ImageStat, UnidentifiedImageError
from scipy import ndimage

FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP")
ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
MAX_PIXELS = 80_000_000  # four times what a phone's camera makes; a few hundred megabytes when they are unpacked

SIDE, BOX = 28, 20  # of an MNIST image, and of the box in it that the digit fits
WORKING_SIDE = 256  # what is larger by a whole factor is made smaller first
MIN_CONTRAST = 12.0  # grey values of 255 by which ink must differ from the paper
THINNEST = 1.6  # pixels of the box: how thick a pen's line is made at least, for MNIST's are 2 to 3

# What Pillow raises for files that are cut short or damaged.
BROKEN = (OSError, SyntaxError, ValueError, TypeError, IndexError, EOFError, struct.error, zlib.error)


class PictureError(ValueError):
    """A picture that cannot be read or shows nothing; the message is one line about it, without its name."""


def prepare(file: str | Path | BinaryIO, preprocess: str = "mnist") -> np.ndarray:
    """The picture in ``file`` as the network takes it, uint8 [28, 28], light on dark.

    Args:
        preprocess: ``mnist`` brings it to MNIST's form; ``none`` takes 28x28 pixels as they are.

    Raises:
        PictureError: It cannot be read, shows nothing, or has other than 28x28 pixels with ``none``.
    """
    grey = read_grey(file)
    if preprocess == "mnist":
        return to_mnist(grey)
    if grey.shape != (SIDE, SIDE):
        raise PictureError(f"has {grey.shape[1]}x{grey.shape[0]} pixels, and preprocess=none takes {SIDE}x{SIDE}")
    return grey.round().astype(np.uint8)


def read_grey(
    file: str | Path | BinaryIO, formats: tuple[str, ...] = FORMATS, most_pixels: int = MAX_PIXELS
) -> np.ndarray:
    """The grey values 0..255 of a picture, float32 [H, W], upright, large ones made smaller.

    Transparent places become paper: dark under light ink, else light. Where colours differ by more than their
    lightness does, as red ink on green paper, the colour that shows most is taken.

    Raises:
        PictureError: There is no such file, it is none of the ``formats``, damaged, an animation or too large.
    """
    try:
        with Image.open(file, formats=formats) as image:
            if image.width * image.height > most_pixels:
                raise PictureError(f"has {image.width}x{image.height} pixels, more than {most_pixels:,}")
            frames = getattr(image, "n_frames", 1)
            if frames > 1 and image.format != "MPO":  # MPO: a camera's JPEG with a preview
                raise PictureError(f"has {frames} pictures in one file, and one is expected")
            image.draft(None, (2 * WORKING_SIDE, 2 * WORKING_SIDE))  # a large JPEG is read at an eighth of its size
            image.load()
            grey = _grey(ImageOps.exif_transpose(image))
            factor = max(grey.size) // WORKING_SIDE
            return np.asarray(grey.reduce(factor) if factor > 1 else grey, dtype=np.float32)
    except PictureError:
        raise
    except UnidentifiedImageError as error:
        raise PictureError(f"is not a picture in {', '.join(formats[:-1])} or {formats[-1]} format") from error
    except Image.DecompressionBombError as error:
        raise PictureError(f"has more than {most_pixels:,} pixels") from error
    except FileNotFoundError as error:
        raise PictureError("there is no such file") from error
    except (PermissionError, IsADirectoryError) as error:
        raise PictureError(f"cannot be read ({error.strerror})") from error
    except BROKEN as error:
        raise PictureError(f"is damaged ({' '.join(str(error).split()) or type(error).__name__})") from error


def _grey(image: Image.Image) -> Image.Image:
    if image.mode.startswith(("I", "F")):  # 16 or 32 bits, or floating point
        values = np.asarray(image, dtype=np.float32)
        values = np.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0)
        low, high = min(float(values.min()), 0.0), float(values.max())
        tops = (65535.0,) if image.mode.startswith("I;16") else (1.0, 255.0, 65535.0)
        top = next((top for top in tops if low == 0 and high <= top), high)
        return Image.fromarray((values - low) * (255 / ((top - low) or 1)))
    if image.mode in ("1", "L") and not image.has_transparency_data:
        return image.convert("L")
    return _clearest(_on_paper(image.convert("RGBA")) if image.has_transparency_data else image.convert("RGB"))


def _on_paper(image: Image.Image) -> Image.Image:
    """An RGBA picture on paper: dark under light ink, else light."""
    ink = image.getchannel("A")
    inked = ImageStat.Stat(image.convert("L"), ink)
    paper = Image.new("RGB", image.size, "black" if inked.sum[0] > 127.5 * inked.count[0] else "white")
    paper.paste(image, mask=ink)
    return paper


def _clearest(image: Image.Image) -> Image.Image:
    """The lightness of an RGB picture, or that one of its colours that varies far more."""
    lightness = image.convert("L")
    spreads = ImageStat.Stat(image).stddev
    clearest = max(range(3), key=spreads.__getitem__)
    return image.getchannel(clearest) if spreads[clearest] > 2 * ImageStat.Stat(lightness).stddev[0] else lightness


def to_mnist(grey: np.ndarray) -> np.ndarray:
    """A picture of one digit in MNIST's form: cropped to the ink, fitted into 20x20, centred by mass in 28x28.

    A picture that has this form already, 28x28 and light on dark, is left as it is. Paper may be unevenly lit, ink
    light or dark; specks are left out, and lines far thinner than MNIST's are made thicker.

    Args:
        grey: Values 0..255 [H, W].

    Returns:
        uint8 [28, 28], light on dark.

    Raises:
        PictureError: No ink stands out from the paper.
    """
    if grey.max() - grey.min() < MIN_CONTRAST:
        raise PictureError("is blank")
    if grey.shape == (SIDE, SIDE) and np.median(_border(grey)) < (grey.min() + grey.max()) / 2:
        return np.asarray(grey.round().astype(np.uint8))
    ink = _largest_parts(_ink(grey))
    rows, columns = (np.flatnonzero(ink.any(axis=axis)) for axis in (1, 0))
    ink = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    ink = _thick_enough(ink)
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
    """How much ink there is at each place, float32 [H, W] from 0 to 1, surely none being 0.

    Raises:
        PictureError: None stands out.
    """
    paper, noise = _paper(grey)
    difference = grey - paper
    if float((difference * difference * difference).sum()) < 0:  # the largest differences are downwards: dark ink
        difference = -difference
    highest = float(difference.max())
    if highest < max(MIN_CONTRAST, 6 * noise):
        raise PictureError("is blank")
    full = float(np.percentile(difference[difference > max(0.3 * highest, 4 * noise)], 75))
    ink = difference / (0.9 * full)
    ink[ink < max(0.2, 3 * noise / full)] = 0
    return np.asarray(ink.clip(0, 1), dtype=np.float32)


def _paper(grey: np.ndarray) -> tuple[np.ndarray, float]:
    """The paper's grey at each place, to be broadcast to [H, W], and its standard deviation.

    Where nearly all of a picture is of two greys, as drawings and close crops are, the paper is that of the corners;
    else it is a surface of second degree through what is not ink, for paper that is unevenly lit.
    """
    corners = np.median(grey[:: len(grey) - 1 or 1, :: len(grey[0]) - 1 or 1])
    dark, light, share = _two_greys(grey)
    if share > 0.93 or min(grey.shape) < 8:
        return np.full((1, 1), dark if corners < (dark + light) / 2 else light), 0.0
    y, x = (np.arange(side, dtype=np.float32) / max(grey.shape) for side in grey.shape)
    step = max(1, min(grey.shape) // 24)
    values, sy, sx = grey[::step, ::step], y[::step], x[::step]
    grid = np.broadcast_arrays(1, sx, sy[:, None], sx * sx, sx * sy[:, None], (sy * sy)[:, None])
    some, values = np.stack(grid, axis=-1).reshape(-1, 6).astype(np.float32), values.reshape(-1)
    distance = np.abs(values - np.median(_border(grey)))
    for _ in range(4):
        # A third of the places is paper for sure; what they are within says how far paper is from the surface.
        sure = np.partition(distance, int(0.3 * len(distance)))[int(0.3 * len(distance))]
        near = distance <= max(8 * float(sure), 2.0)
        paper = some[near]
        c = np.linalg.solve(paper.T @ paper + 1e-4 * np.eye(6, dtype=np.float32), paper.T @ values[near])
        distance = np.abs(values - some @ c)
    surface = (c[0] + c[1] * x + c[3] * x * x) + (c[2] * y + c[5] * y * y)[:, None] + c[4] * x * y[:, None]
    return surface, 1.4826 * float(np.median(distance[near]))


def _two_greys(grey: np.ndarray) -> tuple[float, float, float]:
    """The two greys that say most about a picture, and which share of its variance they explain (Otsu's method)."""
    counts = np.bincount(grey.astype(np.uint8).reshape(-1), minlength=256).astype(np.float64)
    below, sums = counts.cumsum(), (counts * np.arange(256)).cumsum()
    above = below[-1] - below
    some = (below > 0) & (above > 0)
    dark, light = sums[some] / below[some], (sums[-1] - sums[some]) / above[some]
    explained = below[some] * above[some] * (light - dark) ** 2 / below[-1] ** 2
    best = int(explained.argmax())
    return float(dark[best]), float(light[best]), float(explained[best] / grey.var())


def _largest_parts(ink: np.ndarray) -> np.ndarray:
    """Without the parts that are specks beside the largest one."""
    parts, count = ndimage.label(ink > 0, structure=np.ones((3, 3)))
    if count == 1:
        return ink
    masses = ndimage.sum_labels(ink, parts, np.arange(count + 1))
    return ink * (masses >= 0.06 * masses[1:].max())[parts] * (parts > 0)


def _thick_enough(ink: np.ndarray) -> np.ndarray:
    """Lines that would be too thin in the 20x20 box, made thicker."""
    one = max(ink.shape) / BOX  # a pixel of the box
    inside = np.pad(ink > 0.5, 1)
    edge = inside & ~ndimage.binary_erosion(inside)
    thickness = 2 * inside.sum() / max(edge.sum(), 1)
    missing = round((THINNEST * one - thickness) / 2)
    return ndimage.grey_dilation(np.pad(ink, missing), size=2 * missing + 1) if missing > 0 else ink
