"""How a run shows itself on a terminal while it works."""

import time
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import TQDMProgressBar

from mnist_lit.model import MNISTClassifier

SECONDS_BETWEEN_DRAWINGS = 0.2


class ProgressBar(TQDMProgressBar):
    """Lightning's bar with the epoch's mean loss and accuracy so far, as Keras shows them.

    It is drawn, and their values are fetched from the device, a few times a second and not at every step.
    """

    _drawn = 0.0

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        if time.monotonic() - self._drawn > SECONDS_BETWEEN_DRAWINGS or trainer.is_last_batch:
            super().on_train_batch_end(trainer, pl_module, *args)
            self._drawn = time.monotonic()

    def get_metrics(self, trainer: L.Trainer, model: L.LightningModule) -> dict[str, Any]:
        if not isinstance(model, MNISTClassifier):
            return {}
        return {name: f"{value:.4f}" for name, value in model.running("train").items()}

    def on_train_epoch_start(self, trainer: L.Trainer, *args: Any) -> None:
        super().on_train_epoch_start(trainer, *args)
        self.train_progress_bar.set_description(epoch_name(trainer))

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Nothing: the epoch's line in the log says it."""


def epoch_name(trainer: L.Trainer) -> str:
    """ "epoch 3/12", or "epoch 3" where there is no last one."""
    known = trainer.max_epochs is not None and trainer.max_epochs > 0
    return f"epoch {trainer.current_epoch + 1}" + (f"/{trainer.max_epochs}" if known else "")
