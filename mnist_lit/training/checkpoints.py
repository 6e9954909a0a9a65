"""When a run writes checkpoints, how no kill can leave a damaged one, and how a signal ends a run after one."""

import io
import logging
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
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer.states import TrainerFn

from mnist_lit import Interrupted, UserError, compat
from mnist_lit.storage.atomic import atomic_path, sync_folder
from mnist_lit.storage.checkpoint_file import corruption, read_checkpoint
from mnist_lit.storage.runs import BEST, LAST, NEW, PREVIOUS, resume_hint, versions
from mnist_lit.training.progress import epoch_name

log = logging.getLogger(__name__)

NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint under another name, reads it back, and only then gives it its own; refuses damaged ones."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """
        Raises:
            WriteError: What was there before is untouched.
        """
        content = io.BytesIO()
        torch.save(move_data_to_device(checkpoint, "cpu"), content)  # so that it loads wherever it is taken
        path = Path(path)
        path.parent.mkdir(exist_ok=True)
        with atomic_path(path, content.getbuffer().nbytes) as temporary:
            temporary.write_bytes(content.getbuffer())
            if reason := corruption(temporary):
                raise OSError(f"what was written does not read back: {reason}")

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """
        Raises:
            UserError: As ``read_checkpoint``.
        """
        return read_checkpoint(Path(path))


class Checkpoints(Checkpoint):
    """Writes ``last.ckpt`` and keeps the one before it; writes ``best.ckpt``; ends a run that is asked to stop.

    A checkpoint is only written where a run can go on with the same bits: after a step of the optimizer, after the
    validation that follows it, or after an epoch. A first SIGTERM or Ctrl-C ends the run at the next such place, a
    second one at once.

    Args:
        folder: The run's; its checkpoints are in ``checkpoints/``.
        every_n_steps: Between two checkpoints in an epoch; None for none.
        every_n_epochs: Between two epochs with a checkpoint at their end. The last epoch always has one.
        enabled: False writes none, and a stopped run cannot go on.

    Attributes:
        best: ``epoch`` and ``val/acc`` of the best validation, the first of several; empty before the first one.

    Raises:
        Interrupted: By Lightning's hooks, when a signal came.
        UserError: By Lightning's hooks, where weights are not finite or the file cannot be written.
    """

    def __init__(
        self, folder: Path, every_n_steps: int | None = None, every_n_epochs: int = 1, enabled: bool = True
    ) -> None:
        super().__init__()
        self.folder, self.enabled = folder, enabled
        self.every_n_steps, self.every_n_epochs = every_n_steps, every_n_epochs
        self.best: dict[str, Any] = {}
        self._stopped_early = False  # by something else than the number of epochs or steps
        self._signal: int | None = None  # the first one that came
        self._testing = False
        self._step_before = -1  # trainer.global_step when the batch began

    @property
    def best_path(self) -> Path | None:
        path = self.folder / BEST
        return path if self.best and self.enabled and path.exists() else None

    # When

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        self._step_before = trainer.global_step

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if not compat.validation_follows(trainer):
            self._save_if_due(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking:
            return
        acc = float(trainer.callback_metrics["val/acc"])
        if not self.best or acc > self.best["val/acc"]:
            self.best = {"epoch": trainer.current_epoch + 1, "val/acc": acc}
            self._save(trainer, BEST)
        self._save_if_due(trainer)

    def _save_if_due(self, trainer: L.Trainer) -> None:
        accumulating = trainer.global_step == self._step_before
        if accumulating or _epoch_ends(trainer):
            return
        asked = self._asked(trainer)
        if asked or (self.every_n_steps and trainer.global_step % self.every_n_steps == 0):
            self._save_last(trainer)
        if asked:
            self._stop(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        asked, epochs = self._asked(trainer), trainer.current_epoch + 1
        self._stopped_early = trainer.should_stop and _minimum_reached(trainer, epochs)
        finished = self._stopped_early or epochs == trainer.max_epochs or trainer.global_step == trainer.max_steps
        # With max_steps Lightning cannot go on from the end of an epoch; it can from every step.
        possible = finished or trainer.max_steps == -1
        if finished or (possible and (asked or epochs % self.every_n_epochs == 0)):
            self._save_last(trainer)
        if asked and possible:
            self._stop(trainer)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.should_stop = self._stopped_early  # a run that was over when it was killed is over

    # How

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
                f"weights are not finite after step {trainer.global_step} ({epoch_name(trainer)}): training has "
                "stopped; the checkpoints from before are untouched"
            )
        trainer.save_checkpoint(self.folder / name, weights_only=False)

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "stopped_early": self._stopped_early}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best, self._stopped_early = state["best"], state["stopped_early"]

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["machine"] = machine(trainer)

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            compare_machines(checkpoint["machine"], machine(trainer))

    # Signals

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._listen(trainer)

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._testing = True
        self._listen(trainer)

    def _listen(self, trainer: L.Trainer) -> None:
        """Instead of Lightning's handlers, which end a run with other exit codes; it restores those from before."""
        self._says = trainer.is_global_zero
        if threading.current_thread() is threading.main_thread():
            for number in NAMES:
                if signal.getsignal(number) != signal.SIG_IGN:  # nohup, or a job that a shell runs in the background
                    signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._testing or self._signal is not None:
            raise Interrupted(number, f"stopped at once by {NAMES[signal.Signals(number)]}{resume_hint(self.folder)}")
        self._signal = number
        if self._says:
            # Not the log, which may be at work in what was interrupted.
            os.write(2, b"\nstopping at the end of this step; once more stops at once\n")

    def _asked(self, trainer: L.Trainer) -> bool:
        """Whether a signal came, with several processes to any of them, so that all stop at the same step."""
        asked = self._signal is not None
        return trainer.strategy.reduce_boolean_decision(asked, all=False) if trainer.world_size > 1 else asked

    def _stop(self, trainer: L.Trainer) -> None:
        number = self._signal or signal.SIGTERM
        where = f"after step {trainer.global_step} ({epoch_name(trainer)})"
        raise Interrupted(number, f"stopped by {NAMES[signal.Signals(number)]} {where}{resume_hint(self.folder)}")


class StopOnNaN(L.Callback):
    """Ends a run at the first loss that is NaN or infinite, before anything is saved over.

    On a GPU it is noticed some steps later, so that no step has to wait for the value, but the step is the right one.
    """

    CHECK_EVERY = 50

    def __init__(self) -> None:
        self._first: torch.Tensor | None = None

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        finite = outputs["loss"].detach().isfinite()
        if finite.device.type == "cpu":
            if not finite:
                self._stop(trainer, trainer.global_step)
            return
        step = torch.full_like(finite, trainer.global_step, dtype=torch.int64)
        now = torch.where(finite, 0, step)
        self._first = now if self._first is None else torch.where(self._first == 0, now, self._first)
        look = trainer.global_step % self.CHECK_EVERY == 0 or trainer.is_last_batch
        if look and (first := int(self._first)):
            self._stop(trainer, first)

    def _stop(self, trainer: L.Trainer, step: int) -> None:
        rate = trainer.optimizers[0].param_groups[0]["lr"]
        raise UserError(
            f"the loss is not finite at step {step} ({epoch_name(trainer)}), with optimizer.lr={rate:g}: training has "
            "stopped; the checkpoints from before are untouched"
        )


def machine(trainer: L.Trainer) -> dict[str, Any]:
    """What a run's bits depend on besides its configuration and data."""
    return {
        "versions": versions(),
        "device": trainer.strategy.root_device.type,
        "processes": trainer.world_size,
        "threads": torch.get_num_threads(),
    }


def _epoch_ends(trainer: L.Trainer) -> bool:
    """Whether the current batch is the last that Lightning trains on in this epoch."""
    reached_max_steps = trainer.max_steps != -1 and trainer.global_step >= trainer.max_steps
    stopped = trainer.should_stop and _minimum_reached(trainer, trainer.current_epoch)
    return trainer.is_last_batch or reached_max_steps or stopped


def _minimum_reached(trainer: L.Trainer, epochs: int) -> bool:
    """Whether ``min_epochs`` and ``min_steps`` let a run stop early after so many whole epochs."""
    return epochs >= (trainer.min_epochs or 0) and trainer.global_step >= (trainer.min_steps or 0)


def compare_machines(before: dict[str, Any], now: dict[str, Any]) -> None:
    """Warn of what makes the bits of a run differ from those that it would have had without a stop.

    Raises:
        UserError: Another number of processes: each has its own share of a batch and of dropout's draws.
    """
    if before["processes"] != now["processes"]:
        raise UserError(f"the run had {before['processes']} processes and not {now['processes']}")
    old, new = (each["versions"] | {key: each.get(key) for key in ("device", "threads")} for each in (before, now))
    changed = [f"{key} {old.get(key)} before, {new.get(key)} now" for key in new if old.get(key) != new.get(key)]
    if changed:
        log.warning("another machine: %s; the run goes on, but its last bits may differ", ", ".join(changed))
