"""Find the digit in an image, and normalize it as MNIST's digits were.

A digit consists of strokes. What does not, such as a shadow or the table that a sheet lies on, means that the estimate of
the paper was wrong, and another one is tried.
"""

from contextlib import suppress
from typing import NamedTuple

import numpy as np
from PIL import Image
from scipy import ndimage

from mnist_lit.inference.ink import (
    BLURRED,
    MIN_CONTRAST,
    SIDE,
    ImageError,
    border,
    half_width,
    ink_beside,
    ink_on_paper,
    ink_on_sheet,
    is_drawing,
)

BOX = 20  # pixels: the side of the box in an MNIST image that the digit is fitted into
LARGE = 3 * BOX  # a digit whose longer side has this many pixels loses nothing in that box
MIN_STROKE = 1.6  # thinner strokes are thickened to this many pixels of the box; MNIST's have 2 to 3
NARROW = 0.22  # of the longer side of a digit's box: what is wider may be no stroke
STROKE = 0.45  # of full ink belongs to a stroke
DARKER = 1.6  # of what is full ink for most of a shape are strokes that the rest of it is no part of
FAINT = 0.2  # of full ink may belong to a line of the paper
MAX_SLOPE = 0.1  # of the lines of the paper
EIGHT_CONNECTED = np.ones((3, 3), bool)  # a pixel's eight neighbours touch it
MOMENTS = np.array([np.ones(SIDE), np.arange(SIDE)], np.float32)


def to_mnist(grey: np.ndarray, refuse: bool = True) -> np.ndarray:
    """Normalize an image of one digit as MNIST's were: crop, fit into 20x20, centre by mass in 28x28.

    The ink may be light or dark; the paper may be ruled, framed, unevenly lit, or a sheet on a table. Specks and what
    comes in from the edges are removed, and strokes much thinner than MNIST's are thickened. An image that has MNIST's
    form already is returned unchanged.

    Args:
        grey: Values 0..255 [H, W].
        refuse: Whether to raise an error if there are two shapes side by side, instead of taking the likelier one.

    Returns:
        uint8 [28, 28], light on dark.

    Raises:
        ImageError: No ink stands out from the paper, or there is not one digit.
    """
    if grey.max() - grey.min() < MIN_CONTRAST:
        raise ImageError("is blank")
    if _has_mnists_form(grey):
        return np.asarray(grey.round().astype(np.uint8))
    ink, shape = _found(grey)
    if refuse and shape.aside:
        raise ImageError("shows two shapes side by side instead of one digit")
    return _fitted(ink, shape.mask, shape.others)


def each_to_mnist(grey: np.ndarray) -> list[np.ndarray]:
    """Like ``to_mnist``, for an image of several digits that do not touch: one image each, from left to right."""
    if grey.max() - grey.min() < MIN_CONTRAST:
        raise ImageError("is blank")
    ink, shape = _found_at_this_size(grey)  # at half the size, digits that are close to each other would touch
    masks = _side_by_side(shape)
    return [_fitted(ink, mask, (shape.parts > 0) & ~mask) for mask in masks]


def _found(grey: np.ndarray) -> tuple[np.ndarray, "Shape"]:
    """How much ink each pixel has, float32 [h, w] with 1 for full ink, and where the digit's strokes are in it.

    In a drawing, dark on light, a large digit is looked for at half the image's size, in a quarter of the time.

    Raises:
        ImageError: No ink stands out from the paper.
    """
    if min(grey.shape) >= 2 * LARGE and is_drawing(grey[::2, ::2]):
        with suppress(ImageError):
            ink, shape = _found_at_this_size(np.asarray(Image.fromarray(grey.astype(np.float32)).reduce(2)))
            longer = 1 + max(np.ptp(np.flatnonzero(shape.mask.any(axis))) for axis in (0, 1))
            if longer >= LARGE and shape.is_of_strokes:
                return ink, shape
    return _found_at_this_size(grey)


def _found_at_this_size(grey: np.ndarray) -> tuple[np.ndarray, "Shape"]:
    usual: tuple[np.ndarray, Shape] | None = None
    for estimate in (ink_on_sheet, ink_on_paper, ink_beside):
        try:
            ink = estimate(grey)
        except ImageError:
            continue
        if ink is None or not (shape := _find(ink)):
            continue
        if shape.is_of_strokes and (estimate is ink_on_paper or shape.contact < 0.01):
            return _darkest(ink, shape)
        if estimate is ink_on_paper:
            usual = ink, shape
    if usual:
        return usual
    ink = ink_on_paper(grey, BLURRED)  # a close picture may show too little paper to fit a surface to
    if not (shape := _find(ink)):
        raise ImageError("is blank")
    return ink, shape


def _darkest(ink: np.ndarray, shape: "Shape") -> tuple[np.ndarray, "Shape"]:
    """``ink`` and ``shape`` by the darkest strokes alone, if they are much darker than the rest: than squared paper's lines."""
    darkest = float(np.percentile(ink[shape.mask], 97))
    if darkest < DARKER:
        return ink, shape
    darker = ink / (0.9 * darkest)
    darker[darker < FAINT] = 0
    if (
        not (found := _find(darker))
        or not found.is_of_strokes
        or (found.mask & shape.mask).sum() < 0.9 * found.mask.sum()
    ):
        return ink, shape
    return darker, found


class Shape(NamedTuple):
    """What may be the digit.

    Attributes:
        mask: Its strokes, bool [H, W].
        others: What else is inked.
        aside: Whether another shape of its kind is beside it.
        parts: The number of the part of what is inked that each pixel belongs to, from 1, or 0; int [H, W].
        alike: The numbers of the parts that may be the main part of a digit.
        free: The numbers of those that are neither a frame nor come in from the edge.
        contact: The fraction of the image's border that it touches.
        width: Of its widest place, as a fraction of the longer side of its box; an upper bound if that is below ``NARROW``.
        width_of_others: Of the widest place of the others, as a fraction of the image's shorter side, if they are more.
    """

    mask: np.ndarray
    others: np.ndarray
    aside: bool
    parts: np.ndarray
    alike: np.ndarray
    free: np.ndarray
    contact: float
    width: float
    width_of_others: float

    @property
    def is_of_strokes(self) -> bool:
        blot = self.width > 0.4 or (self.contact > 0.1 and self.width > NARROW)
        return not blot and self.width_of_others < 0.12


def _has_mnists_form(grey: np.ndarray) -> bool:
    if grey.shape != (SIDE, SIDE):
        return False
    edge, highest = border(grey), float(grey.max())
    paper = float(np.partition(edge, len(edge) // 2)[len(edge) // 2])  # np.median takes ten times as long
    if paper >= (float(grey.min()) + highest) / 2:
        return False
    light = np.maximum(grey - paper, 0)
    (total, x), (y, _) = MOMENTS @ light @ MOMENTS.T
    inked = light > 0.1 * (highest - paper)
    rows, columns = (np.flatnonzero(inked.any(axis)) for axis in (1, 0))
    centred = max(abs(place / total - (SIDE - 1) / 2) for place in (x, y)) < 1.5
    return bool(centred and max(rows[-1] - rows[0], columns[-1] - columns[0]) <= BOX)


def _find(ink: np.ndarray) -> Shape | None:
    """The digit's strokes among what is inked: large, near the middle, and not a frame or something at the edge."""
    strokes = _without_lines(ink > STROKE, ink > FAINT)
    rows, columns = (np.flatnonzero(strokes.any(axis)) for axis in (1, 0))
    if not len(rows):
        return None
    box = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    parts = np.zeros(ink.shape, np.int32)
    count = ndimage.label(strokes[box], EIGHT_CONNECTED, parts[box])
    if count == 1:
        boxes, mask = [box], strokes
        main, alike, free, aside = 0, *np.ones((2, 1), bool), False
    else:
        boxes = ndimage.find_objects(parts)
        main, own, alike, free, aside = _chosen(parts, boxes)
        mask = np.append(False, own)[parts]
    others = strokes & ~mask
    longer = max(side.stop - side.start for side in boxes[main])
    more = np.count_nonzero(others) > np.count_nonzero(mask)
    return Shape(
        mask,
        others,
        aside,
        parts,
        1 + np.flatnonzero(alike),
        1 + np.flatnonzero(free),
        contact=float(border(mask).mean()),
        width=2 * half_width(mask[boxes[main]], NARROW / 2 * longer) / longer,
        width_of_others=2 * half_width(others) / min(ink.shape) if more else 0.0,
    )


def _chosen(
    parts: np.ndarray, boxes: list[tuple[slice, slice]]
) -> tuple[int, np.ndarray, np.ndarray, np.ndarray, bool]:
    """
    Args:
        parts: The number of the part that each pixel belongs to, from 1, or 0.
        boxes: Of each part.

    Returns:
        The index of the digit's main part; which parts are the digit's, which may be the main part of one, and which are
        neither a frame nor come in from the edge: bool [N] each; and whether another shape is beside it.
    """
    first, last = (np.array([[getattr(side, end) for side in box] for box in boxes]) for end in ("start", "stop"))
    mass, whole = np.bincount(parts.ravel())[1:].astype(float), np.array(parts.shape)
    size, edges = last - first, np.concatenate([first, whole - last], axis=1) <= 0.01 * np.tile(whole, 2)
    span, at_edge = size / whole, np.asarray(edges.any(axis=1))
    framing = np.zeros(len(boxes), bool)
    for i in np.argsort(-mass)[:6]:
        around = span[i].min() > 0.75 or (span[i].max() > 0.75 and span[i].min() < 0.1)
        around |= edges[i].sum() > 1 and span[i].max() > 0.5
        others = span[(np.arange(len(boxes)) != i) & ~framing]
        if around and others.max(initial=0) > 0.15:
            framing[i] = 2 * half_width(parts[boxes[i]] == i + 1) < 0.07 * whole.min()
    off_center = ((first + last) / 2 / whole - 0.5) ** 2
    likely = mass * np.exp(-3 * off_center.sum(1)) * np.minimum(1, span.max(1) / 0.12) ** 2
    main = int((likely * np.where(at_edge, 0.3, 1) * ~framing).argmax())

    gap = np.maximum(first - last[main], first[main] - last)
    own = (mass >= 0.05 * mass[main]) & (gap.max(1) <= max(2.0, 0.5 * size[main].max())) & ~framing
    own &= ~at_edge | at_edge[main]
    own[main] = True
    alike = (size[:, 0] > 0.5 * size[main, 0]) & (mass > 0.1 * mass[main]) & ~at_edge & ~framing
    alike &= gap[:, 1] > -0.15 * np.minimum(size[:, 1], size[main, 1])
    together = np.maximum(last, last[main]) - np.minimum(first, first[main])
    alike &= together[:, 1] > 0.75 * together[:, 0]  # otherwise they are two strokes of one digit
    alike[main] = aside = False
    if alike.any() and size[main, 0] > 8 and not at_edge[main]:
        distance = ndimage.distance_transform_edt(parts != main + 1)
        aside = any(distance[parts == i + 1].min() > 0.07 * size[main, 0] for i in np.flatnonzero(alike))
    own &= ~alike | ~np.bool_(aside)
    alike[main] = True
    return main, own, alike, ~at_edge & ~framing, aside


def _side_by_side(shape: Shape) -> list[np.ndarray]:
    """The strokes of each digit, from left to right: bool [H, W] each."""
    ends = [(box[1].start, box[1].stop) for box in ndimage.find_objects(shape.parts)]
    digits: list[list[int]] = []  # the numbers of the parts of each
    for number in sorted(shape.alike.tolist(), key=lambda number: sum(ends[number - 1])):
        start, stop = ends[number - 1]
        if digits and max(ends[each - 1][1] for each in digits[-1]) - start > 0.5 * (stop - start):
            digits[-1].append(number)  # it is above or below the last one, or inside
        else:
            digits.append([number])

    def distance(number: int, digit: list[int]) -> float:
        """Between the middle of a part and the sides of a digit's first part; negative if it is between them."""
        start, stop = ends[digit[0] - 1]
        return abs(sum(ends[number - 1]) / 2 - (start + stop) / 2) - (stop - start) / 2

    for number in set(shape.free.tolist()) - set(shape.alike.tolist()):
        nearest = min(digits, key=lambda digit: distance(number, digit))
        if distance(number, nearest) < 0.1 * shape.parts.shape[0]:
            nearest.append(number)
    return [np.isin(shape.parts, digit) for digit in digits]


def _without_lines(mask: np.ndarray, faint: np.ndarray) -> np.ndarray:
    """``mask`` without thin straight lines that cross the image; strokes that they cross stay.

    Args:
        mask: The strokes, bool [H, W].
        faint: The same with what is too faint for a stroke.
    """
    if min(mask.shape) < 2 * SIDE:
        return mask
    for transposed in (False, True):
        inked, seen = (mask.T, faint.T) if transposed else (mask, faint)
        margin = max(1, seen.shape[1] // 12)
        if seen[:, :margin].any() and seen[:, -margin:].any():
            lines = _lines(inked, seen)
            mask = mask & ~(lines.T if transposed else lines)
    return mask


def _lines(inked: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """The pixels of ``inked`` that belong to thin lines from left to right, and to no stroke."""
    high, wide = seen.shape
    joined = ndimage.grey_closing(seen, (1, 5))  # over gaps
    thickest = max(3, round(0.06 * min(seen.shape)))
    thin = ndimage.grey_opening(joined, (1, max(9, wide // 12))) & ~ndimage.grey_opening(seen, (thickest + 1, 1))
    parts, _ = ndimage.label(ndimage.maximum_filter1d(thin, 2 * (wide // 12), axis=1), EIGHT_CONNECTED)
    near, lines, x = ndimage.maximum_filter1d(seen, 3, axis=0), np.zeros_like(seen), np.arange(wide)
    strokes: dict[int, np.ndarray] = {}  # wider than so many pixels
    for number, box in enumerate(ndimage.find_objects(parts), 1):
        if box[1].stop - box[1].start < 0.3 * wide:
            continue
        rows, columns = np.nonzero((parts[box] == number) & thin[box])
        if not (fit := _fitted_line(columns + box[1].start, rows + box[0].start)):
            continue
        slope, start, thickness = fit
        y = np.round(slope * x + start).astype(int)
        inside = (y >= 0) & (y < high)
        if abs(slope) > MAX_SLOPE or inside.mean() < 0.8 or near[y[inside], x[inside]].mean() < 0.9:
            continue
        width = int(1.6 * thickness + 1.5)
        if width not in strokes:
            strokes[width] = ndimage.grey_opening(inked, (width, 1))
        reach = int(thickness / 2 + 1.5)
        rows = (y + np.arange(-reach, reach + 1)[:, None]).clip(0, high - 1)
        lines[rows, x] |= ~strokes[width][rows, x]
    return lines


def _fitted_line(x: np.ndarray, y: np.ndarray) -> tuple[float, float, float] | None:
    """Slope, start and thickness of the line that most of the pixels are on, although strokes adjoin it; None if none is."""
    if len(x) < 10:
        return None
    left, right = x <= np.quantile(x, 1 / 3), x >= np.quantile(x, 2 / 3)
    distance = np.median(x[right]) - np.median(x[left])
    if distance < 1:
        return None
    slope = (np.median(y[right]) - np.median(y[left])) / distance
    off = y - slope * x
    on = np.abs(off - np.median(off)) < 3
    if on.sum() < 10:
        return None
    slope, start = np.polyfit(x[on], y[on], 1)
    return float(slope), float(start), float(on.sum() / len(np.unique(x[on])))


def _fitted(ink: np.ndarray, mask: np.ndarray, others: np.ndarray) -> np.ndarray:
    """The strokes ``mask`` in the 20x20 box, centred by mass, without ``others``: uint8 [28, 28]."""
    around = max(1, max(ink.shape) // 100)
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    box = tuple(slice(max(0, side[0] - around), side[-1] + around + 1) for side in (rows, columns))
    ink = ink[box].clip(0, 1) * (ndimage.maximum_filter(mask[box], 2 * around + 1) & ~others[box])
    rows, columns = (np.flatnonzero((ink > FAINT).any(axis)) for axis in (1, 0))
    ink = _thickened(ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1])
    scale = BOX / max(ink.shape)
    height, width = (max(1, round(side * scale)) for side in ink.shape)
    fitted = np.asarray(Image.fromarray(ink).resize((width, height), Image.Resampling.HAMMING))
    fitted = (fitted * (255 / fitted.max())).clip(0, 255)
    image = np.zeros((SIDE, SIDE), np.uint8)
    profiles = fitted.sum(1), fitted.sum(0)
    centers = (float(profile @ np.arange(len(profile)) / profile.sum()) for profile in profiles)
    top, left = (
        min(max(round(SIDE / 2 - center), 0), SIDE - side) for center, side in zip(centers, fitted.shape, strict=True)
    )
    image[top : top + height, left : left + width] = fitted.round()
    return image


def _thickened(ink: np.ndarray) -> np.ndarray:
    """Dilate strokes that would be too thin in the 20x20 box."""
    box_pixel = max(ink.shape) / BOX
    inside = np.pad(ink > 0.5, 1)
    beside = inside[:-2, 1:-1] & inside[2:, 1:-1] & inside[1:-1, :-2] & inside[1:-1, 2:]  # all four neighbours
    edge = inside[1:-1, 1:-1] & ~beside
    thickness = 2 * inside.sum() / max(edge.sum(), 1)
    missing = round((MIN_STROKE * box_pixel - thickness) / 2)
    return ndimage.grey_dilation(np.pad(ink, missing), size=2 * missing + 1) if missing > 0 else ink
