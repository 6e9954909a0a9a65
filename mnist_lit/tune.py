"""``python -m mnist_lit.tune``: search for settings with Optuna; each trial is a training run in a process of its own.

Any number of these commands, on any number of machines, may work on one study: what they share is its storage. A trial
is counted once it has a result or has failed by its own fault; one whose process or worker was killed is run again.
"""

import csv
import json
import logging
import os
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from mnist_lit import Refusal, Stopped, job, runs
from mnist_lit.configuration import ConfigFiles, flat, own_values, quoted
from mnist_lit.launch import launch
from mnist_lit.resume import is_free
from mnist_lit.tune_report import report, short

log = logging.getLogger("mnist_lit.tune")

OWN = ("n_trials", "storage", "study", "sampler", "pruner", "sampler_seed", "workers", "space")
HEARTBEAT, GRACE = 5, 15  # seconds between two signs of life of a trial, and after which it is taken for dead
LOOK = 4.0  # seconds between two looks for trials that have died
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
) -> Any:
    """Work on a study until it has ``n_trials`` results; the arguments after ``folder`` are those of ``conf/tune.yaml``.

    Args:
        folder: Where the trials have their folders, and the results go.
        overrides: Changes to ``conf/train.yaml``, for every trial.

    Returns:
        Optuna's study.

    Raises:
        Refusal: The space has keys that there are not, the study was made for another search, or its storage is out of
            reach; or the first trials all failed.
        Stopped: Ctrl-C or SIGTERM came; the trials under way will be run again.
    """
    folder = Path(folder)
    knobs = _knobs(space, overrides)
    opened = _open(storage, study, _sampler(sampler, sampler_seed), _pruner(pruner))
    decisive = [override for override in overrides if not is_free(override.split("=")[0])]  # data may lie elsewhere
    _require_same_search(opened, study, {"space": space, "overrides": sorted(decisive)})
    search = _Search(folder, opened, n_trials, knobs, overrides, workers)
    search.work()
    report(folder, opened, overrides)
    return opened


class _Search:
    """The workers of this process: threads, each with one trial's process at a time."""

    def __init__(
        self, folder: Path, study: Any, n_trials: int, knobs: dict[str, Any], overrides: Sequence[str], workers: int
    ) -> None:
        self.folder, self.study, self.n_trials, self.knobs = folder, study, n_trials, knobs
        self.overrides, self.workers = overrides, workers
        self.stop = threading.Event()
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
            optuna.storages.fail_stale_trials(self.study)
            counts = self._counts()
            if counts["done"] >= self.n_trials:
                return
            if counts["done"] + counts["running"] >= self.n_trials:  # the others may yet lose one
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
        log.info("trial %d, %d of %d: %s  (%s)", trial.number, self._counts()["done"], self.n_trials, what, settings)

    def _counts(self) -> dict[str, int]:
        from optuna.trial import TrialState

        trials = self.study.get_trials(deepcopy=False)
        running = sum(trial.state == TrialState.RUNNING for trial in trials)
        return {"done": sum(map(counts, trials)), "running": running}

    def _trial(self, trial: Any) -> float:
        """One trial; returns its best validation accuracy."""
        import optuna

        values = {key: suggest(trial) for key, suggest in self.knobs.items()}
        self._refuse_surplus(trial)
        folder = runs.claim(self.folder / "trials" / str(trial.number))
        trial.set_user_attr("folder", str(folder))
        settings = [f"{key}={json.dumps(value)}" for key, value in values.items()]
        where = [quoted(f"hydra.run.dir={folder}"), "trainer.enable_progress_bar=false"]
        curve = _Curve(folder / "metrics.csv", trial)
        looked = time.monotonic()

        def look() -> bool:
            nonlocal looked
            if time.monotonic() - looked > LOOK:
                optuna.storages.fail_stale_trials(self.study)
                looked = time.monotonic()
            return self.stop.is_set() or curve.is_hopeless()

        threads = max(1, (os.cpu_count() or 1) // self.workers)
        ended = job.run("train", [*self.overrides, *settings, *where], quiet=True, look=look, threads=threads)
        hopeless = curve.is_hopeless()
        if self.stop.is_set() and ended.code != 0:
            self._run_again(trial)
            raise TrialFailed("stopped; it will be run again")
        if ended.code < 0 and len(trial.system_attrs.get("retry_history", [])) < MOST_RETRIES:
            self._run_again(trial)
            raise TrialFailed(f"{ended.reason}; it will be run again")
        if hopeless and ended.code != 0:
            raise optuna.TrialPruned(f"after epoch {curve.epoch}")
        if ended.code != 0 or curve.best is None:
            trial.set_user_attr("reason", ended.reason.removeprefix("train: "))
            raise TrialFailed(ended.reason)
        return curve.best

    def _run_again(self, trial: Any) -> None:
        self.retry(self.study, self.study._storage.get_trial(trial._trial_id))

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

    return trial.state in (TrialState.COMPLETE, TrialState.PRUNED) or "reason" in trial.user_attrs


def _knobs(space: dict[str, Any], overrides: Sequence[str]) -> dict[str, Callable[[Any], Any]]:
    """What draws each key's value in a trial.

    Raises:
        Refusal: A key that train does not have, or a range that is none.
    """
    from mnist_lit.configuration import suggestion

    files = ConfigFiles("train")
    with files.errors_as_refusals(overrides):
        known = flat(own_values(files.compose([quoted(override) for override in overrides]), resolve=False))
    ranges: dict[str, dict[str, Any]] = {}
    for path, value in flat(space).items():
        key, _, name = path.rpartition(".")
        ranges.setdefault(key, {})[name] = value
    knobs = {}
    for key, given in ranges.items():
        if key not in known:
            raise Refusal(f"space.{key}: train has no key {key}{suggestion(key, known)}; '~space.{key}' leaves it out")
        knobs[key] = _knob(key, given, is_whole=isinstance(known[key], int))
    if not knobs:
        raise Refusal("space is empty: there is nothing to search")
    return knobs


def _knob(key: str, given: dict[str, Any], is_whole: bool) -> Callable[[Any], Any]:
    match given:
        case {"choices": [_, *_] as choices, **rest} if not rest:
            return lambda trial: trial.suggest_categorical(key, choices)
        case {"low": int() | float() as low, "high": int() | float() as high, **rest} if (
            low < high and rest.keys() <= {"log"} and not (rest.get("log") and low <= 0)
        ):
            logarithmic = bool(rest.get("log", False))
            if is_whole:
                return lambda trial: trial.suggest_int(key, int(low), int(high), log=logarithmic)
            return lambda trial: trial.suggest_float(key, low, high, log=logarithmic)
    raise Refusal(
        f"space.{key}: must be choices: [...], or low: and high: with low < high, and log: true only above 0; "
        f"it is {given}"
    )


def _sampler(name: str, seed: int | None) -> Any:
    import optuna

    if name == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    # constant_liar: trials under way count as bad ones, so that those beside them are not the same.
    return optuna.samplers.TPESampler(seed=seed, multivariate=True, constant_liar=True)


def _pruner(name: str) -> Any:
    import optuna

    return (
        optuna.pruners.NopPruner() if name == "none" else optuna.pruners.MedianPruner(n_warmup_steps=2)
    )  # not by the first epoch


def _open(storage: str, name: str, sampler: Any, pruner: Any) -> Any:
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
    if storage.startswith("sqlite:///"):
        Path(storage.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
    for attempt in range(5):
        try:
            opened = optuna.storages.RDBStorage(
                storage,
                heartbeat_interval=HEARTBEAT,
                grace_period=GRACE,
                heartbeat_stale_trial_callback=optuna.storages.RetryHeartbeatStaleTrialCallback(),
            )
            return optuna.create_study(
                study_name=name,
                storage=opened,
                sampler=sampler,
                pruner=pruner,
                direction="maximize",
                load_if_exists=True,
            )
        except (SQLAlchemyError, optuna.exceptions.StorageInternalError, ImportError, ValueError) as error:
            if attempt == 4 or not isinstance(error, SQLAlchemyError | optuna.exceptions.StorageInternalError):
                reason = " ".join(str(error).split())
                raise Refusal(f"storage={storage}: cannot be opened ({reason[:300]})") from error
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
            raise Refusal(f"study={name} was begun with {key} {before[key]} and not {now[key]}: choose another study=")


def _command(**values: Any) -> None:
    """``tune`` with the keys of train on the command line handed on to the trials."""
    import signal

    from hydra.core.hydra_config import HydraConfig

    of_hydra = HydraConfig.get()
    given = [each for each in of_hydra.overrides.task if each.lstrip("+~").split("=")[0].split(".")[0] not in OWN]
    files = ConfigFiles("train")
    train = flat(own_values(files.compose(given), resolve=False))
    # What tune.yaml sets otherwise than train.yaml.
    others = [f"{key}={json.dumps(value)}" for key, value in flat(values).items() if train.get(key, value) != value]

    def stopped(number: int, frame: Any) -> None:
        raise Stopped(number, "stopped by SIGTERM; the trials under way will be run again by the same command")

    signal.signal(signal.SIGTERM, stopped)
    own = {key: values[key] for key in OWN}
    try:
        tune(of_hydra.runtime.output_dir, **own, overrides=[*given, *others])
    except KeyboardInterrupt as error:
        raise Stopped(
            signal.SIGINT, "stopped by Ctrl-C; the trials under way will be run again by the same command"
        ) from error


def main() -> None:
    launch("tune", _command)


if __name__ == "__main__":
    main()
