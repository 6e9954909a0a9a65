"""Callbacks that every training run has: seeding for exact resume, a stop at a loss that is not finite, cleanup."""

from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler, StochasticWeightAveraging, WeightAveraging

from mnist_lit import UserError, compat
from mnist_lit.batches import number_from
from mnist_lit.training.progress import epoch_name


class SeedEachBatch(L.Callback):
    """Reseeds the generators that dropout uses before each training batch, from seed, epoch, batch index and rank.

    And before each epoch, for loaders that shuffle by PyTorch's global generator.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        torch.default_generator.manual_seed(number_from("epoch", self.seed, trainer.current_epoch))

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: object, idx: int) -> None:
        number = number_from("batch", self.seed, trainer.current_epoch, idx, trainer.global_rank)
        # Not torch.manual_seed(): it also queues the call for unused devices, which takes a millisecond.
        torch.default_generator.manual_seed(number)
        if pl_module.device.type != "cpu":  # torch.cuda, torch.mps ...
            seed_device = getattr(getattr(torch, pl_module.device.type, None), "manual_seed", None)
            if seed_device:  # other devices draw from the CPU's generator
                seed_device(number)


class FirstEpochOfProcess(L.Callback):
    """Makes up for what Lightning does otherwise than in later epochs, or without any; after all other callbacks.

    The iterators of the training loaders are made before any hook, and if the run was stopped within that epoch, there is
    no ``on_train_epoch_start``.
    """

    _has_trained = False

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self._has_trained:  # resumed after its last epoch, so that nothing has put the average in its place
            for callback in trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(callback, (StochasticWeightAveraging, WeightAveraging)):
                    callback.on_train_end(trainer, pl_module)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._is_first = self._has_trained = True
        if trainer.fit_loop.restarted_mid_epoch:
            for callback in trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(callback, (StochasticWeightAveraging, GradientAccumulationScheduler)):
                    callback.on_train_epoch_start(trainer, pl_module)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._is_first:
            compat.restart_train_loaders(trainer)

    def on_train_batch_start(self, *_: Any) -> None:
        self._is_first = False


class StopOnNaN(L.Callback):
    """Stops a run at the first NaN or infinite loss, before any checkpoint is overwritten.

    On a GPU the losses are looked at every few steps, to avoid a synchronization at each; the step reported is exact.
    """

    CHECK_EVERY = 50

    def __init__(self) -> None:
        # Those not looked at yet, with the number of their step and its learning rate.
        self._losses: list[tuple[int, float, torch.Tensor]] = []

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        self._rate = trainer.optimizers[0].param_groups[0]["lr"]

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._losses.append((trainer.global_step, self._rate, outputs["loss"].detach()))
        is_due = trainer.global_step % self.CHECK_EVERY == 0 or trainer.is_last_batch
        if is_due or pl_module.device.type == "cpu":
            self._check(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._check(trainer)  # it may have been cut short

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self._check(trainer)  # before the file is written

    def _check(self, trainer: L.Trainer) -> None:
        losses, self._losses = self._losses, []
        finite = torch.stack([loss for *_, loss in losses]).isfinite().tolist() if losses else []
        for (step, rate, _), is_finite in zip(losses, finite, strict=True):
            if not is_finite:
                raise UserError(
                    f"the loss is not finite at step {step} ({epoch_name(trainer)}), at a learning rate of {rate:g}: "
                    "training stopped; earlier checkpoints are unchanged"
                )


class TerminateOtherRanks(L.Callback):
    """When this process fails, kills those that Lightning has started from it."""

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        started = compat.launched_processes(trainer)
        others = started[:]
        started.clear()  # Lightning's observer looks at this list, and would kill this process for one of them
        for process in others:
            process.kill()
            process.wait()
