"""A callback that writes down what each epoch gave and how long it took."""

import csv
import logging
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch

from mnist_lit.progress import epoch_name

log = logging.getLogger(__name__)


class RunRecorder(L.Callback):
    """Times the epochs, writes a row of ``metrics.csv`` and a line of the log after each.

    Attributes:
        history: The rows so far: ``epoch`` (from 1), ``train/loss``, ``train/acc``, with a validation split
            ``val/loss`` and ``val/acc``, and ``epoch_seconds`` from the first to the last training batch, without
            validation and checkpoints.
        validations: ``epoch``, ``val/loss`` and ``val/acc`` of each time that the model was validated.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "metrics.csv"
        self.history: list[dict[str, Any]] = []
        self._started: float | None = None
        self._seconds = 0.0
        self.validations: list[dict[str, Any]] = []

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._seconds = 0.0

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if self._started is None:
            self._started = _now(trainer)

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.is_last_batch:
            self._pause(trainer)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._pause(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            self.validations.append({"epoch": trainer.current_epoch + 1, **_logged(trainer, "val")})

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._pause(trainer)
        epoch = trainer.current_epoch + 1
        row = {"epoch": epoch, **pl_module.epoch("train")}  # this hook is called before the model's, which logs them
        if self.validations and self.validations[-1]["epoch"] == epoch:
            row |= self.validations[-1]
        row["epoch_seconds"] = self._seconds
        self.history.append(row)
        if trainer.is_global_zero:
            parts = [f"{key} {value:.4f}" for key, value in row.items() if "/" in key]
            log.info("%s  %s  %.1f s", epoch_name(trainer), "  ".join(parts), self._seconds)
            self._write(trainer, row)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        if trainer.is_global_zero and trainer.training:
            log.warning("stopped in %s; what there is so far is in %s", epoch_name(trainer), self.path.parent)

    def _pause(self, trainer: L.Trainer) -> None:
        if self._started is not None:
            self._seconds += _now(trainer) - self._started
            self._started = None

    def _write(self, trainer: L.Trainer, row: dict[str, Any]) -> None:
        facts = trainer.datamodule.facts  # type: ignore[attr-defined]
        data = {"data": facts["name"], "data_sha256": facts["sha256"]}
        columns = ["epoch", "train/loss", "train/acc", "val/loss", "val/acc", "epoch_seconds", *data]
        new = not self.path.exists()
        with self.path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns, restval="")
            if new:
                writer.writeheader()
            writer.writerow({**row, **data})


def _logged(trainer: L.Trainer, stage: str) -> dict[str, float]:
    return {k: float(v) for k, v in trainer.callback_metrics.items() if k in (f"{stage}/loss", f"{stage}/acc")}


def _now(trainer: L.Trainer) -> float:
    if trainer.strategy.root_device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
