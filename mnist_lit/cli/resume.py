"""``resume=``: finds the run and checkpoint to resume from, and merges allowed overrides into its configuration."""

import contextlib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mnist_lit import UserError
from mnist_lit.cli.config import ConfigFiles, flatten
from mnist_lit.cli.data_of_run import run_of
from mnist_lit.cli.keys import MAY_CHANGE, RUN_LENGTH_KEYS, is_under
from mnist_lit.reports.results import LIMITS, limited_by
from mnist_lit.storage import runs
from mnist_lit.storage.checkpoint_file import corruption
from mnist_lit.storage.run_config import read_config


@dataclass(frozen=True)
class Run:
    """A run that has been started.

    Attributes:
        folder: Its folder.
        start: The checkpoint to resume from, or the folder itself if there is none yet.
        config: The content of ``config.yaml``.
    """

    folder: Path
    start: Path
    config: dict[str, Any]


def find(wanted: str, outputs: Path | None = None) -> Run:
    """Find the run that ``resume=`` refers to.

    Args:
        wanted: ``latest`` (see ``preferred``), a run's folder, or a checkpoint in one.
        outputs: The folder with the runs, for ``latest``; None for that of ``conf/train.yaml``.

    Raises:
        UserError: There is no such run, or its checkpoint is corrupt; then the message names the newest intact one.
    """
    path = Path(wanted)
    if wanted == "latest" and not path.exists():
        outputs = outputs or ConfigFiles("train").outputs_folder()
        begun = runs.newest_first(outputs)
        if not begun:
            raise UserError(f"resume=latest: there is no run in {outputs}")
        path = preferred(begun)
    elif not path.exists():
        raise UserError(f"resume={wanted}: there is no such run or checkpoint")
    folder = path if path.is_dir() else Path(runs.display_path(run_of(path)))
    if not (folder / "config.yaml").is_file():
        raise UserError(f"resume={wanted}: no run has begun in {folder} (it has no config.yaml)")
    config = read_config(folder / "config.yaml")
    # It is from within a validation, where Lightning cannot go on exactly.
    if path.is_file() and path.name == Path(runs.BEST).name:
        raise UserError(
            f"resume={wanted}: best.ckpt cannot be resumed, only tested; resume the run itself: resume={folder}"
        )
    written = (place for name in (runs.LAST, runs.PREVIOUS) if (place := folder / name).exists())
    start = path if path.is_file() else next(written, folder)
    if start != folder and (reason := corruption(start)):
        raise UserError(f"resume={wanted}: {reason}{runs.suggest_intact(folder, start, 'resume')}")
    return Run(folder, start, config)


def preferred(newest_first: Sequence[Path]) -> Path:
    """The newest of the runs that used all images; if none did, the newest one."""
    for folder in newest_first:
        with contextlib.suppress(UserError):  # whoever uses the run says what is wrong with it
            if limited_by(read_config(folder / "config.yaml")["trainer"]):
                continue
        return folder
    return newest_first[0]


def _amount(limit: Any) -> float:
    """A limit as a number, for comparison; NaN if it is none, which Lightning refuses."""
    if limit in (-1, None):
        return math.inf
    if isinstance(limit, str) and re.fullmatch(r"\d+(:\d+){3}", limit):
        days, hours, minutes, seconds = map(int, limit.split(":"))
        return ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    return limit if isinstance(limit, int) else math.nan


def continued(run: Run, asked: dict[str, Any], typed: set[str]) -> dict[str, Any]:
    """The configuration of the run, with the overrides that may change.

    Args:
        asked: The configuration that the command line gives.
        typed: The keys that were set there, as ``flatten`` names them.

    Raises:
        UserError: Some of the overrides would change the run; the message names them all.
    """
    own, new = flatten(run.config), flatten(asked)
    own |= {key: run.config[key] for key in typed if asked.get(key) == {} and run.config.get(key)}  # GROUP=none
    different = sorted(key for key in typed if own.get(key) != new.get(key))
    raised = [key for key in different if key.removeprefix("trainer.") in LIMITS]
    other = [key for key in different if not is_under(key, MAY_CHANGE) and key not in raised]
    if other:
        differences = ", ".join(f"{key} was {own.get(key)} and not {new.get(key)}" for key in other)
        raise UserError(f"{run.folder} is another run: {differences}; remove these overrides to resume it")
    for key in raised:
        if _amount(new.get(key)) < _amount(own.get(key)):
            raise UserError(f"{run.folder} has {key.partition('.')[2]}={own.get(key)}: it can only be increased")
    if {*raised} - {"trainer.max_time"} and (
        open_length := next((key for key in RUN_LENGTH_KEYS if own.get(key, "") is None), None)
    ):
        raise UserError(
            f"{run.folder} has {open_length}=null: its schedule spans the whole run, whose length cannot change"
        )
    averaging = (key for key, value in own.items() if key.endswith(".swa_epoch_start") and isinstance(value, float))
    if "trainer.max_epochs" in raised and (fraction := next(averaging, None)):
        raise UserError(
            f"{run.folder} has {fraction}={own[fraction]}: averaging begins at this fraction of the epochs, whose number "
            "cannot change"
        )
    values = {key: dict(value) if isinstance(value, dict) else value for key, value in run.config.items()}
    for key in different:
        section, _, name = key.partition(".")
        if section == "logger":  # as a whole: each logger has keys of its own
            values["logger"] = asked["logger"]
        elif name:
            name = name.partition(".")[0]  # as a whole, if it is a class with arguments
            values[section][name] = asked[section].get(name)
    return {**values, "resume": str(run.start)}
