"""Sweeps: which jobs run in which folder, that none can end another, and what the summary says."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import colour
import hydra
import pytest
from conftest import Command
from helpers import QUICK, ROOT, is_in_use

from mnist_lit import UserError
from mnist_lit.cli.config import CONF, ConfigFiles
from mnist_lit.storage import runs
from mnist_lit.storage.tables import text_table, to_csv
from mnist_lit.sweeps.jobs import Job, identity, read_jobs
from mnist_lit.sweeps.summary import best_first, summarize, table
from mnist_lit.sweeps.sweep import asked_jobs, plan

NETWORK = """\
import os, signal, sys
from mnist_lit.network import TutorialCNN

class Odd(TutorialCNN):
    def __init__(self, how="well"):
        super().__init__()
        self.how = how

    def forward(self, images):
        if self.how == "raises":
            raise ZeroDivisionError("as the test wants it")
        if self.how == "exits":
            sys.exit(5)
        if self.how == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(images)
"""
SLOW = """\
import os, signal, time
from pathlib import Path
from mnist_lit.network import TutorialCNN

class Slow(TutorialCNN):
    def forward(self, images):
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])  # as if it were computing in C
        Path(f"slow-{os.getpid()}").touch()
        time.sleep(90)
"""
SMALL = [
    *("data.source=sample", "data.batch_size=100", "data.val_size=200", "trainer.accelerator=cpu"),
    *("trainer.max_epochs=2", "trainer.limit_train_batches=3", "trainer.limit_test_batches=2"),
]


def planned(folder: Path, *overrides: str) -> list[Job]:
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):  # as inside a command
        return plan(asked_jobs(ConfigFiles("train"), overrides), folder)


def names(jobs: list[Job]) -> list[str]:
    return [job.folder.name for job in jobs]


def results(job: Job, **values: float) -> None:
    job.status = "finished"
    job.write()
    content = {f"{key.replace('_', '/')}": value for key, value in values.items()}
    (job.folder / "metrics.json").write_text(json.dumps(content))


def test_a_jobs_folder_has_the_name_of_what_was_changed(tmp_path: Path) -> None:
    jobs = planned(tmp_path, "optimizer.lr=0.3,1.0", "seed=range(2)", "trainer.max_epochs=3")
    assert names(jobs) == ["lr-0.3_seed-0", "lr-0.3_seed-1", "lr-1.0_seed-0", "lr-1.0_seed-1"]
    assert jobs[0].overrides == {"optimizer.lr": "0.3", "seed": "0", "trainer.max_epochs": "3"}
    odd = planned(tmp_path / "odd", "optimizer=sgd,adam", "model.dropout=0.1,0.2", "data.dir='a/b, c','ä'")
    assert names(odd)[0] == "optimizer-sgd_dropout-0.1_dir-a-b-c" and len(set(names(odd))) == 8
    assert all(name.isascii() and not set(name) & set("=,()[] '/") for name in names(odd))


def test_23_jobs_are_matched_by_what_they_were_asked_and_not_by_their_number(tmp_path: Path) -> None:
    first = planned(tmp_path, "optimizer.lr=0.3,1.0", "trainer.max_epochs=3")
    more = planned(tmp_path, "optimizer.lr=1.0,0.1,0.3", "trainer.max_epochs=3")
    assert names(more) == ["lr-1.0", "lr-0.1", "lr-0.3"]
    # The same said in another way, and with another place for the data.
    again = planned(tmp_path, "trainer.max_epochs=3", "optimizer.lr=1.00,0.3", "seed=0", "data.dir=elsewhere")
    assert [job.folder for job in again] == [first[1].folder, first[0].folder]
    # Another length of training is another job, whatever its folder would like to be called.
    longer = planned(tmp_path, "optimizer.lr=0.3,1.0", "trainer.max_epochs=4")
    assert names(longer) == ["lr-0.3_2", "lr-1.0_2"]
    # What usually does not make another job does when it is swept over.
    assert len(set(names(planned(tmp_path / "b", "model.cpu_kernel=true,false")))) == 2
    for number, swept in enumerate(("checkpoint.every_n_epochs=1,2", "++trainer.profiler=simple,null")):
        assert len(set(names(planned(tmp_path / f"d{number}", swept)))) == 2
    assert (
        len(set(names(planned(tmp_path / "e", "trainer.limit_train_batches=1,1.0")))) == 2
    )  # a batch, and all of them
    # Other data make other jobs.
    sample, full = (planned(tmp_path / "f", "seed=0,1", f"data.source={source}") for source in ("sample", "mnist"))
    assert not {*names(sample)} & {*names(full)}
    # Asked twice in one sweep, it is one job.
    assert len(set(names(planned(tmp_path / "c", "seed=0,0,1")))) == 2


def test_23_a_job_without_results_takes_what_has_been_put_right(tmp_path: Path) -> None:
    wrong = planned(tmp_path, "seed=0,1", "data.dir=nowhere")
    results(wrong[0], test_acc=0.9)
    right = planned(tmp_path, "seed=0,1", "data.dir=there")
    assert names(right) == names(wrong)
    assert [job.overrides["data.dir"] for job in read_jobs(tmp_path)] == ["nowhere", "there"]


def test_a_folder_with_a_single_run_and_another_sweeper_are_refused(tmp_path: Path, command: Command) -> None:
    (tmp_path / "config.yaml").write_text("")
    with pytest.raises(UserError, match="holds a run, not a sweep"):
        planned(tmp_path, "seed=0,1")
    files = ConfigFiles("train")
    with (
        pytest.raises(UserError, match="does not support sweep type"),
        files.errors_as_user_errors(["seed=interval(0,1)"]),
    ):
        planned(tmp_path / "new", "optimizer.lr=interval(0.1,1)")
    with pytest.raises(UserError, match=r"unknown key optimizer\.rho"), files.errors_as_user_errors([]):
        planned(tmp_path / "new", "optimizer=adadelta,sgd", "optimizer.rho=0.9")
    assert not (tmp_path / "new").exists()  # nothing is made before all jobs can be composed
    done = command("-m", "optimizer=adadelta,sgd", "optimizer.rho=0.9", cwd=tmp_path)
    assert done.returncode == 1 and not (tmp_path / "outputs").exists()


def test_the_summary_ranks_by_validation_with_mean_and_deviation_over_the_seeds(tmp_path: Path) -> None:
    jobs = planned(tmp_path, "optimizer.lr=0.3,1.0,3.0", "seed=0,1", "data.val_size=100")
    for job, (val, test) in zip(jobs, [(0.90, 0.99), (0.92, 0.99), (0.97, 0.95), (0.99, 0.95)], strict=False):
        results(job, val_acc=val, test_acc=test)
    jobs[4].status, jobs[4].reason = "failed", "ZeroDivisionError: no"
    jobs[4].write()
    groups, ranked = best_first(read_jobs(tmp_path))
    assert ranked and [group.title for group in groups] == [f"optimizer.lr={lr}" for lr in ("1.0", "0.3", "3.0")]
    text = table(groups, ranked)
    assert "optimizer.lr=1.0  2/2   0.9800 ± 0.0141  0.9500 ± 0.0000" in text
    assert "failed: optimizer.lr=3.0 seed=0: ZeroDivisionError: no" in text
    assert "waiting: optimizer.lr=3.0 seed=1" in text

    summarize(tmp_path)
    rows = list(csv.DictReader((tmp_path / "summary.csv").open()))
    assert [row["rank"] for row in rows] == ["1", "1", "2", "2", "3", "3"]
    assert rows[0]["optimizer.lr"] == "1.0" and float(rows[0]["val/acc mean"]) == pytest.approx(0.98)
    assert float(rows[0]["val/acc sd"]) == pytest.approx(0.0141, abs=1e-4)
    assert [row["status"] for row in rows[4:]] == ["failed", "waiting"] and rows[4]["folder"] == "lr-3.0_seed-0"
    assert (tmp_path / "summary.png").read_bytes().startswith(b"\x89PNG")


def test_the_summary_ranks_by_what_the_jobs_monitor(tmp_path: Path) -> None:
    monitored = ["checkpoint.monitor=val/loss", "checkpoint.mode=min", "data.val_size=100"]
    for job, loss in zip(planned(tmp_path, "optimizer.lr=0.3,1.0,3.0", *monitored), (0.2, 0.1, None), strict=True):
        if loss:
            results(job, val_loss=loss, val_acc=0.9 + loss, test_acc=0.9, test_f1=0.9 - loss)
    groups, criterion = best_first(read_jobs(tmp_path))
    assert criterion == "val/loss"
    assert [group.title for group in groups] == [f"optimizer.lr={lr}" for lr in ("1.0", "0.3", "3.0")]
    text = table(groups, criterion)
    assert "best first, by val/loss" in text
    assert "test f1" in text and "optimizer.lr=1.0  1/1   1.0000   0.1000    0.9000    0.8000" in text


def test_seeds_that_were_added_later_are_of_the_same_group(tmp_path: Path) -> None:
    for job in planned(tmp_path, "optimizer.lr=0.3,1.0", "seed=0", "data.val_size=100", "data.dir=a"):
        results(job, val_acc=0.9, test_acc=0.9)
    for job in planned(tmp_path, "optimizer.lr=0.3,1.00", "seed=0,1", "data.val_size=100", "data.dir=b"):
        results(job, val_acc=0.9, test_acc=0.9)
    groups, _ = best_first(read_jobs(tmp_path))
    assert [len(group.values("val/acc")) for group in groups] == [2, 2]


def test_a_sweep_over_the_validation_split_itself_is_shown(tmp_path: Path) -> None:
    without, with_it = planned(tmp_path, "data.val_size=0,100")
    results(without, test_acc=0.9)
    results(with_it, test_acc=0.9, val_acc=0.8)
    summarize(tmp_path)
    assert (tmp_path / "summary.png").exists()
    assert not best_first(read_jobs(tmp_path))[1]


def test_without_a_validation_split_nothing_is_ranked(tmp_path: Path) -> None:
    for job, test in zip(planned(tmp_path, "optimizer.lr=0.3,1.0"), (0.9, 0.99), strict=True):
        results(job, test_acc=test)
    groups, ranked = best_first(read_jobs(tmp_path))
    assert not ranked and [group.title for group in groups] == ["optimizer.lr=0.3", "optimizer.lr=1.0"]
    assert "not ranked: data.val_size=0 leaves no validation accuracy" in table(groups, ranked)
    summarize(tmp_path)
    assert {row["rank"] for row in csv.DictReader((tmp_path / "summary.csv").open())} == {""}


def test_columns_are_aligned_and_csv_ignores_other_keys() -> None:
    assert text_table([["", "x"], ["long", "1.5"]]) == "      x\nlong  1.5"
    assert text_table([["a", "10"], ["bb", "9"]], ">") == " a  10\nbb   9"
    assert to_csv(["a", "b"], [{"a": 1, "c": 2}]) == b"a,b\r\n1,\r\n"


def test_28_a_sweep_with_a_refused_job_runs_the_others(tmp_path: Path, command: Command) -> None:
    done = command("-m", *QUICK, "data.val_size=-1,20", "hydra.sweep.dir=s", cwd=tmp_path)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("train: 1 of 2 jobs failed; the sweep is in s")
    assert "failed: data.val_size=-1: data.val_size=-1: must be greater than or equal to 0" in done.stdout
    (job,) = (path.parent for path in tmp_path.glob("s/*/metrics.json"))
    assert job.name == "val_size-20"
    assert {"config.yaml", "job.json", "train.log", "report.html"} <= {each.name for each in job.iterdir()}
    assert {path.name for path in (tmp_path / "s").iterdir() if path.is_file()} == {
        *("multirun.yaml", "summary.csv", "summary.png", "train.log")
    }


@pytest.mark.slow
def test_41_reports_that_cannot_be_written_lose_no_results_of_a_sweep(tmp_path: Path, command: Command) -> None:
    (tmp_path / "s" / "summary.png").mkdir(parents=True)
    asked = ["-m", *colour.ASKED, "data.val_size=100", "seed=0,1", "hydra.sweep.dir=s"]
    done = command(*asked, cwd=tmp_path)
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and last.startswith("train: 2 of 2 jobs failed; summary.png cannot be written"), last
    assert "failed: seed=0: the report cannot be written (IndexError: " in done.stdout
    with (tmp_path / "s" / "summary.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["status"] for row in rows] == ["failed"] * 2 and all(float(row["test/acc"]) >= 0 for row in rows)

    (tmp_path / "s" / "summary.png").rmdir()
    again = command(*asked, cwd=tmp_path)  # their results are there, so nothing is missing
    assert again.returncode == 0 and "job 2 of 2 has been run" in again.stdout, again.stderr


@pytest.mark.slow
def test_a_job_has_several_processes_where_asked(tmp_path: Path, command: Command) -> None:
    done = command("-m", *QUICK, "trainer.devices=1,2", "hydra.sweep.dir=s", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    devices = {
        path.parent.name: json.loads(path.read_text())["device"][:5] for path in tmp_path.glob("s/*/metrics.json")
    }
    assert devices == {"devices-1": "cpu, ", "devices-2": "2 x c"}


@pytest.mark.slow
def test_22_a_job_that_raises_exits_or_is_killed_does_not_stop_the_others(tmp_path: Path, command: Command) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher", reason="needs the extra joblib")
    (tmp_path / "odd_networks.py").write_text(NETWORK)
    (tmp_path / "conf" / "model").mkdir(parents=True)
    (tmp_path / "conf" / "model" / "odd.yaml").write_text("_target_: odd_networks.Odd\nhow: well\n")
    arguments = ["-m", "--config-dir=conf", "model=odd", "model.how=raises,dies,exits,well", *SMALL]
    arguments += ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "hydra.sweep.dir=s"]
    done = command(*arguments, cwd=tmp_path)
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith("train: 3 of 4 jobs failed"), done.stderr
    for line in (
        "failed: model.how=raises: ZeroDivisionError: as the test wants it",
        "failed: model.how=dies: killed by SIGKILL (out of memory?)",
        "failed: model.how=exits: exit code 5",
    ):
        assert line in done.stdout.splitlines()
    well = tmp_path / "s" / "how-well" / "metrics.json"
    if (os.cpu_count() or 1) == 2:
        assert json.loads(well.read_text())["device"] == "cpu, 1 thread"  # shared out among the two jobs
    assert "Traceback" in (tmp_path / "s" / "how-raises" / "error.txt").read_text()

    before = well.stat().st_mtime_ns
    again = command(*arguments[:-3], "hydra.sweep.dir=s", "model.how=well", cwd=tmp_path)
    assert again.returncode == 0 and "job 1 of 1 has been run" in again.stdout, again.stderr
    assert well.stat().st_mtime_ns == before

    (tmp_path / "odd_networks.py").write_text(NETWORK.replace("raise ZeroDivisionError", "print"))
    mended = command(*arguments[:-3], "hydra.sweep.dir=s", "model.how=raises", cwd=tmp_path)
    assert mended.returncode == 0 and (tmp_path / "s" / "how-raises" / "metrics.json").exists(), mended


def wait_for(condition: Any, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "devices"), [(signal.SIGKILL, 1), (signal.SIGKILL, 2), (signal.SIGINT, 1)])
def test_23_a_sweep_that_was_killed_or_stopped_goes_on_with_the_same_command(
    number: int, devices: int, tmp_path: Path, command: Command
) -> None:
    epochs = 14 // devices
    long = [f"trainer.max_epochs={epochs}", "trainer.limit_train_batches=2", f"trainer.devices={devices}"]
    arguments = [*SMALL, *long, "seed=0,1", f"hydra.sweep.dir={tmp_path}/s"]
    sweep = command.start("-m", *arguments, cwd=tmp_path)
    job = tmp_path / "s" / "seed-0"
    wait_for((job / "checkpoints" / "last.ckpt").exists, 90)
    assert is_in_use(job)
    sweep.send_signal(number)
    ended = sweep.ended()
    assert ended.returncode == (-signal.SIGKILL if number == signal.SIGKILL else 128 + number)
    if number == signal.SIGKILL:
        wait_for(lambda: not is_in_use(job), 5)  # its job does not outlive it
    else:
        assert "the same command with hydra.sweep.dir=" in ended.stderr.splitlines()[-1]
        assert Job.read(tmp_path / "s" / "seed-0").status == "stopped"

    done = command("-m", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "resuming" in (tmp_path / "s" / "seed-0" / "train.log").read_text()
    assert len(list(csv.DictReader((tmp_path / "s" / "seed-0" / "metrics.csv").open()))) == epochs
    assert [job.status for job in read_jobs(tmp_path / "s")] == ["finished", "finished"]


@pytest.mark.slow
def test_23_a_launchers_process_does_not_outlive_the_sweep_and_nor_does_its_job(
    tmp_path: Path, command: Command
) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher", reason="needs the extra joblib")
    (tmp_path / "slow_networks.py").write_text(SLOW)
    network = ["model._target_=slow_networks.Slow", "~model.dropout", "~model.cpu_kernel"]
    launcher = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "hydra.sweep.dir=s", "seed=0,1"]
    sweep = command.start("-m", *SMALL, *network, *launcher, cwd=tmp_path)
    jobs = [tmp_path / "s" / f"seed-{seed}" for seed in (0, 1)]
    wait_for(lambda: len(list(tmp_path.glob("slow-*"))) == 2, 90)
    assert all(map(is_in_use, jobs))
    sweep.send_signal(signal.SIGKILL)
    sweep.wait()
    wait_for(lambda: not any(map(is_in_use, jobs)), 5)


def test_23_a_run_waits_for_the_lock_of_one_that_is_about_to_end(tmp_path: Path) -> None:
    began = time.monotonic()
    with locked_by_another(tmp_path, "time.sleep(1)") as other, runs.locked(tmp_path):
        assert 0.5 < time.monotonic() - began < 5 and other.wait(5) == 0


def test_23_what_a_run_has_forked_does_not_hold_its_lock(tmp_path: Path) -> None:
    """As a DataLoader's workers do, which live for seconds after a kill -9 of the run."""
    with locked_by_another(tmp_path, "os.fork() and os.kill(os.getpid(), signal.SIGKILL); time.sleep(3)") as other:
        other.wait(5)
        wait_for(lambda: not is_in_use(tmp_path), 2)  # the fork may need a moment, and lives for three seconds


@contextmanager
def locked_by_another(folder: Path, then: str) -> Iterator["subprocess.Popen[bytes]"]:
    """Another process has locked the folder, and does something then."""
    code = f"""
import os, signal, time
from pathlib import Path
from mnist_lit.storage import runs
with runs.locked(Path({str(folder)!r})):
    print(flush=True)
    {then}
"""
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE) as other:
        assert other.stdout and other.stdout.readline() == b"\n"
        yield other


def test_only_train_makes_sweeps_and_a_sweep_is_not_resumed_job_by_job(tmp_path: Path, command: Command) -> None:
    for verb, arguments in (("evaluate", ["data.batch_size=1,2"]), ("train", ["resume=latest", "seed=0,1"])):
        done = command("-m", *arguments, cwd=tmp_path, verb=verb)
        assert done.returncode == 1 and "-m" in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert list(tmp_path.iterdir()) == []


def test_an_order_that_is_drawn_is_refused(tmp_path: Path, command: Command) -> None:
    done = command("-m", "seed=shuffle(range(5))", *SMALL, "hydra.sweep.dir=s", cwd=tmp_path)
    assert done.stderr == "train: seed=shuffle(range(5)): jobs have a fixed order here; leave out shuffle\n"
    assert not (tmp_path / "s").exists()


@pytest.mark.slow
def test_another_monitor_makes_other_jobs(tmp_path: Path) -> None:
    first, second = (planned(tmp_path, "seed=0,1", f"checkpoint.monitor={each}") for each in ("val/acc", "val/f1"))
    assert not {*names(first)} & {*names(second)}


def test_a_job_from_before_there_was_a_key_is_the_same_as_one_where_it_is_null() -> None:
    old = {"seed": 0, "optimizer.lr": 1.0, "scheduler": None}
    new = {**old, "float32_matmul_precision": None}
    assert identity(old, ["seed"]) == identity(new, ["seed"])
    assert identity(old, ["seed"]) != identity({**new, "float32_matmul_precision": "high"}, ["seed"])
