"""Pictures of printed digits, and of what is no digit: letters, words, shapes, textures and noise, in random variants."""

import string
from collections.abc import Callable, Iterator
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage
from scipy.interpolate import CubicSpline

from mnist_lit.inference.digit import to_mnist
from mnist_lit.inference.ink import ImageError

SIDE = 96  # pixels of a picture
MIDDLE = float(SIDE)  # of a shape, which is drawn at twice that size
FONTS = [
    str(font)
    for font in sorted(Path(matplotlib.get_data_path(), "fonts/ttf").glob("*.ttf"))
    if not any(part in font.name for part in ("Display", "LastResort", "NonUni", "Siz", "cmsy", "cmex", "cmmi"))
]
NO_DIGITS = [
    *"ACEFHJKMNPRTUVWXYabcdefhjkmnprtuvwxy&%#@?+=*<>{}~"
]  # not those that are written like a digit: B, O, l, S

Picture = np.ndarray  # float32 [SIDE, SIDE], ink from 0 to 1
Random = np.random.Generator


def text(random: Random, characters: list[str], length: int) -> Picture:
    font = ImageFont.truetype(random.choice(FONTS), int(random.uniform(50, 70)))
    image = Image.new("L", (300, 200))
    ImageDraw.Draw(image).text((60, 50), "".join(random.choice(characters, length)), font=font, fill=255)
    image = image.crop(image.getbbox())
    factor = 60 / max(image.size)
    image = image.resize((max(3, int(image.width * factor)), max(3, int(image.height * factor))))
    picture = Image.new("L", (SIDE, SIDE))
    picture.paste(image, ((SIDE - image.width) // 2, (SIDE - image.height) // 2))
    return np.asarray(picture, np.float32) / 255


def changed(picture: Picture, random: Random, strength: float) -> Picture:
    """Turned, sheared, stretched, bent, and with thicker or thinner strokes."""
    y, x = np.mgrid[:SIDE, :SIDE].astype(np.float32) - SIDE / 2
    angle, shear = random.normal(0, 0.12 * strength, 2)
    high, wide = np.exp(random.normal(0, 0.12 * strength, 2))
    rows, columns = (np.cos(angle) * y + np.sin(angle) * x) * high, (np.cos(angle) * x - np.sin(angle) * y) * wide
    size = random.uniform(6, 14)
    bends = [
        ndimage.gaussian_filter(random.normal(0, 1, y.shape), size) * size * random.uniform(0, 3) * strength
        for _ in range(2)
    ]
    places = [rows + bends[0] + SIDE / 2, columns + shear * y + bends[1] + SIDE / 2]
    picture = ndimage.map_coordinates(picture, places, order=1)
    match random.integers(5):
        case 0:
            picture = ndimage.grey_dilation(picture, size=int(random.integers(2, 7)))
        case 1 if (thin := ndimage.grey_erosion(picture, size=int(random.integers(2, 4)))).sum() > 0.2 * picture.sum():
            picture = thin
    return np.asarray(picture.clip(0, 1))


def around(count: int, radius: float, turn: float) -> np.ndarray:
    """Points on a circle about the middle of a shape, float [count, 2]."""
    angles = turn + 2 * np.pi * np.arange(count) / count
    return MIDDLE + radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)


def shape(random: Random) -> Picture:
    image = Image.new("L", (2 * SIDE, 2 * SIDE))
    draw = ImageDraw.Draw(image)
    radius, width, turn = random.uniform(40, 64), int(random.integers(6, 22)), random.uniform(0, 2 * np.pi)
    count, filled = int(random.integers(3, 8)), random.random() < 0.4

    def line(points: np.ndarray, width: int = width) -> None:
        draw.line([tuple(point) for point in points], fill=255, width=width, joint="curve")

    def outline(points: np.ndarray) -> None:
        if filled:
            draw.polygon([tuple(point) for point in points], fill=255)
        else:
            line(np.vstack([points, points[:2]]))

    def disc(point: np.ndarray, radius: float) -> None:
        draw.ellipse((*(point - radius), *(point + radius)), fill=255)

    match random.integers(12):
        case 0:
            outline(around(4, radius, np.pi / 4 + random.normal(0, 0.2)))
        case 1:
            outline(around(count, radius, turn))
        case 2:
            tips, dents = around(count, radius, turn), around(count, radius / 2, turn + np.pi / count)
            outline(np.stack([tips, dents], axis=1).reshape(-1, 2))
        case 3:  # rays
            for point in around(count, radius, turn):
                line(np.array([[MIDDLE, MIDDLE], point]))
        case 4:  # an arrow
            points = around(8, radius, turn)
            line(points[[0, 4]])
            line(np.array([(points[0] + points[2]) / 2, points[0], (points[0] + points[6]) / 2]))
        case 5:  # a heart
            t = np.linspace(0, 2 * np.pi, 60)
            y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
            outline(MIDDLE + radius * np.stack([np.sin(t) ** 3, -y / 16], axis=1))
        case 6:  # a grid
            for place in np.linspace(-radius, radius, int(random.integers(2, 5))):
                ends = np.array([[place, -radius], [place, radius]]) + MIDDLE
                line(ends, width // 2 + 1)
                line(ends[:, ::-1], width // 2 + 1)
        case 7:  # a face
            box = MIDDLE - radius, MIDDLE - radius, MIDDLE + radius, MIDDLE + radius
            draw.ellipse(box, outline=255, width=width // 2 + 2)
            for side in (-0.4, 0.4):
                disc(MIDDLE + radius * np.array([side, -0.35]), radius / 6)
            start, inner = (20 if filled else 200), tuple(MIDDLE + 0.55 * (np.array(box) - MIDDLE))
            draw.arc(inner, start, start + 140, fill=255, width=width // 2 + 2)
        case 8:  # dots, or one
            for _ in range(1 if filled else random.integers(4, 25)):
                disc(MIDDLE + random.uniform(-radius, radius, 2), random.uniform(20, 60) if filled else width / 4)
        case 9:  # a zigzag
            count = int(random.integers(6, 14))
            x = np.linspace(-radius, radius, count)
            line(MIDDLE + np.stack([x, radius * random.uniform(0.15, 0.8) * (-1.0) ** np.arange(count)], 1), width // 2)
        case 10:  # a spiral
            t = np.linspace(0, random.uniform(3.3, 8) * np.pi, 200)
            line(MIDDLE + (radius * t / t[-1])[:, None] * np.stack([np.cos(t), np.sin(t)], axis=1), max(3, width // 2))
        case _:  # a scribble
            points = MIDDLE + random.uniform(-radius, radius, (2 * count, 2))
            line(CubicSpline(np.arange(2 * count), points)(np.linspace(0, 2 * count - 1, 24 * count)), width // 2 + 2)
    return np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BOX), np.float32) / 255


def noise(random: Random) -> Picture:
    grain = random.normal(0, 1, (SIDE, SIDE))
    match random.integers(4):
        case 0:
            blobs = ndimage.gaussian_filter(grain, random.uniform(1, 9))
            return (blobs > np.quantile(blobs, random.uniform(0.6, 0.95))).astype(np.float32)
        case 1:
            specks = (random.random(grain.shape) < random.uniform(0.002, 0.05)).astype(np.float32)
            return np.asarray((ndimage.gaussian_filter(specks, 0.7) * 4).clip(0, 1))
        case 2:
            return from_0_to_1(ndimage.gaussian_filter(grain, random.uniform(0, 9)))
        case _:
            return from_0_to_1(grain.cumsum(0).cumsum(1))


def texture(random: Random) -> Picture:
    y, x = np.mgrid[:SIDE, :SIDE]
    angle, period = random.uniform(0, np.pi), random.uniform(6, 50)
    u, v = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    center = random.uniform(0.3, 0.7, 2) * SIDE
    kinds = [
        np.sin(2 * np.pi * u / period),  # stripes
        np.sign(np.sin(2 * np.pi * u / period) * np.sin(2 * np.pi * v / period)),  # squares
        np.sin(2 * np.pi * np.hypot(x - center[0], y - center[1]) / period),  # rings
        ((u % period) < period * random.uniform(0.3, 0.8)) * ((v % (period / 2)) < 0.4 * period) * 1.0,  # bricks
        ndimage.gaussian_filter(random.normal(0, 1, x.shape), (1, random.uniform(4, 20))),  # wood
    ]
    inside = np.hypot(x - SIDE / 2, y - SIDE / 2) < random.uniform(20, 90)
    return from_0_to_1(kinds[random.integers(len(kinds))]) * inside


def from_0_to_1(picture: np.ndarray) -> Picture:
    return np.asarray((picture - picture.min()) / np.ptp(picture), np.float32)


KINDS: dict[str, tuple[float, Callable[[Random], Picture]]] = {  # each with its share
    "letter": (0.55, lambda random: changed(text(random, NO_DIGITS, 1), random, random.uniform(0, 1.3))),
    "word": (0.06, lambda random: changed(text(random, NO_DIGITS, int(random.integers(2, 4))), random, 0.5)),
    "shape": (0.25, lambda random: changed(shape(random), random, random.uniform(0, 0.7))),
    "noise": (0.07, noise),
    "texture": (0.07, texture),
}


def printed_digit(random: Random) -> Picture:
    return changed(text(random, [*string.digits], 1), random, random.uniform(0, 0.8))


def prepared(make: Callable[[Random], Picture], random: Random, count: int) -> Iterator[np.ndarray]:
    """So many pictures, dark on light paper, in MNIST's form, uint8 [28, 28]; those that are refused anyway left out."""
    while count:
        grey = 255 * (1 - make(random)) + random.normal(0, 1, (SIDE, SIDE)) * max(0, random.uniform(-10, 5))
        try:
            yield to_mnist(grey.clip(0, 255).astype(np.float32))
        except ImageError:
            continue
        count -= 1
