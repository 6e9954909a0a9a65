"""``MNISTLikeDataModule``: torchvision's other data sets of grey images with 28x28 pixels, such as Fashion-MNIST."""

import contextlib
import pickle
from collections.abc import Iterator
from typing import Any

import torch
import torchvision.datasets
from filelock import FileLock
from torch import Tensor

from mnist_lit import UserError
from mnist_lit.data import MNISTDataModule
from mnist_lit.storage.tables import one_line


class MNISTLikeDataModule(MNISTDataModule):
    """Like ``MNISTDataModule``, from a class of torchvision, which downloads the files and compares their checksums.

    Args:
        dataset: The class in ``torchvision.datasets``: FashionMNIST, KMNIST, QMNIST or EMNIST.
        dir: Data folder; the files are in its ``<dataset>/raw/``, or are downloaded there.
        options: More arguments of that class; EMNIST needs ``split: digits``.
        batch_size, val_size, seed: As in ``MNISTDataModule``.

    Raises:
        UserError: There is no such class, or the files can neither be read nor downloaded.
    """

    def __init__(
        self,
        dataset: str = "FashionMNIST",
        dir: str = "data",
        options: dict[str, Any] | None = None,
        batch_size: int = 500,
        val_size: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(dir, batch_size=batch_size, val_size=val_size, seed=seed)
        self.dataset, self.options = dataset, options or {}
        cls = getattr(torchvision.datasets, dataset, None)
        if not (isinstance(cls, type) and issubclass(cls, torchvision.datasets.MNIST)):
            raise UserError(f"data.dataset={dataset}: torchvision.datasets has no such class that is like MNIST")
        self.cls: Any = cls

    def prepare_data(self) -> None:
        if self.facts:
            return
        with self._errors_as_user_errors():
            if self._is_there():  # perhaps in a folder that is read-only
                return
            self.dir.mkdir(parents=True, exist_ok=True)
            with FileLock(self.dir / f".{self.dataset}.lock"):  # one process downloads
                for train in (True, False):
                    self.cls(self.dir, train=train, download=True, **self.options)

    def _is_there(self) -> bool:
        with contextlib.suppress(RuntimeError):  # torchvision's
            return all(self.cls(self.dir, train=train, **self.options) for train in (True, False))
        return False

    def read(self) -> tuple[dict[str, Any], tuple[Tensor, Tensor, Tensor, Tensor]]:
        with self._errors_as_user_errors():
            train, test = (self.cls(self.dir, train=train, **self.options) for train in (True, False))
            facts = {"name": self.dataset, "classes": [*train.classes]}
            return facts, (*self._arrays(train), *self._arrays(test))

    def _arrays(self, dataset: Any) -> tuple[Tensor, Tensor]:
        images, labels = dataset.data, dataset.targets
        if self.cls is torchvision.datasets.EMNIST:
            images = images.transpose(1, 2).contiguous()  # its files have rows and columns exchanged
        if images.shape[1:] != (28, 28) or len(images) != len(labels):
            raise ValueError(f"{len(images)} images {tuple(images.shape[1:])} and {len(labels)} labels")
        return images, (labels if labels.dim() == 1 else labels[:, 0]).to(torch.int64)  # QMNIST has more than labels

    @contextlib.contextmanager
    def _errors_as_user_errors(self) -> Iterator[None]:
        try:
            yield
        except (OSError, RuntimeError, TypeError, ValueError, AssertionError, pickle.UnpicklingError) as error:
            where = self.dir / self.dataset
            raise UserError(
                f"{where} has no data set that torchvision can read ({one_line(error)}); data.dir= is the folder that "
                f"{self.dataset}/raw/ with its files is in; if they are damaged, delete them, and the next run downloads them"
            ) from error
