"""Results of a search: the best settings as an experiment, a table of the trials, and Optuna's plots."""

import logging
import shlex
import warnings
from collections.abc import Sequence
from pathlib import Path

import optuna
from omegaconf import OmegaConf
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from mnist_lit import UserError
from mnist_lit.cli.config import CONF, ConfigFiles, as_overrides, checked_values, flatten, key_of, plain_values
from mnist_lit.cli.keys import SINGLE_GROUPS, is_under
from mnist_lit.reports.results import only_showing
from mnist_lit.storage import runs
from mnist_lit.storage.atomic import atomic_write
from mnist_lit.storage.tables import short, text_table, to_csv
from mnist_lit.sweeps.records import NOT_SHOWN

log = logging.getLogger("mnist_lit.tune")

PLOTS = ("optimization_history", "param_importances", "slice", "intermediate_values", "parallel_coordinate")
MAX_ROWS = 10  # of the table on the terminal
BEST = "best"  # the name of the files with the best settings


def report(folder: Path, study: optuna.Study, overrides: Sequence[str], files: ConfigFiles, monitor: str) -> None:
    """Write the results of ``study`` to ``folder``, and log the best of them.

    Args:
        monitor: The metric that was optimized.

    Raises:
        UserError: No trial completed, or a file cannot be written; an existing one is left as it was.
    """
    trials, shown = study.get_trials(deepcopy=False), runs.display_path(folder)
    atomic_write(folder / "trials.csv", _csv(trials, monitor))
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    if not complete:
        raise UserError(f"no trial completed; {shown}/trials.csv says why")
    complete.sort(key=lambda trial: trial.value or 0.0, reverse=study.direction == StudyDirection.MAXIMIZE)
    best, keys = complete[0], list(complete[0].params)
    for path, text in experiment(best, study.study_name, overrides, files, monitor).items():
        (folder / path).parent.mkdir(exist_ok=True)
        atomic_write(folder / path, text.encode())
    rows = [["trial", monitor, *keys]]
    rows += [[str(t.number), f"{t.value:.4f}", *(short(t.params[key]) for key in keys)] for t in complete[:MAX_ROWS]]
    failed = [trial for trial in trials if "reason" in trial.user_attrs]
    pruned = sum(trial.state == TrialState.PRUNED for trial in trials)
    lines = [f"failed: trial {trial.number}: {trial.user_attrs['reason']}" for trial in failed]
    arguments = [f"--config-dir={shown}", "experiment=best"]
    arguments += [each for each in overrides if key_of(each) in ("data.dir", "data.source")]
    lines += [
        f"{len(complete)} trial{'s' * (len(complete) != 1)} completed, {pruned} pruned, {len(failed)} failed; all are in {shown}",
        f"to train with the best settings: python -m mnist_lit.train {shlex.join(arguments)}",
    ]
    log.info("\n%s\n\n%s", text_table(rows, ">"), "\n".join(lines))
    with only_showing("the plots", folder, "trials.csv"):
        _plot(study, folder, PLOTS if len(complete) > 1 else PLOTS[:1], monitor)


def experiment(
    trial: FrozenTrial, study: str, overrides: Sequence[str], files: ConfigFiles, monitor: str
) -> dict[str, str]:
    """The settings of a trial as files for ``experiment=best``, without the folder of MNIST or similar data.

    Returns:
        Each file's text by its path in the folder of the search: ``experiment/best.yaml``, and ``model/best.yaml`` or the
        like for a group whose keys are not those of a file in ``conf/``.
    """
    config = files.compose([*overrides, *as_overrides(trial.params)])
    values, choices = checked_values("train", config), config.hydra.runtime.choices
    typed = [key_of(override) for override in overrides]
    head = f"The best of the study {study}: {monitor} {trial.value:.4f} in trial {trial.number}."
    texts, chosen = {}, {}
    for group in SINGLE_GROUPS:
        if (name := choices[group]) in (None, "none"):
            continue
        changed = f"{group}._target_" in typed or any(each.startswith(f"~{group}.") for each in overrides)
        if changed or not (CONF / group / f"{name}.yaml").exists():
            texts[f"{group}/{BEST}.yaml"] = f"# {head}\n{OmegaConf.to_yaml(values.pop(group))}"
            name = BEST
        chosen[group] = name
    ours = [f"{group}={name}" for group, name in chosen.items() if name != BEST]
    defaults = flatten(plain_values(ConfigFiles("train").compose(ours)))
    changes = OmegaConf.create({"defaults": [{f"override /{group}": name} for group, name in chosen.items()]})
    for key, value in flatten(values).items():
        if (key not in defaults or defaults[key] != value) and not is_under(key, NOT_SHOWN):
            OmegaConf.update(changes, key, value, force_add=True)
    return {**texts, f"experiment/{BEST}.yaml": f"# @package _global_\n# {head}\n{OmegaConf.to_yaml(changes)}"}


def _csv(trials: Sequence[FrozenTrial], monitor: str) -> bytes:
    keys = dict.fromkeys(key for trial in trials for key in trial.params)
    rows = [
        {
            "trial": trial.number,
            "state": trial.state.name.lower(),
            # What is reported is the best so far.
            monitor: trial.intermediate_values[trial.last_step] if trial.last_step else "",
            "epochs": trial.last_step or 0,
            "seconds": round(trial.duration.total_seconds(), 1) if trial.duration else "",
            **trial.params,
            **trial.user_attrs,  # folder, reason
        }
        for trial in trials
    ]
    return to_csv(["trial", "state", monitor, *keys, "epochs", "seconds", "folder", "reason"], rows)


def _plot(study: optuna.Study, folder: Path, names: Sequence[str], monitor: str) -> None:
    import matplotlib
    import matplotlib.pyplot as plt
    import optuna.visualization.matplotlib as visualization

    matplotlib.use("Agg")
    logging.getLogger("matplotlib.category").setLevel(logging.WARNING)  # it mentions numeric choices
    with warnings.catch_warnings(action="ignore"):  # Optuna's matplotlib plots are experimental
        for name in names:
            target = {} if name == "intermediate_values" else {"target_name": monitor}
            try:
                getattr(visualization, f"plot_{name}")(study, **target)
                plt.savefig(folder / f"{name}.png", dpi=120, bbox_inches="tight")
            except (ValueError, RuntimeError) as error:  # all trials have the same value, for instance
                log.info("no plot of %s: %s", name, error)
            plt.close("all")
