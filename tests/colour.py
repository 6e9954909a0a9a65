"""Colour images in twelve classes, a network for them, and one whose report fails."""

import torch
from torch import Tensor, nn

from mnist_lit.data import MNISTDataModule

ASKED = [
    *("data._target_=colour.ColourDigits", "data.source=sample", "trainer.accelerator=cpu", "trainer.fast_dev_run=2"),
    *("model._target_=colour.Unreportable", "~model.dropout", "~model.cpu_kernel"),
]


class ColourDigits(MNISTDataModule):
    def setup(self, stage: str | None = None) -> None:
        first = not self.facts
        super().setup(stage)
        for name in ("train_images", "val_images", "test_images") if first else ():
            setattr(self, name, getattr(self, name).unsqueeze(1).expand(-1, 3, -1, -1))


class Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3 * 784, 12)

    def forward(self, images: Tensor) -> Tensor:
        return self.layer(images.flatten(1))


class Unreportable(Linear):
    """Its first convolution has no kernels to draw."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Conv2d(1, 1, 1)
        self.unused.weight = nn.Parameter(torch.zeros(1))
