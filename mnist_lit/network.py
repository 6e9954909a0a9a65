"""The tutorial's network as a plain ``nn.Module``: torch and nothing else, so that using a model starts fast."""

import importlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mnist_lit import Refusal
from mnist_lit.kernels.convolutions import can_replace, features
from mnist_lit.kernels.dropout import Dropout


class TutorialCNN(nn.Module):
    """Two convolutions, max-pooling, dropout and two dense layers: 1,045,576 parameters.

    Weights start as Keras starts them: Glorot-uniform kernels, zero biases.

    Args:
        dropout: Share of the 4,096 pooled values that a training step drops, from 0 to below 1.
        compiled: Whether the convolutions may run as compiled C (``mnist_lit.kernels``), where that applies.
    """

    def __init__(self, dropout: float = 0.5, compiled: bool = True) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3)
        self.conv2 = nn.Conv2d(32, 64, 3)
        self.pool = nn.MaxPool2d(3)
        self.dropout = Dropout(dropout)
        self.dense1 = nn.Linear(4096, 250)
        self.dense2 = nn.Linear(250, 10)
        self.compiled = compiled
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
        if self.compiled and can_replace(*layers, images):
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


def build_network(model: Mapping[str, Any]) -> nn.Module:
    """The network that a configuration's section ``model`` describes, with fresh weights.

    Args:
        model: The class by its dotted name (``network``), and the class's own arguments.

    Raises:
        Refusal: There is no such class, or it does not take the arguments.
    """
    dotted = model["network"]
    module, _, name = dotted.rpartition(".")
    try:
        cls = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise Refusal(f"model.network={dotted}: no such class ({error})") from error
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise Refusal(f"model.network={dotted}: not a torch.nn.Module")
    network: nn.Module = built(cls, "model", {key: value for key, value in model.items() if key != "network"})
    return network


def built(cls: Callable[..., Any], section: str, arguments: Mapping[str, Any], *first: Any) -> Any:
    """``cls(*first, **arguments)``.

    Raises:
        Refusal: The class does not take the arguments, which are a configuration's ``section``.
    """
    try:
        return cls(*first, **arguments)
    except (TypeError, ValueError, RuntimeError) as error:
        raise Refusal(f"{section}: {error} (the keys of {section} are the arguments of this class)") from error
