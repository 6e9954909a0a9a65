"""Sets up training and testing: Lightning's Trainer from the configuration, its loggers, checks of the data."""

import logging
import math
import os
import re
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import hydra.utils
import lightning as L
import torch
from lightning.pytorch import loggers
from lightning.pytorch.callbacks import ProgressBar as AnyProgressBar
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn
from torchmetrics import Metric
from tqdm.contrib.logging import logging_redirect_tqdm

from mnist_lit import UserError, compat
from mnist_lit.build import call, find_class, instantiate
from mnist_lit.data import MNISTDataModule
from mnist_lit.kernels.memory import peak_memory_bytes
from mnist_lit.storage import runs
from mnist_lit.storage.provenance import described, facts_of
from mnist_lit.storage.tables import one_line
from mnist_lit.training.always import FirstEpochOfProcess, TerminateOtherRanks
from mnist_lit.training.checkpoints import AtomicCheckpointIO, Checkpoints
from mnist_lit.training.progress import ProgressBar

log = logging.getLogger("mnist_lit.train")

T = TypeVar("T")

# The package that a class of conf/logger/ or conf/callbacks/ needs and this project does not install.
NEEDED = {
    "AimLogger": "aim",
    "CometLogger": "comet_ml",
    "MLFlowLogger": "mlflow",
    "RichProgressBar": "rich",
    "TensorBoardLogger": "tensorboard",
    "WandbLogger": "wandb",
}


def build_trainer(
    folder: Path,
    arguments: dict[str, Any],
    logger: dict[str, dict[str, Any]] | None,
    callbacks: list[L.Callback],
    datamodule: Any,
    resumed: bool = False,
) -> L.Trainer:
    """Build a Trainer that writes to ``folder`` and shows a progress bar on a terminal.

    Args:
        arguments: The section ``trainer`` of the configuration.
        logger: The class and arguments of each logger, by name.
        datamodule: The data; without a validation split, validation is disabled.
        resumed: Whether a run in this folder is resumed.

    Raises:
        UserError: Lightning rejects an argument, or this machine lacks the device or a package.
    """
    tidy_messages()
    shows_bar = arguments.get("enable_progress_bar") is not False and sys.stdout.isatty()
    no_validation = {"limit_val_batches": 0, "val_check_interval": None, "check_val_every_n_epoch": 1}
    added = {
        key: hydra.utils.instantiate(arguments.get(key) or [], _convert_="all") for key in ("callbacks", "plugins")
    }
    changed = {
        **{key: value for key, value in arguments.items() if key not in added},
        # Forked or spawned, this is one of the processes: Lightning need not start any.
        **(
            {"strategy": re.sub("^ddp_(fork|notebook|spawn)", "ddp", strategy)}
            if isinstance(strategy := arguments.get("strategy"), str)
            else {}
        ),
        **({} if getattr(datamodule, "val_size", True) else no_validation),
        "enable_progress_bar": shows_bar,
        "enable_model_summary": False,  # ``log_header`` has it
        "enable_checkpointing": True,  # required by a callback that may write checkpoints
    }
    callbacks = [TerminateOtherRanks(), *callbacks, *added["callbacks"], FirstEpochOfProcess()]
    bars: list[L.Callback] = [each for each in callbacks if isinstance(each, AnyProgressBar)] or [ProgressBar()]
    callbacks = [each for each in callbacks if each not in bars] + (bars if shows_bar else [])
    own_loggers = [_logger(name, options, folder, resumed) for name, options in _entries("logger", logger)]
    try:
        trainer = instantiate(
            "trainer",
            changed,
            L.Trainer,
            plugins=[AtomicCheckpointIO(), *added["plugins"]],
            callbacks=callbacks,
            logger=own_loggers,
            default_root_dir=folder,
        )
    except UserError as error:
        is_missing = re.search("not available|not met|your machine|backend found", str(error))
        if arguments.get("accelerator") not in ("gpu", "cuda", "mps", "tpu") or not is_missing:
            raise
        asked = f"trainer.accelerator={arguments['accelerator']} trainer.devices={arguments.get('devices', 'auto')}"
        raise UserError(
            f"{asked} is not available on this machine; trainer.accelerator=auto uses what is ({error})"
        ) from error
    cores = os.cpu_count() or 1
    if trainer.strategy.root_device.type == "cpu" and trainer.num_devices > cores:
        log.warning("%d processes share %d CPU cores: expect it to be slower", trainer.num_devices, cores)
    return trainer


def build_callbacks(config: dict[str, Any] | None) -> list[L.Callback]:
    """The callbacks of the section ``callbacks``, which has the class and arguments of each by name; null is none."""
    return [_build(f"callbacks.{name}", options, L.Callback) for name, options in _entries("callbacks", config)]


def build_metrics(config: dict[str, Any] | None) -> dict[str, Metric]:
    """The metrics of the section ``metrics``, by name; null is none.

    Raises:
        UserError: There is no such class, it does not accept its arguments, or it keeps every prediction.
    """
    built: dict[str, Metric] = {}
    for name, options in _entries("metrics", config):
        if name in ("loss", "acc"):
            raise UserError(f"metrics.{name}: {name} is a reserved name; choose another")
        built[name] = instantiate(f"metrics.{name}", options, Metric)  # type: ignore[type-abstract]
        within = [each for each in built[name].modules() if isinstance(each, Metric)]
        if any(isinstance(state, list) for each in within for state in each.metric_state.values()):
            raise UserError(
                f"metrics.{name}: it would keep every prediction; some metrics need thresholds not to do so"
            )
    return built


def build_module(section: str, config: dict[str, Any] | None) -> nn.Module | None:
    """What the section ``augment`` or ``loss`` says, with its class and arguments; null is none."""
    return _build(section, config, nn.Module) if config else None


def build_checkpoints(folder: Path, arguments: dict[str, Any], trainer: dict[str, Any]) -> Checkpoints:
    """The callback that writes checkpoints, unless the section ``trainer`` disables them.

    Args:
        arguments: The section ``checkpoint`` of the configuration.
    """
    enabled = trainer.get("enable_checkpointing") is not False and not trainer.get("fast_dev_run")
    return call("checkpoint", Checkpoints, folder, enabled=enabled, **arguments)


def prepare_data(
    trainer: L.Trainer,
    data: Any,
    arguments: dict[str, Any],
    scheduler: dict[str, Any] | None = None,
    stages: Sequence[str] = ("train", "val", "test"),
) -> None:
    """Set up the data, and check what Lightning would notice late or never; other data modules are left to Lightning.

    Args:
        arguments: The section ``trainer`` of the configuration.
        scheduler: The section ``scheduler``.
        stages: What the data will be used for.

    Raises:
        UserError: The data are missing or corrupt, there is nothing to test with, a fraction of the batches selects none,
            the validation interval is longer than an epoch, or a time although there are several processes, a batch cannot
            be divided equally among them, or something monitors validation and there is no validation split.
    """
    if arguments.get("limit_test_batches") == 0:
        raise UserError("trainer.limit_test_batches=0: every run ends with a test, which needs at least one batch")
    if not isinstance(data, MNISTDataModule):
        if "test" in stages and not is_overridden("test_dataloader", data, L.LightningDataModule):
            raise UserError(f"data: {type(data).__name__} has no test_dataloader, and every run ends with a test")
        return
    data.prepare_data()
    data.setup()
    for stage in stages:
        batches, limit = math.ceil(data.facts[stage] / data.batch_size), arguments.get(f"limit_{stage}_batches")
        if isinstance(limit, float) and batches and int(batches * limit) == 0 < limit:
            raise UserError(f"trainer.limit_{stage}_batches={limit}: selects no batch (there are {batches})")
    if "train" not in stages:
        return
    callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    monitored = [(f"callbacks: {type(each).__name__}", getattr(each, "monitor", None)) for each in callbacks]
    for name, metric in [*monitored, ("scheduler", (scheduler or {}).get("monitor"))]:
        if str(metric).startswith("val") and not data.facts["val"]:
            raise UserError(f"{name} monitors {metric}, and there is no validation split: set data.val_size")
    count, processes, interval = data.facts["train"], trainer.world_size, arguments.get("val_check_interval")
    batches, limit = math.ceil(count / data.batch_size), arguments.get("limit_train_batches")
    batches = min(batches, limit) if isinstance(limit, int) else int(batches * (1.0 if limit is None else limit))
    if isinstance(interval, (str, dict)) and processes > 1:
        raise UserError(f"trainer.val_check_interval={interval}: the clocks of several processes differ; count batches")
    if isinstance(interval, int) and interval > batches and arguments.get("check_val_every_n_epoch", 1) is not None:
        raise UserError(f"trainer.val_check_interval={interval}: an epoch has only {batches} batches")
    if data.batch_size % processes or count % data.batch_size % processes:
        raise UserError(
            f"data.batch_size={data.batch_size}: each batch of the {count:,} training images, the last one too, must "
            f"divide equally among the {processes} processes"
        )


@contextmanager
def matmul_precision(precision: str | None) -> Iterator[None]:
    """In this block, float32 matrix products on a GPU have this precision; None: the one they have."""
    if not precision:
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def fitting(trainer: L.Trainer, is_new: bool) -> Iterator[None]:
    """In this block, log lines appear above the progress bar; at its end, those that stopped the run early say why.

    A new run that is refused before its first step leaves no configuration, so that its folder is no run's.

    Raises:
        UserError: Lightning finds the configuration wrong, or what a checkpoint holds cannot be restored.
    """
    bar = logging_redirect_tqdm() if trainer.is_global_zero else nullcontext()  # only it has a bar
    try:
        with bar, _errors_as_user_errors(trainer):
            yield
    except UserError:
        if is_new and trainer.is_global_zero and not trainer.global_step:
            (Path(trainer.default_root_dir) / "config.yaml").unlink(missing_ok=True)
        raise
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if reason := getattr(callback, "stopping_reason_message", None):
            log.info("stopped early: %s", " ".join(reason.split()))


@contextmanager
def _errors_as_user_errors(trainer: L.Trainer) -> Iterator[None]:
    """In this block, what Lightning says about the configuration, the data or a checkpoint becomes a ``UserError``."""
    try:
        yield
    except Exception as error:
        if several := re.search(r"multiple `(\w+)_dataloader`", str(error)):
            raise UserError(
                f"data: several loaders for {several[1]}; only one loader for each part is supported"
            ) from error
        # Early stopping's, at the end of the first epoch, that of the length of an epoch, and that of a fused optimizer with
        # a mixed precision have no type of their own.
        said = ("conditioned on metric", "`val_check_interval`", "does not allow for gradient clipping")
        lacks_package = isinstance(error, ModuleNotFoundError) and _raised_by_lightning(error)
        if isinstance(error, MisconfigurationException) or lacks_package or any(each in str(error) for each in said):
            raise UserError(" ".join(str(error).split())) from error
        if large := re.fullmatch(r"Target (\d+) is out of bounds.*", str(error)):  # a GPU does not say so
            raise UserError(
                f"the data have a class {large[1]}, counted from 0, and the network has fewer outputs: model=mlp and "
                "model=resnet18 have model.classes="
            ) from error
        if isinstance(error, UserError) or not compat.is_restoring(trainer):
            raise
        what = f"{type(error).__name__}: {one_line(error)}"
        raise UserError(f"{trainer.ckpt_path} cannot be resumed: its state does not fit this run ({what})") from error


def tested(trainer: L.Trainer, classifier: Any, data: Any) -> dict[str, Any]:
    """The metrics of the test.

    Raises:
        UserError: There are several test loaders.
    """
    with _errors_as_user_errors(trainer):
        (results,) = trainer.test(classifier, data, verbose=False)
    return dict(results)


def log_header(trainer: L.Trainer, classifier: Any, data: Any, config: dict[str, Any], resume: Any) -> None:
    """Log the network and the data, and pass the configuration to the loggers."""
    if config["trainer"].get("enable_model_summary") is not False:
        parameters = sum(parameter.numel() for parameter in classifier.parameters())
        log.info("%s\n%s parameters", classifier.network, f"{parameters:,}")
    facts = facts_of(data)
    log.info("data: %s", described(facts))
    known = {"data_name": facts["name"], "data_sha256": facts.get("sha256", ""), "versions": runs.versions()}
    for logger in trainer.loggers:
        logger.log_hyperparams({**known, **config})
    if resume:
        where = Path(resume)
        start = where.name if where.is_file() else "its beginning"
        log.info("resuming %s from %s", runs.display_path(Path(trainer.default_root_dir)), start)


def conditions(trainer: L.Trainer, data: Any) -> dict[str, Any]:
    """What results depend on besides the configuration: hardware, data and versions."""
    device, threads = trainer.strategy.root_device, torch.get_num_threads()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    name += f", {threads} thread{'s' * (threads > 1)}" if device.type == "cpu" else ""
    return {
        "peak_memory_bytes": peak_memory_bytes(),
        "device": f"{trainer.world_size} x {name}" if trainer.world_size > 1 else name,
        "precision": str(trainer.precision),
        "data": facts_of(data),
        "versions": runs.versions(),
    }


def tidy_messages() -> None:
    """De-duplicate Lightning's messages, and silence the uninformative ones."""
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")  # batches are ready in memory
    warnings.filterwarnings("ignore", message=".*smaller than the logging interval.*")  # the model logs by epoch
    warnings.filterwarnings("ignore", message="When using the `ThroughputMonitor`, you need")  # it counts images
    warnings.filterwarnings("ignore", message="Total length of `list` across ranks is zero.*")  # no validation split
    # The layouts are equal: with one input channel, its stride does not matter.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides.*")
    warnings.filterwarnings("ignore", message=".*LeafSpec.*is deprecated.*")  # Lightning 2.6 with torch 2.15
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_says_something)
    if logging.getLogger().hasHandlers():  # Hydra's; Lightning's own handlers would print everything twice
        logging.captureWarnings(True)
        for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
            logging.getLogger(name).handlers.clear()
            logging.getLogger(name).propagate = True


def _says_something(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("\N{ELECTRIC LIGHT BULB} Tip")


def _logger(name: str, options: dict[str, Any], folder: Path, resumed: bool) -> Any:
    section = f"logger.{name}"
    if resumed and issubclass(find_class(section, options, object), loggers.CSVLogger):
        place = options.get("name", "lightning_logs")
        parts = len(list(folder.glob(f"{place}*"))) + 1  # CSVLogger deletes what is in its folder
        options = {**options, "name": f"{place}_{parts}" if parts > 1 else place}
    others = {key: value for key, value in options.items() if key != "save_dir"}
    place = str(folder / (options.get("save_dir") or ""))
    return _build(f"logger.{name}", others, loggers.Logger, save_dir=place)  # type: ignore[type-abstract]


def _entries(group: str, config: dict[str, Any] | None) -> list[tuple[str, dict[str, Any]]]:
    """The name and the options of each entry of a group of which several can be chosen, but for those switched off.

    Raises:
        UserError: A file of the group gives its entry no name.
    """
    if config and "_target_" in config:
        target = config["_target_"]
        raise UserError(
            f"{group}: an entry has a name, so that several can be chosen: mine: {{_target_: {target}, ...}}"
        )
    return [(name, options) for name, options in (config or {}).items() if options]


def _build(section: str, options: dict[str, Any], kind: type[T], **defaults: Any) -> T:
    """``instantiate``; if a class that the groups offer lacks its package, the error says which."""
    try:
        return instantiate(section, options, kind, **defaults)
    except UserError as error:
        if not isinstance(error.__cause__, ModuleNotFoundError):
            raise
        package = "kornia" if error.__cause__.name == "kornia" else NEEDED.get(str(options["_target_"]).split(".")[-1])
        if not package:  # a class of the user's own
            raise
        asked = section.replace(".", "=")
        raise UserError(f"{asked} needs a package that is not installed: pip install {package}") from error


def _raised_by_lightning(error: BaseException) -> bool:
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return str(frames[-1].f_globals.get("__name__")).startswith("lightning.")
