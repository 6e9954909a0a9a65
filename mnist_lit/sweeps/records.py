"""Runs as their folders record them, to list and compare; a folder may be damaged, unfinished or untrusted."""

import csv
import io
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

from mnist_lit import UserError
from mnist_lit.cli.config import CONF, ConfigFiles, flatten, plain_values
from mnist_lit.cli.keys import MAY_CHANGE, MULTI_GROUPS, SINGLE_GROUPS, is_under
from mnist_lit.reports.results import limited_by
from mnist_lit.storage import run_config, runs
from mnist_lit.storage.tables import one_line, short
from mnist_lit.sweeps.jobs import FILE as JOB
from mnist_lit.sweeps.summary import METRICS

MAX_DEPTH = 6  # of folders below the one that is listed
MAX_BYTES = 2**24  # of a file with results; the tutorial's ``metrics.json`` has 6 kB
GROUPS = (*SINGLE_GROUPS, "metrics", "callbacks")  # what loggers record changes no results
NOT_SHOWN = (*MAY_CHANGE, "trainer.enable_checkpointing")  # it changes nothing, and no trial of a search has any
REFERENCE = re.compile(r"\$\{(?:oc\.select:)?([\w.]+)(?:,(\d+))?\}")
METRIC = re.compile(r"(val|test|train)/\w{1,30}")


@dataclass
class Record:
    """A run.

    Attributes:
        facts: ``folder``, ``started``, ``status`` ...: what ``mnist_lit.runs`` has for each run, None if not known.
        settings: Its configuration, flattened; for a group of ``conf/`` the file that was chosen; device and versions.
        changes: The settings that differ from the defaults and could have changed the results.
    """

    folder: Path
    facts: dict[str, Any]
    settings: dict[str, Any] = field(repr=False)
    changes: dict[str, Any]


def find(folder: Path) -> tuple[list[Record], list[str]]:
    """The runs in ``folder`` and below it, the newest first; and what cannot be read, with the reasons."""
    found: list[Record] = []
    skipped: list[str] = []
    for place in _run_folders(folder, skipped):
        try:
            found.append(read(place, folder))
        except UserError as error:
            skipped.append(str(error))
    return sorted(found, key=lambda record: record.facts["started"], reverse=True), skipped


def _run_folders(folder: Path, skipped: list[str]) -> Iterator[Path]:
    def skip(error: OSError) -> None:
        skipped.append(f"{error.filename}: {error.strerror}")

    seen = set()  # links may lead in a circle
    for name, inside, files in os.walk(folder, followlinks=True, onerror=skip):
        place = Path(name)
        is_new = (real := place.resolve()) not in seen
        seen.add(real)
        is_run = bool({"config.yaml", JOB} & {*files})
        if is_new and is_run:
            yield place
        if is_run or not is_new or len(place.relative_to(folder).parts) == MAX_DEPTH:
            inside.clear()
        inside[:] = [each for each in inside if not each.startswith(".")]


def read(folder: Path, base: Path) -> Record:
    """The run in ``folder``.

    Args:
        base: The folder that its name is relative to.

    Raises:
        UserError: There is no run, or it cannot be read; the message names the file.
    """
    try:
        return _read(folder, base)
    except OSError as error:
        raise UserError(f"{folder} cannot be read ({error.strerror})") from error


def _read(folder: Path, base: Path) -> Record:
    job, results = _read_json(folder / JOB), _read_json(folder / "metrics.json")
    if (folder / "config.yaml").exists() or not job:
        config = flatten(run_config.read_config(folder / "config.yaml"))
    else:  # a job that has not begun
        config = job["config"] if isinstance(job.get("config"), dict) else {}
    chosen, changes = _compared_with_defaults(config)
    history = [] if results else read_history(folder)
    last = {**history[-1], "epochs": history[-1].get("epoch")} if history else results
    others = [key for key, value in last.items() if METRIC.fullmatch(key) and _number(value) is not None]
    status = _status(folder, config, results, job)
    facts = {
        "folder": str(folder.relative_to(base)) if folder.is_relative_to(base) else runs.display_path(folder),
        "started": _started(folder),
        "status": status,
        "data": _data(folder, results),
        "changes": " ".join(f"{key}={one_line(as_typed(value))}" for key, value in changes.items()),
        "epochs": _count(last.get("epochs")),
        "max_epochs": _count(config.get("trainer.max_epochs")),
        **{key: _number(last.get(key)) for key in (*METRICS, *others) if key != "test/images"},
        "fit_seconds": _number(results.get("fit_seconds")),
        "reason": one_line(job.get("reason") or "") if status == "failed" else None,
    }
    versions = results.get("versions")
    conditions = {f"versions.{name}": each for name, each in (versions if isinstance(versions, dict) else {}).items()}
    return Record(folder, facts, {**config, **chosen, "device": results.get("device"), **conditions}, changes)


def differing(records: Sequence[Record]) -> list[str]:
    """The settings that differ between runs and can have changed their results, the chosen files first."""
    settings = [record.settings for record in records]
    keys = dict.fromkeys([*GROUPS, *(key for each in settings for key in each)])
    different = [key for key in keys if any(each.get(key) != settings[0].get(key) for each in settings)]

    def is_named(key: str) -> bool:
        """Whether it is a class that the names of chosen files stand for."""
        group = key.partition(".")[0]
        return key.endswith("._target_") and all(each.get(group) or key not in each for each in settings)

    return [key for key in different if not is_named(key) and not is_under(key, NOT_SHOWN)]


def read_history(folder: Path) -> list[dict[str, float]]:
    """A row per epoch, as in ``RunRecorder.history``; none if there is no ``metrics.csv``.

    Raises:
        UserError: The file cannot be read.
    """
    path = folder / "metrics.csv"
    if not path.exists():
        return []
    try:
        rows = list(csv.DictReader(io.StringIO(runs.read_text(path, MAX_BYTES))))
        return [
            {key: float(value) for key, value in row.items() if key and value and not key.startswith("data")}
            for row in rows
        ]
    except (OSError, ValueError, TypeError, csv.Error) as error:
        raise UserError(f"{path} cannot be read ({one_line(error)})") from error


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        content = json.loads(runs.read_text(path, MAX_BYTES))
        if not isinstance(content, dict):
            raise ValueError("it is not an object")  # noqa: TRY004  # for the line below
        inside: list[Any] = [content]
        for _ in range(run_config.MAX_DEPTH):
            lists = [
                each.values() if isinstance(each, dict) else each for each in inside if isinstance(each, (dict, list))
            ]
            inside = [each for values in lists for each in values]
        if inside:
            raise ValueError("it is nested too deeply")
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({one_line(error)})") from error
    return content


def as_typed(value: Any) -> str:
    """A value as on the command line, in short."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    text = short(value)
    return f"{text}.0" if isinstance(value, float) and text.lstrip("-").isdigit() else text  # 1.0 of the batches is all


def _number(value: Any) -> float | None:
    return value if type(value) in (int, float) and abs(value) < 1e12 else None  # NaN is not, and infinity


def _count(value: Any) -> int | None:
    return None if (number := _number(value)) is None else int(number)


def _status(folder: Path, config: Mapping[str, Any], results: Mapping[str, Any], job: Mapping[str, Any]) -> str:
    """finished; limited: finished, on a part of the batches; running; unfinished; or of a job failed, waiting, stopped."""
    if job.get("status") == "failed":  # it may have results nevertheless
        return "failed"
    if results:
        trainer = {key.removeprefix("trainer."): value for key, value in config.items()}
        return "limited" if limited_by(trainer) else "finished"
    if runs.is_in_use(folder):
        return "running"
    return job["status"] if job.get("status") in ("waiting", "stopped") else "unfinished"


def _started(folder: Path) -> str:
    """By the first line of its log, or else the age of its configuration, which changes when it is resumed."""
    log = folder / "train.log"
    if log.is_file():
        with log.open("rb") as file:
            first = file.read(19).decode(errors="replace")
        if re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", first):
            return first
    path = next(path for name in ("config.yaml", JOB) if (path := folder / name).exists())
    return datetime.fromtimestamp(path.stat().st_mtime).isoformat(" ", "seconds")


def _data(folder: Path, results: Mapping[str, Any]) -> str | None:
    data = results.get("data")
    if isinstance(data, dict) and isinstance(data.get("name"), str):
        return one_line(data["name"])
    if not (path := folder / "config.yaml").is_file():
        return None
    with path.open(encoding="utf-8") as file:
        head = re.match(r"# data: (.+), sha256 ", file.readline(1000))
    return head[1] if head else None


@cache
def _defaults() -> dict[str, Any]:
    return flatten(plain_values(ConfigFiles("train").compose([])))


@cache
def _options(group: str) -> dict[str, dict[str, Any]]:
    """The files of a group of ``conf/`` but ``none``, flattened, by name."""
    from omegaconf import OmegaConf

    loaded = {path.stem: OmegaConf.to_container(OmegaConf.load(path)) for path in sorted((CONF / group).glob("*.yaml"))}
    return {name: flatten({group: values}) for name, values in loaded.items() if name != "none"}


def _chosen(group: str, config: Mapping[str, Any]) -> tuple[str | None, dict[str, Any]]:
    """Which file of a group a flattened configuration has chosen, and what is in it; None if it is none of ``conf/``."""
    options, own = _options(group), {key: value for key, value in config.items() if is_under(key, [group])}
    if group in MULTI_GROUPS:
        names = [name for name in options if f"{group}.{name}._target_" in own]
        if not names:
            return None, {}
        return f"[{','.join(names)}]", {key: value for name in names for key, value in options[name].items()}
    target = own.get(f"{group}._target_")
    fitting = [name for name in options if target and options[name][f"{group}._target_"] == target]
    if not fitting:
        return None, {}

    def differences(name: str) -> int:
        return sum(own.get(key, ...) != options[name].get(key, ...) for key in {*own, *options[name]})

    return (name := min(fitting, key=differences)), options[name]


def _compared_with_defaults(config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The chosen file of each group, and all settings that differ from those of the defaults and of these files."""
    expected, chosen, changes = dict(_defaults()), {}, {}
    for group in GROUPS:
        default, _ = _chosen(group, _defaults())
        chosen[group], values = _chosen(group, config)
        expected |= values
        if chosen[group] not in (None, default):
            changes[group] = chosen[group]
    for key, value in config.items():
        wanted = expected.get(key)  # of a group without a choice there is nothing
        if reference := REFERENCE.fullmatch(str(wanted)):
            wanted = config.get(reference[1], int(reference[2]) if reference[2] else None)
        if value not in (expected.get(key), wanted) and not is_under(key, NOT_SHOWN):
            changes[key] = value
    return chosen, changes
