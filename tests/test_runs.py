"""``mnist_lit.runs``: which runs there are, in what they differ, and that no folder can break the list."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
import time
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pytest
from conftest import Command, Made
from helpers import QUICK, ROOT, small

from mnist_lit import UserError
from mnist_lit.cli.config import CONF, settings
from mnist_lit.runs import runs, side_by_side, table
from mnist_lit.storage import runs as storage
from mnist_lit.sweeps import records


@pytest.fixture(scope="session")
def whole_run(made: Made) -> Path:
    """The folder of a run on all batches of the sample."""
    whole = ["trainer.limit_train_batches=null", "trainer.limit_test_batches=null", "trainer.max_epochs=1"]
    return made("whole", small("model=mlp", "optimizer=adam", "data.val_size=200", "seed=3", *whole))


def begun(folder: Path, *overrides: str, **results: Any) -> Path:
    """The folder of a run that has begun, or ended with these results."""
    config = {key: value for key, value in settings("train", *overrides).items() if key != "resume"}
    folder.mkdir(parents=True)
    storage.create(folder, config, {"name": "mnist"})
    if results:
        named = {key.replace("_", "/"): value for key, value in results.items()}
        storage.write_json(folder / "metrics.json", {**named, "epochs": 12, "data": {"name": "mnist"}})
    return folder


def changes_of(folder: Path) -> str:
    return records.read(folder, folder.parent).facts["changes"]


def test_runs_jobs_and_trials_are_listed_with_what_they_are(
    whole_run: Path, finished_run: Path, tmp_path: Path, command: Command
) -> None:
    outputs = tmp_path / "outputs"
    outputs.mkdir()
    done = command("-m", *QUICK, "model=mlp", "data.val_size=-1,20", "hydra.sweep.dir=outputs/s", cwd=tmp_path)
    assert "1 of 2 jobs failed" in done.stderr
    (outputs / "whole").symlink_to(whole_run)
    for name in ("tune/trials/0", "held", "limited"):
        shutil.copytree(finished_run, outputs / name, ignore=shutil.ignore_patterns("checkpoints"))
    for name in ("tune/trials/0", "held"):
        (outputs / name / "metrics.json").unlink()
    shutil.copytree(finished_run, outputs / "evaluated", ignore=shutil.ignore_patterns("checkpoints", "config.yaml"))
    with storage.locked(outputs / "held"):
        rows = {row["folder"]: row for row in runs(outputs)}
    assert {name: row["status"] for name, row in rows.items()} == {
        "whole": "finished",
        "limited": "limited",
        "held": "running",
        "tune/trials/0": "unfinished",
        "s/val_size-20": "limited",
        "s/val_size--1": "failed",
    }
    whole, results = rows["whole"], json.loads((whole_run / "metrics.json").read_text())
    for key in ("epochs", "max_epochs", "val/acc", "val/loss", "test/acc", "test/loss", "train/acc", "fit_seconds"):
        assert whole[key] == results[key]
    assert whole["data"] == "mnist-sample" and whole["changes"] == (
        "model=mlp optimizer=adam seed=3 data.batch_size=100 data.val_size=200 trainer.max_epochs=1"
    )
    assert (rows["tune/trials/0"]["epochs"], rows["tune/trials/0"]["max_epochs"]) == (2, 2)
    assert rows["tune/trials/0"]["train/acc"] == rows["limited"]["train/acc"]
    assert rows["s/val_size--1"]["reason"].startswith("data.val_size=-1: must be greater")
    assert rows["s/val_size--1"]["data.val_size"] == -1 and rows["whole"]["data.val_size"] == 200
    text = table([*rows.values()])
    assert re.search(r"^whole .* finished +mnist-sample  1/1 +0\.\d{4} .* model=mlp optimizer=adam", text, re.MULTILINE)
    assert text.splitlines()[-1].startswith("failed: s/val_size--1: data.val_size=-1: must be greater")

    done = command("where=status=limited", "sort=-test/loss", cwd=tmp_path, verb="runs")
    names = [line.split()[0] for line in done.stdout.splitlines()]
    assert done.returncode == 0 and names[0] == "folder" and {*names[1:]} == {"limited", "s/val_size-20"}, done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"outputs"}  # it leaves nothing


@pytest.mark.parametrize(
    "overrides",
    [
        "",
        "optimizer=sgd optimizer.lr=0.5",
        "optimizer.lr=0.3 trainer.fast_dev_run=true",
        "callbacks=[early_stopping,ema] data.val_size=500 callbacks.ema.decay=0.9",
        "data=kmnist data.batch_size=100 data.val_size=100",
        "trainer.gradient_clip_val=1.0",
    ],
)
def test_changes_are_what_was_typed(overrides: str, tmp_path: Path) -> None:
    assert changes_of(begun(tmp_path / "run", *overrides.split())) == overrides


def test_every_file_of_a_group_is_recognized(tmp_path: Path) -> None:
    choices = [[f"{group}={path.stem}" for path in (CONF / group).glob("*.yaml")] for group in records.GROUPS]
    defaults = ("data=mnist", "model=tutorial", "optimizer=adadelta")
    for number, chosen in enumerate(zip_longest(*choices)):
        asked = [choice for choice in chosen if choice]
        several = {choice: f"{group}=[{name}]" for choice in asked for group, name in [choice.split("=")]}
        shown = [several[each] if each.startswith(records.MULTI_GROUPS) else each for each in asked]
        expected = " ".join(each for each in shown if each not in defaults and "none" not in each)
        assert changes_of(begun(tmp_path / str(number), *[several[each] for each in asked])) == expected


def test_what_cannot_change_the_results_is_no_change(tmp_path: Path) -> None:
    run = begun(tmp_path / "run", "data.dir=elsewhere", "trainer.accelerator=cpu", "logger=csv", "trust=[mine]")
    assert changes_of(run) == ""


def test_a_class_of_ones_own_is_shown_with_its_arguments(tmp_path: Path) -> None:
    run = begun(tmp_path / "run", "model._target_=mine.Net", "model.dropout=0.1", "+my.alpha=[1,2]")
    assert changes_of(run) == "model._target_=mine.Net model.dropout=0.1 my.alpha=[1, 2]"


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with three runs: b is the best, c the newest, and a has no validation."""
    folder = tmp_path_factory.mktemp("three")
    for number, (name, overrides, results) in enumerate(
        [
            ("a", ["optimizer.lr=10"], {"test_acc": 0.97, "test_loss": 0.3}),
            ("b", ["optimizer=adam"], {"test_acc": 0.99, "test_loss": 0.1, "val_acc": 0.98}),
            ("c", ["optimizer.lr=9.5", "scheduler=cosine"], {"test_acc": 0.98, "test_loss": 0.2, "val_acc": 0.99}),
        ]
    ):
        run = begun(folder / name, *overrides, **results)
        os.utime(run / "config.yaml", (number, number))
    return folder


@pytest.mark.parametrize(
    ("sort", "names"),
    [
        ("started", "cba"),
        ("-started", "abc"),
        ("test/acc", "bca"),
        ("-test/loss", "bca"),
        ("val/acc", "cba"),  # what has none comes last,
        ("-val/acc", "bca"),  # either way
        ("optimizer.lr", "acb"),
        ("-folder", "abc"),
    ],
)
def test_they_are_sorted_by_any_column_or_setting(sort: str, names: str, three: Path) -> None:
    assert "".join(row["folder"] for row in runs(three, sort=sort)) == names


@pytest.mark.parametrize(
    ("where", "names"),
    [
        ("optimizer=adam", "b"),
        ("optimizer=adadelta", "ca"),
        ("optimizer.lr=10.0", "a"),
        ("scheduler=null", "ba"),
        ("optimizer=adadelta scheduler=cosine", "c"),
        ("optimizer=adam optimizer.rho=0.95", ""),  # a key of others only
        ("status=finished data=mnist", "cba"),
        ("b", "b"),
        ("status=failed", ""),
    ],
)
def test_they_are_selected_by_words_that_all_hold(where: str, names: str, three: Path) -> None:
    assert "".join(row["folder"] for row in runs(three, where=where)) == names


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"where": "optimiser=adam"}, "where=optimiser=adam: no run has optimiser; did you mean optimizer?"),
        ({"sort": "lr"}, "sort=lr: no run has lr; did you mean optimizer.lr?"),
        ({"sort": "acc"}, "sort=acc: no run has acc, neither as a column, such as test/acc, nor as a setting"),
        ({"compare": ["a", "d"]}, "compare: there is no run d in "),
        ({"output": "x.png"}, "output=x.png: must end in .csv; .png shows the curves of runs"),
        ({"output": "x.txt", "compare": ["a", "b"]}, "output=x.txt: must end in .csv or .png"),
        ({"output": "x.png", "compare": ["a", "b"]}, "output=x.png: none of these runs has recorded an epoch"),
        ({"output": "no/x.csv"}, "output=no/x.csv: there is no folder no"),
        ({"compare": ["a", "b"], "where": "b"}, "where=b: compare= names the runs itself"),
        ({"folder": "nowhere"}, "folder=nowhere: there is no such folder"),
    ],
)
def test_mistakes_are_refused_in_one_sentence(arguments: dict[str, Any], sentence: str, three: Path) -> None:
    with pytest.raises(UserError) as error:
        runs(**{"folder": three, **arguments})
    assert str(error.value).startswith(sentence) and "\n" not in str(error.value)


def test_a_setting_that_they_are_sorted_by_is_a_column_though_none_has_changed_it(three: Path) -> None:
    assert [row["optimizer.eps"] for row in runs(three, sort="-optimizer.eps")] == [1e-8, 1e-7, 1e-7]
    assert [row["folder"] for row in runs(three, sort="-optimizer.lr", compare=["a", "b", "c"])] == ["b", "c", "a"]


def test_the_table_as_csv_has_a_column_for_each_setting_that_was_changed(three: Path, tmp_path: Path) -> None:
    output = tmp_path / "table.csv"
    rows = runs(three, output=output)
    written = list(csv.DictReader(output.open()))
    assert [row["optimizer.lr"] for row in written] == ["9.5", "0.001", "10"]
    assert [row["scheduler"] for row in written] == ["cosine", "", ""]
    assert [*written[0]] == [*rows[0]] and all(row.keys() == rows[0].keys() for row in rows)
    with pytest.raises(UserError, match="exists already"):
        runs(three, output=output)
    runs(three, output=output, overwrite=True)


def test_two_runs_side_by_side(whole_run: Path, finished_run: Path, tmp_path: Path) -> None:
    for name, run in (("one", whole_run), ("two", finished_run)):
        (tmp_path / name).symlink_to(run)
    rows = runs(tmp_path, compare=["one", str(tmp_path / "two")], output=tmp_path / "curves.png")
    lines = {line.split()[0]: line.split()[1:] for line in side_by_side(rows).splitlines()}
    assert lines["one"] == ["two"]
    assert lines["model"] == ["mlp", "tutorial"] and lines["optimizer.lr"] == ["0.001", "1.0"]
    assert lines["trainer.limit_train_batches"] == ["-", "3"] and lines["epochs"] == ["1/1", "2/2"]
    assert lines["test/acc"] == [f"{row['test/acc']:.4f}" for row in rows] and lines["val/acc"][1] == "-"
    assert not {"data.batch_size", "data.dir", "model._target_", "changes"} & lines.keys()
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


HOSTILE = {
    "config.yaml": [
        "[" * 10**6,
        "a: &a [1, 2]\nb: [*a, *a]",
        "data: {}\nmodel: {}\noptimizer: {}\ntrainer: 5",
        "seed: !!bool x",
        "seed: !!python/object/apply:os.system ['touch owned']",
        "seed: 1" + ":1" * 10**5,
        "defaults: []\nlr: 0.1\n",
        "\0",
    ],
    "metrics.json": ["", "[]", "[" * 10**5, '{"epochs": 1' + "0" * 5000 + "}", '{"test/acc": NaN'],
    "job.json": ["{", "5", '{"config": ' + '{"a": ' * 900 + "1" + "}" * 901],
    "metrics.csv": ["epoch,train/loss\n1,x\n", 'epoch,"' + "a" * 200_000],
}


@pytest.mark.parametrize(("name", "content"), [(name, each) for name in HOSTILE for each in HOSTILE[name]])
def test_44_a_damaged_or_foreign_folder_is_named_and_the_others_are_listed(
    name: str, content: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    begun(tmp_path / "good", test_acc=0.9)
    (begun(tmp_path / "bad") / name).write_text(content)
    started = time.process_time()
    assert [row["folder"] for row in runs(tmp_path)] == ["good"]
    assert time.process_time() - started < 2
    (message,) = caplog.messages
    assert message.startswith("skipped: ") and f"bad/{name}" in message and len(message) < 600
    with pytest.raises(UserError, match=name):
        runs(tmp_path, compare=["good", "bad"])


def test_44_the_command_says_what_it_has_skipped(tmp_path: Path, command: Command) -> None:
    begun(tmp_path / "good", test_acc=0.9)
    (begun(tmp_path / "bad") / "config.yaml").write_text("[")
    done = command("folder=.", cwd=tmp_path, verb="runs")
    assert "good" in done.stdout and done.stderr.startswith("skipped: ") and done.stderr.count("\n") == 1


def test_values_of_other_types_are_no_values(tmp_path: Path) -> None:
    run = begun(tmp_path / "run", test_acc=[1], test_loss="x", val_acc=float("nan"), fit_seconds={})
    content = json.loads((run / "metrics.json").read_text())
    odd = {"epochs": True, "data": 5, "versions": [], "device": {"a": {}}, "train/acc": 1e300}
    (run / "metrics.json").write_text(json.dumps({**content, **odd}))
    (run / "job.json").write_text('{"status": {}, "config": 5, "reason": []}')
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(
        text.replace("max_epochs: 12", "max_epochs: [a]").replace("lr: 1.0", "lr: {1: {}}")
    )
    (row,) = rows = runs(tmp_path)
    assert row["status"] == "finished" and row["epochs"] is row["test/acc"] is row["train/acc"] is None
    assert "trainer.max_epochs=['a']" in table(rows)


def test_a_pipe_is_not_waited_for_and_links_may_go_in_circles_and_folders_deep(tmp_path: Path) -> None:
    begun(tmp_path / "1" / "2" / "3" / "4" / "5" / "6" / "7", test_acc=0.9)
    good = begun(tmp_path / "good", test_acc=0.9)
    os.mkfifo(begun(tmp_path / "bad") / "metrics.json")
    (tmp_path / "circle").symlink_to(tmp_path)
    (tmp_path / "again").symlink_to(good)
    shutil.copytree(good, tmp_path / ".hidden" / "run")
    assert len(runs(tmp_path)) == 1


def test_a_terminal_gets_nothing_that_it_would_obey(tmp_path: Path) -> None:
    begun(tmp_path / "a\x1b[2J\udcff", '+my.name="\\e[2J\\n"', test_acc=0.9)
    rows = runs(tmp_path)
    assert table(rows).replace("\n", "").isprintable()
    runs(tmp_path, output=tmp_path / "table.csv")
    assert b"a\x1b[2J\xff" in (tmp_path / "table.csv").read_bytes()


def test_it_needs_nothing_that_takes_long_to_import_and_lists_200_runs_in_two_seconds(
    three: Path, tmp_path: Path
) -> None:
    for number in range(200):
        shutil.copytree(three / "abc"[number % 3], tmp_path / "many" / str(number))
    code = (
        "import sys, time, mnist_lit.runs\n"
        "mnist_lit.runs.main()\n"
        "heavy = [m for m in ('torch', 'lightning', 'numpy', 'matplotlib') if m in sys.modules]\n"
        "print(heavy, time.process_time())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "folder=many"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    *lines, last = done.stdout.splitlines()
    assert len(lines) == 201
    heavy, seconds = last.split("] ")
    assert heavy == "[" and float(seconds) < 4  # of the processor; half of it if nothing else runs
