"""Temperature scaling: probabilities that say how often they are right."""

from typing import Any

import lightning as L
import torch
from torch import Tensor
from torchmetrics import Metric

TEMPERATURES = torch.logspace(-1, 1, 101, base=4.0)  # a quarter to four, in steps of 2.8 %


class BestTemperature(Metric):
    """The temperature T for which softmax(logits / T) has the least cross-entropy (Guo et al., 2017).

    It is chosen among ``TEMPERATURES``, so that a sum for each of them is all that has to be kept and added over
    processes.
    """

    losses: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("losses", torch.zeros(len(TEMPERATURES)), dist_reduce_fx="sum")

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Add a batch: logits [B, classes] and labels [B]."""
        scaled = logits.detach().float() / TEMPERATURES.to(logits.device)[:, None, None]
        right = scaled.gather(2, labels.expand(len(scaled), -1)[..., None])
        self.losses += scaled.logsumexp(dim=2).sum(1) - right.sum((1, 2))

    def compute(self) -> Tensor:
        return TEMPERATURES[self.losses.argmin().cpu()]


class Calibration(L.Callback):
    """Measures the best temperature on the validation images, and stores it in checkpoints for ``mnist_lit.load``.

    Attributes:
        temperature: For the weights of the last validation; None before the first.
    """

    def __init__(self) -> None:
        self.temperature: float | None = None
        self._metric = BestTemperature()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._metric = BestTemperature().to(pl_module.device)

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        self._metric.update(outputs, batch[1])

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking:
            return
        self.temperature = float(self._metric.compute())
        pl_module.log("val/temperature", self.temperature, sync_dist=True)  # it is the same in all processes

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        if self.temperature is not None:
            checkpoint["temperature"] = self.temperature

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self.temperature = checkpoint.get("temperature")
