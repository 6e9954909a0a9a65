"""The tutorial's network as a plain ``nn.Module``: torch and nothing else, so that using a model starts fast."""

import importlib
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mnist_lit import Refusal
from mnist_lit.kernels.convolutions import convolutions


class TutorialCNN(nn.Module):
    """Two convolutions, max-pooling, dropout and two dense layers: 1,045,576 parameters.

    28x28x1 -> conv 26x26x32 -> conv 24x24x64 -> max-pool 8x8x64 -> 4096 -> 250 -> 10.
    Weights start as Keras starts them: Glorot-uniform kernels, zero biases.

    Args:
        dropout: Share of the 4,096 pooled values that a training step drops, from 0 to below 1.
        compiled: Whether the convolutions may run as compiled C (``mnist_lit.kernels``), where that applies.
    """

    def __init__(self, dropout: float = 0.5, compiled: bool = True) -> None:
        super().__init__()
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be from 0 to below 1, not {dropout}")
        self.dropout, self.compiled = dropout, compiled
        self.conv1 = nn.Conv2d(1, 32, 3)
        self.conv2 = nn.Conv2d(32, 64, 3)
        self.dense1 = nn.Linear(4096, 250)
        self.dense2 = nn.Linear(250, 10)
        for name, parameter in self.named_parameters():
            if name.endswith("weight"):
                nn.init.xavier_uniform_(parameter)
            else:
                nn.init.zeros_(parameter)
        # Shapes stay N,C,H,W; only the order in memory changes, which makes PyTorch's convolutions faster on a CPU.
        self.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [N, 10] of images [N, 1, 28, 28] with values from 0 to 1."""
        kept, scale = None, 1.0
        on_cpu = images.device.type == "cpu"  # where our own draws save time, and the operator takes the mask
        if self.training and self.dropout and on_cpu:
            kept, scale = keep_mask((len(images), 64, 8, 8), self.dropout)
        # conv1, ReLU, conv2, max-pooling 3x3, ReLU, dropout
        layers = [self.get_parameter(f"{name}.{part}") for name in ("conv1", "conv2") for part in ("weight", "bias")]
        x = convolutions(images, *layers, kept=kept, scale=scale, compiled=self.compiled)
        if not on_cpu:
            x = nn.functional.dropout(x, self.dropout, self.training)
        x = torch.sigmoid(self.dense1(x.flatten(1)))
        return self.dense2(x)

    def extra_repr(self) -> str:
        return f"dropout={self.dropout}"


def keep_mask(shape: tuple[int, ...], dropout: float) -> tuple[Tensor, float]:
    """Which values dropout keeps on a CPU, bool of the given shape, and what the kept ones are multiplied by.

    Each value takes sixteen random bits, four to a number of torch's generator: a tenth of the time of
    ``nn.Dropout``'s draws, and a share that is within 1/131,072 of ``dropout``.
    """
    count = math.prod(shape)
    dropped = min(round(dropout * 2**16), 2**16 - 1)
    bits = torch.empty((count + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    kept = bits.view(torch.int16)[:count].view(shape) >= dropped - 2**15
    return kept, 2**16 / (2**16 - dropped)


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
