"""A sweep: which jobs it has, which of them are missing, and what Hydra calls for each.

Hydra's launchers decide where and when a job runs. There its work is the plain command in a process of its own, so no
job can end another one, and a killed launcher leaves jobs behind that the same command goes on with.
"""

import contextlib
import json
import logging
import os
import re
import signal
import socket
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mnist_lit import Interrupted, UserError
from mnist_lit.cli import job, launch, resume
from mnist_lit.cli.configuration import ConfigFiles, flatten, plain_values, quoted
from mnist_lit.storage import runs
from mnist_lit.storage.atomic import atomic_write

log = logging.getLogger("mnist_lit.sweeps.sweep")

QUOTES = "'\""
FILE = "job.json"  # in a job's folder: what it was asked, and how it ended
# Where the jobs run and what the folders are called is the sweep's affair; each job has a folder of its own.
OF_THE_SWEEP = re.compile(r"[+~]*hydra(/launcher|/sweeper|\.(launcher|sweeper|sweep|run|mode|job_logging|callbacks)\b)")


@dataclass
class Job:
    """One job of a sweep, as ``job.json`` in its folder has it.

    Attributes:
        folder: Its folder; not in the file.
        overrides: What was changed for it, key by key.
        config: The whole configuration that this gives, flat.
        swept: The keys that its sweep has several values of.
        status: waiting, running, finished, failed or stopped.
        reason: Why it failed, or empty.
        seconds: How long its process took, the start included.
    """

    folder: Path
    overrides: dict[str, str]
    config: dict[str, Any] = field(repr=False)
    swept: list[str]
    status: str = "waiting"
    reason: str = ""
    seconds: float = 0.0

    @classmethod
    def read(cls, folder: Path) -> "Job":
        job = cls(folder, **json.loads((folder / FILE).read_text(encoding="utf-8")))
        if job.results:  # perhaps it was all done when the sweep was killed
            job.status, job.reason = "finished", ""
        return job

    def write(self) -> None:
        content = {key: value for key, value in asdict(self).items() if key != "folder"}
        atomic_write(
            self.folder / FILE, (json.dumps(content, indent=1, ensure_ascii=False, default=str) + "\n").encode()
        )

    @property
    def results(self) -> dict[str, Any]:
        """What ``metrics.json`` has: empty as long as the job has not ended well."""
        path = self.folder / "metrics.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def differing(jobs: Sequence[Job]) -> list[str]:
    """The keys by whose values the jobs differ, in the order of the command line."""
    keys = {key: None for job in jobs for key in job.overrides}
    return [key for key in keys if len({job.overrides.get(key) for job in jobs}) > 1]


def title(overrides: dict[str, str], keys: Sequence[str]) -> str:
    """ "optimizer.lr=0.3 seed=1", of these keys."""
    return " ".join(f"{key}={overrides[key]}" for key in keys if key in overrides) or "as configured"


def read_jobs(folder: Path) -> list[Job]:
    """All jobs that a sweep's folder has."""
    return [Job.read(path.parent) for path in sorted(folder.glob(f"*/{FILE}"))]


def plan(files: ConfigFiles, overrides: Sequence[str], folder: Path) -> list[Job]:
    """The jobs of a sweep, each with its folder: the one that was asked the same before, or a new one.

    Raises:
        UserError: ``folder`` holds a single run, or another sweeper was chosen.
    """
    if (folder / "config.yaml").exists():
        raise UserError(f"{folder} holds a run, not a sweep: choose another hydra.sweep.dir")
    lists = files.sweep_jobs(overrides)
    asked = [dict(override.split("=", 1) for override in each) for each in lists]
    swept = [key for key in asked[0] if len({each[key] for each in asked}) > 1]
    configs = [
        flatten(plain_values(files.compose(each), resolve=False)) for each in lists
    ]  # all, before a folder is made
    folder = folder.absolute()  # jobs may run in processes that are elsewhere
    known = {identity(job.config, swept): job for job in read_jobs(folder)}
    jobs: list[Job] = []
    for own, config in zip(asked, configs, strict=True):
        mine = known.setdefault(identity(config, swept), Job(Path(), own, config, swept))
        if not mine.folder.name:
            mine.folder = runs.claim(folder / _name(own, swept))
        if not mine.results:  # what does not make it another job, such as where the data are, may have been put right
            mine.overrides, mine.config, mine.swept = own, config, swept
            mine.write()
        jobs.append(mine)
    return jobs


def identity(config: dict[str, Any], swept: Iterable[str]) -> str:
    """What makes a job another one than those with other configurations: all but where it runs and where the data are,
    which do not change its results. What is swept over, or which data they are, always does."""
    keys = [key.lstrip("+~") for key in swept] + ["data.source"]
    free = [each for each in resume.MAY_CHANGE if not any(key == each or key.startswith(f"{each}.") for key in keys)]
    decisive = {key: value for key, value in config.items() if not resume.may_change(key, free)}
    return json.dumps(decisive, sort_keys=True, default=str)


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

    Args:
        files: What the jobs' configurations are composed from.
        jobs: By their numbers.
        for_each: Arguments for each job's command besides its overrides.
        output_subdir: ``hydra.output_subdir`` of each job.
        quiet: Whether jobs run side by side, so that what they say would be a muddle.
    """

    def __init__(
        self,
        verb: str,
        files: ConfigFiles,
        jobs: list[Job],
        for_each: list[str],
        output_subdir: str | None,
        quiet: bool,
    ) -> None:
        self.verb, self.files, self.jobs, self.for_each, self.quiet = verb, files, jobs, for_each, quiet
        self.output_subdir = output_subdir
        self.keys = differing(jobs)
        self.cwd, self.host, self.process = Path.cwd(), socket.gethostname(), os.getpid()

    def __call__(self, config: Any) -> None:
        from hydra.core.hydra_config import HydraConfig

        if os.getppid() == self.process:  # joblib's processes would wait for ever for one that was killed
            job.end_with(self.process)
        number = HydraConfig.get().job.num
        mine = self.jobs[number]
        if any(each.folder == mine.folder for each in self.jobs[:number]):
            return  # the same was asked twice
        place, asked = f"job {number + 1} of {len(self.jobs)}", title(mine.overrides, self.keys)
        if (mine.folder / "metrics.json").exists():
            mine.write()  # perhaps the sweep was killed before it could say so
            log.info("%s has been run: %s", place, asked)
            return
        if self._is_over():
            return
        log.info("%s: %s", place, asked)
        started = time.monotonic()
        mine.status = "running"
        mine.write()
        try:
            arguments, composed = self._arguments(mine), self._composed(mine, config)
            ended = job.run(self.verb, arguments, self.cwd, self.quiet, look=self._is_over, composed=composed)
            finished = ended.code == 0 and bool(mine.results)
            mine.status = "finished" if finished else "failed"
            mine.reason = (
                ""
                if finished
                else "it ended without results"
                if ended.code == 0
                else ended.reason.removeprefix(f"{self.verb}: ")
            )
            if not finished:
                atomic_write(mine.folder / "error.txt", f"{ended.error_output}\n".encode())
        except BaseException:
            mine.status, mine.reason = "stopped", "the sweep was stopped"
            raise
        finally:
            mine.seconds = time.monotonic() - started
            mine.write()
        found = [
            f"{key} {mine.results[key]:.4f}" for key in ("val/acc", "test/acc") if mine.results.get(key) is not None
        ]
        log.info("%s %s: %s  %s", place, mine.status, asked, "  ".join(found) or mine.reason)

    def _arguments(self, mine: Job) -> list[str]:
        each = [f"{key}={value}" for key, value in mine.overrides.items()]
        if (mine.folder / "config.yaml").exists():  # begun, and not finished
            each = [override for override in each if resume.may_change(override.split("=")[0])]
            return [*each, *self.for_each, quoted(f"resume={mine.folder}")]
        return [*each, *self.for_each, quoted(f"hydra.run.dir={mine.folder}")]

    def _composed(self, mine: Job, config: Any) -> Any:
        """What Hydra has composed for this job, made to a run in the job's folder; None where its own command shall
        compose it, as it does to go on with what was begun."""
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
        return launch.for_another_process(self.files, config)

    def _is_over(self) -> bool:
        """Whether the process that runs the sweep is gone; known only on the same machine."""
        if self.host != socket.gethostname():
            return False
        try:
            os.kill(self.process, 0)
        except ProcessLookupError:
            return True
        return False


def run(verb: str, files: ConfigFiles, flags: Any, arguments: list[str], hydra_main: Any) -> None:
    """Plan the jobs of a sweep, have Hydra's launcher run them, and say at the end which have failed.

    Raises:
        UserError: A job cannot be composed, this command makes no sweeps, or jobs have failed.
    """
    overrides: list[str] = flags.overrides
    hydras = [override for override in overrides if override.lstrip("+~").startswith(("hydra.", "hydra/"))]
    config = files.compose([*files.sweep_jobs(overrides)[0], *hydras])
    if config.get("resume"):
        raise UserError("resume= goes on with one run: leave out -m (a sweep goes on with its hydra.sweep.dir=)")
    if any(override.startswith("hydra.sweep.subdir=") for override in hydras):
        raise UserError("hydra.sweep.subdir: a job's folder has the name of what was changed for it")
    job.find_package()  # a launcher's process may start elsewhere
    job.warm_up()
    folder = launch.claimed(overrides, "hydra.sweep.dir", config.hydra.sweep.dir)
    with runs.locked(folder):
        try:
            jobs = plan(files, overrides, folder)
        except Exception:
            with contextlib.suppress(OSError):
                folder.rmdir()  # if nothing is in it
            raise
        for_each = [override for override in hydras if not OF_THE_SWEEP.match(override)] + ["hydra.mode=RUN"]
        for_each += [f"--config-name={flags.config_name}"] if flags.config_name else []
        for_each += [f"--config-dir={flags.config_dir}"] if flags.config_dir else []
        side_by_side = not config.hydra.launcher._target_.endswith(".BasicLauncher")
        task = Sweep(verb, files, jobs, for_each, config.hydra.output_subdir, quiet=side_by_side)
        # No .hydra in the sweep's folder: each job has its own.
        launch.hand_over(
            arguments, flags, [*overrides, quoted(f"hydra.sweep.dir={folder}"), "hydra.output_subdir=null"]
        )
        signal.signal(signal.SIGTERM, _stopped)
        again = f"{runs.display_path(folder.absolute())}; the same command with hydra.sweep.dir={folder} runs what is missing"
        try:
            hydra_main(task)()
        except KeyboardInterrupt as error:
            raise Interrupted(signal.SIGINT, f"stopped by Ctrl-C; the sweep is in {again}") from error
        except Interrupted as stopped:
            raise Interrupted(stopped.signal, f"stopped by SIGTERM; the sweep is in {again}") from stopped
        except Exception as error:
            log.debug("the launcher failed", exc_info=True)
            raise UserError(
                f"the launcher failed ({type(error).__name__}: {error}); the sweep is in {again}"
            ) from error
    if failed := sum(not job.results for job in jobs):
        raise UserError(f"{failed} of {len(jobs)} jobs failed; the sweep is in {again}")


def _stopped(number: int, frame: Any) -> None:
    raise Interrupted(number, "stopped")
