"""Schedules of the learning rate from the configuration, and one that PyTorch does not have as a class."""

import math
from collections.abc import Mapping
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from mnist_lit import UserError, compat
from mnist_lit.build import build

LIGHTNING_KEYS = ("interval", "frequency", "monitor")  # the other keys are the arguments of the class
LENGTHS = ("T_max", "total_steps", "total_iters")  # arguments for which None stands for the whole run


def for_lightning(config: Mapping[str, Any], optimizer: Optimizer, trainer: Any) -> dict[str, Any]:
    """The scheduler with its ``interval``, ``frequency`` and ``monitor``, as ``configure_optimizers`` returns it.

    Raises:
        UserError: As ``build_scheduler``.
    """
    by_step = config.get("interval", "epoch") == "step"
    frequency = config.get("frequency", 1)
    if by_step:  # Lightning counts them anew in each epoch, and leaves out those that only accumulate
        length = compat.estimated_steps(trainer) if frequency == 1 else math.inf
    else:
        length = -1 if trainer.max_epochs == -1 else max(1, trainer.max_epochs // frequency)
    settings = {key: config[key] for key in LIGHTNING_KEYS if key in config}
    return {"scheduler": build_scheduler(config, optimizer, length), **settings}


def build_scheduler(config: Mapping[str, Any], optimizer: Optimizer, length: float) -> LRScheduler:
    """
    Args:
        config: The section ``scheduler``.
        length: Of the run, in steps of the scheduler; -1 or infinite if it has no end or they cannot be counted.

    Raises:
        UserError: There is no such class, it does not accept the arguments, or needs a length, and there is none.
    """
    arguments = {key: value for key, value in config.items() if key not in LIGHTNING_KEYS}
    for key in LENGTHS:
        if arguments.get(key, length) is None:
            if not 0 < length < math.inf:
                counts = config.get("frequency", 1) == 1 or config.get("interval") != "step"
                why = "has no end to reach" if counts else "is not stepped at every step"
                raise UserError(f"scheduler.{key}=null: the schedule {why}, so its length must be given here")
            arguments[key] = int(length)
    return build("scheduler", arguments, LRScheduler, optimizer)


class WarmupCosine(LambdaLR):
    """Raises the learning rate linearly to the optimizer's, then lowers it to zero along a half-period of a cosine.

    Args:
        total_steps: Steps until it is zero.
        warmup: The fraction of the steps in which it rises, from 0 to 1.
    """

    def __init__(self, optimizer: Optimizer, total_steps: int, warmup: float = 0.05) -> None:
        rising = max(1, round(warmup * total_steps))

        def factor(step: int) -> float:
            if step < rising:
                return (step + 1) / rising
            return (1 + math.cos(math.pi * min(1.0, (step - rising + 1) / (total_steps - rising + 1)))) / 2

        super().__init__(optimizer, factor)
