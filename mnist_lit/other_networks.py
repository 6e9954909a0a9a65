"""Two networks besides the tutorial's, ``model=mlp`` and ``model=resnet18``: images [N, 1, 28, 28] to logits [N, 10]."""

import torchvision
from torch import nn


class MLP(nn.Sequential):
    """A dense layer with ReLU, dropout, and a dense layer.

    Args:
        hidden: Number of values between the two layers.
        dropout: Probability of dropping each of them during training.
        classes: Number of logits.
    """

    def __init__(self, hidden: int = 256, dropout: float = 0.2, classes: int = 10) -> None:
        super().__init__(
            nn.Flatten(), nn.Linear(784, hidden), nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden, classes)
        )


class ResNet18(torchvision.models.ResNet):
    """torchvision's ResNet-18 for small grey images: its first layer has one channel and keeps all of the pixels.

    Args:
        classes: Number of logits.
        channels: Number of channels of an image.
    """

    def __init__(self, classes: int = 10, channels: int = 1) -> None:
        super().__init__(torchvision.models.resnet.BasicBlock, [2, 2, 2, 2], num_classes=classes)
        self.conv1 = nn.Conv2d(channels, 64, kernel_size=3, padding=1, bias=False)  # was 7x7, with a stride of 2
        self.maxpool = nn.Identity()  # would leave 7x7 values
