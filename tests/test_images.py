"""Images of any kind normalized to MNIST's form; the numbers are the rows of docs/faults.md."""

import contextlib
import io
import os
import struct
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import ROOT, assert_same
from pictures import KINDS, NO_DIGITS, two
from PIL import Image
from scipy import ndimage

from mnist_lit.inference import web
from mnist_lit.inference.detector import load_detector
from mnist_lit.inference.digit import _found, each_to_mnist, to_mnist
from mnist_lit.inference.images import MAX_PIXELS, prepare, read_grey
from mnist_lit.inference.ink import ImageError
from mnist_lit.inference.trained import load

Pixels = np.ndarray


def saved(pixels: Pixels | Image.Image, format: str = "PNG", **options: Any) -> io.BytesIO:
    file = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(file, format=format, **options)
    file.seek(0)
    return file


def accuracy(run: Path, images: list[Pixels], labels: Pixels) -> float:
    with torch.inference_mode():
        predicted = load(run)(torch.from_numpy(np.stack(images)).unsqueeze(1) / 255).argmax(1)
    return float((predicted.numpy() == labels).mean())


def scaled(digit: Pixels, side: int = 140) -> Pixels:
    return np.asarray(Image.fromarray(digit).resize((side, side), Image.Resampling.BICUBIC))


def on_paper(digit: Pixels, draw: np.random.Generator) -> Pixels:
    """Black on white at a random position of 100x140 pixels, rotated by up to 10°, with a light gradient, a lamp and noise."""
    side = int(28 * draw.uniform(2, 3.3))
    turned = Image.fromarray(scaled(digit, side)).rotate(draw.uniform(-10, 10), Image.Resampling.BICUBIC)
    canvas = Image.new("L", (100, 140))
    canvas.paste(turned, (int(draw.uniform(0, 100 - side)), int(draw.uniform(0, 140 - side))))
    ink = np.asarray(canvas, float) / 255
    y, x = np.mgrid[0:140, 0:100] / 140
    slope, lamp = draw.uniform(-80, 80, 2), draw.uniform(0, 1, 2)
    paper = 195 + slope[0] * (x - 0.35) + slope[1] * (y - 0.5) - 60 * ((x - lamp[0]) ** 2 + (y - lamp[1]) ** 2)
    return np.asarray((paper * (1 - 0.8 * ink) + draw.normal(0, 3, ink.shape)).clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize("options", [{"format": "PNG"}, {"format": "JPEG", "quality": 75}])
def test_1000_digits_on_unevenly_lit_paper_lose_less_than_two_points(
    options: dict[str, Any], good_run: Path, digits
) -> None:
    images, labels = digits
    draw = np.random.default_rng(0)
    prepared = [prepare(saved(on_paper(digit, draw), **options)) for digit in images]
    assert accuracy(good_run, prepared, labels) > accuracy(good_run, list(images), labels) - 0.02


def colored(digit: Pixels, ink: tuple[int, int, int], paper: tuple[int, int, int]) -> Pixels:
    share = scaled(digit)[..., None] / 255
    return np.asarray((share * ink + (1 - share) * paper).round().astype(np.uint8))


def transparent(digit: Pixels, ink: int) -> Pixels:
    return np.dstack([np.full((140, 140, 3), ink, np.uint8), scaled(digit)])


CHANGES: dict[str, Callable[[Pixels], Pixels]] = {
    "scaled": scaled,
    "small": lambda digit: np.asarray(Image.fromarray(digit).reduce(2)),
    "inverted": lambda digit: 255 - digit,
    "shifted": lambda digit: np.pad(255 - scaled(digit), ((0, 300), (200, 20)), constant_values=255),
    "cropped": lambda digit: 255 - np.pad(digit[np.ix_(digit.any(1), digit.any(0))], 1).repeat(5, 0).repeat(5, 1),
    "faint": lambda digit: (200 - scaled(digit) / 6).astype(np.uint8),
    "blue on white": lambda digit: colored(digit, (30, 60, 200), (255, 255, 255)),
    "yellow on white": lambda digit: colored(digit, (255, 240, 0), (255, 255, 255)),
    "red on green of the same lightness": lambda digit: colored(digit, (255, 0, 0), (0, 130, 0)),
    "black on transparent": lambda digit: transparent(digit, 0),
    "white on transparent": lambda digit: transparent(digit, 255),
    "with specks": lambda digit: with_specks(255 - scaled(digit)),
}


def with_specks(image: Pixels) -> Pixels:
    image = np.pad(image, 40, constant_values=255)
    for y, x in ((5, 5), (200, 190), (20, 150), (110, 3)):
        image[y : y + 4, x : x + 4] = 0
    return image


@pytest.mark.parametrize("change", CHANGES)
def test_changed_digits_are_still_recognized(change: str, good_run: Path, digits) -> None:
    images, labels = digits[0][:300], digits[1][:300]
    prepared = [prepare(saved(CHANGES[change](digit))) for digit in images]
    lost = accuracy(good_run, list(images), labels) - accuracy(good_run, prepared, labels)
    assert lost <= (0.06 if change == "small" else 0.02)


def test_thin_strokes_are_thickened_to_those_of_mnist(good_run: Path, digits, monkeypatch) -> None:
    def thin(digit: Pixels) -> Pixels:
        inside = ndimage.distance_transform_edt(scaled(digit, 280) > 127)
        line = (inside > 0.75 * ndimage.maximum_filter(inside, 15)) & (inside > 0)
        return np.where(ndimage.binary_dilation(line), 20, 255).astype(np.uint8)  # some are in pieces

    images, labels = digits[0][:300], digits[1][:300]
    files = [thin(digit) for digit in images]
    thick = accuracy(good_run, [prepare(saved(file), refuse=False) for file in files], labels)
    assert thick > accuracy(good_run, list(images), labels) - 0.03
    monkeypatch.setattr("mnist_lit.inference.digit.MIN_STROKE", 0)
    assert accuracy(good_run, [prepare(saved(file), refuse=False) for file in files], labels) < thick


def as_file(picture: Pixels, format: str = "PNG") -> io.BytesIO:
    return saved(picture if picture.dtype == np.uint16 else picture.clip(0, 255).round().astype(np.uint8), format)


def enlarged(picture: Pixels, side: int = 900) -> Pixels:
    """With smooth edges, as a scanner or a phone would have them."""
    image = Image.fromarray(picture.astype(np.float32))
    factor = side / max(image.size)
    size = round(image.width * factor), round(image.height * factor)
    return np.asarray(image.resize(size, Image.Resampling.BICUBIC)).clip(0, picture.max()).astype(picture.dtype)


@pytest.mark.parametrize("change", [np.asarray, enlarged])
@pytest.mark.parametrize("kind", KINDS)
def test_pictures_as_people_have_them_are_read(
    kind: str, change: Callable[[Pixels], Pixels], good_run: Path, clear
) -> None:
    images, labels = clear[0][:150], clear[1][:150]
    random = np.random.default_rng(7)
    prepared = []
    for image in images:
        try:
            prepared.append(prepare(as_file(change(KINDS[kind](image, random)), "TIFF")))  # writes faster than PNG
        except ImageError:
            prepared.append(np.zeros((28, 28), np.uint8))
    assert accuracy(good_run, prepared, labels) > FLOORS.get(kind, 0.97)


FLOORS = {"shadow": 0.95}


def test_a_wide_picture_keeps_the_height_of_its_digits(good_run: Path, clear) -> None:
    random, right = np.random.default_rng(7), 0
    for _ in range(30):
        row = random.integers(0, len(clear[0]), 16)
        line = np.pad(np.concatenate(clear[0][row], axis=1), 8)
        grey = read_grey(as_file(255 - enlarged(line, 4000)))
        with contextlib.suppress(ImageError):
            digits = each_to_mnist(grey)
            right += len(digits) == 16 and accuracy(good_run, digits, clear[1][row]) == 1
    assert right >= 27


def test_a_large_digit_in_a_drawing_is_found_at_half_the_size(digits) -> None:
    def drawing(side: int) -> Pixels:
        return 255 - np.pad(scaled(digits[0][0], side) > 127, (280 - side) // 2) * np.float32(255)

    assert _found(drawing(240))[0].shape == (140, 140)
    assert _found(drawing(100))[0].shape == (280, 280)
    noise = np.random.default_rng(0).normal(0, 60, (280, 280)).astype(np.float32)
    assert _found((drawing(240) + noise).clip(0, 255))[0].shape == (280, 280)


def test_what_shows_no_digit_is_refused_or_unsure(good_run: Path) -> None:
    random, model, detector = np.random.default_rng(7), load(good_run), load_detector()
    honest = {}
    for kind, make in NO_DIGITS.items():
        honest[kind] = 0
        for _ in range(125):
            try:
                inputs = torch.from_numpy(prepare(as_file(make(random))))[None, None] / 255
            except ImageError:
                honest[kind] += 1
                continue
            with torch.inference_mode():
                honest[kind] += bool(not detector.shows_digit(inputs) or model(inputs).max() < 0.6)
    assert sum(honest.values()) >= 450, honest


def test_digits_on_paper_of_every_kind_show_a_digit(good_run: Path, clear) -> None:
    """Less than 2 % of those that would be read rightly are refused."""
    random, model, detector = np.random.default_rng(8), load(good_run), load_detector()
    for kind, make in KINDS.items():
        prepared, labels = [], []
        for image, label in zip(clear[0][:150], clear[1], strict=False):
            with contextlib.suppress(ImageError):
                prepared.append(prepare(as_file(make(image, random))))
                labels.append(label)
        inputs = torch.from_numpy(np.stack(prepared)).unsqueeze(1) / 255
        with torch.inference_mode():
            right = model(inputs).argmax(1) == torch.tensor(labels)
            assert (right & ~detector.shows_digit(inputs)).sum() < 3, kind


def test_mnists_own_digits_show_a_digit(digits) -> None:
    assert load_detector().shows_digit(torch.from_numpy(digits[0]).unsqueeze(1) / 255).float().mean() > 0.99


def test_two_digits_are_no_digit(clear) -> None:
    random = np.random.default_rng(7)
    pairs = list(zip(clear[0][:150], clear[0][150:300], strict=True))
    refused = 0
    for pair in pairs:
        picture = as_file(two(pair, random))
        try:
            prepare(picture)
        except ImageError as error:
            refused += str(error) == "shows two shapes side by side instead of one digit"
        picture.seek(0)
        assert prepare(picture, refuse=False).max() == 255  # the likelier one
    assert refused >= 0.95 * len(pairs)


def test_an_image_in_mnists_form_is_unchanged_in_every_format_and_mode(digits) -> None:
    digit = digits[0][0]
    grey = Image.fromarray(digit)
    for mode in ("L", "RGB", "RGBA", "LA", "P"):
        assert_same(prepare(saved(grey.convert(mode))), digit)
    for format in ("BMP", "TIFF", "PNG"):
        assert_same(prepare(saved(grey, format)), digit)
    assert_same(prepare(saved(grey, "WEBP", lossless=True)), digit)
    assert_same(prepare(saved(grey, "GIF")), digit)
    assert_same(prepare(saved(grey, "JPEG2000")), digit)
    assert abs(prepare(saved(grey, "AVIF", quality=95)).astype(int) - digit).max() < 40
    assert abs(prepare(saved(grey, "JPEG", quality=95)).astype(int) - digit).max() < 40
    assert_same(prepare(saved(digit.astype(np.uint16) * 257)), digit)  # 16 bits
    assert_same(prepare(saved(Image.fromarray(digit / np.float32(255)), "TIFF")), digit)  # floating point
    black_and_white = Image.fromarray(digit > 127)
    assert_same(prepare(saved(black_and_white)), (digit > 127) * np.uint8(255))


def test_the_result_has_mnists_form(digits) -> None:
    for digit in digits[0][:50]:
        image = to_mnist(255 - np.pad(scaled(digit), ((3, 90), (50, 0))).astype(np.float32))
        assert image.shape == (28, 28) and image.dtype == np.uint8 and image.max() == 255
        rows, columns = np.flatnonzero(image.any(1)), np.flatnonzero(image.any(0))
        assert max(np.ptp(rows), np.ptp(columns)) + 1 == 20
        assert all(abs(center - 14) <= 0.6 for center in ndimage.center_of_mass(image))


def test_exif_orientation_is_applied_and_a_preview_is_ignored(digits) -> None:
    page = Image.fromarray(255 - np.pad(scaled(digits[0][0]), 20))
    upright = prepare(saved(page, "JPEG", quality=95))
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90° clockwise
    turned = saved(page.transpose(Image.Transpose.ROTATE_90), "JPEG", quality=95, exif=exif)
    assert abs(prepare(turned).astype(int) - upright).mean() < 3
    preview = saved(page, "MPO", quality=95, save_all=True, append_images=[page.resize((50, 50))])
    assert_same(prepare(preview), upright)


def test_31_large_images_are_read_at_a_reduced_size(digits) -> None:
    page = Image.new("RGB", (6000, 8000), "white")
    page.paste(Image.fromarray(255 - scaled(digits[0][0], 2000)), (3000, 1000))
    small = to_mnist(np.pad(255 - scaled(digits[0][0], 128), 64, constant_values=255).astype(np.float32))
    for format in ("PNG", "JPEG"):
        assert max(read_grey(saved(page, format)).shape) <= 512
        assert abs(prepare(saved(page, format)).astype(int) - small).mean() < 8


def broken(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 255]) + content[place + 1 :]


def test_31_what_cannot_be_read_gets_one_line(digits, tmp_path: Path) -> None:
    png = saved(scaled(digits[0][0])).getvalue()
    two = [Image.new("L", (30, 30), level) for level in (0, 255)]
    noise = np.random.default_rng(0).normal(128, 20, (100, 100)).clip(0, 255).astype(np.uint8)
    bomb = saved(Image.new("1", (20_000, 20_000))).getvalue()
    (tmp_path / "folder").mkdir()
    cases: dict[str, list[Any]] = {
        r"cannot be read \(No such file or directory\)": [tmp_path / "nowhere.png"],
        r"cannot be read \(Is a directory\)": [tmp_path / "folder"],
        "is not an image in PNG, JPEG, BMP, TIFF, WEBP, GIF, AVIF or JPEG2000 format": [
            io.BytesIO(b"hello"),
            io.BytesIO(),
        ],
        "is damaged": [io.BytesIO(png[: len(png) // 2]), io.BytesIO(broken(png, 60))],
        "has more than 80,000,000 pixels|more than 80,000,000": [io.BytesIO(bomb)],
        "contains several images instead of one": [
            saved(two[0], format, save_all=True, append_images=two[1:])
            for format in ("PNG", "TIFF", "WEBP", "GIF", "AVIF")
        ],
        "is blank": [
            saved(np.full(shape, level, np.uint8))
            for shape in ((1, 1), (28, 28), (1, 300), (200, 100))
            for level in (0, 128, 255)
        ]
        + [saved(noise), saved(np.zeros((50, 50, 4), np.uint8))],
    }
    for sentence, files in cases.items():
        for file in files:
            with warnings.catch_warnings(), pytest.raises(ImageError, match=sentence) as refused:
                warnings.simplefilter("ignore")
                prepare(file)
            assert "\n" not in str(refused.value)


def tiff(pages: int, **tags: int) -> bytes:
    """A TIFF of 10x10 grey pixels; each page has nothing but these numbers, and no data."""
    numbers = {256: 10, 257: 10, 258: 8, 259: 1, 262: 1, 273: 8, 277: 1, 279: 100} | {
        int(tag[1:]): number for tag, number in tags.items()
    }
    fields = b"".join(struct.pack("<HHII", tag, 4, 1, number) for tag, number in sorted(numbers.items()))
    size = 2 + len(fields) + 4
    directories = [
        struct.pack("<H", len(numbers)) + fields + struct.pack("<I", 8 + size * page if page < pages else 0)
        for page in range(1, pages + 1)
    ]
    return struct.pack("<2sHI", b"II", 42, 8) + b"".join(directories)


def with_scans(count: int, side: int) -> bytes:
    """A progressive JPEG whose second scan, of a single byte, is repeated."""
    jpeg = saved(np.zeros((side, side), np.uint8), "JPEG", progressive=True).getvalue()
    start = jpeg.index(b"\xff\xda", jpeg.index(b"\xff\xda") + 1)
    scan = jpeg[start : start + 2 + int.from_bytes(jpeg[start + 2 : start + 4], "big")] + b"\0"
    return jpeg[:start] + scan * count + b"\xff\xd9"


def test_31_small_files_that_would_take_minutes_or_gigabytes_are_refused(tmp_path: Path) -> None:
    """They took 25 s (pages), 20 s (scans), 1.5 GB (tiles), and 4 GB and 30 s (a chunk of a file with holes)."""
    png = saved(np.eye(30, dtype=np.uint8) * 255).getvalue()
    (tmp_path / "chunk.png").write_bytes(png[:33] + struct.pack(">I", 2**31 - 1) + b"abCd")
    os.truncate(tmp_path / "chunk.png", 2**31 + 100)  # takes no space on the disk
    os.mkfifo(tmp_path / "fifo.png")
    started = time.monotonic()
    for file, max_pixels, reason in (
        (io.BytesIO(tiff(20_000)), MAX_PIXELS, "contains several images"),
        (io.BytesIO(with_scans(50_000, 1024)), web.MAX_PIXELS, "has 50,001 scans, too many for 1024x1024 pixels"),
        (io.BytesIO(tiff(1, _322=40_000, _323=40_000)), MAX_PIXELS, "is stored in tiles of more than 80,000,000"),
        (tmp_path / "chunk.png", MAX_PIXELS, "has more than 67,108,864 bytes"),
        (tmp_path / "fifo.png", MAX_PIXELS, "is not a regular file"),
    ):
        with pytest.raises(ImageError, match=reason):
            read_grey(file, max_pixels=max_pixels)
    assert time.monotonic() - started < 5
    assert read_grey(io.BytesIO(with_scans(40, 1024)), max_pixels=web.MAX_PIXELS).shape == (256, 256)


def test_31_images_of_odd_shapes_are_read() -> None:
    for shape in ((1, 2), (2, 2), (3, 200), (200, 3), (7, 7), (1000, 9), (1, 200_000), (200_000, 1)):
        image = np.full(shape, 255, np.uint8)
        image[: max(1, shape[0] // 2), : max(1, shape[1] // 2)] = 0
        assert prepare(saved(image)).max() == 255
    cmyk = Image.fromarray(CHANGES["blue on white"](np.eye(28, dtype=np.uint8) * 255)).convert("CMYK")
    assert prepare(saved(cmyk, "JPEG")).max() == 255


def test_random_and_mutated_files_are_read_or_refused(digits) -> None:
    draw = np.random.default_rng(0)
    sources = [saved(Image.fromarray(scaled(digits[0][0], 60)), format).getvalue() for format in
               ("PNG", "JPEG", "BMP", "TIFF", "WEBP", "GIF", "AVIF", "JPEG2000")]  # fmt: skip
    for _ in range(400):
        content = bytearray(sources[draw.integers(len(sources))])
        for _ in range(draw.integers(1, 6)):
            content[draw.integers(len(content))] = draw.integers(256)
        file = io.BytesIO(content[: draw.integers(1, len(content) + 1)] if draw.random() < 0.3 else content)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                assert prepare(file).shape == (28, 28)
            except ImageError as error:
                assert "\n" not in str(error)


def test_preprocess_none_takes_pixels_as_they_are(digits) -> None:
    assert_same(prepare(saved(255 - digits[0][0]), "none"), 255 - digits[0][0])
    assert_same(prepare(saved(np.zeros((28, 28), np.uint8)), "none"), np.zeros((28, 28), np.uint8))
    with pytest.raises(ImageError, match="has 30x20 pixels, but preprocess=none requires 28x28"):
        prepare(saved(np.zeros((20, 30), np.uint8)), "none")


def test_worker_processes_do_not_import_torch() -> None:
    code = "import sys, mnist_lit.predict; print([n for n in ('torch', 'hydra', 'matplotlib') if n in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True) == "[]\n"


def test_a_dim_16_bit_picture_of_a_sheet_in_one_grey_is_read() -> None:
    grey = np.full((120, 120), 100, np.uint16)
    grey[25:95, 25:95], grey[40:80, 57:63], grey[3, 3] = 450, 280, 65535
    with contextlib.suppress(ImageError):
        prepare(saved(grey))


def test_numbers_beyond_those_of_a_difference_are_read(digits) -> None:
    values = (digits[0][0].astype(np.float32) / 127.5 - 1) * np.float32(3e38)
    assert prepare(saved(values, "TIFF"), refuse=False).max() == 255


def test_a_picture_with_damaged_exif_data_is_read_as_it_is(digits) -> None:
    whole = prepare(saved(scaled(digits[0][0]), "JPEG", dpi=(72, 72)))
    odd = saved(scaled(digits[0][0]), "JPEG", dpi=(72, 72), exif=b"Exif\0\0not an EXIF block")
    assert_same(prepare(odd), whole)


def test_an_avif_that_is_also_a_heif_is_an_avif(digits) -> None:
    content = bytearray(saved(scaled(digits[0][0]), "AVIF").getvalue())
    assert content[8:12] == b"avif" and b"avif" in content[16:64]
    expected = prepare(io.BytesIO(bytes(content)))
    content[8:12] = b"mif1"
    assert_same(prepare(io.BytesIO(bytes(content))), expected)
