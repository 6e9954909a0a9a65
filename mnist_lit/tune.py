"""``python -m mnist_lit.tune``: search for settings with Optuna; each trial is a training run in a process of its own.

Any number of these commands, on any number of machines, may work on one study: what they share is its storage.
"""

import json
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mnist_lit import Interrupted, UserError, require_packages
from mnist_lit.cli import job
from mnist_lit.cli.config import ConfigFiles, as_overrides, flatten, plain_values
from mnist_lit.cli.launch import launch, loading
from mnist_lit.sweeps.jobs import identity
from mnist_lit.sweeps.search import Search
from mnist_lit.sweeps.study import distributions, make_pruner, make_sampler, open_study, require_same_search
from mnist_lit.sweeps.tune_report import report

OWN = ("n_trials", "storage", "study", "sampler", "pruner", "sampler_seed", "workers", "space")


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
    """Work on a study until it has ``n_trials`` results; the arguments after ``folder`` are those of ``conf/tune.yaml``.

    Trials are processes of ``multiprocessing``: a script that calls this does so under ``if __name__ == "__main__":``.

    Args:
        folder: Where the trials have their folders, and the results go.
        overrides: Changes to ``conf/train.yaml``, for every trial.
        config_dir: A folder with further files of the configuration's groups.

    Returns:
        Optuna's study.

    Raises:
        UserError: The space has keys that there are not, the study was made for another search, or its storage is out of
            reach; or the first trials all failed, or none came to its end.
        Interrupted: Ctrl-C or SIGTERM came; the trials under way will be run again.
    """
    require_packages("tune", "optuna")
    with loading("Optuna"):
        import optuna  # noqa: F401
    folder, files = Path(folder), ConfigFiles("train", config_dir)
    draws = distributions(space, overrides, files)
    opened = open_study(storage, study, make_pruner(pruner))
    opened.sampler = make_sampler(sampler, sampler_seed, len(opened.trials))
    with files.errors_as_user_errors(overrides):
        config = flatten(plain_values(files.compose(overrides), resolve=False))
    require_same_search(opened, study, {"space": space, "settings": json.loads(identity(config, ()))})
    Search(folder, opened, n_trials, draws, files, overrides, workers).work()
    report(folder, opened, overrides, files)
    return opened


def _command(**values: Any) -> None:
    """``tune`` with the keys of train on the command line handed on to the trials."""
    from hydra.core.hydra_config import HydraConfig

    job.warm_up()
    of_hydra = HydraConfig.get()
    if values["resume"]:
        raise UserError("resume= goes on with a run; a search goes on with its storage= and study=")
    if not values["data"]["val_size"]:
        raise UserError("data.val_size=0: there would be no validation accuracy to search for")
    given = [each for each in of_hydra.overrides.task if each.lstrip("+~").split("=")[0].split(".")[0] not in OWN]
    folders = [source.path for source in of_hydra.runtime.config_sources if source.provider == "command-line"]
    files = ConfigFiles("train", folders[0] if folders else None)
    train = flatten(plain_values(files.compose(given)))
    # What tune.yaml sets otherwise than train.yaml.
    others = as_overrides({key: value for key, value in flatten(values).items() if train.get(key, value) != value})

    def stopped(number: int, frame: Any) -> None:
        raise Interrupted(number, "stopped by SIGTERM; the trials under way will be run again by the same command")

    signal.signal(signal.SIGTERM, stopped)
    own = {key: values[key] for key in OWN}
    try:
        tune(of_hydra.runtime.output_dir, **own, overrides=[*given, *others], config_dir=files.user_folder)
    except KeyboardInterrupt as error:
        raise Interrupted(
            signal.SIGINT, "stopped by Ctrl-C; the trials under way will be run again by the same command"
        ) from error


def main() -> None:
    launch("tune", _command)


if __name__ == "__main__":
    main()
