"""How much ink each pixel of an image has: it differs from the paper, whatever that is and however it is lit."""

import numpy as np
from PIL import Image
from scipy import ndimage

SIDE = 28  # pixels: of an MNIST image
MIN_CONTRAST = 12.0  # how far ink must differ from the paper, in grey values of 0..255
MIN_LOG_CONTRAST = 0.05  # and in the logarithm of the grey value
TWO_GREYS = 0.93  # two greys explain more than this of the variance of a drawing, or of a coarse or close picture
BLURRED = 0.82  # and more than this if its edges are blurred; of waves of light and dark they explain 0.81


class ImageError(Exception):
    """The image cannot be read or shows no digit. The message is a single line that does not name the file."""


def ink_on_sheet(grey: np.ndarray) -> np.ndarray | None:
    """Ink on a light sheet that lies on something dark; None if there is no such sheet.

    Returns:
        float32 [h, w] for the part of the image that the sheet takes.

    Raises:
        ImageError: No ink stands out from the sheet.
    """
    if _edge_is_light(grey):
        return None
    low, high = np.percentile(grey[::3, ::3], [2, 98])
    light = grey > (low + high) / 2
    if low > 0.45 * high or light.mean() < 0.1:
        return None
    parts, count = ndimage.label(ndimage.binary_opening(light, iterations=2))
    if not count:
        return None
    largest = 1 + int(np.bincount(parts.ravel())[1:].argmax())
    box, sheet = ndimage.find_objects(parts)[largest - 1], parts == largest
    filled = ndimage.binary_fill_holes(sheet)
    whole = filled[box]
    if border(filled).mean() > 0.4 or sheet.sum() < 0.8 * filled.sum() or min(whole.shape) < 0.2 * min(grey.shape):
        return None
    if whole.mean() < 0.6 or half_width(whole) < 0.15 * max(whole.shape):  # it is a stroke itself
        return None
    inner = ndimage.binary_erosion(filled, iterations=1 + min(whole.shape) // 30, border_value=1)
    if not inner.any():
        return None
    level, outside = np.median(grey[sheet]), np.median(grey[~filled])
    if outside > 0.5 * level or level - np.percentile(grey[inner], 0.3) < 0.3 * (level - outside):
        return None
    return ink_on_paper(np.where(inner, grey, level)[box].astype(np.float32))


def ink_on_paper(grey: np.ndarray, two_greys: float = TWO_GREYS) -> np.ndarray:
    """Ink on paper that fills the image and may be unevenly lit.

    Args:
        two_greys: The paper is evenly lit if two greys explain more than this fraction of the image's variance.

    Returns:
        float32 [H, W]: exactly 0 on the paper, about 1 for most of the ink, and more for what is darker still.

    Raises:
        ImageError: None stands out.
    """
    paper, noise = _paper(grey, two_greys)
    difference = grey - paper
    if float((difference * difference * difference).sum()) < 0:  # the largest differences are negative: dark ink
        difference = -difference
    highest = float(difference.max())
    if highest < max(MIN_CONTRAST, 6 * noise):
        raise ImageError("is blank")
    full = float(np.percentile(difference[difference > max(0.3 * highest, 4 * noise)], 75))
    ink = difference / (0.9 * full)
    ink[ink < max(0.2, 3 * noise / full)] = 0
    return np.asarray(ink, dtype=np.float32)


def ink_beside(grey: np.ndarray) -> np.ndarray | None:
    """Ink that is darker, or lighter, than what is beside it within a third of the image; None if that is too small.

    The light multiplies the grey of paper and ink, so a shadow, even one with a hard edge, adds to the logarithms.

    Returns:
        float32 [H, W] from 0 to 1.

    Raises:
        ImageError: None stands out.
    """
    if min(grey.shape) < SIDE:
        return None
    smooth = np.log(ndimage.gaussian_filter(grey, max(grey.shape) / 250) + 16)
    window = int(0.3 * min(grey.shape)) | 1
    dark = ndimage.grey_closing(smooth, window) - smooth
    light = smooth - ndimage.grey_opening(smooth, window)
    ink = dark if _is_dark(dark, light, smooth) else light
    if ink.max() < MIN_LOG_CONTRAST:
        raise ImageError("is blank")
    full = float(np.percentile(ink[ink > 0.4 * ink.max()], 60))
    noise = 1.4826 * float(np.median(np.abs(ink - np.median(ink))))
    if full < max(MIN_LOG_CONTRAST, 4 * noise):
        raise ImageError("is blank")
    ink = ink / full
    ink[ink < 0.25] = 0
    return np.asarray(ink.clip(0, 1), dtype=np.float32)


def _is_dark(dark: np.ndarray, light: np.ndarray, smooth: np.ndarray) -> bool:
    """Whether the ink is what is darker than its surroundings, and the gaps in it what is lighter, or vice versa.

    Gaps are surrounded by ink, and ink not by gaps. The grey of most of the middle has a vote.
    """
    level = 0.5 * max(np.percentile(dark, 99), np.percentile(light, 99))
    inked, gaps = dark > level, light > level

    def surrounded(mask: np.ndarray, other: np.ndarray) -> float:
        ring = ndimage.maximum_filter(mask, 7) & ~mask
        return float(other[ring].mean()) if ring.any() else 1.0

    middle = smooth[tuple(slice(side // 4, side - side // 4) for side in smooth.shape)]
    low, high = np.percentile(middle, [1, 99])
    vote = 0.3 if np.median(middle) > (low + high) / 2 else -0.3
    return surrounded(gaps, inked) - surrounded(inked, gaps) + vote > 0


def half_width(mask: np.ndarray, least: float = 0.0) -> float:
    """Half the width, in pixels, of the widest place in ``mask``; if that is below ``least``, it may be an upper bound."""
    framed = np.pad(mask, 1)
    # No Euclidean distance is larger than the one in moves of a chess king times the root of two, which takes less time.
    bound = 2**0.5 * float(ndimage.distance_transform_cdt(framed, "chessboard").max()) if least else np.inf
    return bound if bound < least else float(ndimage.distance_transform_edt(framed).max())


def border(grey: np.ndarray) -> np.ndarray:
    return np.concatenate([grey[0], grey[-1], grey[1:-1, 0], grey[1:-1, -1]])


def _paper(grey: np.ndarray, two_greys: float) -> tuple[np.ndarray, float]:
    """The grey value of the paper, broadcastable to [H, W], and its standard deviation.

    If the image has essentially two greys, as drawings and close crops do, the paper is the one closer to the corners.
    Otherwise the paper may be unevenly lit: a quadratic surface is fitted to the pixels without ink.
    """
    corners = np.median(grey[:: len(grey) - 1 or 1, :: len(grey[0]) - 1 or 1])
    dark, light, explained = _two_greys(grey)
    if explained > two_greys or min(grey.shape) < SIDE:
        return np.full((1, 1), dark if corners < (dark + light) / 2 else light, np.float32), 0.0
    y, x = (np.arange(side, dtype=np.float32) / max(grey.shape) for side in grey.shape)
    step = max(1, min(grey.shape) // 24)
    values, sy, sx = grey[::step, ::step], y[::step], x[::step]
    grid = np.broadcast_arrays(1, sx, sy[:, None], sx * sx, sx * sy[:, None], (sy * sy)[:, None])
    terms, values = np.stack(grid, axis=-1).reshape(-1, 6).astype(np.float32), values.reshape(-1)
    distance = np.abs(values - np.median(border(grey)))
    for _ in range(4):
        # At least 30 % of the pixels are paper; how close those are to the surface scales the threshold for the others.
        close = np.partition(distance, int(0.3 * len(distance)))[int(0.3 * len(distance))]
        near = distance <= max(8 * float(close), 2.0)
        paper = terms[near]
        c = np.linalg.solve(paper.T @ paper + 1e-4 * np.eye(6, dtype=np.float32), paper.T @ values[near])
        distance = np.abs(values - terms @ c)
    surface = (c[0] + c[1] * x + c[3] * x * x) + (c[2] * y + c[5] * y * y)[:, None] + c[4] * x * y[:, None]
    return surface, 1.4826 * float(np.median(distance[near]))


def is_drawing(grey: np.ndarray) -> bool:
    """Whether the image has essentially two greys, with the lighter one along its border."""
    return _edge_is_light(grey) and _two_greys(grey)[2] > TWO_GREYS


def _edge_is_light(grey: np.ndarray) -> bool:
    edge = border(grey)
    return bool(np.count_nonzero(edge > (grey.min() + grey.max()) / 2) > 0.4 * len(edge))


def _two_greys(grey: np.ndarray) -> tuple[float, float, float]:
    """Otsu's method: the mean greys of the two classes, and the fraction of the variance that they explain; 0 for one grey."""
    counts = np.array(Image.fromarray(grey.astype(np.uint8)).histogram(), np.float64)
    below, sums = counts.cumsum(), (counts * np.arange(256)).cumsum()
    above = below[-1] - below
    split = (below > 0) & (above > 0)
    if not split.any():
        return float(grey.mean()), float(grey.mean()), 0.0
    dark, light = sums[split] / below[split], (sums[-1] - sums[split]) / above[split]
    explained = below[split] * above[split] * (light - dark) ** 2 / below[-1] ** 2
    best = int(explained.argmax())
    return float(dark[best]), float(light[best]), float(explained[best] / grey.var())
