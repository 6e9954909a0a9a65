"""The progress bar."""

import time
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import TQDMProgressBar

from mnist_lit.model import MNISTClassifier

REFRESH_SECONDS = 0.2


class ProgressBar(TQDMProgressBar):
    """Lightning's progress bar with the epoch's running mean loss and accuracy, as in Keras.

    Refreshes a few times a second rather than at every step, and only then fetches the metrics from the device.
    """

    _refreshed = 0.0

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        if time.monotonic() - self._refreshed > REFRESH_SECONDS or trainer.is_last_batch:
            super().on_train_batch_end(trainer, pl_module, *args)
            self._refreshed = time.monotonic()

    def get_metrics(self, trainer: L.Trainer, model: L.LightningModule) -> dict[str, Any]:
        if not isinstance(model, MNISTClassifier):
            return {}
        return {name: f"{value:.4f}" for name, value in model.stage_metrics("train").compute_locally().items()}

    def on_train_epoch_start(self, trainer: L.Trainer, *args: Any) -> None:
        super().on_train_epoch_start(trainer, *args)
        self.train_progress_bar.set_description(epoch_name(trainer))

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Do nothing: the epoch's line in the log has its metrics."""


def epoch_name(trainer: L.Trainer) -> str:
    """ "epoch 3/12", or "epoch 3" if the number of epochs is not limited."""
    limited = trainer.max_epochs is not None and trainer.max_epochs > 0
    return f"epoch {trainer.current_epoch + 1}" + (f"/{trainer.max_epochs}" if limited else "")
