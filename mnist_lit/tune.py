"""``python -m mnist_lit.tune``: hyperparameter search with Optuna; each trial is a training run in its own process.

Any number of these commands, on any number of machines, can work on the same study: they share its storage.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mnist_lit import UserError, require_packages
from mnist_lit.cli import job
from mnist_lit.cli.config import ConfigFiles, as_overrides, flatten, key_of, plain_values
from mnist_lit.cli.keys import is_under
from mnist_lit.cli.launch import launch, loading, stopped_by_signals
from mnist_lit.sweeps.jobs import identity

OF_ALL = ("experiment", "debug", "local")  # groups whose files change other sections


def tune(
    folder: str | Path,
    n_trials: int,
    storage: str,
    study: str,
    sampler: str,
    pruner: str,
    sampler_seed: int | None,
    workers: int,
    space: dict[str, Any],
    overrides: Sequence[str] = (),
    config_dir: str | None = None,
) -> Any:
    """Run trials until the study has ``n_trials``; the arguments after ``folder`` are the keys of ``conf/tune.yaml``.

    Trials are ``multiprocessing`` processes, so a script needs ``if __name__ == "__main__":`` around the call.

    Args:
        folder: For the trials' folders and the results.
        overrides: Changes to ``conf/train.yaml``, for every trial.
        config_dir: A folder with more options for the configuration's groups.

    Returns:
        The ``optuna.Study``.

    Raises:
        UserError: The search space is invalid, the study was started with another configuration, its storage cannot be
            opened, the first trials all failed, or no trial completed.
        Interrupted: Stopped by a signal; the next call runs the interrupted trials again.
    """
    require_packages("tune", "optuna")
    with loading("Optuna"):
        from mnist_lit.sweeps import search
    folder, files = Path(folder), ConfigFiles("train", config_dir)
    with files.errors_as_user_errors(overrides):
        composed = files.compose(overrides)
    config, groups = flatten(plain_values(composed, resolve=False)), composed.hydra.runtime.choices
    if not config.get("data.val_size", True):
        raise UserError("data.val_size=0 leaves no validation accuracy to optimize")
    distributions = search.distributions(space, {**groups, **config}, overrides)
    monitored = {key: str(config[key]) for key in ("checkpoint.monitor", "checkpoint.mode")}
    monitor, mode = monitored.values()
    opened, database = search.open_study(storage, study, search.make_pruner(pruner), mode)
    opened.sampler = search.make_sampler(sampler, sampler_seed, len(opened.trials))
    search.require_same_search(opened, flatten({"space": space}) | json.loads(identity(config, ())) | monitored)
    search.Search(folder, opened, database, n_trials, distributions, files, overrides, workers, monitor).run()

    from mnist_lit.sweeps.tune_report import report

    report(folder, opened, overrides, files, monitor)
    return opened


def _command(**values: Any) -> None:
    from hydra.core.hydra_config import HydraConfig

    from mnist_lit.cli import schema

    job.warm_up()
    if values.get("resume"):
        raise UserError("resume= continues a run; a search continues with the same storage= and study=")
    if "checkpoint" not in values:
        raise UserError("a search needs the section checkpoint")
    hydra = HydraConfig.get()
    overrides = [each for each in hydra.overrides.task if not is_under(key_of(each), schema.TUNE_KEYS)]
    config_dirs = [source.path for source in hydra.runtime.config_sources if source.provider == "command-line"]
    files = ConfigFiles("train", config_dirs[0] if config_dirs else None)
    own = {key: values.pop(key) for key in schema.TUNE_KEYS}
    overrides = _of_train(overrides, values, hydra.runtime.choices, files)
    with stopped_by_signals(lambda: "; the same command continues, and runs the interrupted trials again"):
        tune(hydra.runtime.output_dir, **own, overrides=overrides, config_dir=files.user_folder)


def _of_train(typed: list[str], values: dict[str, Any], choices: Mapping[str, Any], files: ConfigFiles) -> list[str]:
    """``typed``, and as further overrides of ``train`` what ``tune.yaml``, or one of the user's own, has otherwise.

    Args:
        values: The configuration without the keys that are tune's alone.
        choices: The files that were chosen for it, by group.
    """
    own = {group: name or "none" for group, name in choices.items() if not group.startswith("hydra/")}
    usual = files.compose([each for each in typed if key_of(each) in own]).hydra.runtime.choices
    own = {group: name for group, name in own.items() if group in usual}
    overrides = [*(f"{group}={name}" for group, name in own.items() if (usual[group] or "none") != name), *typed]
    chosen = [f"{group}={name}" for group, name in own.items() if name != "none" and group not in OF_ALL]
    default, train = (flatten(plain_values(files.compose(each))) for each in (chosen, overrides))
    # What an experiment changes stays as it has it.
    changed = {
        key: value
        for key, value in flatten(values).items()
        if key in train and train[key] != value and train[key] == default.get(key, train[key])
    }
    # data.val_size is in tune.yaml for any data, and not all have it.
    added = {f"+{key}": value for key, value in flatten(values).items() if key not in (*train, "data.val_size")}
    return [*overrides, *as_overrides({**changed, **added})]


def main() -> None:
    launch("tune", _command)


if __name__ == "__main__":
    main()
