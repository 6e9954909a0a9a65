"""Callback that records the metrics and the duration of every epoch."""

import logging
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch

from mnist_lit import Interrupted
from mnist_lit.storage.atomic import atomic_write
from mnist_lit.storage.provenance import facts_of
from mnist_lit.storage.tables import to_csv
from mnist_lit.training.progress import epoch_name

log = logging.getLogger(__name__)


class RunRecorder(L.Callback):
    """Times each epoch, then appends it to ``metrics.csv`` and logs a line.

    Attributes:
        history: One row per epoch: ``epoch`` (from 1), ``train/loss``, ``train/acc`` and further metrics, with a
            validation split likewise ``val/loss`` ..., ``epoch_seconds``, the training time without validation, and
            ``images_per_second`` of that time.
        validations: ``epoch``, ``val/loss`` ... of each validation.
        test_seconds: From the first test batch to the last.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "metrics.csv"
        self.history: list[dict[str, Any]] = []
        self.validations: list[dict[str, Any]] = []
        self._seconds, self._images = 0.0, 0  # of the current epoch
        self._started: float | None = None
        self._fit_seconds = 0.0  # in earlier processes of this run
        self._fit_started: float | None = None
        self.test_seconds = 0.0

    @property
    def fit_seconds(self) -> float:
        """Total training time with validation and checkpoints, including time before the run was resumed."""
        return self._fit_seconds + (time.perf_counter() - self._fit_started if self._fit_started else 0.0)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._fit_started = time.perf_counter()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._fit_seconds, self._fit_started = self.fit_seconds, None

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._seconds, self._images = 0.0, 0

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if self._started is None:
            self._started = _now(trainer)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._images += len(batch[1]) * trainer.world_size
        if trainer.is_last_batch:
            self._pause(trainer)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._pause(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            metrics = {key: float(value) for key, value in trainer.callback_metrics.items() if key.startswith("val/")}
            self.validations.append({"epoch": trainer.current_epoch + 1, **metrics})

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._pause(trainer)
        epoch = trainer.current_epoch + 1
        # Not from callback_metrics: the model's own hook, which logs these, runs after the callbacks'.
        trained = pl_module.stage_metrics("train").compute()
        row = {"epoch": epoch, **{f"train/{name}": value for name, value in trained.items()}}
        if self.validations and self.validations[-1]["epoch"] == epoch:
            row |= self.validations[-1]
        row |= {"epoch_seconds": self._seconds, "images_per_second": self._images / max(self._seconds, 1e-9)}
        if self.history and self.history[-1]["epoch"] == epoch:  # cut short by a limit that has been raised since
            self.history.pop()
        self.history.append(row)
        if trainer.is_global_zero:
            shown = {key: value for key, value in row.items() if "/" in key and key != "val/temperature"}
            parts = [f"{key} {value:.4f}" for key, value in shown.items()]
            log.info("%s  %s  %.1f s", epoch_name(trainer), "  ".join(parts), self._seconds)
            self._write(trainer, pl_module)

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._started = _now(trainer)

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert self._started
        self.test_seconds, self._started = _now(trainer) - self._started, None

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        if (
            trainer.is_global_zero
            and trainer.training
            and trainer.global_step
            and not isinstance(exception, Interrupted)
        ):
            log.warning("stopped in %s; partial results are in %s", epoch_name(trainer), self.path.parent)

    def _pause(self, trainer: L.Trainer) -> None:
        if self._started is not None:
            self._seconds += _now(trainer) - self._started
            self._started = None

    def _write(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Rewrite the whole file: a resumed run repeats the epochs after its checkpoint."""
        facts = facts_of(trainer.datamodule)  # type: ignore[attr-defined]
        data = {"data": facts["name"], "data_sha256": facts.get("sha256", "")}
        metrics = [f"{stage}/{name}" for stage in ("train", "val") for name in pl_module.stage_metrics(stage)]
        others = [key for row in self.history for key in row if key.startswith("val/")]  # what callbacks have logged
        columns = [*dict.fromkeys(["epoch", *metrics, *others]), "epoch_seconds", "images_per_second", *data]
        atomic_write(self.path, to_csv(columns, [{**row, **data} for row in self.history]))

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        mid_epoch = not self.history or self.history[-1]["epoch"] <= trainer.current_epoch or not trainer.is_last_batch
        checkpoint["recorded"] = {
            "history": self.history,
            "validations": self.validations,
            "fit_seconds": self.fit_seconds,
            "seconds": self._seconds + (_now(trainer) - self._started if self._started else 0.0) if mid_epoch else 0.0,
            "images": self._images if mid_epoch else 0,
            "metrics": _states_of_all_ranks(trainer, pl_module) if mid_epoch else None,
        }

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        recorded = checkpoint["recorded"]
        self.history, self.validations = recorded["history"], recorded["validations"]
        self._seconds, self._fit_seconds = recorded["seconds"], recorded["fit_seconds"]
        self._images = recorded.get("images", 0)  # older checkpoints have none
        metrics = recorded["metrics"]
        if isinstance(metrics, dict):  # older checkpoints hold the sum over all ranks: restore it on rank 0 only
            metrics = [metrics, *[None] * (trainer.world_size - 1)]
        if metrics and len(metrics) == trainer.world_size and (own := metrics[trainer.global_rank]):
            pl_module.stage_metrics("train").load_states(own)


def _now(trainer: L.Trainer) -> float:
    device, here = trainer.strategy.root_device, torch.accelerator.current_accelerator()
    if here and here.type == device.type:  # kernels run asynchronously
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def _states_of_all_ranks(trainer: L.Trainer, pl_module: Any) -> list[dict[str, dict[str, torch.Tensor]]]:
    """The training metrics' states on each rank.

    Not summed over ranks: floating-point sums depend on the grouping, so the result would differ in the last bit.
    """
    own = pl_module.stage_metrics("train").states()
    if trainer.world_size == 1:
        return [own]
    gathered: Any = pl_module.all_gather(own)  # adds a first dimension, the rank
    return [
        {name: {key: value[rank].clone() for key, value in states.items()} for name, states in gathered.items()}
        for rank in range(trainer.world_size)
    ]
