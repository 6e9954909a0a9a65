"""Pictures as people have them: digits on squared paper, in boxes, under a shadow, two at once; and what is no digit."""

from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from scipy import ndimage

Pixels = np.ndarray
Random = np.random.Generator


def strokes(digit: Pixels, height: float) -> Pixels:
    """How much ink a pen leaves that writes the digit so high, from 0 to 1, cropped to the ink."""
    large = Image.fromarray(np.pad(cropped(digit, 40), 2))
    factor = height / max(large.size)
    large = large.resize(
        (max(3, round(large.width * factor)), max(3, round(large.height * factor))), Image.Resampling.BICUBIC
    )
    smooth = ndimage.gaussian_filter(np.pad(np.asarray(large, np.float32) / 255, 4), max(0.6, 0.35 * factor))
    return cropped(ndimage.gaussian_filter(((smooth - 0.42) / 0.16).clip(0, 1), 0.5), 0.2)


def cropped(pixels: Pixels, level: float) -> Pixels:
    rows, columns = (np.flatnonzero((pixels > level).any(axis)) for axis in (1, 0))
    return pixels[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def size(random: Random) -> tuple[int, int]:
    return int(random.integers(80, 260)), int(random.integers(80, 260))


def paper(shape: tuple[int, int], random: Random, level: float | None = None) -> Pixels:
    grain = ndimage.gaussian_filter(random.normal(0, 1, shape), random.uniform(0.5, 1.5)) * random.uniform(0, 5)
    level = random.uniform(215, 253) if level is None else level
    return level + grain + random.normal(0, random.uniform(0.5, 4), shape)


def placed(ink: Pixels, shape: tuple[int, int], random: Random, jitter: float = 0.1) -> Pixels:
    """The ink somewhere near the middle of an image of that shape."""
    image = np.zeros(shape, np.float32)
    top, left = (
        int(np.clip((whole - part) / 2 + random.uniform(-jitter, jitter) * whole, 1, whole - part - 1))
        for whole, part in zip(shape, ink.shape, strict=True)
    )
    image[top : top + ink.shape[0], left : left + ink.shape[1]] = ink
    return image


def written(digit: Pixels, shape: tuple[int, int], random: Random, smallest: float = 0.35) -> Pixels:
    return placed(strokes(digit, random.uniform(smallest, 0.65) * min(shape)), shape, random)


def mixed(ground: Pixels, ink: Pixels, grey: float) -> Pixels:
    return ground * (1 - ink) + grey * ink


def drawn(shape: tuple[int, int], draw: Callable[[ImageDraw.ImageDraw], None]) -> Pixels:
    image = Image.new("L", shape[::-1])
    draw(ImageDraw.Draw(image))
    return np.asarray(image.filter(ImageFilter.GaussianBlur(0.5)), np.float32) / 255


def plain(digit: Pixels, random: Random) -> Pixels:
    shape = size(random)
    image = mixed(paper(shape, random), written(digit, shape, random), random.uniform(5, 90))
    return image if random.random() < 0.7 else 255 - image


def corner(digit: Pixels, random: Random) -> Pixels:
    """28x28, light on dark, anywhere but in the middle."""
    small = cropped(digit, 40)
    factor = random.uniform(0.5, 0.9)
    shape = max(2, round(small.shape[1] * factor)), max(4, round(small.shape[0] * factor))
    small = np.asarray(Image.fromarray(small).resize(shape, Image.Resampling.BILINEAR))
    free = np.subtract(28, small.shape)
    top, left = (int(random.choice([0, room])) if room > 8 else int(random.integers(0, room + 1)) for room in free)
    image = np.zeros((28, 28), np.uint8)
    image[top : top + small.shape[0], left : left + small.shape[1]] = small
    return image


def ruled(digit: Pixels, random: Random) -> Pixels:
    shape = size(random)
    y, x = np.mgrid[: shape[0], : shape[1]]
    step, slope = random.uniform(0.08, 0.25) * min(shape), random.uniform(-0.03, 0.03)
    width = random.uniform(0.5, max(0.8, min(shape) / 130))
    across = [y + slope * x] + ([x - slope * y] if random.random() < 0.5 else [])
    lines = np.any([abs((each + random.uniform(0, step)) % step - step / 2) < width for each in across], axis=0)
    lines = ndimage.gaussian_filter(lines.astype(np.float32), 0.5) * random.uniform(0.15, 0.5)
    grey = random.uniform(5, 60)
    return mixed(mixed(paper(shape, random), lines, grey + 20), written(digit, shape, random), grey)


def boxed(digit: Pixels, random: Random) -> Pixels:
    """In the box of a form, or a cell of a table, of which one to four sides are seen."""
    shape = high, wide = size(random)
    margins = random.uniform(0, 0.09, 4) * [high, wide, high, wide]
    top, left, bottom, right = margins[0], margins[1], high - 1 - margins[2], wide - 1 - margins[3]
    sides = [(0, top, wide, top), (left, 0, left, high), (0, bottom, wide, bottom), (right, 0, right, high)]
    width, seen = int(random.integers(1, max(3, min(shape) // 30))), random.permutation(4)[: random.integers(1, 5)]

    def draw(on: ImageDraw.ImageDraw) -> None:
        if random.random() < 0.4:
            on.rectangle((left, top, right, bottom), outline=255, width=width)
        else:
            for side in seen:
                on.line(sides[side], fill=255, width=width)

    ground = mixed(paper(shape, random), drawn(shape, draw) * random.uniform(0.4, 1), random.uniform(5, 90))
    return mixed(ground, written(digit, shape, random), random.uniform(5, 90))


def shadow(digit: Pixels, random: Random) -> Pixels:
    """With a hard or soft edge, anywhere."""
    shape = high, wide = size(random)
    angle, (y, x) = random.uniform(0, 2 * np.pi), np.mgrid[:high, :wide]
    place = random.uniform(0.3, 0.7, 2)
    inside = (y - high * place[0]) * np.sin(angle) + (x - wide * place[1]) * np.cos(angle)
    light = 1 - random.uniform(0.2, 0.6) / (1 + np.exp(-(inside / random.uniform(0.5, 3)).clip(-50, 50)))
    image = mixed(paper(shape, random), written(digit, shape, random), random.uniform(5, 90))
    return image * light + random.normal(0, 1, shape)


def table(digit: Pixels, random: Random) -> Pixels:
    """A sheet, turned a little, on a dark table."""
    high, wide = (int(random.integers(130, 300)) for _ in range(2))
    shape = int(high * random.uniform(0.4, 0.7)), int(wide * random.uniform(0.4, 0.7))
    sheet = mixed(paper(shape, random), written(digit, shape, random), random.uniform(5, 90)).clip(0, 255)
    angle, mode = random.uniform(-9, 9), Image.Resampling.BICUBIC
    turned = Image.fromarray(sheet.astype(np.uint8)).rotate(angle, mode, expand=True)
    mask = Image.new("L", shape[::-1], 255).rotate(angle, mode, expand=True)
    picture = Image.fromarray(paper((high, wide), random, random.uniform(15, 80)).clip(0, 255).astype(np.uint8))
    room = max(1, wide - turned.width), max(1, high - turned.height)
    picture.paste(turned, (int(random.integers(0, room[0])), int(random.integers(0, room[1]))), mask)
    return np.asarray(picture)


def deep(digit: Pixels, random: Random) -> Pixels:
    """9 to 16 bits in 16."""
    top = 2.0 ** random.integers(9, 17) - 1
    return (plain(digit, random).clip(0, 255) / 255 * top).astype(np.uint16)


def crossed(digit: Pixels, random: Random) -> Pixels:
    """With specks, and strokes of a neighbour's that come in from the edges."""
    shape = high, wide = size(random)
    ink = written(digit, shape, random)
    free = ~ndimage.binary_dilation(ink > 0.2, iterations=1 + min(shape) // 16)

    def draw(on: ImageDraw.ImageDraw) -> None:
        for _ in range(random.integers(1, 5)):
            y, x, radius = (
                random.uniform(0, high - 1),
                random.uniform(0, wide - 1),
                random.uniform(0.004, 0.014) * min(shape),
            )
            on.ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)
            end = random.uniform(0.05, 0.13) * wide, random.uniform(0, high - 1)
            on.line((0, end[1], *end), fill=255, width=max(1, min(shape) // 50))

    return mixed(mixed(paper(shape, random), drawn(shape, draw) * free, 30), ink, random.uniform(5, 90))


def chalk(digit: Pixels, random: Random) -> Pixels:
    shape = size(random)
    gaps = ndimage.gaussian_filter((random.random(shape) < random.uniform(0.75, 0.95)).astype(np.float32), 0.6)
    board = random.uniform(25, 70) + ndimage.gaussian_filter(random.normal(0, 1, shape), 6) * random.uniform(5, 40)
    return mixed(board, written(digit, shape, random) * gaps, random.uniform(170, 235))


def lowlight(digit: Pixels, random: Random) -> Pixels:
    shape = high, wide = size(random)
    y, x = np.mgrid[:high, :wide]
    lens = 1 - random.uniform(0.2, 1) * ((y / high - 0.5) ** 2 + (x / wide - 0.5) ** 2)
    image = mixed(np.full(shape, random.uniform(50, 90)), written(digit, shape, random), random.uniform(15, 35))
    return image * lens + random.normal(0, random.uniform(1, 4), shape)


def tight(digit: Pixels, random: Random) -> Pixels:
    """Cropped to the digit, and as coarse as 14 pixels."""
    ink = strokes(digit, random.uniform(14, 110))
    image = mixed(np.full(ink.shape, random.uniform(220, 255)), ink, random.uniform(0, 60))
    return image if random.random() < 0.5 else 255 - image


def tablet(digit: Pixels, random: Random) -> Pixels:
    shape = size(random)
    image = mixed(np.full(shape, 255.0), placed(strokes(digit, 0.4 * min(shape)), shape, random, 0.25), 0)
    return image if random.random() < 0.5 else 255 - image


KINDS = {
    each.__name__: each
    for each in (plain, corner, ruled, boxed, shadow, table, deep, crossed, chalk, lowlight, tight, tablet)
}


def two(digits: tuple[Pixels, Pixels], random: Random) -> Pixels:
    """Two digits side by side."""
    return row_of(digits, random)


def row_of(digits: Sequence[Pixels], random: Random) -> Pixels:
    """Digits from left to right that do not touch."""
    high = int(random.integers(80, 200))
    inks = [strokes(digit, random.uniform(0.45, 0.7) * high) for digit in digits]
    gap = np.zeros((high, int(random.uniform(0.1, 0.4) * high)))
    tall = [placed(ink, (high, ink.shape[1] + 2), random, 0.05) for ink in inks]
    ink = np.hstack([gap, *(part for one in tall for part in (one, gap))])
    return mixed(paper(ink.shape, random), ink, random.uniform(5, 90))


LETTERS = "ACEFHJKMNPRTUVWXYabcdefhjkmnprtuvwxy"  # those that no digit is written like


def letter(random: Random) -> Pixels:
    fonts = sorted(map(str, Path(matplotlib.get_data_path(), "fonts/ttf").glob("DejaVu*[!y].ttf")))
    shape, font = size(random), ImageFont.truetype(random.choice(fonts), 100)

    def draw(on: ImageDraw.ImageDraw) -> None:
        on.text((50, 50), str(random.choice([*LETTERS])), font=font, fill=255)

    ink = Image.fromarray(cropped(drawn((250, 250), draw), 0.2))
    factor = random.uniform(0.35, 0.65) * min(shape) / max(ink.size)
    ink = ink.resize((max(2, round(ink.width * factor)), max(2, round(ink.height * factor))))
    return mixed(paper(shape, random), placed(np.asarray(ink), shape, random), random.uniform(5, 90))


def sign(random: Random) -> Pixels:
    """A polygon, a star, a cross, a smile or a grid, drawn or filled."""
    shape = high, wide = size(random)
    kind, turn, width = random.integers(5), random.uniform(0, 6), max(2, round(random.uniform(0.03, 0.1) * min(shape)))
    radius, middle = random.uniform(0.2, 0.4) * min(shape), np.array([wide, high]) / 2

    def around(count: int, radius: float = radius, turn: float = turn) -> list[tuple[float, ...]]:
        angles = turn + 2 * np.pi * np.arange(count) / count
        return [*map(tuple, middle + radius * np.stack([np.cos(angles), np.sin(angles)], 1))]

    def draw(on: ImageDraw.ImageDraw) -> None:
        if kind < 2:
            corners = around(int(random.integers(3, 7)))
            if kind == 1:
                tips = zip(around(5), around(5, 0.4 * radius, turn + np.pi / 5), strict=True)
                corners = [corner for both in tips for corner in both]
            if random.random() < 0.5:
                on.polygon(corners, fill=255)
            else:
                on.line([*corners, *corners[:2]], fill=255, width=width, joint="curve")
        elif kind == 2:
            for point in around(4):
                on.line([tuple(middle), point], fill=255, width=width)
        elif kind == 3:
            on.ellipse((*(middle - radius), *(middle + radius)), outline=255, width=width)
            on.arc((*(middle - radius / 2), *(middle + radius / 2)), 20, 160, fill=255, width=width)
            for side in (-0.4, 0.4):
                eye = middle + radius * np.array([side, -0.3])
                on.ellipse((*(eye - radius / 7), *(eye + radius / 7)), fill=255)
        else:
            for place in np.linspace(-radius, radius, 4):
                ends = np.array([[place, -radius], [place, radius]])
                for line in (middle + ends, middle + ends[:, ::-1]):
                    on.line([*map(tuple, line)], fill=255, width=width)

    return mixed(paper(shape, random), drawn(shape, draw), random.uniform(5, 90))


def texture(random: Random) -> Pixels:
    shape = high, wide = size(random)
    y, x = np.mgrid[:high, :wide]
    period, angle = random.uniform(5, 40), random.uniform(0, np.pi)
    u, v = (2 * np.pi * (x * np.cos(a) + y * np.sin(a)) / period for a in (angle, angle + np.pi / 2))
    rings = np.sin(2 * np.pi * np.hypot(x - wide / 2, y - high / 2) / period)
    wood = ndimage.gaussian_filter(random.normal(0, 1, shape), (1, random.uniform(5, 20)))
    kinds = [np.sin(u), np.sign(np.sin(u) * np.sin(v)), rings, wood / abs(wood).max()]
    return 128 + 100 * kinds[random.integers(4)] + random.normal(0, random.uniform(0.1, 8), shape)


def noise(random: Random) -> Pixels:
    shape = size(random)
    blobs = ndimage.gaussian_filter(random.normal(0, 1, shape), random.uniform(0.1, 8))
    specks = ndimage.gaussian_filter((random.random(shape) < random.uniform(0.002, 0.05)) * 255.0, 0.6)
    return 255 - specks if random.random() < 0.3 else 128 + random.uniform(20, 60) * blobs / blobs.std()


NO_DIGITS = {each.__name__: each for each in (letter, sign, texture, noise)}
