"""The trials of a search: which are due, how one runs in a process of its own, and what becomes of those that are lost.

A trial is counted once it has a result or has failed by its own fault; one whose process or worker was killed is run
again. All decisions are made from the study's storage, so any number of processes and machines may make them at once.
"""

import contextlib
import csv
import logging
import os
import signal
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from mnist_lit import UserError
from mnist_lit.cli import job, launch
from mnist_lit.cli.configuration import ConfigFiles, as_overrides, quoted
from mnist_lit.storage import runs
from mnist_lit.sweeps import tune_report
from mnist_lit.sweeps.study import GRACE

log = logging.getLogger("mnist_lit.tune")

LOOK = 4.0  # seconds between two looks for trials that have died
STOPPED = (128 + signal.SIGINT, 128 + signal.SIGTERM)  # exit codes of a run that was asked to stop
MAX_RETRIES = 3  # of a trial whose process was killed, by the system for want of memory perhaps
FIRST_FAILURES = 3  # after so many, and nothing else, the fault is not in the settings that were tried


class TrialError(RuntimeError):
    """A trial has no result."""


class Search:
    """The workers of this process: threads, each with one trial's process at a time."""

    def __init__(
        self,
        folder: Path,
        study: Any,
        n_trials: int,
        distributions: dict[str, Any],
        files: ConfigFiles,
        overrides: Sequence[str],
        workers: int,
    ) -> None:
        self.folder, self.study, self.n_trials, self.distributions = folder, study, n_trials, distributions
        self.files, self.overrides, self.workers = files, overrides, workers
        self.composing = threading.Lock()  # Hydra composes one configuration at a time
        self.stop = threading.Event()
        self.beginning: dict[int, float] = {}  # since when a trial is known to be about to begin

    def work(self) -> None:
        with ThreadPoolExecutor(self.workers) as pool:
            try:
                working = [pool.submit(self._work) for _ in range(self.workers)]
                tune_report.load_pictures()  # while the first trials run
                for done in as_completed(working):
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
                self.study.optimize(self._trial, n_trials=1, catch=(TrialError,), callbacks=[self._say])
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
        settings = "  ".join(f"{key}={tune_report.short(value)}" for key, value in trial.params.items())
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
        values = {key: suggest(trial) for key, suggest in self.distributions.items()}
        self._refuse_surplus(trial)
        folder = runs.claim(self.folder / "trials" / str(trial.number))
        trial.set_user_attr("folder", str(folder))
        where = [quoted(f"hydra.run.dir={folder}"), "hydra.mode=RUN", "trainer.enable_progress_bar=false"]
        curve = Curve(folder / "metrics.csv", trial)
        looked = time.monotonic()

        def look() -> bool:
            nonlocal looked
            if time.monotonic() - looked > LOOK:
                self._fail_lost_trials()
                looked = time.monotonic()
            return self.stop.is_set() or curve.should_prune()

        # One at a time takes what there is, as any run does.
        threads = max(1, (os.cpu_count() or 1) // self.workers) if self.workers > 1 else None
        overrides = [*self.overrides, *as_overrides(values), *where]
        folders = [f"--config-dir={self.files.user_folder}"] if self.files.user_folder else []
        composed = self._composed(overrides)
        ended = job.run("train", [*overrides, *folders], quiet=True, look=look, threads=threads, composed=composed)
        hopeless = curve.should_prune()
        if ended.code != 0 and not self.stop.is_set() and hopeless:
            raise optuna.TrialPruned(f"after epoch {curve.epoch}")
        killed = ended.code < 0 or ended.code in STOPPED
        before = self.study.trials[trial.number]
        again = killed and len(before.system_attrs.get("retry_history", [])) < MAX_RETRIES
        if ended.code != 0 and (self.stop.is_set() or again):
            optuna.storages.RetryHeartbeatStaleTrialCallback()(self.study, before)
            raise TrialError("stopped or killed; it will be run again")
        if ended.code != 0 or curve.best is None:
            reason = ended.reason.removeprefix("train: ") if ended.code else "nothing was validated"
            trial.set_user_attr("reason", reason)
            raise TrialError(reason)
        return curve.best

    def _composed(self, overrides: Sequence[str]) -> Any:
        """A trial's configuration; None where its own command shall compose it, for it has something to refuse."""
        with self.composing, contextlib.suppress(UserError), self.files.errors_as_refusals(overrides):
            return launch.for_another_process(self.files, self.files.compose(overrides))
        return None

    def _refuse_surplus(self, trial: Any) -> None:
        """Two processes may begin the last trial at once: the one that has the higher number leaves it."""
        from optuna.trial import TrialState

        trials = self.study.get_trials(deepcopy=False)
        before = [each for each in trials if each.state in (TrialState.RUNNING, TrialState.WAITING)]
        place = sum(map(counts, trials)) + sum(each.number <= trial.number for each in before)
        if place > self.n_trials:
            trial.set_user_attr("surplus", True)
            raise TrialError("not needed: another process was faster")

    def _refuse_what_cannot_succeed(self) -> None:
        from optuna.trial import TrialState

        done = [trial for trial in self.study.get_trials(deepcopy=False) if counts(trial)]
        if len(done) >= FIRST_FAILURES and all(trial.state == TrialState.FAIL for trial in done):
            raise UserError(f"all {len(done)} trials failed, the last one thus: {done[-1].user_attrs['reason']}")


class Curve:
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

    def should_prune(self) -> bool:
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
