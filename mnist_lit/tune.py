"""``python -m mnist_lit.tune``: search for settings with Optuna; each trial is a training run in a process of its own.

Any number of these commands, on any number of machines, may work on one study: what they share is its storage. A trial
is counted once it has a result or has failed by its own fault; one whose process or worker was killed is run again.
"""

import contextlib
import csv
import json
import logging
import os
import random
import re
import signal
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from mnist_lit import Refusal, Stopped, job, runs
from mnist_lit.configuration import ConfigFiles, as_overrides, flat, own_values, quoted, suggestion
from mnist_lit.launch import launch
from mnist_lit.sweep import identity
from mnist_lit.tune_report import report, short

log = logging.getLogger("mnist_lit.tune")

OWN = ("n_trials", "storage", "study", "sampler", "pruner", "sampler_seed", "workers", "space")
HEARTBEAT, GRACE = 5, 15  # seconds between two signs of life of a trial, and after which it is taken for dead
LOOK = 4.0  # seconds between two looks for trials that have died
STOPPED = (128 + signal.SIGINT, 128 + signal.SIGTERM)  # exit codes of a run that was asked to stop
MOST_RETRIES = 3  # of a trial whose process was killed, by the system for want of memory perhaps
FIRST_FAILURES = 3  # after so many, and nothing else, the fault is not in the settings that were tried


class TrialFailed(RuntimeError):
    """A trial has no result."""


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

    Args:
        folder: Where the trials have their folders, and the results go.
        overrides: Changes to ``conf/train.yaml``, for every trial.
        config_dir: A folder with further files of the configuration's groups.

    Returns:
        Optuna's study.

    Raises:
        Refusal: The space has keys that there are not, the study was made for another search, or its storage is out of
            reach; or the first trials all failed, or none came to its end.
        Stopped: Ctrl-C or SIGTERM came; the trials under way will be run again.
    """
    folder, files = Path(folder), ConfigFiles("train", config_dir)
    knobs = _knobs(space, overrides, files)
    opened = _open(storage, study, _pruner(pruner))
    opened.sampler = _sampler(sampler, sampler_seed, len(opened.trials))
    with files.errors_as_refusals(overrides):
        config = flat(own_values(files.compose(overrides), resolve=False))
    _require_same_search(opened, study, {"space": space, "settings": json.loads(identity(config, ()))})
    given = [*overrides, *([f"--config-dir={config_dir}"] if config_dir else [])]
    _Search(folder, opened, n_trials, knobs, given, workers).work()
    report(folder, opened, overrides, files)
    return opened


class _Search:
    """The workers of this process: threads, each with one trial's process at a time."""

    def __init__(
        self, folder: Path, study: Any, n_trials: int, knobs: dict[str, Any], arguments: Sequence[str], workers: int
    ) -> None:
        self.folder, self.study, self.n_trials, self.knobs = folder, study, n_trials, knobs
        self.arguments, self.workers = arguments, workers
        self.stop = threading.Event()
        self.beginning: dict[int, float] = {}  # since when a trial is known to be about to begin
        self.retry = study._storage.get_heartbeat_stale_trial_callback()

    def work(self) -> None:
        with ThreadPoolExecutor(self.workers) as pool:
            try:
                for done in as_completed([pool.submit(self._work) for _ in range(self.workers)]):
                    done.result()
            finally:  # a signal came, or a worker failed: the others stop, too
                self.stop.set()

    def _work(self) -> None:
        import optuna

        while not self.stop.is_set():
            self._fail_lost_trials()
            done, running = self._progress()
            if done >= self.n_trials:
                return
            if done + running >= self.n_trials:  # the others may yet lose one
                self.stop.wait(LOOK)
                continue
            try:
                self.study.optimize(self._trial, n_trials=1, catch=(TrialFailed,), callbacks=[self._say])
            except optuna.exceptions.UpdateFinishedTrialError:
                log.warning("a trial of this process was taken for dead, and is run again")
            self._refuse_what_cannot_succeed()

    def _say(self, study: Any, trial: Any) -> None:
        """A line on each trial that has ended, instead of Optuna's, which has a traceback for those that failed."""
        if "surplus" in trial.user_attrs:
            return
        what = f"val/acc {trial.value:.4f}" if trial.value is not None else trial.state.name.lower()
        if trial.state.name == "PRUNED":
            what = f"pruned after epoch {max(trial.intermediate_values)}, val/acc {trial.value:.4f}"
        if trial.state.name == "FAIL":
            what = f"failed: {trial.user_attrs.get('reason', 'stopped or killed; it will be run again')}"
        settings = "  ".join(f"{key}={short(value)}" for key, value in trial.params.items())
        log.info("trial %d, %d of %d: %s  (%s)", trial.number, self._progress()[0], self.n_trials, what, settings)

    def _progress(self) -> tuple[int, int]:
        """How many trials are done, and how many are running."""
        from optuna.trial import TrialState

        trials = self.study.get_trials(deepcopy=False)
        return sum(map(counts, trials)), sum(trial.state == TrialState.RUNNING for trial in trials)

    def _fail_lost_trials(self) -> None:
        """Those whose process was killed, to be run again; also those that had not even begun to give signs of life."""
        import optuna
        from optuna.trial import TrialState

        optuna.storages.fail_stale_trials(self.study)
        running = self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        before = {trial.number for trial in running if trial.user_attrs.get("begun") != trial.number}
        self.beginning = {number: self.beginning.get(number, time.monotonic()) for number in before}
        for number, since in self.beginning.items():
            if time.monotonic() - since > GRACE:
                with contextlib.suppress(ValueError):  # another process was faster, or it has begun after all
                    self.study.tell(number, state=TrialState.FAIL)

    def _trial(self, trial: Any) -> float:
        """One trial; returns its best validation accuracy."""
        import optuna

        trial.set_user_attr("begun", trial.number)
        values = {key: suggest(trial) for key, suggest in self.knobs.items()}
        self._refuse_surplus(trial)
        folder = runs.claim(self.folder / "trials" / str(trial.number))
        trial.set_user_attr("folder", str(folder))
        where = [quoted(f"hydra.run.dir={folder}"), "hydra.mode=RUN", "trainer.enable_progress_bar=false"]
        curve = _Curve(folder / "metrics.csv", trial)
        looked = time.monotonic()

        def look() -> bool:
            nonlocal looked
            if time.monotonic() - looked > LOOK:
                self._fail_lost_trials()
                looked = time.monotonic()
            return self.stop.is_set() or curve.is_hopeless()

        # One at a time takes what there is, as any run does.
        threads = max(1, (os.cpu_count() or 1) // self.workers) if self.workers > 1 else None
        arguments = [*self.arguments, *as_overrides(values), *where]
        ended = job.run("train", arguments, quiet=True, look=look, threads=threads)
        hopeless = curve.is_hopeless()
        if ended.code != 0 and not self.stop.is_set() and hopeless:
            raise optuna.TrialPruned(f"after epoch {curve.epoch}")
        killed = ended.code < 0 or ended.code in STOPPED
        again = killed and len(trial.system_attrs.get("retry_history", [])) < MOST_RETRIES
        if ended.code != 0 and (self.stop.is_set() or again):
            self.retry(self.study, self.study._storage.get_trial(trial._trial_id))
            raise TrialFailed("stopped or killed; it will be run again")
        if ended.code != 0 or curve.best is None:
            reason = ended.reason.removeprefix("train: ") if ended.code else "nothing was validated"
            trial.set_user_attr("reason", reason)
            raise TrialFailed(reason)
        return curve.best

    def _refuse_surplus(self, trial: Any) -> None:
        """Two processes may begin the last trial at once: the one that has the higher number leaves it."""
        from optuna.trial import TrialState

        trials = self.study.get_trials(deepcopy=False)
        before = [each for each in trials if each.state in (TrialState.RUNNING, TrialState.WAITING)]
        place = sum(map(counts, trials)) + sum(each.number <= trial.number for each in before)
        if place > self.n_trials:
            trial.set_user_attr("surplus", True)
            raise TrialFailed("not needed: another process was faster")

    def _refuse_what_cannot_succeed(self) -> None:
        from optuna.trial import TrialState

        done = [trial for trial in self.study.get_trials(deepcopy=False) if counts(trial)]
        if len(done) >= FIRST_FAILURES and all(trial.state == TrialState.FAIL for trial in done):
            raise Refusal(f"all {len(done)} trials failed, the last one thus: {done[-1].user_attrs['reason']}")


class _Curve:
    """What a run under way has validated, read from its ``metrics.csv`` and told to Optuna.

    Attributes:
        epoch: The last one that was validated.
        best: The best accuracy so far.
    """

    def __init__(self, path: Path, trial: Any) -> None:
        self.path, self.trial = path, trial
        self.epoch, self.best = 0, None

    epoch: int
    best: float | None

    def is_hopeless(self) -> bool:
        """Whether the pruner gives the trial up."""
        if self.path.exists():
            for row in csv.DictReader(self.path.read_text(encoding="utf-8").splitlines()):
                if int(row["epoch"]) > self.epoch and row["val/acc"]:
                    self.epoch = int(row["epoch"])
                    self.best = max(float(row["val/acc"]), self.best or 0.0)
                    self.trial.report(self.best, self.epoch)
        return self.epoch > 0 and bool(self.trial.should_prune())


def counts(trial: Any) -> bool:
    """Whether a trial is one of those that were asked for: it has a result, or failed by its own fault."""
    from optuna.trial import TrialState

    failed = trial.state == TrialState.FAIL and "reason" in trial.user_attrs
    return failed or trial.state in (TrialState.COMPLETE, TrialState.PRUNED)


def _knobs(space: dict[str, Any], overrides: Sequence[str], files: ConfigFiles) -> dict[str, Callable[[Any], Any]]:
    """What draws each key's value in a trial.

    Raises:
        Refusal: A key that train does not have or that was given a value, or a range that is none.
    """
    with files.errors_as_refusals(overrides):
        known = flat(own_values(files.compose(overrides), resolve=False))
    ranges: dict[str, dict[str, Any]] = {}
    for path, value in flat(space).items():
        key, _, name = path.rpartition(".")
        ranges.setdefault(key, {})[name] = value
    knobs = {}
    for key, given in ranges.items():
        if key not in known:
            raise Refusal(f"space.{key}: train has no key {key}{suggestion(key, known)}; '~space.{key}' leaves it out")
        if any(override.lstrip("+~").split("=")[0] == key for override in overrides):
            raise Refusal(f"{key} is searched, so it cannot be given; '~space.{key}' leaves it out of the search")
        knobs[key] = _knob(key, given, known[key])
    if not knobs:
        raise Refusal("space is empty: there is nothing to search")
    return knobs


def _knob(key: str, given: dict[str, Any], default: Any) -> Callable[[Any], Any]:
    match given:
        case {"choices": [_, *_] as choices, **rest} if not rest:
            return lambda trial: trial.suggest_categorical(key, choices)
        case {"low": int() | float() as low, "high": int() | float() as high, **rest} if (
            low < high and rest.keys() <= {"log"} and not (rest.get("log") and low <= 0)
        ):
            logarithmic = bool(rest.get("log", False))
            if all(type(value) is int for value in (low, high, default)):
                return lambda trial: trial.suggest_int(key, low, high, log=logarithmic)
            return lambda trial: trial.suggest_float(key, low, high, log=logarithmic)
    raise Refusal(
        f"space.{key}: must be choices: [...], or low: and high: with low < high, and log: true only above 0; "
        f"it is {given}"
    )


def _sampler(name: str, seed: int | None, trials: int = 0) -> Any:
    """
    Args:
        trials: How many there are already, so that another start does not draw the same ones again.
    """
    import optuna

    seed = None if seed is None else random.Random(f"{seed} {trials}").getrandbits(32)
    if name == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    # constant_liar: trials under way count as bad ones, so that those beside them are not the same.
    return optuna.samplers.TPESampler(seed=seed, multivariate=True, constant_liar=True)


def _pruner(name: str) -> Any:
    import optuna

    return (
        optuna.pruners.NopPruner() if name == "none" else optuna.pruners.MedianPruner(n_warmup_steps=2)
    )  # not by the first epoch


def _open(storage: str, name: str, pruner: Any) -> Any:
    """
    Raises:
        Refusal: The storage is out of reach, or there is no such kind.
    """
    import optuna
    from sqlalchemy.exc import SQLAlchemyError

    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)  # signs of life, since 2.9
    optuna.logging.disable_default_handler()
    optuna.logging.enable_propagation()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    for attempt in range(5):
        try:
            if storage.startswith("sqlite:///"):
                Path(storage.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
            opened = optuna.storages.RDBStorage(
                storage,
                heartbeat_interval=HEARTBEAT,
                grace_period=GRACE,
                heartbeat_stale_trial_callback=optuna.storages.RetryHeartbeatStaleTrialCallback(),
            )
            return optuna.create_study(
                study_name=name,
                storage=opened,
                pruner=pruner,
                direction="maximize",
                load_if_exists=True,
            )
        except (SQLAlchemyError, optuna.exceptions.StorageInternalError, ImportError, OSError, ValueError) as error:
            if attempt == 4 or not isinstance(error, SQLAlchemyError | optuna.exceptions.StorageInternalError):
                reason = " ".join(str(error).split())
                shown = re.sub(r"(//[^/:@]*):[^@]*@", r"\1:***@", storage)
                raise Refusal(f"storage={shown}: cannot be opened ({reason[:300]})") from error
            time.sleep(0.5 * (attempt + 1))  # another process may be making its tables
    raise AssertionError("not reached")


def _require_same_search(study: Any, name: str, asked: dict[str, Any]) -> None:
    """
    Raises:
        Refusal: The study was begun with other settings, with which its trials cannot be compared.
    """
    before = study.user_attrs.get("asked")
    if before is None:
        study.set_user_attr("asked", asked)
        return
    now = json.loads(json.dumps(asked))
    for key in now:
        if before[key] != now[key]:
            old, new = flat(before[key]), flat(now[key])
            keys = [each for each in {**old, **new} if old.get(each) != new.get(each)]
            differ = ", ".join(f"{each} was {old.get(each)} and not {new.get(each)}" for each in keys)
            raise Refusal(f"study={name} was begun with other {key}: {differ}; choose another study=")


def _command(**values: Any) -> None:
    """``tune`` with the keys of train on the command line handed on to the trials."""
    from hydra.core.hydra_config import HydraConfig

    of_hydra = HydraConfig.get()
    if values["resume"]:
        raise Refusal("resume= goes on with a run; a search goes on with its storage= and study=")
    if not values["data"]["val_size"]:
        raise Refusal("data.val_size=0: there would be no validation accuracy to search for")
    given = [each for each in of_hydra.overrides.task if each.lstrip("+~").split("=")[0].split(".")[0] not in OWN]
    folders = [source.path for source in of_hydra.runtime.config_sources if source.provider == "command-line"]
    files = ConfigFiles("train", folders[0] if folders else None)
    train = flat(own_values(files.compose(given)))
    # What tune.yaml sets otherwise than train.yaml.
    others = as_overrides({key: value for key, value in flat(values).items() if train.get(key, value) != value})

    def stopped(number: int, frame: Any) -> None:
        raise Stopped(number, "stopped by SIGTERM; the trials under way will be run again by the same command")

    signal.signal(signal.SIGTERM, stopped)
    own = {key: values[key] for key in OWN}
    try:
        tune(of_hydra.runtime.output_dir, **own, overrides=[*given, *others], config_dir=files.user_folder)
    except KeyboardInterrupt as error:
        raise Stopped(
            signal.SIGINT, "stopped by Ctrl-C; the trials under way will be run again by the same command"
        ) from error


def main() -> None:
    launch("tune", _command)


if __name__ == "__main__":
    main()
