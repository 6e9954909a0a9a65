"""The progress bar."""

import time
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import TQDMProgressBar

REFRESH_SECONDS = 0.2


class ProgressBar(TQDMProgressBar):
    """Lightning's progress bar with the epoch's running mean loss and accuracy, as in Keras, and its images per second.

    Refreshes a few times a second rather than at every step, and only then fetches the metrics from the device.
    """

    _refreshed = 0.0
    _paused = 0.0
    _batch_size = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if trainer.fit_loop.restarted_mid_epoch:  # then Lightning does not call the next hook
            self.on_train_epoch_start(trainer, pl_module)
            self.train_progress_bar.initial = trainer.fit_loop.epoch_loop.batch_progress.current.ready

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if time.monotonic() - self._refreshed > REFRESH_SECONDS or trainer.is_last_batch:
            self._batch_size = max(self._batch_size, len(batch[1]) * trainer.world_size)
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
            self._refreshed = time.monotonic()

    def get_metrics(self, trainer: L.Trainer, model: Any) -> dict[str, Any]:
        shown = {name: f"{value:.4f}" for name, value in model.stage_metrics("train").compute_locally().items()}
        bar = self.train_progress_bar.format_dict
        if bar["elapsed"]:
            batches_per_second = (bar["n"] - bar["initial"]) / bar["elapsed"]
            shown["images/s"] = f"{batches_per_second * self._batch_size:,.0f}"
        return shown

    def on_train_epoch_start(self, trainer: L.Trainer, *args: Any) -> None:
        super().on_train_epoch_start(trainer, *args)
        self.train_progress_bar.set_description(epoch_name(trainer))

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_validation_start(trainer, pl_module)
        self._paused = time.time()  # tqdm's clock

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == "fit" and not self.train_progress_bar.disable:
            self.train_progress_bar.start_t += time.time() - self._paused  # images per second are those of training
        super().on_validation_end(trainer, pl_module)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Do nothing: the epoch's line in the log has its metrics."""


def epoch_name(trainer: L.Trainer) -> str:
    """ "epoch 3/12", or "epoch 3" if the number of epochs is not limited."""
    limited = trainer.max_epochs is not None and trainer.max_epochs > 0
    return f"epoch {trainer.current_epoch + 1}" + (f"/{trainer.max_epochs}" if limited else "")
