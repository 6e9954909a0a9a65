"""Hyperparameter search with Optuna: the study, its search space, and the workers that run its trials.

A trial counts towards ``n_trials`` once it has a value or has failed for a reason of its own. One whose process or worker
was killed is queued again with the same parameters. Workers coordinate through the study's storage alone, so any number
of processes and machines can share a study.
"""

import contextlib
import json
import logging
import math
import os
import platform
import random
import signal
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.exceptions import ExperimentalWarning, OptunaError, StorageInternalError, UpdateFinishedTrialError
from optuna.storages import RetryHeartbeatStaleTrialCallback
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from mnist_lit import UserError
from mnist_lit.cli import job, launch
from mnist_lit.cli.config import ConfigFiles, as_overrides, flatten, key_of, quoted
from mnist_lit.cli.errors import suggestion
from mnist_lit.storage import runs
from mnist_lit.storage.tables import one_line, short
from mnist_lit.sweeps.database import DATABASE_TIMEOUT, GRACE_PERIOD, MAX_RETRIES, Database, without_password
from mnist_lit.sweeps.jobs import BEFORE_MONITOR
from mnist_lit.sweeps.records import read_history

log = logging.getLogger("mnist_lit.tune")

SQLITE = "sqlite:///"  # and a path: the storage is a file
POLL_INTERVAL = 2.0  # seconds between checks for stale trials
FIRST_FAILURES = 3  # if the first trials all fail, the parameters are not to blame
STOPPED = (128 + signal.SIGINT, 128 + signal.SIGTERM)  # exit codes of a run that was asked to stop
SUGGEST: dict[type[BaseDistribution], Callable[..., Any]] = {
    CategoricalDistribution: optuna.Trial.suggest_categorical,
    IntDistribution: optuna.Trial.suggest_int,
    FloatDistribution: optuna.Trial.suggest_float,
}


def distributions(
    space: dict[str, Any], config: Mapping[str, Any], overrides: Sequence[str] = ()
) -> dict[str, BaseDistribution]:
    """The ``space`` of ``conf/tune.yaml`` as Optuna's distributions.

    Args:
        config: The flat configuration of a training run, and the choice of each group.
        overrides: The changes to it on the command line.

    Raises:
        UserError: The space is empty, a key is unknown or also overridden, or a distribution is invalid.
    """
    arguments: dict[str, dict[str, Any]] = {}
    for path, value in flatten(space).items():
        if value is not None:  # null, as elsewhere, switches an entry off
            key, _, name = path.rpartition(".")
            arguments.setdefault(key, {})[name] = value
    if not arguments:
        raise UserError("space is empty: there is nothing to search")
    for key in arguments:
        if key not in config:
            raise UserError(
                f"space.{key}: train has no key {key}{suggestion(key, config)}; '~space.{key}' removes it from the search"
            )
        if any(key_of(override) == key for override in overrides):
            raise UserError(f"{key} is searched and cannot be set; '~space.{key}' removes it from the search")
    return {key: _distribution(key, given, config[key]) for key, given in arguments.items()}


def _distribution(key: str, given: dict[str, Any], default: Any) -> BaseDistribution:
    # A float key such as dropout stays a float if its bounds are integers.
    integers = all(type(value) is int for value in (given.get("low"), given.get("high"), default))
    kind = CategoricalDistribution if "choices" in given else IntDistribution if integers else FloatDistribution
    try:
        distribution: Any = kind(**given)
        if distribution.single() or ("low" in given and not math.isfinite(distribution.high - distribution.low)):
            raise ValueError("needs two choices, or finite bounds with low < high")
    except (TypeError, ValueError) as error:
        reason = str(error).rpartition("__init__() ")[2].rstrip(".")
        allowed = "low: and high:, optionally with log: true or step:, or choices: [...]"
        raise UserError(f"space.{key}: {reason}; it takes {allowed}, and is {given}") from error
    return distribution


def suggest(trial: optuna.Trial, distributions: Mapping[str, BaseDistribution]) -> dict[str, Any]:
    """What ``study.ask(distributions)`` does, for a trial that ``study.optimize`` has created."""
    return {key: SUGGEST[type(each)](trial, key, **vars(each)) for key, each in distributions.items()}


def make_sampler(name: str, seed: int | None, n_existing: int) -> optuna.samplers.BaseSampler:
    """The sampler that ``conf/tune.yaml`` calls ``name``.

    Args:
        n_existing: The number of trials in the study, so that a second start does not repeat the draws of the first.
    """
    seed = None if seed is None else random.Random(f"{seed} {n_existing}").getrandbits(32)
    if name == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    # constant_liar keeps trials that run at the same time apart.
    return optuna.samplers.TPESampler(seed=seed, multivariate=True, constant_liar=True)


def make_pruner(name: str) -> optuna.pruners.BasePruner:
    if name == "none":
        return optuna.pruners.NopPruner()
    return optuna.pruners.MedianPruner(n_warmup_steps=2)  # the first epoch says too little


def open_study(storage: str, name: str, pruner: optuna.pruners.BasePruner, mode: str) -> tuple[optuna.Study, Database]:
    """Create the study, or load it if it exists.

    Args:
        mode: ``max`` or ``min``: whether more or less of what the trials return is better.

    Raises:
        UserError: The storage cannot be opened.
    """
    warnings.filterwarnings("ignore", category=ExperimentalWarning)  # heartbeats
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    direction: Any = {"max": "maximize", "min": "minimize"}[mode]
    if storage.startswith(SQLITE):
        storage = SQLITE + os.path.expanduser(storage.removeprefix(SQLITE))
    for delay in (0.5, 1.0, 1.5, 2.0, None):
        try:
            if storage.startswith(SQLITE):
                Path(storage.removeprefix(SQLITE)).parent.mkdir(parents=True, exist_ok=True)
            database = Database(storage)
            study = optuna.create_study(
                study_name=name, storage=database, pruner=pruner, direction=direction, load_if_exists=True
            )
            break
        except (SQLAlchemyError, StorageInternalError, ImportError, OSError, ValueError) as error:
            if delay is None or not isinstance(error, DBAPIError | StorageInternalError):
                where = f"storage={without_password(storage)}"
                raise UserError(f"{where}: cannot be opened ({one_line(error, limit=300)})") from error
            time.sleep(delay)  # another process may be creating the tables
    database.timeout = DATABASE_TIMEOUT
    return study, database


def require_same_search(study: optuna.Study, config: Mapping[str, Any]) -> None:
    """Compare ``config`` with the configuration that the study was started with.

    Raises:
        UserError: They differ, so new trials could not be compared with those in the study.
    """
    new = json.loads(json.dumps(config))
    old = {key: BEFORE_MONITOR[key] for key in BEFORE_MONITOR if key in new} | study.user_attrs.get("config", new)
    study.set_user_attr("config", old)
    changes = [f"{key} was {old.get(key)}, is now {new.get(key)}" for key in old | new if old.get(key) != new.get(key)]
    if changes:
        raise UserError(f"study={study.study_name}: {', '.join(changes)}; choose another study=")


def counts(trial: FrozenTrial) -> bool:
    """Whether a trial counts towards ``n_trials``."""
    failed = trial.state == TrialState.FAIL and "reason" in trial.user_attrs
    return failed or trial.state in (TrialState.COMPLETE, TrialState.PRUNED)


@dataclass
class Search:
    """The worker threads of this process; each runs one trial at a time, in a child process."""

    folder: Path
    study: optuna.Study
    database: Database
    n_trials: int
    distributions: dict[str, BaseDistribution]
    files: ConfigFiles
    overrides: Sequence[str]
    workers: int
    monitor: str

    def __post_init__(self) -> None:
        self.stop = self.database.stop
        self.composing = threading.Lock()  # Hydra's state is global
        self.silent_since: dict[int, float] = {}  # running trials that have not sent a heartbeat yet

    def run(self) -> None:
        """Run trials until the study has ``n_trials`` of them."""
        with ThreadPoolExecutor(self.workers) as pool:
            try:
                working = {pool.submit(self._work) for _ in range(self.workers)}
                with contextlib.suppress(Exception):  # the report says it
                    import optuna.visualization.matplotlib  # noqa: F401  # takes seconds, so while the first trials run

                while working:
                    with contextlib.suppress(OptunaError):  # the database is busy, or another process was faster
                        self._fail_stale_trials()
                    done, working = wait(working, POLL_INTERVAL)
                    for each in done:
                        each.result()
            finally:  # also when a signal arrives or a worker fails
                self.stop.set()

    def _fail_stale_trials(self) -> None:
        """Fail the trials whose worker was killed. Optuna overlooks those without a single heartbeat."""
        if not self.database.trusts_heartbeats:
            self.silent_since = {}
            return
        optuna.storages.fail_stale_trials(self.study)
        running = self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        silent = [trial.number for trial in running if trial.user_attrs.get("started") != trial.number]
        self.silent_since = {number: self.silent_since.get(number, time.monotonic()) for number in silent}
        for number, since in self.silent_since.items():
            if time.monotonic() - since > GRACE_PERIOD:
                self.study.tell(number, state=TrialState.FAIL, skip_if_finished=True)

    def _work(self) -> None:
        while not self.stop.is_set():
            trials = self.study.get_trials(deepcopy=False)
            counted, running = sum(map(counts, trials)), sum(trial.state == TrialState.RUNNING for trial in trials)
            if counted >= self.n_trials:
                return
            if counted + running >= self.n_trials:  # one of those running may be lost yet
                self.stop.wait(POLL_INTERVAL)
                continue
            try:
                self.study.optimize(self._objective, n_trials=1, callbacks=[self._after_trial])
            except UpdateFinishedTrialError:
                log.warning("a trial of this process was considered dead and will be run again")

    def _objective(self, trial: optuna.Trial) -> float:
        """Train with the trial's parameters; returns the best of what is monitored, or NaN, which fails the trial."""
        trial.set_user_attr("started", trial.number)  # from now on there are heartbeats
        trial.set_user_attr("host", platform.node())
        if self._is_surplus(trial):
            trial.set_user_attr("surplus", True)
            return math.nan
        overrides = [*self.overrides, *as_overrides(suggest(trial, self.distributions))]
        folder = runs.claim(self.folder / "trials" / str(trial.number))
        trial.set_user_attr("folder", str(folder))
        overrides += [quoted(f"hydra.run.dir={folder}"), "hydra.mode=RUN", "trainer.enable_progress_bar=false"]
        config_dir = [f"--config-dir={self.files.user_folder}"] if self.files.user_folder else []
        best: dict[int, float] = {}  # best value so far, by epoch
        better = max if self.study.direction == StudyDirection.MAXIMIZE else min

        is_bad = False

        def should_prune() -> bool:
            """Whether it was to be pruned after one of the epochs so far; those that it still trains change nothing."""
            nonlocal is_bad
            for row in read_history(folder):
                if self.monitor in row and (epoch := int(row["epoch"])) > max(best, default=0):
                    best[epoch] = better([row[self.monitor], *best.values()])
                    if not is_bad:
                        trial.report(best[epoch], epoch)
                        is_bad = trial.should_prune()
            return is_bad

        ended = job.run(
            "train",
            [*overrides, *config_dir],
            quiet=True,
            should_stop=lambda: self.stop.is_set() or should_prune(),
            threads=self._threads(),
            composed=self._composed(overrides),
        )
        pruned, stopped = should_prune(), self.stop.is_set()
        if best and (folder / "metrics.json").exists():
            if ended.code:
                log.warning("trial %d: %s", trial.number, ended.reason)
            return better(best.values())
        if pruned and not stopped:
            raise optuna.TrialPruned
        frozen = self.study.trials[trial.number]
        killed = ended.code < 0 or ended.code in STOPPED
        if stopped or (killed and len(RetryHeartbeatStaleTrialCallback.retry_history(frozen)) < MAX_RETRIES):
            RetryHeartbeatStaleTrialCallback()(self.study, frozen)
        else:
            reason = ended.reason.removeprefix("train: ") if ended.code else "no epoch was validated"
            trial.set_user_attr("reason", reason)
        return math.nan

    def _threads(self) -> int | None:
        """A trial's share of the cores, among those that run on this machine for this study; None for all of them."""
        running = self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        here = sum(trial.user_attrs.get("host") == platform.node() for trial in running)
        share = max(here, self.workers)
        return max(1, (os.cpu_count() or 1) // share) if share > 1 else None

    def _is_surplus(self, trial: optuna.Trial) -> bool:
        """Whether another process started the last trial at the same time, and with a lower number."""
        trials = self.study.get_trials(deepcopy=False)
        pending = (TrialState.RUNNING, TrialState.WAITING)
        ahead = sum(each.state in pending and each.number < trial.number for each in trials)
        return sum(map(counts, trials)) + ahead >= self.n_trials

    def _composed(self, overrides: Sequence[str]) -> Any:
        """A trial's configuration; None if it is invalid, so that the trial's own command reports it."""
        with self.composing, contextlib.suppress(UserError), self.files.errors_as_user_errors(overrides):
            return launch.for_another_process("train", self.files.compose(overrides))
        return None

    def _after_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        """Log how a trial ended, since Optuna logs a traceback for a failure; give up if the first trials all fail."""
        if "surplus" in trial.user_attrs:
            return
        counted = [each for each in study.get_trials(deepcopy=False) if counts(each)]
        outcome = f"{self.monitor} {trial.value:.4f}" if trial.value is not None else ""
        if trial.state == TrialState.PRUNED:
            outcome = f"pruned after epoch {trial.last_step}, {outcome}"
        if trial.state == TrialState.FAIL:
            outcome = f"failed: {trial.user_attrs.get('reason', 'stopped or killed; it will be run again')}"
        params = "  ".join(f"{key}={short(value)}" for key, value in trial.params.items())
        log.info("trial %d, %d of %d: %s  (%s)", trial.number, len(counted), self.n_trials, outcome, params)
        if len(counted) >= FIRST_FAILURES and all(each.state == TrialState.FAIL for each in counted):
            raise UserError(f"all {len(counted)} trials failed, the last one with: {counted[-1].user_attrs['reason']}")
