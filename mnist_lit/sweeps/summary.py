"""What a sweep gave: a table on the terminal, ``summary.csv``, and a picture, ``summary.png``."""

import csv
import io
import logging
import math
import statistics
from dataclasses import dataclass
from pathlib import Path

from mnist_lit.cli.resume import may_change
from mnist_lit.storage import runs
from mnist_lit.storage.atomic import atomic_write
from mnist_lit.sweeps.jobs import Job, differing, identity, read_jobs, title

log = logging.getLogger("mnist_lit.sweeps.sweep")

NOT_RANKED = "data.val_size=0 holds no images out to select by, and the test images select nothing: not ranked"
FIGURES = ("val/acc", "val/loss", "test/acc", "test/loss", "train/acc", "train/loss")


@dataclass
class Group:
    """Jobs that differ in nothing but their seed.

    Attributes:
        settings: What they were asked that not all jobs of the sweep were, without the seed.
        jobs: Those that have ended well are in ``finished``.
    """

    settings: dict[str, str]
    jobs: list[Job]

    @property
    def finished(self) -> list[Job]:
        return [job for job in self.jobs if job.results]

    def values(self, key: str) -> list[float]:
        return [job.results[key] for job in self.finished if job.results.get(key) is not None]

    def mean(self, key: str) -> float | None:
        values = self.values(key)
        return statistics.mean(values) if values else None

    def deviation(self, key: str) -> float | None:
        """The standard deviation over the seeds (n - 1), where there are several."""
        values = self.values(key)
        return statistics.stdev(values) if len(values) > 1 else None

    @property
    def title(self) -> str:
        return title(self.settings, list(self.settings))


def summarize(folder: Path) -> None:
    """Write the summary of the sweep in ``folder``, and show it.

    Raises:
        WriteError: What was there before is untouched.
    """
    groups, ranked = best_first(read_jobs(folder))
    atomic_write(folder / "summary.csv", _csv(groups, ranked).encode())
    if any(group.finished for group in groups):
        _draw(groups, folder / "summary.png")
    log.info(
        "\n%s\n\nthe sweep is in %s: summary.csv, summary.png",
        table(groups, ranked),
        runs.display_path(folder.absolute()),
    )


def best_first(jobs: list[Job]) -> tuple[list[Group], bool]:
    """The jobs by what they were asked, the seed left out; by their mean validation accuracy, if all have one.

    Returns:
        The groups, and whether they are ranked; if not they have the order of their folders.
    """
    swept = sorted({key for job in jobs for key in job.swept})
    keys = [key for key in differing(jobs) if key != "seed" and (key in swept or not may_change(key.lstrip("+~")))]
    groups: dict[str, Group] = {}
    for job in jobs:
        settings = {key: job.overrides[key] for key in keys if key in job.overrides}
        group = identity({**job.config, "seed": None}, swept)
        groups.setdefault(group, Group(settings, [])).jobs.append(job)
    finished = [group for group in groups.values() if group.finished]
    ranked = bool(finished) and all(
        job.results.get("val/acc") is not None for each in finished for job in each.finished
    )
    if not ranked:
        return list(groups.values()), False
    return sorted(groups.values(), key=lambda group: group.mean("val/acc") or 0.0, reverse=True), True


def table(groups: list[Group], ranked: bool) -> str:
    """A line a group, and one for each job that has not ended well."""
    shown = [key for key in FIGURES[:4] if any(group.mean(key) is not None for group in groups)]
    head = ["", "jobs", *({"val/acc": "validation acc"}.get(key, key.replace("/", " ")) for key in shown)]
    rows = [
        [group.title, f"{len(group.finished)}/{len(group.jobs)}", *(_cell(group, key) for key in shown)]
        for group in groups
    ]
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in [head, *rows]
    ]
    several = any(len(group.jobs) > 1 for group in groups)
    lines.append("")
    if several:
        lines.append("mean ± standard deviation over the seeds")
    if any(group.finished for group in groups):
        lines.append("best first, by the accuracy on the validation images" if ranked else NOT_RANKED)
    jobs = [job for group in groups for job in group.jobs]
    keys = differing(jobs)
    lines += [
        f"{job.status}: {title(job.overrides, keys)}" + f": {job.reason}" * bool(job.reason)
        for job in jobs
        if not job.results
    ]
    return "\n".join(lines)


def _cell(group: Group, key: str) -> str:
    mean, deviation = group.mean(key), group.deviation(key)
    if mean is None:
        return "-"
    return f"{mean:.4f}" if deviation is None else f"{mean:.4f} ± {deviation:.4f}"


def _csv(groups: list[Group], ranked: bool) -> str:
    """A row a job; each has the mean and the standard deviation of its group."""
    keys = list({key: None for group in groups for job in group.jobs for key in job.overrides})
    statistic = [f"{key} {what}" for key in FIGURES for what in ("mean", "sd")]
    columns = ["rank", *keys, "status", *FIGURES, *statistic, "epochs", "fit_seconds", "seconds", "folder", "reason"]
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, restval="", extrasaction="ignore")
    writer.writeheader()
    for rank, group in enumerate(groups, 1):
        of_group = {f"{key} mean": group.mean(key) for key in FIGURES} | {
            f"{key} sd": group.deviation(key) for key in FIGURES
        }
        for job in group.jobs:
            own = {
                "status": job.status,
                "seconds": round(job.seconds, 1),
                "folder": job.folder.name,
                "reason": job.reason,
            }
            writer.writerow({**of_group, **job.results, **job.overrides, **own, "rank": rank if ranked else ""})
    return text.getvalue()


def _draw(groups: list[Group], path: Path) -> None:
    """A line a group: each seed's accuracy as a dot, their mean and standard deviation beside it."""
    from matplotlib.figure import Figure

    shown = [group for group in groups if group.finished][:40]
    keys = [key for key in ("val/acc", "test/acc") if any(group.mean(key) is not None for group in shown)]
    figure = Figure(figsize=(9, 1.4 + 0.42 * len(shown)), layout="constrained")
    axes = figure.subplots()
    for number, key in enumerate(keys):
        color, shift = f"C{number}", 0.18 * (number - (len(keys) - 1) / 2)
        for place, group in enumerate(shown):
            values = group.values(key)
            axes.plot(values, [place + shift] * len(values), "o", ms=4, mfc="none", color=color, alpha=0.6)
        means = [group.mean(key) or math.nan for group in shown]
        spread = [group.deviation(key) or 0.0 for group in shown]
        axes.errorbar(
            means,
            [i + shift for i in range(len(shown))],
            xerr=spread,
            fmt="o",
            ms=6,
            color=color,
            capsize=3,
            label={"val/acc": "validation"}.get(key, "test"),
        )
    axes.set_yticks(range(len(shown)), [group.title for group in shown])
    axes.invert_yaxis()
    axes.set_xlabel(
        "accuracy" + (": each seed, mean and standard deviation" if any(len(g.jobs) > 1 for g in shown) else "")
    )
    axes.grid(alpha=0.3, axis="x")
    axes.legend()
    figure.savefig(path, dpi=120)
