"""Lightning's Trainer from a run's configuration: with its loggers, its refusals, and messages that appear once."""

import logging
import math
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import loggers

from mnist_lit import UserError, compat
from mnist_lit.data import MNISTDataModule
from mnist_lit.training.checkpoints import AtomicCheckpointIO
from mnist_lit.training.progress import ProgressBar


def build_trainer(
    folder: Path,
    arguments: dict[str, Any],
    logger: dict[str, dict[str, Any]] | None,
    callbacks: list[L.Callback],
    resumed: bool = False,
) -> L.Trainer:
    """A Trainer that writes into ``folder`` and shows a bar on a terminal.

    Args:
        arguments: Lightning's own.
        logger: The chosen loggers' names with their own arguments.
        resumed: Whether a run in this folder goes on.

    Raises:
        UserError: Lightning does not take an argument, or this machine lacks the device or a logger's package.
    """
    tidy_messages()
    shows_bar = arguments["enable_progress_bar"] and sys.stdout.isatty()
    try:
        trainer = L.Trainer(
            **{
                **arguments,
                "enable_progress_bar": shows_bar,
                "enable_model_summary": False,
                "enable_checkpointing": True,  # Lightning wants this where a callback could write one
            },
            plugins=[AtomicCheckpointIO()],
            callbacks=[TerminateOtherRanks(), *callbacks, *([ProgressBar()] if shows_bar else [])],
            logger=[_logger(name, folder, options, resumed) for name, options in (logger or {}).items()],
            default_root_dir=folder,
            use_distributed_sampler=False,  # the loaders share a batch out among the processes themselves
        )
    except (MisconfigurationException, AttributeError, ImportError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(_sentence(arguments, error)) from error
    cores = os.cpu_count() or 1
    if trainer.strategy.root_device.type == "cpu" and trainer.num_devices > cores:
        raise UserError(f"trainer.devices={arguments['devices']}: this machine has {cores} CPU cores to share out")
    return trainer


class TerminateOtherRanks(L.Callback):
    """When this process fails, ends those that Lightning has started from it: they would only find that it is gone."""

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        started = compat.launched_processes(trainer)
        others = started[:]
        started.clear()  # Lightning's observer looks at this list, and would kill this process for one of them
        for process in others:
            process.kill()
            process.wait()


def check_batches(trainer: L.Trainer, data: MNISTDataModule, arguments: dict[str, Any]) -> None:
    """Refuse what Lightning would find out in the middle of a run, or not at all, now that the data are known.

    Raises:
        UserError: A share of the batches that is none, a validation after more batches than there are, or a batch that
            the processes cannot share equally.
    """
    facts, processes = data.facts, trainer.world_size
    for stage in ("train", "val", "test"):
        check_limit(stage, data, arguments)
    batches, interval = math.ceil(facts["train"] / data.batch_size), arguments["val_check_interval"]
    if isinstance(interval, int) and interval > batches and arguments["check_val_every_n_epoch"] is not None:
        raise UserError(f"trainer.val_check_interval={interval}: an epoch has only {batches} batches")
    if data.batch_size % processes or facts["train"] % data.batch_size % processes:
        raise UserError(
            f"data.batch_size={data.batch_size}: each batch of the {facts['train']:,} training images, the last one "
            f"too, must divide equally among the {processes} processes"
        )


def check_limit(stage: str, data: MNISTDataModule, arguments: dict[str, Any]) -> None:
    """
    Raises:
        UserError: ``limit_<stage>_batches`` is a share of the batches that is none.
    """
    batches, limit = math.ceil(data.facts[stage] / data.batch_size), arguments[f"limit_{stage}_batches"]
    if isinstance(limit, float) and batches and int(batches * limit) == 0 < limit:
        raise UserError(f"trainer.limit_{stage}_batches={limit}: of {batches} batches that is not one")


def device_name(trainer: L.Trainer) -> str:
    device, threads = trainer.strategy.root_device, torch.get_num_threads()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    name += f", {threads} thread{'s' * (threads > 1)}" if device.type == "cpu" else ""
    return f"{trainer.world_size} x {name}" if trainer.world_size > 1 else name


def tidy_messages() -> None:
    """Every message of Lightning's once, on the terminal and in the run's log; those that say nothing, never."""
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")  # batches are ready in memory
    warnings.filterwarnings("ignore", message=".*smaller than the logging interval.*")  # the model logs by epoch
    warnings.filterwarnings("ignore", message="Total length of `list` across ranks is zero.*")  # no validation split
    # The same layout by other numbers: a stride over the one input channel means nothing.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides.*")
    warnings.filterwarnings("ignore", message=".*LeafSpec.*is deprecated.*")  # Lightning 2.6 with torch 2.15
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_says_something)
    if logging.getLogger().hasHandlers():  # set up by Hydra; Lightning's own handlers would say it a second time
        logging.captureWarnings(True)
        for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
            logging.getLogger(name).handlers.clear()
            logging.getLogger(name).propagate = True


def _says_something(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("\N{ELECTRIC LIGHT BULB} Tip")


def _logger(name: str, folder: Path, options: dict[str, Any], resumed: bool) -> Any:
    try:
        match name:
            case "csv":  # it deletes what it finds in its folder
                parts = len(list(folder.glob("csv*"))) + 1 if resumed else 1
                return loggers.CSVLogger(folder, name="csv" if parts == 1 else f"csv_{parts}", version="", **options)
            case "tensorboard":
                return loggers.TensorBoardLogger(folder, name="tensorboard", version="", **options)
            case "wandb":
                return loggers.WandbLogger(save_dir=folder, **options)
            case "mlflow":
                return loggers.MLFlowLogger(save_dir=str(folder / "mlflow"), **options)
    except ModuleNotFoundError as error:
        raise UserError(f"logger={name} needs a package that is not installed: pip install {name}") from error
    raise UserError(f"logger={name}: choose csv, tensorboard, wandb or mlflow")


def _sentence(arguments: dict[str, Any], error: Exception) -> str:
    reason = " ".join(str(error).split())
    if arguments["accelerator"] in ("auto", "cpu"):
        return f"trainer: {reason}"
    asked = f"trainer.accelerator={arguments['accelerator']} trainer.devices={arguments['devices']}"
    return f"{asked} is more than this machine has; trainer.accelerator=auto takes what there is ({reason})"
