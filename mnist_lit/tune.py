"""``python -m mnist_lit.tune``: hyperparameter search with Optuna; each trial is a training run in its own process.

Any number of these commands, on any number of machines, can work on the same study: they share its storage.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mnist_lit import UserError, require_packages
from mnist_lit.cli import job
from mnist_lit.cli.config import ConfigFiles, arguments_of_tune, flatten, key_of, plain_values
from mnist_lit.cli.launch import launch, loading, stopped_by_signals
from mnist_lit.sweeps.jobs import identity


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
    of_the_users_own = "data._target_" in map(key_of, overrides)  # it validates as it likes
    if not of_the_users_own and not config.get("data.val_size", True):
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

    job.warm_up()
    hydra = HydraConfig.get()
    config_dirs = [source.path for source in hydra.runtime.config_sources if source.provider == "command-line"]
    config_dir = config_dirs[0] if config_dirs else None
    asked = arguments_of_tune(values, hydra.overrides.task, hydra.runtime.choices, config_dir)
    with stopped_by_signals(lambda: "; the same command continues, and runs the interrupted trials again"):
        tune(hydra.runtime.output_dir, **asked)


def main() -> None:
    launch("tune", _command)


if __name__ == "__main__":
    main()
