"""Random state derived from the position in the run, so that training can resume exactly from any step."""

import lightning as L
import torch

from mnist_lit.batches import number_from


class SeedEachBatch(L.Callback):
    """Reseeds the generators that dropout uses before each training batch, from seed, epoch, batch index and rank."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: object, idx: int) -> None:
        number = number_from("batch", self.seed, trainer.current_epoch, idx, trainer.global_rank)
        # Not torch.manual_seed(): it also queues the call for unused devices, which takes a millisecond.
        torch.default_generator.manual_seed(number)
        if pl_module.device.type != "cpu":  # torch.cuda, torch.mps ...
            seed_device = getattr(getattr(torch, pl_module.device.type, None), "manual_seed", None)
            if seed_device:  # other devices draw from the CPU's generator
                seed_device(number)
