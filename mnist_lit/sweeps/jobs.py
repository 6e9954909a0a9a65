"""The jobs of a sweep, as their folders have them."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mnist_lit.cli import resume
from mnist_lit.storage.atomic import atomic_write

FILE = "job.json"  # in a job's folder: what it was asked, and how it ended


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


def identity(config: dict[str, Any], swept: Iterable[str]) -> str:
    """What makes a job another one than those with other configurations: all but where it runs and where the data are,
    which do not change its results. What is swept over, or which data they are, always does."""
    keys = [key.lstrip("+~") for key in swept] + ["data.source"]
    free = [each for each in resume.MAY_CHANGE if not any(key == each or key.startswith(f"{each}.") for key in keys)]
    decisive = {key: value for key, value in config.items() if not resume.may_change(key, free)}
    return json.dumps(decisive, sort_keys=True, default=str)
