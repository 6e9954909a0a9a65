"""The jobs of a sweep, as they are stored in their folders."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mnist_lit.cli.keys import MAY_CHANGE, is_under
from mnist_lit.storage.atomic import atomic_write

FILE = "job.json"  # in a job's folder: its overrides and status
BEFORE_MONITOR = {
    "checkpoint.monitor": "val/acc",
    "checkpoint.mode": "max",
}  # what sweeps and studies from then optimize


@dataclass
class Job:
    """One job of a sweep, as stored in ``job.json`` in its folder.

    Attributes:
        folder: Its folder; not stored.
        overrides: Its overrides, by key.
        config: Its whole configuration, flattened.
        swept: The keys that have several values in the sweep.
        status: waiting, running, finished, failed or stopped.
        reason: Why it failed, or empty.
        seconds: The wall time of its process.
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
        if job.results and job.status != "failed":  # it may have finished after the sweep was killed
            job.status, job.reason = "finished", ""
        return job

    def write(self) -> None:
        content = {key: value for key, value in asdict(self).items() if key != "folder"}
        atomic_write(
            self.folder / FILE, (json.dumps(content, indent=1, ensure_ascii=False, default=str) + "\n").encode()
        )

    @property
    def results(self) -> dict[str, Any]:
        """The content of ``metrics.json``; empty unless the job has finished."""
        path = self.folder / "metrics.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def differing(jobs: Sequence[Job]) -> list[str]:
    """The keys whose values differ between the jobs, in the order of the command line."""
    keys = {key: None for job in jobs for key in job.overrides}
    return [key for key in keys if len({job.overrides.get(key) for job in jobs}) > 1]


def title(overrides: dict[str, str], keys: Sequence[str]) -> str:
    """ "optimizer.lr=0.3 seed=1", of these keys."""
    return " ".join(f"{key}={overrides[key]}" for key in keys if key in overrides) or "as configured"


def read_jobs(folder: Path) -> list[Job]:
    """All jobs in the folder of a sweep."""
    return [Job.read(path.parent) for path in sorted(folder.glob(f"*/{FILE}"))]


def identity(config: dict[str, Any], swept: Iterable[str]) -> str:
    """A key that is equal for jobs with the same results: the configuration without hardware and data folder, except
    for keys that are swept over. A null counts as none: a job from before there was such a key has none."""
    keys = [key.lstrip("+~") for key in swept] + ["data.source"]
    free = [each for each in MAY_CHANGE if not any(is_under(key, [each]) for key in keys)]
    there = {key: value for key, value in {**BEFORE_MONITOR, **config}.items() if value is not None}
    decisive = {key: value for key, value in there.items() if not is_under(key, free)}
    return json.dumps(decisive, sort_keys=True, default=str)
