"""The tutorial's network as a plain ``nn.Module``: torch and nothing else, so that using a model starts fast."""

import torch
from torch import Tensor, nn

from mnist_lit.kernels.convolutions import can_replace, features
from mnist_lit.kernels.dropout import Dropout


class TutorialCNN(nn.Module):
    """Two convolutions, max-pooling, dropout and two dense layers: 1,045,576 parameters.

    Weights start as Keras starts them: Glorot-uniform kernels, zero biases.

    Args:
        dropout: Fraction of the 4,096 pooled values that a training step drops, at least 0 and less than 1.
        cpu_kernel: Whether the convolutions may run as one C function (``mnist_lit.kernels``) where it applies.
    """

    def __init__(self, dropout: float = 0.5, cpu_kernel: bool = True) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3)
        self.conv2 = nn.Conv2d(32, 64, 3)
        self.pool = nn.MaxPool2d(3)
        self.dropout = Dropout(dropout)
        self.dense1 = nn.Linear(4096, 250)
        self.dense2 = nn.Linear(250, 10)
        self.cpu_kernel = cpu_kernel
        for name, parameter in self.named_parameters():
            if name.endswith("weight"):
                nn.init.xavier_uniform_(parameter)
            else:
                nn.init.zeros_(parameter)
        # Shapes stay N,C,H,W; only the order in memory changes, which makes PyTorch's convolutions faster on a CPU. What
        # conv1 gives sets the order for those that follow; their weights stay as tools such as pruning want them.
        self.conv1.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [N, 10] of images [N, 1, 28, 28] with values from 0 to 1."""
        layers = self.conv1, self.conv2, self.pool, self.dropout
        if self.cpu_kernel and can_replace(*layers, images):
            x = features(*layers, images)  # the four lines below as one operator
        else:
            x = self.conv1(images).relu()  # [N, 32, 26, 26]
            x = self.conv2(x)  # [N, 64, 24, 24]
            x = self.pool(x).relu()  # [N, 64, 8, 8]; the same as ReLU before it, on a ninth of the numbers
            x = self.dropout(x)
        x = self.dense1(x.flatten(1)).sigmoid()  # [N, 250]
        return self.dense2(x)

    def __prepare_scriptable__(self) -> nn.Module:
        raise NotImplementedError("TutorialCNN does not support torch.jit.script: take torch.export or torch.compile")
