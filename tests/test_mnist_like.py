"""torchvision's data sets that are like MNIST: downloaded from a server on loopback, trained on, named everywhere."""

import functools
import gzip
import hashlib
import http.server
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.datasets
from helpers import assert_same, results
from PIL import Image

from mnist_lit import UserError
from mnist_lit.cli.config import settings
from mnist_lit.inference import web
from mnist_lit.inference.trained import load
from mnist_lit.mnist_like import MNISTLikeDataModule
from mnist_lit.predict import predict
from mnist_lit.storage import runs
from mnist_lit.train import train

FILES = ["train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"]
GROUPS = {"fashion_mnist": "FashionMNIST", "kmnist": "KMNIST"}


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


@pytest.fixture(scope="module")
def arrays() -> list[np.ndarray]:
    draw = np.random.default_rng(0)
    shapes = [(300, 28, 28), (300,), (100, 28, 28), (100,)]
    return [draw.integers(0, 256 if len(shape) == 3 else 10, shape) for shape in shapes]


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def mirror(tmp_path: Path, arrays: list[np.ndarray], monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of a server that has the files of each data set, whose checksums torchvision expects."""
    folder = tmp_path / "mirror"
    folder.mkdir()
    for name, array in zip(FILES, arrays, strict=True):
        (folder / f"{name}.gz").write_bytes(gzip.compress(idx(array)))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    sums = [(f"{name}.gz", hashlib.md5((folder / f"{name}.gz").read_bytes()).hexdigest()) for name in FILES]
    for cls in map(torchvision.datasets.__dict__.get, GROUPS.values()):
        monkeypatch.setattr(cls, "mirrors", [f"http://127.0.0.1:{server.server_address[1]}/"])
        monkeypatch.setattr(cls, "resources", sums)
    yield folder
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.parametrize("group", GROUPS)
def test_it_is_downloaded_and_trained_on_and_its_classes_are_named(group: str, mirror: Path, tmp_path: Path) -> None:
    asked = [f"data={group}", f"data.dir={tmp_path / 'data'}", "data.batch_size=100", "trainer.accelerator=cpu"]
    train(tmp_path / "run", **settings("train", *asked, "trainer.max_epochs=2", "data.val_size=50"))
    found, names = results(tmp_path / "run"), getattr(torchvision.datasets, GROUPS[group]).classes
    facts = found["data"]
    assert {key: facts[key] for key in ("name", "train", "val", "test", "classes")} == {
        "name": GROUPS[group],
        "train": 250,
        "val": 50,
        "test": 100,
        "classes": names,
    }
    assert [row["name"] for row in found["test/digits"]] == names
    assert torch.load(tmp_path / "run" / runs.LAST, weights_only=True)["data"][0]["classes"] == names
    assert names[2] in (tmp_path / "run" / "report.html").read_text()

    picture = Image.new("L", (28, 28))
    picture.paste(255, (12, 4, 16, 24))
    picture.save(tmp_path / "picture.png")
    (row,) = predict(tmp_path / "picture.png", tmp_path / "run", tmp_path / "p.csv", preprocess="none")
    assert row["name"] == names[row["digit"]] and row["name"] in (tmp_path / "p.csv").read_text()
    answer = web._Predictor(load(tmp_path / "run"))._predict((tmp_path / "picture.png").read_bytes())
    assert answer["name"] == names[answer["digit"]]


def test_a_changed_file_is_not_taken_from_the_mirror(mirror: Path, tmp_path: Path) -> None:
    (mirror / f"{FILES[0]}.gz").write_bytes(gzip.compress(b"something else"))
    data = MNISTLikeDataModule("KMNIST", str(tmp_path / "data"))
    with pytest.raises(
        UserError, match=r"KMNIST has no data set that torchvision can read \(Error downloading"
    ) as refused:
        data.prepare_data()
    assert "\n" not in str(refused.value)


def test_files_that_are_there_are_read_without_a_mirror(arrays: list[np.ndarray], tmp_path: Path) -> None:
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for name, array in zip(FILES, arrays, strict=True):
        (raw / name).write_bytes(idx(array))
    data = MNISTLikeDataModule("FashionMNIST", str(tmp_path))
    data.prepare_data()
    data.setup()
    assert [path.name for path in tmp_path.iterdir()] == ["FashionMNIST"]  # which may be in a read-only folder
    assert_same(data.train_images, torch.from_numpy(arrays[0].astype(np.uint8)))
    assert_same(data.test_labels, torch.from_numpy(arrays[3].astype(np.int64)))
    (raw / FILES[1]).write_bytes(idx(arrays[1][:200]))
    with pytest.raises(UserError, match=r"300 images \(28, 28\) and 200 labels"):
        MNISTLikeDataModule("FashionMNIST", str(tmp_path)).setup()
    (raw / FILES[1]).write_bytes(b"nothing")
    with pytest.raises(UserError, match="no data set that torchvision can read"):
        MNISTLikeDataModule("FashionMNIST", str(tmp_path)).setup()


def test_images_of_emnist_stand_upright_and_labels_of_qmnist_are_digits(
    arrays: list[np.ndarray], tmp_path: Path
) -> None:
    raw = tmp_path / "EMNIST" / "raw"
    raw.mkdir(parents=True)
    for name, array in zip(FILES, arrays, strict=True):
        (raw / f"emnist-digits-{name.replace('t10k', 'test')}").write_bytes(idx(array))
    data = MNISTLikeDataModule("EMNIST", str(tmp_path), {"split": "digits"})
    data.setup()
    assert_same(data.train_images, torch.from_numpy(arrays[0].astype(np.uint8)).transpose(1, 2))
    assert data.facts["classes"] == list("0123456789")

    class OfQMNIST:
        data, targets = torch.zeros(2, 28, 28, dtype=torch.uint8), torch.tensor([[3, 0, 1], [7, 1, 2]])

    assert_same(MNISTLikeDataModule("QMNIST")._arrays(OfQMNIST())[1], torch.tensor([3, 7]))


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="no data set that torchvision can read"):
        MNISTLikeDataModule("KMNIST", str(tmp_path / "file")).prepare_data()


@pytest.mark.parametrize("name", ["CIFAR10", "Nothing", "MNISTT"])
def test_other_classes_are_refused(name: str) -> None:
    with pytest.raises(
        UserError, match=rf"data\.dataset={name}: torchvision\.datasets has no such class that is like MNIST"
    ):
        MNISTLikeDataModule(name)
