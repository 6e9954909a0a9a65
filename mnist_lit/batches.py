"""The order of the images: a function of seed and epoch, so that a run can resume from the middle of an epoch."""

import hashlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler


class ResumableLoader(DataLoader[tuple[Tensor, Tensor]]):
    """A loader over ``EpochBatches`` whose position in the epoch Lightning saves in checkpoints and restores."""

    sampler: "EpochBatches"

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.sampler.epoch, "given": self.sampler.given}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.sampler.resume_from = state


class EpochBatches(DistributedSampler[Tensor]):
    """Batch sampler: yields this rank's indices of each batch of the epoch that Lightning has set.

    A ``DistributedSampler``, so that Lightning does not divide the batches among the processes once more.

    Args:
        count: Number of images.
        batch_size: Global batch size.
        seed: Determines the order of the images together with the epoch; None keeps the original order.
        rank: This process's rank; every image goes to exactly one rank.
        processes: Number of processes that share each batch.
        device: Where the indices are, which is that of the images.

    Attributes:
        given: Number of batches of this epoch yielded so far.
        resume_from: An ``epoch`` and the number of batches to skip in it (``given``); None to skip none.
    """

    def __init__(
        self,
        count: int,
        batch_size: int,
        seed: int | None = None,
        rank: int = 0,
        processes: int = 1,
        device: torch.device | str = "cpu",
    ) -> None:
        self.count, self.batch_size, self.order_seed = count, batch_size, seed
        self.rank, self.processes, self.device = rank, processes, device
        self.epoch = self.given = 0
        self.resume_from: dict[str, int] | None = None

    def __len__(self) -> int:
        return math.ceil(self.count / self.batch_size)

    def __iter__(self) -> Iterator[Tensor]:
        seed = self.order_seed
        order = torch.arange(self.count) if seed is None else epoch_order(seed, self.epoch, self.count)
        state, self.resume_from = self.resume_from, None
        first = state["given"] if state and state["epoch"] == self.epoch else 0
        for given, batch in enumerate(order.to(self.device).split(self.batch_size)[first:], first + 1):
            self.given = given
            yield batch[self.rank :: self.processes]


def epoch_order(seed: int, epoch: int, count: int) -> Tensor:
    """The permutation of ``count`` images in an epoch, a function of seed and epoch alone."""
    generator = torch.Generator().manual_seed(number_from("order", seed, epoch))
    return torch.randperm(count, generator=generator)


def number_from(*what: int | str) -> int:
    """A 63-bit seed derived from ``what``, by a hash: with a sum, seed 1 epoch 2 would equal seed 2 epoch 1."""
    digest = hashlib.sha256(" ".join(map(str, what)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
