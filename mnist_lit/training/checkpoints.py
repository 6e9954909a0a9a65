"""Checkpointing: atomic writes, exact resume points, and a clean stop on SIGINT and SIGTERM."""

import copy
import io
import logging
import math
import os
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.callbacks import Checkpoint, Timer

from mnist_lit import Interrupted, UserError, compat
from mnist_lit.storage.atomic import atomic_path, sync_folder
from mnist_lit.storage.checkpoint_file import corruption, read_checkpoint
from mnist_lit.storage.runs import BEST, LAST, NEW, PREVIOUS, resume_hint, versions
from mnist_lit.training.progress import epoch_name

log = logging.getLogger(__name__)

REQUIRED_KEYS = ("pytorch-lightning_version", "loops", "callbacks", "optimizer_states", "recorded", "machine")
SIGNALS: dict[int, str] = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint to a temporary file, verifies it and renames it; refuses to load a damaged one."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """
        Raises:
            WriteError: The file could not be written; any previous file is unchanged.
        """
        content = io.BytesIO()
        torch.save(move_data_to_device(checkpoint, "cpu"), content)  # loads on machines without this device
        path = Path(path)
        path.parent.mkdir(exist_ok=True)
        with atomic_path(path, content.getbuffer().nbytes) as temporary:
            temporary.write_bytes(content.getbuffer())
            if reason := corruption(temporary):
                raise OSError(f"the written file does not read back: {reason}")

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """
        Raises:
            UserError: ``read_checkpoint`` refuses it, or it is not that of a run.
        """
        checkpoint = read_checkpoint(Path(path))
        if missing := [key for key in REQUIRED_KEYS if not checkpoint.get(key)]:
            raise UserError(f"{path} is not the checkpoint of a run: it has no {', '.join(missing)}")
        return checkpoint


class Checkpoints(Checkpoint):
    """Saves ``last.ckpt``, its predecessor and ``best.ckpt``, and stops the run on SIGINT or SIGTERM.

    ``last.ckpt`` is only written where a run can resume with bit-for-bit identical results: after an optimizer step,
    after the validation that follows it, or at the end of an epoch. The first signal stops the run at the next such
    point, the second one immediately.

    Args:
        folder: The run folder; checkpoints go into its ``checkpoints/``.
        every_n_steps: Optimizer steps between checkpoints within an epoch; None for no such checkpoints.
        every_n_epochs: Epochs between checkpoints at the end of an epoch. The last epoch always gets one.
        monitor: The metric of the validation that makes an epoch the best one.
        mode: ``max`` or ``min``: whether more or less of it is better.
        enabled: False writes no checkpoints; a stopped run then cannot be resumed.

    Attributes:
        best: ``epoch`` and the monitored metric of the best validation so far, the earliest on a tie; empty before the first.

    Raises:
        Interrupted: From Lightning's hooks, after a signal.
        UserError: From Lightning's hooks, if weights are not finite, a file cannot be written, or there is no metric of
            the name ``monitor``.
    """

    def __init__(
        self,
        folder: Path,
        every_n_steps: int | None = None,
        every_n_epochs: int = 1,
        monitor: str = "val/acc",
        mode: str = "max",
        enabled: bool = True,
    ) -> None:
        super().__init__()
        self.folder, self.enabled = folder, enabled
        self._monitor, self._sign = monitor, 1 if mode == "max" else -1
        self.every_n_steps, self.every_n_epochs = every_n_steps, every_n_epochs
        self.best: dict[str, Any] = {}
        self._stopped_early = False  # by a callback, before max_epochs or max_steps
        self._signal: int | None = None  # the first signal received
        self._epoch_ends = False  # whether the checkpoint that is being saved is that of the end of an epoch
        self._step_before = -1  # trainer.global_step at the start of the batch

    @property
    def best_path(self) -> Path | None:
        path = self.folder / BEST
        return path if self.best and self.enabled and path.exists() else None

    def load_best(self, pl_module: L.LightningModule) -> None:
        """Load the weights of the best checkpoint, if there is one.

        Lightning's ``ckpt_path`` would let callbacks load it, too, and those that average weights would put back the
        weights that training goes on with.
        """
        if path := self.best_path:
            pl_module.load_state_dict(torch.load(path, map_location="cpu", weights_only=True)["state_dict"])

    # When to save

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        self._step_before = trainer.global_step
        compat.epoch_goes_on(trainer)

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if not compat.validation_follows(trainer):
            self._save_if_due(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking:
            return
        metrics = trainer.callback_metrics
        if self._monitor not in metrics:
            there = ", ".join(sorted(key for key in metrics if key.startswith("val/")))
            raise UserError(f"checkpoint.monitor={self._monitor}: there is no such metric; there are {there}")
        value = float(metrics[self._monitor])
        if not self.best or (value - self.best[self._monitor]) * self._sign > 0 or math.isnan(self.best[self._monitor]):
            self.best = {"epoch": trainer.current_epoch + 1, self._monitor: value}
            self._save(trainer, BEST)
        self._save_if_due(trainer)

    def _save_if_due(self, trainer: L.Trainer) -> None:
        accumulating = trainer.global_step == self._step_before
        if accumulating or _is_end_of_epoch(trainer):  # the latter is left to on_train_epoch_end
            return
        asked = self._stop_requested(trainer)
        if asked or (self.every_n_steps and trainer.global_step % self.every_n_steps == 0):
            self._save_last(trainer)
        if asked:
            self._stop(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        asked, epochs = self._stop_requested(trainer), trainer.current_epoch + 1
        self._stopped_early = trainer.should_stop and _can_stop_early(trainer, epochs) and not _is_time_up(trainer)
        finished = trainer.should_stop or epochs == trainer.max_epochs or trainer.global_step == trainer.max_steps
        if finished or asked or epochs % self.every_n_epochs == 0:
            self._epoch_ends = True
            self._save_last(trainer)
            self._epoch_ends = False
        if asked:
            self._stop(trainer)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.should_stop |= self._stopped_early  # do not train on a run that had stopped early

    # How to save

    def _save_last(self, trainer: L.Trainer) -> None:
        self._save(trainer, NEW)
        if self.enabled and trainer.is_global_zero:
            last, new = self.folder / LAST, self.folder / NEW
            if last.exists():
                last.replace(self.folder / PREVIOUS)
            new.replace(last)
            sync_folder(last.parent)

    def _save(self, trainer: L.Trainer, name: str) -> None:
        if not self.enabled:
            return
        if not all(bool(parameter.isfinite().all()) for parameter in trainer.lightning_module.parameters()):
            raise UserError(
                f"weights are not finite after step {trainer.global_step} ({epoch_name(trainer)}): training stopped; "
                "earlier checkpoints are unchanged"
            )
        trainer.save_checkpoint(self.folder / name, weights_only=False)

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "stopped_early": self._stopped_early}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best, self._stopped_early = state["best"], state["stopped_early"]
        if self._monitor not in self.best:  # another one until now
            self.best = {}

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["machine"] = _environment(trainer)
        if self._epoch_ends:
            if not trainer.is_last_batch:  # max_steps, max_time or a callback has cut the epoch short
                compat.as_within_epoch(checkpoint["loops"]["fit_loop"])
                return
            _step_plateaus(trainer, checkpoint)
            if trainer.max_steps != -1:
                compat.as_start_of_epoch(checkpoint["loops"]["fit_loop"])

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        # Lightning would take what is missing for the beginning of the run.
        if missing := trainer.fit_loop.state_dict().keys() - checkpoint["loops"]["fit_loop"].keys():
            lacks = f"it has no {', '.join(sorted(missing))}"
            raise UserError(f"{trainer.ckpt_path} cannot be resumed: its state does not fit this run ({lacks})")
        _compare_environments(checkpoint["machine"], _environment(trainer))

    # Signals

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Replace Lightning's handlers, which use other exit codes; Lightning restores the original ones itself."""
        self._trainer = trainer
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) != signal.SIG_IGN:  # ignored under nohup and in a shell's background jobs
                    signal.signal(number, self._on_signal)

    on_test_start = on_train_start

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._trainer.testing or self._signal is not None:  # a test can be repeated as a whole
            raise Interrupted(number, f"stopped immediately by {SIGNALS[number]}{resume_hint(self.folder)}")
        self._signal = number
        if self._trainer.is_global_zero:
            # Not by logging, which is not reentrant: the signal may have interrupted it.
            os.write(2, b"\nstopping after this step; a second signal stops immediately\n")

    def _stop_requested(self, trainer: L.Trainer) -> bool:
        """Whether any rank has received a signal, so that all ranks stop at the same step."""
        asked = self._signal is not None
        return trainer.strategy.reduce_boolean_decision(asked, all=False) if trainer.world_size > 1 else asked

    def _stop(self, trainer: L.Trainer) -> None:
        number = self._signal or signal.SIGTERM
        where = f"after step {trainer.global_step} ({epoch_name(trainer)})"
        raise Interrupted(number, f"stopped by {SIGNALS[number]} {where}{resume_hint(self.folder)}")


def _step_plateaus(trainer: L.Trainer, checkpoint: dict[str, Any]) -> None:
    """Step the schedulers that monitor a metric, in the checkpoint of the end of an epoch.

    Lightning steps them after the last hook in which a checkpoint can be saved, and not when the run is resumed.
    """
    for number, each in enumerate(trainer.lr_scheduler_configs):
        due = each.interval == "epoch" and (trainer.current_epoch + 1) % each.frequency == 0
        if not (each.reduce_on_plateau and due and each.monitor in trainer.callback_metrics):
            continue
        groups = each.scheduler.optimizer.param_groups
        before, rates = copy.deepcopy(each.scheduler.state_dict()), [group["lr"] for group in groups]
        scheduler: Any = each.scheduler
        scheduler.step(trainer.callback_metrics[each.monitor])
        checkpoint["lr_schedulers"][number] = copy.deepcopy(each.scheduler.state_dict())
        for saved, group, rate in zip(checkpoint["optimizer_states"][0]["param_groups"], groups, rates, strict=True):
            saved["lr"], group["lr"] = group["lr"], rate
        each.scheduler.load_state_dict(before)


def _is_end_of_epoch(trainer: L.Trainer) -> bool:
    """Whether Lightning ends the epoch after the current batch and the validation that may follow it."""
    reached_max_steps = trainer.max_steps != -1 and trainer.global_step >= trainer.max_steps
    stopped = trainer.should_stop and _can_stop_early(trainer, trainer.current_epoch)
    return trainer.is_last_batch or reached_max_steps or stopped


def _is_time_up(trainer: L.Trainer) -> bool:
    """Whether ``max_time`` has stopped the run, which a larger one lets go on."""
    callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    timers = [each.time_remaining() for each in callbacks if isinstance(each, Timer)]
    return any(remaining is not None and remaining <= 0 for remaining in timers)


def _can_stop_early(trainer: L.Trainer, epochs: int) -> bool:
    """Whether ``min_epochs`` and ``min_steps`` are met after that many complete epochs."""
    return epochs >= (trainer.min_epochs or 0) and trainer.global_step >= (trainer.min_steps or 0)


def _environment(trainer: L.Trainer) -> dict[str, Any]:
    """What a run's exact results depend on, besides its configuration and data."""
    return {
        "versions": versions(),
        "device": trainer.strategy.root_device.type,
        "processes": trainer.world_size,
        "threads": torch.get_num_threads(),
    }


def _compare_environments(before: dict[str, Any], now: dict[str, Any]) -> None:
    """Warn of differences that can keep a resumed run from being bit-for-bit identical to an uninterrupted one.

    Raises:
        UserError: The number of processes differs; batches and dropout masks are sharded by rank.
    """
    if before["processes"] != now["processes"]:
        raise UserError(f"this run used {before['processes']} processes, not {now['processes']}")
    old, new = (each["versions"] | {key: each.get(key) for key in ("device", "threads")} for each in (before, now))
    changed = [f"{key} was {old.get(key)}, is {new.get(key)}" for key in new if old.get(key) != new.get(key)]
    if changed:
        log.warning("the environment has changed: %s; results may differ in the last bits", ", ".join(changed))
