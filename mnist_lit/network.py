"""The tutorial's network, a plain ``nn.Module``; imports only torch, so inference starts quickly."""

import torch
from torch import Tensor, nn

from mnist_lit.kernels.convolutions import can_replace, features
from mnist_lit.kernels.dropout import Dropout


class TutorialCNN(nn.Module):
    """Two convolutions, max pooling, dropout and two dense layers: 1,045,576 parameters.

    Initialized as in Keras: Glorot-uniform weights, zero biases.

    Args:
        dropout: Probability of dropping each of the 4,096 pooled features during training, in [0, 1).
        cpu_kernel: Whether to run the convolutions as a fused C kernel (``mnist_lit.kernels``) where possible.
    """

    def __init__(self, dropout: float = 0.5, cpu_kernel: bool = True) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3)
        self.conv2 = nn.Conv2d(32, 64, 3)
        self.pool = nn.MaxPool2d(3)
        self.dropout = Dropout(dropout)  # nn.Dropout, drawn faster on a CPU
        self.dense1 = nn.Linear(4096, 250)
        self.dense2 = nn.Linear(250, 10)
        self.cpu_kernel = cpu_kernel
        for name, parameter in self.named_parameters():
            if name.endswith("weight"):
                nn.init.xavier_uniform_(parameter)  # Xavier Glorot's
            else:
                nn.init.zeros_(parameter)
        # Channels-last convolutions are faster on a CPU. The memory format propagates from conv1's output, so the
        # other layers' weights can stay contiguous, as tools such as pruning require.
        self.conv1.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [N, 10] of images [N, 1, 28, 28] in [0, 1]."""
        layers = self.conv1, self.conv2, self.pool, self.dropout
        if self.cpu_kernel and can_replace(*layers, images):
            x = features(*layers, images)  # the four lines below, fused
        else:
            x = self.conv1(images).relu()  # [N, 32, 26, 26]
            x = self.conv2(x)  # [N, 64, 24, 24]
            x = self.pool(x).relu()  # [N, 64, 8, 8]; same as ReLU before pooling, on a ninth of the values
            x = self.dropout(x)
        x = self.dense1(x.flatten(1)).sigmoid()  # [N, 250]
        return self.dense2(x)

    def __prepare_scriptable__(self) -> nn.Module:  # called by torch.jit.script
        raise NotImplementedError("TutorialCNN does not support torch.jit.script: take torch.export or torch.compile")
