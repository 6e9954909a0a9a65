"""Randomness as a function of where a run is, not of what was drawn before: so that a run can go on from any step."""

import lightning as L
import torch

from mnist_lit.data import number_from


class SeedEachBatch(L.Callback):
    """Seeds what dropout draws from by seed, epoch, batch and process at the start of each training batch."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: object, idx: int) -> None:
        number = number_from("batch", self.seed, trainer.current_epoch, idx, trainer.global_rank)
        # Not torch.manual_seed(), which also notes the call for devices that are not in use, in a millisecond.
        torch.default_generator.manual_seed(number)
        if pl_module.device.type != "cpu":  # torch.cuda, torch.mps ...
            seed_device = getattr(getattr(torch, pl_module.device.type, None), "manual_seed", None)
            if seed_device:  # else it draws from the CPU's
                seed_device(number)
