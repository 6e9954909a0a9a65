"""Summary of a sweep: a table on the terminal, ``summary.csv`` and ``summary.png``."""

import logging
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mnist_lit.cli.keys import MAY_CHANGE, is_under
from mnist_lit.reports.results import extra_metrics, only_showing
from mnist_lit.storage import runs
from mnist_lit.storage.atomic import atomic_write
from mnist_lit.storage.tables import text_table, to_csv
from mnist_lit.sweeps.jobs import BEFORE_MONITOR, Job, differing, identity, read_jobs, title

log = logging.getLogger("mnist_lit.sweeps.sweep")

METRICS = ("val/acc", "val/loss", "test/acc", "test/loss", "train/acc", "train/loss")
NOT_RANKED = "not ranked: data.val_size=0 leaves no validation accuracy, and the test images must not select"
MAX_GROUPS = 40  # in the picture


@dataclass
class Group:
    """Jobs that differ only in their seed; the title says in what they differ from the other groups."""

    title: str
    jobs: list[Job]

    def values(self, key: str) -> list[float]:
        """A metric of the finished jobs."""
        return [job.results[key] for job in self.jobs if job.results.get(key) is not None]

    def mean(self, key: str) -> float | None:
        return statistics.mean(values) if (values := self.values(key)) else None

    def deviation(self, key: str) -> float | None:
        """The sample standard deviation (n - 1)."""
        return statistics.stdev(values) if len(values := self.values(key)) > 1 else None


def summarize(folder: Path) -> None:
    """Log the table of the sweep in ``folder``, and write its summary.

    Raises:
        UserError: A file cannot be written; an existing one is left as it was.
    """
    groups, criterion = best_first(read_jobs(folder))
    shown = runs.display_path(folder.absolute())
    log.info("\n%s\n\nthe sweep is in %s: summary.csv, summary.png", table(groups, criterion), shown)
    with only_showing("summary.csv", folder, "*/metrics.json"):
        atomic_write(folder / "summary.csv", _csv(groups, bool(criterion)))
    if any(job.results for group in groups for job in group.jobs):
        with only_showing("summary.png", folder, "summary.csv"):
            _plot(groups, folder / "summary.png")


def best_first(jobs: list[Job]) -> tuple[list[Group], str]:
    """Group the jobs by their configuration without the seed, and sort the groups by the mean of what the jobs monitor.

    Returns:
        The groups, and the metric by which they are sorted: ``checkpoint.monitor`` if it is the same for all, else
        ``val/acc``; empty if a finished job lacks it.
    """
    swept = sorted({key for job in jobs for key in job.swept})
    free = ("seed", *MAY_CHANGE)
    keys = [key for key in differing(jobs) if (key in swept and key != "seed") or not is_under(key.lstrip("+~"), free)]
    by_identity: dict[str, Group] = {}
    for job in jobs:
        group = Group(title(job.overrides, keys), [])
        by_identity.setdefault(identity({**job.config, "seed": None}, swept), group).jobs.append(job)
    groups = list(by_identity.values())
    finished = [job.results for job in jobs if job.results]
    monitored = {tuple(str(job.config.get(key, value)) for key, value in BEFORE_MONITOR.items()) for job in jobs}
    metric, mode = monitored.pop() if len(monitored) == 1 else BEFORE_MONITOR.values()
    if not finished or any(results.get(metric) is None for results in finished):
        return groups, ""
    sign = 1 if mode == "min" else -1
    groups.sort(key=lambda group: math.inf if (mean := group.mean(metric)) is None else sign * mean)
    return groups, metric


def table(groups: list[Group], criterion: str) -> str:
    """A line for each group, and one for each job that has not finished."""
    jobs = [job for group in groups for job in group.jobs]
    shown = dict.fromkeys([*METRICS[:4], criterion, *_further(jobs, ("val", "test"))])
    metrics = [key for key in shown if any(group.values(key) for group in groups)]
    rows = [["", "jobs", *(key.replace("/", " ") for key in metrics)]]
    for group in groups:
        finished = sum(bool(job.results) for job in group.jobs)
        rows.append([group.title, f"{finished}/{len(group.jobs)}", *(_cell(group, key) for key in metrics)])
    lines = [text_table(rows), ""]
    if len(jobs) > len(groups):
        lines.append("mean ± standard deviation over the seeds")
    if metrics:
        by = "the accuracy on the validation images" if criterion == "val/acc" else criterion
        lines.append(f"best first, by {by}" if criterion else NOT_RANKED)
    keys = differing(jobs)
    for job in jobs:
        if job.status != "finished":
            lines.append(": ".join(filter(None, (job.status, title(job.overrides, keys), job.reason))))
    return "\n".join(lines)


def _cell(group: Group, key: str) -> str:
    mean, deviation = group.mean(key), group.deviation(key)
    if mean is None:
        return "-"
    return f"{mean:.4f}" if deviation is None else f"{mean:.4f} ± {deviation:.4f}"


def _further(jobs: list[Job], stages: Sequence[str]) -> list[str]:
    """The metrics that the section ``metrics`` of some jobs has added."""
    names = dict.fromkeys(name for job in jobs for name in extra_metrics(job.results))
    return [f"{stage}/{name}" for name in names for stage in stages]


def _csv(groups: list[Group], ranked: bool) -> bytes:
    """A row for each job, with the mean and the standard deviation of its group."""
    further = _further([job for group in groups for job in group.jobs], ("val", "test", "train"))
    metrics = [*METRICS, *further]
    rows: list[dict[str, Any]] = []
    for rank, group in enumerate(groups, 1):
        shared: dict[str, Any] = {"rank": rank if ranked else ""}
        shared |= {f"{key} mean": group.mean(key) for key in metrics}
        shared |= {f"{key} sd": group.deviation(key) for key in metrics}
        for job in group.jobs:
            own = {"status": job.status, "seconds": round(job.seconds, 1), "reason": job.reason}
            rows.append({**job.results, **job.overrides, **shared, **own, "folder": job.folder.name})
    keys = dict.fromkeys(key for group in groups for job in group.jobs for key in job.overrides)
    figures = [f"{key} {statistic}" for key in metrics for statistic in ("mean", "sd")]
    last = ["epochs", "fit_seconds", "seconds", "folder", "reason"]
    return to_csv(["rank", *keys, "status", *metrics, *figures, *last], rows)


def _plot(groups: list[Group], path: Path) -> None:
    """For each group its jobs' accuracies as dots, with their mean and standard deviation."""
    from matplotlib.figure import Figure

    shown = [group for group in groups if any(job.results for job in group.jobs)][:MAX_GROUPS]
    keys = [key for key in ("val/acc", "test/acc") if any(group.values(key) for group in shown)]
    figure = Figure(figsize=(9, 1.4 + 0.42 * len(shown)), layout="constrained")
    axes = figure.subplots()
    for number, key in enumerate(keys):
        color, label = f"C{number}", "validation" if key == "val/acc" else "test"
        rows = [place + 0.18 * (number - (len(keys) - 1) / 2) for place in range(len(shown))]
        dots = [(value, row) for row, group in zip(rows, shown, strict=True) for value in group.values(key)]
        axes.plot(*zip(*dots, strict=True), "o", ms=4, mfc="none", color=color, alpha=0.6)
        means = [math.nan if (mean := group.mean(key)) is None else mean for group in shown]
        spread = [group.deviation(key) or 0.0 for group in shown]
        axes.errorbar(means, rows, xerr=spread, fmt="o", ms=6, color=color, capsize=3, label=label)
    axes.set_yticks(range(len(shown)), [group.title for group in shown])
    axes.invert_yaxis()
    several = any(len(group.jobs) > 1 for group in shown)
    axes.set_xlabel("accuracy: each seed, mean and standard deviation" if several else "accuracy")
    axes.grid(alpha=0.3, axis="x")
    axes.legend()
    figure.savefig(path, dpi=120)
