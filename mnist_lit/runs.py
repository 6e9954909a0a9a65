"""``python -m mnist_lit.runs``: list and compare runs."""

import contextlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mnist_lit import UserError
from mnist_lit.cli.errors import suggestion
from mnist_lit.cli.launch import launch, print_for_pipes
from mnist_lit.storage.atomic import atomic_path, atomic_write, require_free
from mnist_lit.storage.tables import printable, text_table, to_csv
from mnist_lit.sweeps import records
from mnist_lit.sweeps.records import Record
from mnist_lit.sweeps.summary import METRICS

log = logging.getLogger("mnist_lit.runs")  # as a command, __name__ is "__main__"

FACTS = ("folder", "started", "status", "data", "changes", "epochs", "max_epochs", "fit_seconds", "reason")
SHOWN = ("folder", "started", "status", "data", "epochs", *METRICS[:4], "fit_seconds", "changes")  # on the terminal
HIDDEN = ("folder", "changes", "max_epochs")  # side by side: they are in other lines


def runs(
    folder: str | Path = "outputs",
    where: str | None = None,
    sort: str = "started",
    compare: Sequence[str | int] | None = None,
    output: str | Path | None = None,
    overwrite: bool = False,
) -> list[dict[str, Any]]:
    """List the runs below a folder, or compare some; the arguments are the keys of ``conf/runs.yaml``.

    Folders that cannot be read are logged as warnings, and left out.

    Returns:
        A row per run, all with the same keys, for ``pandas.DataFrame(runs("outputs"))``; values that a run does not have
        are None. ``folder``; ``started``, as text; ``status``: finished, limited (finished, but on a part of the batches),
        running, unfinished, failed, waiting or stopped; ``data``; ``changes``: in what the configuration differs from
        the defaults; and, as in ``metrics.json``, ``epochs``, ``max_epochs``, ``val/acc`` ..., ``fit_seconds``. Then each
        setting that one of these runs has changed or, of those compared, has otherwise than another.

    Raises:
        UserError: There is no such folder, run or key, or the output cannot be written.
    """
    base = Path(folder).expanduser()
    if output is not None:
        if Path(output).suffix.lower() not in ((".csv", ".png") if compare else (".csv",)):
            png = "" if compare else "; .png shows the curves of runs: compare=[RUN,RUN]"
            raise UserError(f"output={output}: must end in .csv{' or .png' if compare else png}")
        require_free("output", Path(output), overwrite)
    if not os.path.isdir(base):
        raise UserError(f"folder={folder}: there is no such folder")
    if compare and where:
        raise UserError(f"where={where}: compare= names the runs itself")
    if compare:
        chosen = [records.read(_find(str(name), base), base) for name in compare]
        chosen = chosen if sort == "started" else _sorted(chosen, sort)
        keys = records.differing(chosen)
    else:
        chosen, skipped = records.find(base)
        for reason in skipped:
            log.warning("skipped: %s", printable(reason, 500))
        chosen = _sorted(_selected(chosen, where or ""), sort)
        keys = [key for record in chosen for key in record.changes]
        keys += [key for record in chosen for key in record.settings if key == sort.removeprefix("-")]
    columns = dict.fromkeys([*(key for record in chosen for key in record.facts), *keys])
    rows = [{key: record.facts.get(key, record.settings.get(key)) for key in columns} for record in chosen]
    if output is not None and Path(output).suffix.lower() == ".png":
        _draw(chosen, Path(output))
    elif output is not None:
        atomic_write(Path(output), to_csv([*columns], rows))
    return rows


def _find(name: str, base: Path) -> Path:
    for path in (base / name, Path(name).expanduser()):
        if os.path.isdir(path):
            return path
    raise UserError(f"compare: there is no run {name} in {base}")


def _selected(found: list[Record], where: str) -> list[Record]:
    """Those for which every word of ``where`` holds."""
    all_found = found
    for word in where.split():
        key, equals, value = word.partition("=")
        if equals:
            _require_known(key, all_found, f"where={where}")
            found = [each for each in found if _has(each.facts, key, value) or _has(each.settings, key, value)]
        else:
            found = [each for each in found if word in each.facts["folder"]]
    return found


def _has(values: Mapping[str, Any], key: str, text: str) -> bool:
    """Whether a value can be written so: 1 is 1.0, and null and true are as in YAML."""
    if key not in values:
        return False
    value = values[key]
    if value is None or isinstance(value, bool):
        return text == json.dumps(value)
    if isinstance(value, (int, float)):
        with contextlib.suppress(ValueError):
            return float(text) == value
    return text == str(value).replace(" ", "")


def _sorted(found: list[Record], sort: str) -> list[Record]:
    """The largest first, or the smallest with a minus; those without a value last, in the order that they have."""
    key = sort.removeprefix("-")
    _require_known(key, found, f"sort={sort}")
    values = [each.facts.get(key, each.settings.get(key)) for each in found]
    ranks = [(0, value, "") if isinstance(value, (int, float)) else (1, 0, str(value)) for value in values]
    order = sorted(range(len(found)), key=ranks.__getitem__, reverse=sort == key)
    return [found[i] for i in order if values[i] is not None] + [found[i] for i in order if values[i] is None]


def _require_known(key: str, found: list[Record], asked: str) -> None:
    known = {key for each in found for key in (*each.facts, *each.settings)}
    if found and key not in known:
        example = ", neither as a column, such as test/acc, nor as a setting, such as optimizer.lr"
        hint = suggestion(key, known)
        raise UserError(f"{asked}: no run has {key}{hint if 'did you mean' in hint else example}")


def table(rows: Sequence[Mapping[str, Any]], sort: str = "started") -> str:
    """A line for each run, with the column that they are sorted by; then why jobs have failed."""
    shown = list(dict.fromkeys([*SHOWN[:-1], sort.removeprefix("-"), SHOWN[-1]]))
    always = ("folder", "started", "status", "epochs")
    shown = [key for key in shown if key in always or any(row.get(key) not in (None, "") for row in rows)]
    cells = [[_cell(key, row) for key in shown] for row in rows]
    failed = [f"failed: {row['folder']}: {row['reason']}" for row in rows if row["reason"]]
    return "\n".join([text_table([shown, *cells]), *map(printable, failed)])


def side_by_side(rows: Sequence[Mapping[str, Any]]) -> str:
    """A column for each run: the settings that differ, and then the results."""
    facts = [key for key in rows[0] if key in FACTS or records.METRIC.fullmatch(key)]
    keys = [*(key for key in rows[0] if key not in facts), *(key for key in facts if key not in HIDDEN)]
    lines = [[key, *(_cell(key, row) for row in rows)] for key in keys]
    head = ["", *(_cell("folder", row) for row in rows)]
    return text_table([head, *(line for line in lines if {*line[1:]} != {"-"})])


def _cell(key: str, row: Mapping[str, Any]) -> str:
    value = row[key]
    if key == "epochs" and value is not None and (most := row["max_epochs"]) is not None and most > 0:
        return f"{value}/{most}"
    if value is None or value == "":
        return "-"
    if isinstance(value, float) and "/" in key:
        return f"{value:.4f}"
    return f"{value:.1f}" if key == "fit_seconds" else printable(records.as_typed(value))


def _draw(chosen: Sequence[Record], path: Path) -> None:
    """Loss and accuracy over the epochs, a colour for each run."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    histories = [records.read_history(each.folder) for each in chosen]
    if not any(histories):
        raise UserError(f"output={path}: none of these runs has recorded an epoch")
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    for axes, key, label in zip(figure.subplots(1, 2), ("loss", "acc"), ("loss", "accuracy"), strict=True):
        for number, (each, history) in enumerate(zip(chosen, histories, strict=True)):
            for stage, style in (("train", "o-"), ("val", "s--")):
                there = [row for row in history if {"epoch", f"{stage}/{key}"} <= row.keys()]
                points = [(row["epoch"], row[f"{stage}/{key}"]) for row in there]
                if points:
                    axes.plot(*zip(*points, strict=True), style, ms=4, color=f"C{number}")
            if (test := each.facts[f"test/{key}"]) is not None:
                axes.axhline(test, color=f"C{number}", ls=":")
        axes.set_title(label)
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.grid(alpha=0.3)
    lines = [axes.plot([], [], color=f"C{number}")[0] for number in range(len(chosen))]
    lines += [axes.plot([], [], style, ms=4, color="grey")[0] for style in ("o-", "s--", ":")]
    names = [printable(each.facts["folder"]).replace("$", r"\$") for each in chosen]
    names += ["train (during the epoch)", "validation", "test"]
    figure.legend(lines, names, loc="outside lower center", ncols=3, fontsize=9)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120)


def _command(**values: Any) -> None:
    print_for_pipes()
    rows = runs(**values)
    if values["compare"]:
        print(side_by_side(rows))
    elif not rows:
        print(f"no runs in {values['folder']}" + (f" where {values['where']}" if values["where"] else ""))
    elif not values["output"]:
        print(table(rows, values["sort"]))
    if values["output"]:
        print(f"{values['output']}: {len(rows):,} run{'s' * (len(rows) != 1)}")


def main() -> None:
    launch("runs", _command)


if __name__ == "__main__":
    main()
