"""What a search found: the best settings as an experiment to run, a table of the trials, and Optuna's own pictures."""

import csv
import io
import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from mnist_lit import UserError
from mnist_lit.cli.config import ConfigFiles, as_overrides, flatten, plain_values
from mnist_lit.storage import runs
from mnist_lit.storage.atomic import atomic_write

log = logging.getLogger("mnist_lit.tune")

PICTURES = ("optimization_history", "param_importances", "slice", "intermediate_values", "parallel_coordinate")
# Where a run finds its data and what it writes is no part of its settings.
LEFT_OUT = ("data.dir", "data.source", "logger", "trainer.enable_", "resume")
NOTHING = object()
SHOWN = 10  # trials in the table on the terminal


def load_pictures() -> None:
    """Import what ``report`` draws with, which takes seconds."""
    import optuna.importance
    import optuna.visualization.matplotlib  # noqa: F401


def report(folder: Path, study: Any, overrides: Sequence[str], files: ConfigFiles) -> None:
    """Write the results of ``study`` into ``folder``, and show the best of them.

    Raises:
        UserError: No trial came to its end.
        WriteError: What was there before is untouched.
    """
    from optuna.trial import TrialState

    logging.getLogger("matplotlib.category").setLevel(logging.WARNING)  # it is told of numbers that are choices
    trials = study.get_trials(deepcopy=False)
    atomic_write(folder / "trials.csv", _csv(trials).encode())
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    if not complete:
        raise UserError(f"no trial came to its end; what became of them is in {runs.display_path(folder)}/trials.csv")
    complete.sort(key=lambda trial: -trial.value)
    (folder / "experiment").mkdir(exist_ok=True)
    best = complete[0]
    path = folder / "experiment" / "best.yaml"
    atomic_write(path, experiment(best, study.study_name, overrides, files).encode())
    _draw(study, folder, several=len(complete) > 1)
    keys = list(best.params)
    rows = [["trial", "val/acc", *keys]]
    rows += [[str(t.number), f"{t.value:.4f}", *(short(t.params[key]) for key in keys)] for t in complete[:SHOWN]]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    table = "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    pruned = sum(trial.state == TrialState.PRUNED for trial in trials)
    bad = [trial for trial in trials if "reason" in trial.user_attrs]
    lines = [f"failed: trial {trial.number}: {trial.user_attrs['reason']}" for trial in bad]
    lines += [
        f"{len(complete)} trials to their end, {pruned} pruned, {len(bad)} failed; all are in {runs.display_path(folder)}"
    ]
    lines += [f"the best one again: python -m mnist_lit.train --config-dir={runs.display_path(folder)} experiment=best"]
    log.info("\n%s\n\n%s", table, "\n".join(lines))


def experiment(trial: Any, study: str, overrides: Sequence[str], files: ConfigFiles) -> str:
    """The settings of a trial as a file for ``experiment=``; where the data are is left to whoever runs it."""
    config = files.compose([*overrides, *as_overrides(trial.params)])
    choices = config.hydra.runtime.choices
    groups = {group: choices[group] for group in ("model", "optimizer")}
    before = flatten(plain_values(files.compose([f"{group}={choice}" for group, choice in groups.items()])))
    content: dict[str, Any] = {"defaults": [{f"override /{group}": choice} for group, choice in groups.items()]}
    for key, value in flatten(plain_values(config)).items():
        *sections, name = key.split(".")
        if before.get(key, NOTHING) != value and not key.startswith(LEFT_OUT):
            place = content
            for section in sections:
                place = place.setdefault(section, {})
            place[name] = value
    head = f"The best of the study {study}: validation accuracy {trial.value:.4f} in trial {trial.number}."
    return f"# @package _global_\n# {head}\n" + yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


def short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _csv(trials: list[Any]) -> str:
    keys = list({key: None for trial in trials for key in trial.params})
    columns = ["trial", "state", "val/acc", *keys, "epochs", "seconds", "folder", "reason"]
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, restval="")
    writer.writeheader()
    for trial in trials:
        steps = trial.intermediate_values
        row = {"trial": trial.number, "state": trial.state.name.lower(), "epochs": max(steps, default=0)}
        row |= {"val/acc": max(steps.values(), default=""), **trial.params}
        row |= {key: trial.user_attrs.get(key, "") for key in ("folder", "reason")}
        writer.writerow(row | {"seconds": round(trial.duration.total_seconds(), 1) if trial.duration else ""})
    return text.getvalue()


def _draw(study: Any, folder: Path, several: bool) -> None:
    """Optuna's pictures; most of them need several trials."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import optuna.visualization.matplotlib as visualization

    for name in PICTURES if several else PICTURES[:1]:
        what = {} if name == "intermediate_values" else {"target_name": "validation accuracy"}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they are experimental, says each
            try:
                drawn = getattr(visualization, f"plot_{name}")(study, **what)
            except (ValueError, RuntimeError) as error:  # all trials alike, for instance
                log.info("no picture of %s: %s", name, error)
                continue
        axes = drawn.flat[0] if hasattr(drawn, "flat") else drawn
        axes.figure.savefig(folder / f"{name}.png", dpi=120, bbox_inches="tight")
        plt.close("all")
