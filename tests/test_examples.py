"""``examples/one_file.py``: short, without this package, the same training, and it runs as it stands."""

import ast
import runpy
import shutil
import struct
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from conftest import Command
from helpers import ROOT
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from mnist_lit.data import scale
from mnist_lit.model import TUTORIAL_MODEL, MNISTClassifier

ONE_FILE = ROOT / "examples" / "one_file.py"


def losses(module: L.LightningModule, images: Tensor, labels: Tensor) -> list[float]:
    """Those of steps of 500 images, in the given order."""
    seen: list[float] = []

    class Look(L.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            seen.append(outputs["loss"].item())

    quiet: Any = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = L.Trainer(accelerator="cpu", max_epochs=1, limit_val_batches=0, callbacks=[Look()], **quiet)
    trainer.fit(module, DataLoader(TensorDataset(images, labels), 500))
    return seen


def test_one_file_is_one_page_and_needs_nothing_of_this_package() -> None:
    text = ONE_FILE.read_text()
    assert len(text.splitlines()) <= 80
    nodes = list(ast.walk(ast.parse(text)))
    names = [alias.name for node in nodes if isinstance(node, (ast.Import, ast.ImportFrom)) for alias in node.names]
    modules = [str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)]
    assert {name.partition(".")[0] for name in modules} == {"torch", "torchvision"}
    assert {name for name in names if name.islower()} == {"argparse", "lightning", "torch", "nn"}


def test_ten_steps_of_one_file_have_the_losses_of_the_package(sample) -> None:
    torch.manual_seed(0)
    copied = runpy.run_path(str(ONE_FILE))["TutorialCNN"](dropout=0.0)
    own = MNISTClassifier({**TUTORIAL_MODEL, "dropout": 0.0})
    for mine, its in zip(own.network.parameters(), copied.parameters(), strict=True):
        assert its.std().item() == pytest.approx(mine.std().item(), rel=0.2)  # 0 for biases
        mine.data.copy_(its.data)
    images = scale(torch.cat([sample.train_images, sample.test_images]))
    labels = torch.cat([sample.train_labels, sample.test_labels])
    expected = losses(own, images, labels)
    assert len(expected) == 10
    assert losses(copied, images, labels) == pytest.approx(expected, rel=1e-5)


def test_one_file_runs_wherever_it_is_copied(sample, tmp_path: Path, command: Command) -> None:
    shutil.copy(ONE_FILE, tmp_path)
    raw = tmp_path / "data" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for prefix, images, labels in (
        ("train", sample.train_images[::4], sample.train_labels[::4]),
        ("t10k", sample.test_images, sample.test_labels),
    ):
        head = struct.pack(">4i", 2051, len(images), 28, 28)
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(head + bytes(images.contiguous().numpy()))
        head = struct.pack(">2i", 2049, len(labels))
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(head + bytes(labels.to(torch.uint8).numpy()))
    done = command.start("--epochs", "1", module="one_file", cwd=tmp_path).ended()
    assert done.returncode == 0, done.stderr
    loss, accuracy = (float(line.split("= ")[1]) for line in done.stdout.splitlines()[-2:])
    assert 0 < loss < 2.4 and 0.1 < accuracy < 1
