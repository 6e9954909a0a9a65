"""Sweeps: plans the jobs, finds those that are missing, and runs each in its own process.

Hydra's launchers decide where and when a job runs. The job itself is the plain command in its own process, so no job can
end another, and the same command continues a sweep whose launcher was killed.
"""

import contextlib
import logging
import os
import re
import shlex
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mnist_lit import UserError, compat
from mnist_lit.cli import job, launch, parent
from mnist_lit.cli.config import ConfigFiles, flatten, key_of, plain_values, quoted
from mnist_lit.cli.keys import MAY_CHANGE, is_under
from mnist_lit.storage import runs
from mnist_lit.storage.atomic import atomic_write
from mnist_lit.storage.trust import targets
from mnist_lit.sweeps.jobs import Job, differing, identity, read_jobs, title
from mnist_lit.sweeps.summary import NOT_RANKED, summarize

log = logging.getLogger("mnist_lit.sweeps.sweep")

QUOTES = "'\""
# Overrides that concern the sweep: where jobs run and how their folders are named. They are not passed on to a job.
SWEEP_OVERRIDES = re.compile(
    r"[+~]*hydra(/launcher|/sweeper|\.(launcher|sweeper|sweep|run|mode|job_logging|callbacks)\b)"
)


def asked_jobs(files: ConfigFiles, overrides: Sequence[str]) -> list[Job]:
    """The jobs that a sweep's overrides ask for, without folders, as Hydra's basic sweeper expands them, in its order.

    Raises:
        UserError: Another sweeper was chosen, or an order that is drawn.
    """
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.override_parser.overrides_parser import OverridesParser

    parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
    parsed = parser.parse_overrides([*overrides])
    if shuffled := next((each.input_line for each in parsed if getattr(each.value(), "shuffle", False)), None):
        raise UserError(f"{shuffled}: jobs have a fixed order here; leave out shuffle")
    fixed = [each.input_line for each in parsed if not each.is_sweep_override() and each.input_line]
    sweeper = files.compose(fixed).hydra.sweeper
    if not sweeper._target_.endswith(".BasicSweeper"):
        raise UserError("hydra/sweeper: a sweep is a grid here; python -m mnist_lit.tune searches")
    params = parser.parse_overrides([f"{key}={value}" for key, value in (sweeper.params or {}).items()])
    own = [each for each in parsed if not each.key_or_group.startswith(("hydra.", "hydra/"))]
    lists = compat.expand_sweep([*params, *own])
    asked = [dict(override.split("=", 1) for override in each) for each in lists]
    swept = [key for key in asked[0] if len({each[key] for each in asked}) > 1]
    configs = [flatten(plain_values(files.compose(each), resolve=False)) for each in lists]
    return [Job(Path(), own, config, swept) for own, config in zip(asked, configs, strict=True)]


def plan(asked: Sequence[Job], folder: Path) -> list[Job]:
    """The jobs with their folders: that of an earlier job with the same configuration, or a new one.

    Raises:
        UserError: ``folder`` holds a single run.
    """
    if (folder / "config.yaml").exists():
        raise UserError(f"{folder} holds a run, not a sweep: choose another hydra.sweep.dir")
    folder = folder.absolute()  # jobs may run in other working directories
    known = {identity(job.config, asked[0].swept): job for job in read_jobs(folder)}
    jobs: list[Job] = []
    for new in asked:
        mine = known.setdefault(identity(new.config, new.swept), new)
        if not mine.folder.name:
            mine.folder = runs.claim(folder / _name(new.overrides, new.swept))
        if not mine.results:  # what does not distinguish jobs, such as the data folder, may have been corrected
            mine.overrides, mine.config, mine.swept = new.overrides, new.config, new.swept
            mine.write()
        jobs.append(mine)
    return jobs


def _name(overrides: dict[str, str], swept: Sequence[str]) -> str:
    """``lr-0.3_seed-1`` for optimizer.lr=0.3 seed=1."""
    last = [key.rpartition(".")[2] for key in swept]
    parts = [
        f"{short if last.count(short) == 1 else key}-{overrides[key].strip(QUOTES)}"
        for key, short in zip(swept, last, strict=True)
    ]
    return re.sub(r"[^\w.+-]+", "-", "_".join(parts), flags=re.ASCII).strip("-.")[:100] or "job"


class Sweep:
    """What Hydra's launcher calls, perhaps in another process or on another machine, with each job's configuration.

    Attributes:
        jobs: By their numbers.
        keys: Those by whose values the jobs differ.
        for_each: Arguments for each job's command besides its overrides.
        output_subdir: ``hydra.output_subdir`` of each job.
        quiet: Whether to hide the output of the jobs, because they run side by side.
    """

    output_subdir: str | None = None
    quiet = False

    def __init__(self, verb: str, files: ConfigFiles) -> None:
        self.verb, self.files = verb, files
        self.jobs: list[Job] = []
        self.keys: list[str] = []
        self.for_each: list[str] = []
        self.tracebacks = launch.tracebacks
        self.cwd, self.host, self.process = Path.cwd(), socket.gethostname(), os.getpid()

    def __call__(self, config: Any) -> None:
        from hydra.core.hydra_config import HydraConfig

        launch.tracebacks = self.tracebacks
        launch.show_tracebacks_as_asked()
        if os.getpid() != self.process and self.host == socket.gethostname():
            parent.end_with(self.process)  # joblib's processes, for one, would wait forever
        number = HydraConfig.get().job.num
        mine = self.jobs[number]
        if any(each.folder == mine.folder for each in self.jobs[:number]):
            return  # a duplicate
        place, asked = f"job {number + 1} of {len(self.jobs)}", title(mine.overrides, self.keys)
        if (mine.folder / "metrics.json").exists():
            mine.status, mine.reason = "finished", ""
            mine.write()  # the sweep may have been killed before it could write this
            log.info("%s has been run: %s", place, asked)
            return
        log.info("%s: %s", place, asked)
        started = time.monotonic()
        mine.status, mine.reason = "running", ""
        mine.write()
        try:
            arguments, composed = self._arguments(mine), self._composed(mine, config)
            ended = job.run(self.verb, arguments, self.cwd, self.quiet, composed=composed)
            mine.status = "finished"
            if ended.code or not mine.results:
                reason = ended.reason.removeprefix(f"{self.verb}: ") if ended.code else "it ended without results"
                mine.status, mine.reason = "failed", reason
                atomic_write(mine.folder / "error.txt", f"{ended.error_output}\n".encode())
        except BaseException:
            mine.status, mine.reason = "stopped", "the sweep was stopped"
            raise
        finally:
            mine.seconds = time.monotonic() - started
            mine.write()
        found = [(key, mine.results.get(key)) for key in ("val/acc", "test/acc")]
        figures = "  ".join(f"{key} {value:.4f}" for key, value in found if value is not None)
        log.info("%s %s: %s  %s", place, mine.status, asked, mine.reason or figures)

    def _arguments(self, mine: Job) -> list[str]:
        each = [f"{key}={value}" for key, value in mine.overrides.items()]
        if (mine.folder / "config.yaml").exists():  # begun, and not finished
            each = [override for override in each if is_under(override.split("=")[0], MAY_CHANGE)]
            # The same command has chosen the classes, and named them when the job began.
            named = [value for key, value in mine.config.items() if key.endswith("_target_")]
            named += targets([value for value in mine.config.values() if isinstance(value, list)])
            each += [f"trust=[{','.join(map(str, named))}]"]
            return [*each, *self.for_each, quoted(f"resume={mine.folder}")]
        return [*each, *self.for_each, quoted(f"hydra.run.dir={mine.folder}")]

    def _composed(self, mine: Job, config: Any) -> Any:
        """The job's configuration, as a run in the job's folder; None if the job's command has to compose it itself,
        which it does to resume."""
        from hydra.core.hydra_config import HydraConfig
        from hydra.types import RunMode
        from omegaconf import open_dict, read_write

        if (mine.folder / "config.yaml").exists():
            return None
        with open_dict(config):
            config.hydra = HydraConfig.get()
        with read_write(config.hydra):
            config.hydra.mode, config.hydra.output_subdir = RunMode.RUN, self.output_subdir
            config.hydra.run.dir = str(mine.folder)
        return launch.for_another_process(self.verb, config)


def run(verb: str, files: ConfigFiles, flags: Any, hydra_main: Any) -> None:
    """Have Hydra run a sweep, and report failed jobs at the end.

    Raises:
        UserError: A job cannot be composed, or jobs have failed.
    """
    with contextlib.ExitStack() as stack:
        launch.current = command = SweepCommand(verb, files, flags, stack)
        try:
            with launch.stopped_by_signals(lambda: command.again):
                hydra_main(command.task)()
        except Exception as error:
            if not command.task.jobs:  # not begun
                raise
            raise UserError(f"the launcher failed ({type(error).__name__}: {error}){command.again}") from error
    failed = sum(Job.read(each.folder).status != "finished" for each in command.task.jobs)
    problems = [f"{failed} of {len(command.task.jobs)} jobs failed"] if failed else []
    problems += [command.without_summary] if command.without_summary else []
    if problems:
        raise UserError("; ".join(problems) + command.again)


class SweepCommand:
    """The sweep as the command of this process: plans the jobs before Hydra runs them, and summarizes them afterwards.

    Args:
        stack: Holds the lock of the sweep's folder.
    """

    def __init__(self, verb: str, files: ConfigFiles, flags: Any, stack: contextlib.ExitStack) -> None:
        self.flags, self.stack = flags, stack
        self.task = Sweep(verb, files)
        self.again = ""  # how to continue, as the end of a message
        self.without_summary = ""  # why it could not be written

    def prepare(self, config: Any) -> None:
        from omegaconf import open_dict, read_write

        own, hydras = list(config.hydra.overrides.task), list(config.hydra.overrides.hydra)
        if config.get("resume"):
            raise UserError("resume= resumes a single run: remove -m (to continue a sweep, give its hydra.sweep.dir=)")
        if any(key_of(override) == "hydra.sweep.subdir" for override in hydras):
            raise UserError("hydra.sweep.subdir: a job's folder is named after its overrides")
        job.find_package()  # a launcher's process may start elsewhere
        job.warm_up()
        jobs = asked_jobs(self.task.files, [*own, *hydras])  # before a folder is made
        typed = any(key_of(override) == "hydra.sweep.dir" for override in hydras)
        folder = launch.claimed("hydra.sweep.dir", config.hydra.sweep.dir, typed)
        self.stack.enter_context(runs.locked(folder))
        self.task.jobs = plan(jobs, folder)
        shown = runs.display_path(folder.absolute())
        self.again = f"; the sweep is in {shown}; the same command with {shlex.quote(f'hydra.sweep.dir={folder}')} runs what is missing"
        for_each = [override for override in hydras if not SWEEP_OVERRIDES.match(override)] + ["hydra.mode=RUN"]
        for_each += [f"--config-name={self.flags.config_name}"] if self.flags.config_name else []
        for_each += [f"--config-dir={self.flags.config_dir}"] if self.flags.config_dir else []
        self.task.for_each, self.task.output_subdir = for_each, config.hydra.output_subdir
        self.task.quiet = not config.hydra.launcher._target_.endswith(".BasicLauncher")  # jobs run side by side
        self.task.keys = differing(self.task.jobs)
        with read_write(config.hydra), open_dict(config.hydra):
            config.hydra.sweep.dir, config.hydra.output_subdir = str(folder), None  # each job has its own .hydra
            # The launcher composes the jobs with these.
            config.hydra.overrides.hydra += [quoted(f"hydra.sweep.dir={folder}"), "hydra.output_subdir=null"]
        if not all(job.config.get("data.val_size", True) for job in self.task.jobs):
            log.warning(NOT_RANKED)

    def finish(self, config: Any) -> None:
        try:
            summarize(Path(config.hydra.sweep.dir))
        except UserError as error:
            self.without_summary = str(error)
