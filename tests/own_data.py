"""A ``LightningDataModule`` as a user of Lightning writes it, knowing nothing of this project, and a network for it."""

from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

ASKED = ["data._target_=own_data.Patches", "model._target_=own_data.Net", "trainer.accelerator=cpu"]


class Patches(L.LightningDataModule):
    """Colour images 32x32 in five classes: the class is the brightest of five columns."""

    def __init__(self, size: int = 200, batch_size: int = 50, workers: int = 0) -> None:
        super().__init__()
        self.size, self.batch, self.workers = size, batch_size, workers

    def setup(self, stage: str) -> None:
        draw = torch.Generator().manual_seed(0)
        labels = torch.randint(5, (self.size,), generator=draw)
        images = torch.rand(self.size, 3, 32, 32, generator=draw)
        for image, label in zip(images, labels, strict=True):
            image[:, :, 6 * label : 6 * label + 6] += 0.3
        self.images = TensorDataset(images, labels)

    def _loader(self, **options: Any) -> DataLoader[Any]:
        return DataLoader(self.images, self.batch, **options)

    def train_dataloader(self) -> DataLoader[Any]:
        return self._loader(shuffle=True, num_workers=self.workers)

    def val_dataloader(self) -> DataLoader[Any]:
        return self._loader()

    def test_dataloader(self) -> DataLoader[Any]:
        return self._loader()


class Net(nn.Module):
    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.layer = nn.Linear(3 * 32 * 32, classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.layer(images.flatten(1))
