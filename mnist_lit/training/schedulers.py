"""Learning rate schedules that PyTorch does not have as one class."""

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


class WarmupCosine(LambdaLR):
    """Raises the learning rate linearly to the optimizer's, then lowers it to zero along a half cosine.

    Args:
        total_steps: Steps until it is zero.
        warmup: The fraction of the steps in which it rises, from 0 to 1.
    """

    def __init__(self, optimizer: Optimizer, total_steps: int, warmup: float = 0.05) -> None:
        rising = max(1, round(warmup * total_steps))

        def factor(step: int) -> float:
            if step < rising:
                return (step + 1) / rising
            return (1 + math.cos(math.pi * min(1.0, (step - rising + 1) / max(1, total_steps - rising)))) / 2

        super().__init__(optimizer, factor)
