"""Images in NumPy's ``.npy`` and ``.npz`` files, one by one."""

import os
import re
import stat
import zipfile
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mnist_lit.inference.images import MAX_PIXELS, scaled
from mnist_lit.inference.ink import SIDE, ImageError
from mnist_lit.storage.archives import BROKEN, require_short_list
from mnist_lit.storage.tables import one_line

EXTENSIONS = (".npy", ".npz")
MAX_IMAGES = 1_000_000
MAX_BYTES = 2**30  # of an array in an .npz file, which is read as a whole; an .npy file may have any size
NAME = re.compile(r"(.+?\.(?:npy|npz))(?::(.*))?\[(\d+)\]", re.IGNORECASE | re.DOTALL)  # of an image, see ``names_in``


def names_in(path: str) -> list[str]:
    """The names of the images in a file: ``digits.npy[0]``, or ``mnist.npz:x_test[0]`` with the array's own name.

    Arrays are uint8 from 0 to 255 or of other numbers, [N, H, W], [N, H, W, channels], [N, channels, H, W], [N, 784] or of
    one image, [H, W] or [H, W, channels], with one channel or three. Others in an .npz file, such as labels, are left out.

    Raises:
        ImageError: The file is damaged or has no such array.
    """
    names: list[str] = []
    keys = [None] if path.lower().endswith(".npy") else _keys(path)
    shapes = {key: images.shape for key in keys if (images := _images(path, key)) is not None}
    for key, (count, rows, *_) in shapes.items():
        if count == 1 and any(count > 1 and rows == count for count, *_ in shapes.values()):
            continue  # a row for each image: labels, one-hot
        if len(names) + count > MAX_IMAGES:
            raise ImageError(f"has more than {MAX_IMAGES:,} images")
        names += [f"{path}{'' if key is None else f':{key}'}[{number}]" for number in range(count)]
    if not names:
        raise ImageError("has no images [N, H, W]")
    return names


def read_named(name: str) -> Image.Image:
    """The image of a name that ``names_in`` has given; grey, of one channel, or RGB."""
    match = NAME.fullmatch(name)
    assert match
    images = _images(match[1], match[2])
    assert images is not None
    if (size := images.shape[1] * images.shape[2]) > MAX_PIXELS:
        raise ImageError(f"has {size:,} pixels, more than {MAX_PIXELS:,}")
    image = np.asarray(images[int(match[3])])
    if image.ndim == 2:
        return Image.fromarray(image if image.dtype == np.uint8 else image.astype(np.float32))
    return Image.fromarray(image if image.dtype == np.uint8 else np.rint(scaled(image)).astype(np.uint8))


def _images(path: str, key: str | None) -> Any:
    """The images in an array, [N, H, W] or [N, H, W, 3]; None if it holds none."""
    try:
        status = os.stat(path)
    except OSError as error:
        raise ImageError(f"cannot be read ({error.strerror})") from error
    if not stat.S_ISREG(status.st_mode):  # a pipe would wait for a writer
        raise ImageError("is not a regular file")
    return _read(path, key, (status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size))


@lru_cache(maxsize=4)
def _read(path: str, key: str | None, version: tuple[int, ...]) -> Any:
    """``_images`` of one version of a file, which may be written anew in between."""
    try:
        array = np.lib.format.open_memmap(path, mode="r") if key is None else _entry(path, key)
    except Exception as error:  # NumPy reads the head of an array as Python source
        raise _damaged(error) from error
    if array is None or array.dtype.kind not in "buif" or array.size == 0:
        return None
    if array.ndim == 2:
        array = array.reshape(-1, SIDE, SIDE) if array.shape[1] == SIDE * SIDE else array[None]
    elif array.ndim == 3 and array.shape[2] in (1, 3):
        array = array[None]
    elif array.ndim == 4 and array.shape[1] in (1, 3):
        array = np.moveaxis(array, 1, 3)
    if array.ndim == 4 and array.shape[3] == 1:
        array = array[..., 0]
    return array if array.ndim == 3 or (array.ndim == 4 and array.shape[3] == 3) else None


def _keys(path: str) -> list[str]:
    try:
        require_short_list(Path(path))
        with zipfile.ZipFile(path) as archive:
            return [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]
    except BROKEN as error:
        raise _damaged(error) from error


def _damaged(error: Exception) -> ImageError:
    return ImageError(f"is damaged ({one_line(error, limit=200) or type(error).__name__})")


def _entry(path: str, key: str) -> np.ndarray | None:
    """An array of an .npz file, whose size is known before it is read: a small file can expand to any size.

    None for Python objects, such as names, which are not read.
    """
    with zipfile.ZipFile(path) as archive, archive.open(f"{key}.npy") as file:
        # Others it would expand at once, however large that is.
        if archive.getinfo(f"{key}.npy").compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError("compressed otherwise than by NumPy")
        version = np.lib.format.read_magic(file)
        read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        shape, fortran_order, dtype = read_header[version](file)
        if dtype.hasobject:
            return None
        if any(length < 0 for length in shape):
            raise ValueError("the shape of an array is negative")
        size = int(np.prod(shape, dtype=object)) * dtype.itemsize
        if size > MAX_BYTES:
            raise ValueError(f"an array of {size:,} bytes; at most {MAX_BYTES:,} are read")
        content = file.read(size)
    return np.frombuffer(content, dtype).reshape(shape, order="F" if fortran_order else "C")
