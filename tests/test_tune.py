"""Searches count each trial exactly once, whatever is killed, and the settings they find can be trained."""

import csv
import json
import math
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import colour
import hydra
import pytest
import yaml
from conftest import Command

from mnist_lit import UserError
from mnist_lit.cli.config import CONF, ConfigFiles, checked_values, flatten, overrides_of_train, plain_values, settings
from mnist_lit.cli.keys import TUNE_KEYS, is_under

optuna = pytest.importorskip("optuna", reason="needs the extra tune")

from mnist_lit.sweeps import search as search_module
from mnist_lit.sweeps.search import (
    Search,
    counts,
    distributions,
    make_pruner,
    make_sampler,
    open_study,
    require_same_search,
    suggest,
)

SMALL = [
    *("data.source=sample", "data.batch_size=100", "data.val_size=200", "trainer.accelerator=cpu", "~space.data"),
    *("trainer.max_epochs=3", "trainer.limit_train_batches=3", "trainer.limit_test_batches=2"),
]

LONG = ["trainer.max_epochs=14", "trainer.limit_train_batches=2"]  # takes seconds, so that the signal arrives first


def sqlite(folder: Path) -> str:
    return f"sqlite:///{folder}/tune.db"


def train_config(*overrides: str) -> dict[str, Any]:
    return flatten(plain_values(ConfigFiles("train").compose(overrides)))


def opened(storage: str) -> Any:
    return open_study(storage, "tune", make_pruner("none"), "max")[0]


def search_in(folder: Path) -> Search:
    study, database = open_study(sqlite(folder), "tune", make_pruner("none"), "max")
    return Search(folder, study, database, 2, {}, ConfigFiles("train"), [], 1, "val/acc")


@pytest.fixture
def tune(command: Command) -> Callable[..., Any]:
    return partial(command, verb="tune")


@pytest.fixture
def started(command: Command) -> Callable[..., Any]:
    return partial(command.start, verb="tune")


class PostgreSQL:
    """A server of our own, on the loopback interface; ``url`` is SQLAlchemy's."""

    def __init__(self, initdb: Path) -> None:
        from socket import socket

        self.folder = Path(tempfile.mkdtemp())  # the server's user cannot read pytest's folders
        as_its_user: list[Any] = []
        if os.getuid() == 0:  # it refuses to run as root
            as_its_user = ["runuser", "-u", "postgres", "--"]
            shutil.chown(self.folder, "postgres")
        with closing(socket()) as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        data: list[Any] = ["-D", self.folder / "data"]
        subprocess.run(
            [*as_its_user, initdb, "--auth=trust", "--username=tuner", *data], check=True, capture_output=True
        )
        self._control = [*as_its_user, initdb.with_name("pg_ctl"), *data, "-l", self.folder / "log"]
        self._options = f"-h 127.0.0.1 -p {port} -k {self.folder} -c fsync=off"
        self.url = f"postgresql+psycopg://tuner@127.0.0.1:{port}/postgres"

    def start(self) -> None:
        subprocess.run([*self._control, "-w", "-o", self._options, "start"], check=True, capture_output=True)

    def stop(self) -> None:
        subprocess.run([*self._control, "-m", "immediate", "stop"], check=True, capture_output=True)


@pytest.fixture
def postgresql() -> Iterator[PostgreSQL]:
    pytest.importorskip("psycopg", reason="needs the extra postgresql")
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if not programs:
        pytest.skip("needs a PostgreSQL server: apt install postgresql")
    server = PostgreSQL(programs[-1])
    server.start()
    try:
        yield server
    finally:
        server.stop()
        shutil.rmtree(server.folder)


def trains_in(folder: Path) -> int:
    """The PID of the process that has the run's folder open."""
    (found,) = {int(path.parts[2]) for path in Path("/proc").glob("[0-9]*/fd/*") if _target(path) == str(folder)}
    return found


def _target(path: Path) -> str:
    try:
        return os.readlink(path)
    except OSError:  # closed in the meantime
        return ""


def states(study: Any) -> list[str]:
    return [trial.state.name for trial in study.get_trials(deepcopy=False)]


@pytest.mark.parametrize(
    "kind", [pytest.param("sqlite", marks=pytest.mark.slow), pytest.param("postgresql", marks=pytest.mark.services)]
)
def test_25_a_worker_that_is_killed_costs_no_trial_and_the_total_is_honoured(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest, tune: Any, started: Any
) -> None:
    storage = sqlite(tmp_path) if kind == "sqlite" else request.getfixturevalue("postgresql").url
    arguments = [f"storage={storage}", "n_trials=4", "sampler=random", "pruner=none", *SMALL, *LONG]
    first, second = started(*arguments, cwd=tmp_path), started(*arguments, cwd=tmp_path)
    deadline = time.monotonic() + 60
    study, drawn = None, [0]
    # Two at the same time, with all values: a trial that is lost between two draws is run again with those it had.
    while sorted(drawn) != [3, 3]:
        assert time.monotonic() < deadline and first.poll() is None and second.poll() is None
        time.sleep(0.1)
        if (tmp_path / "outputs" / "tune" / "trials").exists():
            study = study or opened(storage)
            drawn = [len(trial.params) for trial in study.get_trials() if trial.state.name == "RUNNING"]
    assert study
    first.send_signal(signal.SIGKILL)
    first.wait()
    killed = time.monotonic()
    while "FAIL" not in states(study):
        assert time.monotonic() - killed < 30
        time.sleep(0.2)
    ended = second.ended()
    assert ended.returncode == 0, ended.stderr
    trials = study.get_trials()
    assert sum(map(counts, trials)) == 4 and states(study).count("COMPLETE") == 4
    assert not {"RUNNING", "WAITING"} & {*states(study)}
    (lost,) = [trial for trial in trials if trial.state.name == "FAIL"]
    (again,) = [trial for trial in trials if trial.system_attrs.get("failed_trial") == lost.number]
    assert again.params == lost.params and again.state.name == "COMPLETE"

    more = tune(*arguments[:1], "n_trials=5", *arguments[2:], cwd=tmp_path)
    assert more.returncode == 0 and sum(map(counts, study.get_trials())) == 5, more.stderr
    # The two have shared the cores of the machine.
    devices = [json.loads(file.read_text())["device"] for file in tmp_path.glob("outputs/tune/trials/*/metrics.json")]
    if (cores := os.cpu_count() or 1) > 1:
        assert any(device.startswith(f"cpu, {cores // 2} thread") for device in devices), devices


@pytest.mark.services
def test_43_a_database_that_goes_away_is_waited_for(postgresql: PostgreSQL, tmp_path: Path, started: Any) -> None:
    search = started(f"storage={postgresql.url}", "n_trials=3", "workers=2", "pruner=none", *SMALL, *LONG, cwd=tmp_path)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("outputs/tune/trials/*/metrics.csv")):
        assert time.monotonic() < deadline and search.poll() is None
        time.sleep(0.1)
    postgresql.stop()
    time.sleep(4)
    postgresql.start()
    ended = search.ended()
    assert ended.returncode == 0 and "Traceback" not in ended.stderr, ended.stderr
    trials = opened(postgresql.url).get_trials()
    surplus = [trial for trial in trials if "surplus" in trial.user_attrs]  # begun at the same moment as the last one
    assert [trial.state.name for trial in trials if trial not in surplus] == ["COMPLETE"] * 3
    log = (tmp_path / "outputs" / "tune" / "tune.log").read_text()
    assert "the database is unreachable; retrying for up to 5 minutes" in log


def test_43_a_database_that_stays_away_ends_the_search_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mnist_lit.sweeps import database

    monkeypatch.setattr(database, "RETRY_INTERVAL", 0.1)
    search = search_in(tmp_path)
    study, search.database.timeout = search.study, 0.5
    trial = study.ask()
    search.database.engine.dispose()  # its connections
    (tmp_path / "tune.db").rename(tmp_path / "away.db")
    (tmp_path / "tune.db").mkdir()
    started = time.monotonic()
    with pytest.raises(UserError, match=r"tune.db is still unreachable \(.*unable to open.*\); the same command"):
        trial.set_user_attr("a", 1)
    assert 0.5 < time.monotonic() - started < 5 and not search.database.trusts_heartbeats
    search.database.record_heartbeat(trial._trial_id)  # as a thread of Optuna's does, without a traceback
    (tmp_path / "tune.db").rmdir()
    (tmp_path / "away.db").rename(tmp_path / "tune.db")
    trial.set_user_attr("a", 2)
    # What could not send heartbeats is not stale.
    assert study.trials[0].user_attrs == {"a": 2} and not search.database.trusts_heartbeats
    monkeypatch.setattr(database, "GRACE_PERIOD", 0)
    assert search.database.trusts_heartbeats


@pytest.mark.slow
def test_a_search_over_groups_by_another_metric(tmp_path: Path, tune: Any, command: Command) -> None:
    space = ["~space", "+space.optimizer.choices=[adam,sgd]", "+space.scheduler.choices=[none,cosine]"]
    asked = ["metrics=f1", "checkpoint.monitor=val/loss", "checkpoint.mode=min", "sampler=random", "sampler_seed=1"]
    done = tune("n_trials=4", *asked, *space, *SMALL[:4], *SMALL[5:], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader((tmp_path / "outputs" / "tune" / "trials.csv").open()))
    assert len({row["optimizer"] for row in rows}) == len({row["scheduler"] for row in rows}) == 2
    for row in rows:
        config = yaml.safe_load((Path(tmp_path, row["folder"]) / "config.yaml").read_text())
        assert config["optimizer"]["_target_"].lower().endswith(row["optimizer"])
        scheduler = "torch.optim.lr_scheduler.CosineAnnealingLR" if row["scheduler"] == "cosine" else None
        assert (config["scheduler"] or {}).get("_target_") == scheduler
    best = min(rows, key=lambda row: float(row["val/loss"]))
    shown = command("--config-dir=outputs/tune", "experiment=best", "--cfg=job", "--package=optimizer", cwd=tmp_path)
    assert best["optimizer"] in shown.stdout.lower()
    again = tune("n_trials=5", *asked[:1], *asked[3:], *space, *SMALL[:4], *SMALL[5:], cwd=tmp_path)
    assert again.returncode == 1 and "checkpoint.monitor was val/loss, is now val/acc" in again.stderr
    unknown = tune("n_trials=4", "~space", "+space.optimiser.choices=[adam,sgd]", *SMALL[:4], cwd=tmp_path)
    assert "train has no key optimiser; did you mean optimizer?" in unknown.stderr


@pytest.mark.slow
def test_24_a_trial_without_a_finite_loss_fails_and_the_study_goes_on(tmp_path: Path, tune: Any) -> None:
    arguments = ["~space", "+space.optimizer.lr.choices=[1e30,1.0]", "optimizer=sgd", "sampler_seed=0", *SMALL[:-4]]
    done = tune(
        "n_trials=4", "sampler=random", f"storage={sqlite(tmp_path)}", *arguments, "trainer.max_epochs=1", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader((tmp_path / "outputs" / "tune" / "trials.csv").open()))
    assert len(rows) == 4 and {row["state"] for row in rows} == {"complete", "fail"}
    for row in rows:
        assert (row["state"] == "fail") == (row["optimizer.lr"] == "1e+30")
        assert ("not finite" in row["reason"]) == (row["state"] == "fail")


@pytest.mark.slow
def test_ctrl_c_stops_and_the_same_command_goes_on(tmp_path: Path, command: Command, tune: Any, started: Any) -> None:
    arguments = [f"storage={sqlite(tmp_path)}", "n_trials=2", "pruner=none", *SMALL, *LONG]
    process = started(*arguments, cwd=tmp_path)
    deadline = time.monotonic() + 60
    while not list((tmp_path / "outputs" / "tune" / "trials").glob("*/config.yaml")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    ended = process.ended()
    assert ended.returncode == 130 and "Traceback" not in ended.stderr, ended.stderr
    assert "stopped by Ctrl-C; the same command continues, and runs the interrupted trials again" in ended.stderr
    study = opened(sqlite(tmp_path))
    assert "RUNNING" not in states(study)
    (waiting,) = [trial for trial in study.get_trials() if trial.state.name == "WAITING"]

    done = tune(*arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    complete = [trial for trial in study.get_trials() if trial.state.name == "COMPLETE"]
    assert len(complete) == 2 and complete[0].params == waiting.params
    folder = tmp_path / "outputs" / "tune"
    assert {"optimization_history.png", "slice.png", "trials.csv", "tune.log"} <= {
        path.name for path in folder.iterdir()
    }

    # The best settings are an experiment that composes to the best trial's configuration, and it trains.
    best = study.best_trial
    line = next(line for line in done.stdout.splitlines() if line.startswith("to train with the best settings: python"))
    again = command(
        *line.split("mnist_lit.train ")[1].split(),
        "hydra.run.dir=again",
        "trainer.fast_dev_run=1",
        cwd=tmp_path,
    )
    assert again.returncode == 0, again.stderr
    of_trial = yaml.safe_load((Path(best.user_attrs["folder"]) / "config.yaml").read_text())
    of_run = yaml.safe_load((tmp_path / "again" / "config.yaml").read_text())
    for section in ("seed", "model", "optimizer", "data"):
        assert of_run[section] == of_trial[section]
    assert of_run["optimizer"]["lr"] == best.params["optimizer.lr"] and of_run["data"]["val_size"] == 200


@pytest.mark.slow
def test_25_a_trial_whose_own_process_is_killed_is_run_again(tmp_path: Path, started: Any) -> None:
    process = started(f"storage={sqlite(tmp_path)}", "n_trials=1", *SMALL, *LONG, cwd=tmp_path)
    first = tmp_path / "outputs" / "tune" / "trials" / "0"
    deadline = time.monotonic() + 60
    while not (first / "config.yaml").exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.1)
    os.kill(trains_in(first), signal.SIGKILL)
    ended = process.ended()
    assert ended.returncode == 0 and "stopped or killed; it will be run again" in ended.stdout, ended
    study = opened(sqlite(tmp_path))
    lost, again = study.get_trials()
    assert states(study) == ["FAIL", "COMPLETE"] and again.params == lost.params


@pytest.mark.slow
def test_a_trial_that_validates_badly_is_pruned(tmp_path: Path, tune: Any) -> None:
    study = opened(sqlite(tmp_path))
    for _ in range(5):
        study.add_trial(optuna.create_trial(value=0.99, intermediate_values={epoch: 0.99 for epoch in range(1, 40)}))
    arguments = [*SMALL, "trainer.max_epochs=40"]
    done = tune(f"storage={sqlite(tmp_path)}", "n_trials=6", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    last = study.get_trials()[-1]
    assert last.state.name == "PRUNED" and 2 <= max(last.intermediate_values) < 40
    assert not (Path(last.user_attrs["folder"]) / "metrics.json").exists()


def test_a_trial_that_was_to_be_pruned_is_so_though_it_got_better_before_it_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study, database = open_study(sqlite(tmp_path), "tune", make_pruner("median"), "max")
    for _ in range(5):
        study.add_trial(optuna.create_trial(value=0.9, intermediate_values={epoch: 0.9 for epoch in range(1, 9)}))

    def run(*_: Any, should_stop: Any, **__: Any) -> Any:
        rows = tmp_path / "trials" / "5" / "metrics.csv"
        rows.write_text("epoch,val/acc\n1,0.1\n")
        assert not should_stop()
        rows.write_text("epoch,val/acc\n1,0.1\n2,0.2\n3,0.95\n")  # the second is too bad, and there is a third
        assert should_stop()
        return SimpleNamespace(code=143, reason="train: stopped")

    monkeypatch.setattr(search_module.job, "run", run)
    Search(tmp_path, study, database, 6, {}, ConfigFiles("train"), [], 1, "val/acc").run()
    last = study.get_trials()[-1]
    assert last.number == 5 and last.state.name == "PRUNED" and last.intermediate_values == {1: 0.1, 2: 0.2}


@pytest.mark.slow
def test_a_fault_that_is_not_in_the_settings_ends_the_search(tmp_path: Path, tune: Any) -> None:
    done = tune(
        f"storage={sqlite(tmp_path)}", "data.dir=nowhere", "data.source=mnist", "data.val_size=70", cwd=tmp_path
    )
    assert done.returncode == 1, done.stdout
    assert done.stderr.splitlines()[-1].startswith("tune: all 3 trials failed, the last one with: ")


@pytest.mark.parametrize(
    ("space", "overrides", "sentence"),
    [
        ({"optimizer": {"lrr": {"low": 0, "high": 1}}}, [], "space.optimizer.lrr: train has no key .*; did you mean"),
        ({"optimizer": {"rho": {"low": 0, "high": 1}}}, ["optimizer=sgd"], "train has no key optimizer.rho"),
        ({"optimizer": {"lr": {"low": 1, "high": 1}}}, [], "space.optimizer.lr: .* low < high"),
        ({"optimizer": {"lr": {"low": 2, "high": 1}}}, [], "space.optimizer.lr: `low <= high` must hold"),
        ({"optimizer": {"lr": {"low": 0, "high": math.inf}}}, [], "space.optimizer.lr: .* finite bounds"),
        ({"optimizer": {"lr": {"low": 0, "high": math.nan}}}, [], "space.optimizer.lr: .* finite bounds"),
        ({"optimizer": {"lr": {"low": "a", "high": "b"}}}, [], "space.optimizer.lr: could not convert"),
        ({"optimizer": {"lr": {"low": None, "high": 1}}}, [], "space.optimizer.lr: "),
        ({"optimizer": {"lr": {"low": 0, "high": 1, "log": True}}}, [], "`low > 0` must hold for `log=True`"),
        ({"optimizer": {"lr": {"low": 0.1}}}, [], "space.optimizer.lr: missing .* 'high'; it takes low: and high:"),
        ({"optimizer": {"lr": {"choices": [1], "low": 0.1}}}, [], "unexpected keyword argument 'low'"),
        ({"optimizer": {"lr": {"choices": []}}}, [], "`choices` must contain one or more elements; it takes"),
        ({"optimizer": {"lr": {"choices": [1]}}}, [], "space.optimizer.lr: needs two choices"),
        (
            {"optimizer": {"lr": {"low": 1, "high": 2}}},
            ["optimizer.lr=1"],
            "optimizer.lr is searched and cannot be set",
        ),
        ({"optimizer": {"lr": None}}, [], "space is empty"),
        ({}, [], "space is empty"),
    ],
)
def test_28_an_invalid_search_space_is_refused(space: dict, overrides: list[str], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        distributions(space, train_config(*overrides), overrides)


def test_28_what_else_is_refused_before_any_trial(tmp_path: Path, tune: Any) -> None:
    for arguments, sentence in (
        (["n_trials=0"], "n_trials=0: must be greater than or equal to 1"),
        (["sampler=grid"], "sampler=grid: must be 'tpe' or 'random'"),
        (["storage=oracle://x"], "storage=oracle://x: cannot be opened"),
        (
            ["storage=postgresql+psycopg://nobody@127.0.0.1:9/x"],
            "storage=postgresql+psycopg://nobody@127.0.0.1:9/x: cannot",
        ),
        (["optimizer=sgd"], "space.optimizer.rho: train has no key optimizer.rho"),
        (
            ["+space.optimizer.lr.step=0.1"],
            "space.optimizer.lr: The parameter `step` is not supported when `log` is true",
        ),
        (["trainer.max_epoch=3"], "unknown key trainer.max_epoch; did you mean trainer.max_epochs?"),
    ):
        done = tune(*arguments, cwd=tmp_path)
        assert done.returncode == 1 and "Traceback" not in done.stderr
        assert done.stderr.splitlines()[-1].startswith(f"tune: {sentence}"), done.stderr


def test_a_study_is_not_mixed_with_another_search(tmp_path: Path) -> None:
    study = opened(sqlite(tmp_path))
    require_same_search(study, {"space.a": (1, 2), "seed": 0})
    require_same_search(study, {"space.a": [1, 2], "seed": 0})
    with pytest.raises(UserError, match="study=tune: seed was 0, is now 1; choose another study="):
        require_same_search(study, {"space.a": (1, 2), "seed": 1})
    with pytest.raises(UserError, match=r"space.a was \[1, 2\], is now None, space.b was None, is now 3"):
        require_same_search(study, {"space.b": 3, "seed": 0})


def test_of_two_that_begin_the_last_trial_one_leaves_it(tmp_path: Path) -> None:
    study = opened(sqlite(tmp_path))
    search = search_in(tmp_path)
    study.add_trial(optuna.create_trial(value=0.5))
    earlier, later = study.ask(), study.ask()
    assert not search._is_surplus(earlier) and search._is_surplus(later)
    assert math.isnan(search._objective(later))
    study.tell(later, state=optuna.trial.TrialState.FAIL)
    assert not counts(study.get_trials()[-1])


@pytest.mark.slow
def test_the_path_of_a_storage_may_begin_with_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    open_study("sqlite:///~/new/tune.db", "tune", make_pruner("none"), "max")
    assert (tmp_path / "new" / "tune.db").is_file()


def test_41_plots_that_cannot_be_written_lose_no_results_of_a_search(tmp_path: Path) -> None:
    from mnist_lit.sweeps.tune_report import report

    study = optuna.create_study(direction="maximize")
    for value in (0.8, 0.9):
        rate = {"params": {"optimizer.lr": value}, "distributions": {"optimizer.lr": DISTRIBUTION}}
        study.add_trial(optuna.create_trial(value=value, **rate))
    (tmp_path / "slice.png").mkdir()
    with pytest.raises(
        UserError, match=r"the plots cannot be written \(IsADirectoryError: .*; the results are in .*csv"
    ):
        report(tmp_path, study, [], ConfigFiles("train"), "val/acc")
    assert "lr: 0.9" in (tmp_path / "experiment" / "best.yaml").read_text()
    assert len((tmp_path / "trials.csv").read_text().splitlines()) == 3


@pytest.mark.slow
def test_41_a_trial_whose_report_cannot_be_written_counts_with_its_value(tmp_path: Path, tune: Any) -> None:
    asked = [*colour.ASKED[:2], *colour.ASKED[4:], *SMALL[1:], "~space.model"]
    done = tune("n_trials=1", f"storage={sqlite(tmp_path)}", *asked, cwd=tmp_path)
    assert done.returncode == 0 and "the report cannot be written (IndexError: " in done.stdout, done
    assert states(opened(sqlite(tmp_path))) == ["COMPLETE"]


def test_every_key_of_train_is_one_of_tune() -> None:
    composed = ConfigFiles("tune").compose([])
    assert settings("train").keys() <= composed.keys()


def test_from_python_a_search_takes_its_settings_and_asks_for_a_validation_split(tmp_path: Path) -> None:
    from mnist_lit.tune import tune as search

    own = settings("tune", "n_trials=1", f"storage={sqlite(tmp_path)}", "optimizer=adam", "data.val_size=0")
    assert "optimizer=adam" in own["overrides"] and "trainer.enable_checkpointing=false" in own["overrides"]
    assert "data.val_size=5000" in settings("tune")["overrides"]
    with pytest.raises(UserError, match=r"^data\.val_size=0 leaves no validation accuracy to optimize"):
        search(tmp_path, **own)
    of_a_class = settings("tune", f"storage={sqlite(tmp_path)}", "data._target_=own_data.Patches", "~space.data")
    with pytest.raises(UserError, match="space is empty"):  # not that it lacks a split: it validates as it likes
        search(tmp_path, **{**of_a_class, "space": {}})
    assert not [*tmp_path.iterdir()]


def test_a_schedule_may_refer_to_what_is_searched() -> None:
    own = settings("tune", "optimizer._target_=torch.optim.Adam", "scheduler=onecycle", "~space.optimizer.rho")
    assert "scheduler=onecycle" in own["overrides"]


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["optimizer=adam", "trainer.max_epochs=3"],
        ["experiment=adam", "optimizer.betas=[0.8,0.9]"],
        ["experiment=speedrun", "scheduler=none"],
        ["experiment=validated", "logger=[csv,tensorboard]", "data.dir=elsewhere"],
        ["trainer.max_time=10:00:00:00", "+trainer.limit={a:1}", "trainer.gradient_clip_val=null"],
        ["+model.x='it\\'s, so'", "+model.y=yes", "data.source=sample", "trainer.deterministic=true"],
        ["data=fashion_mnist", "augment=shift", "model=mlp"],
        ["~optimizer.rho"],
        ["model._target_=my.Net", "+model.width=3", "data._target_=my.Data", "optimizer=mine"],
    ],
)
def test_the_best_settings_are_an_experiment_that_composes_to_what_the_trial_had(
    overrides: list[str], tmp_path: Path
) -> None:
    from mnist_lit.sweeps.records import NOT_SHOWN
    from mnist_lit.sweeps.tune_report import experiment

    params = {"optimizer.lr": 0.123, "model.dropout": 0.3, "data.batch_size": 250}
    trial = optuna.create_trial(value=0.99, params=params, distributions=dict.fromkeys(params, DISTRIBUTION))
    (tmp_path / "own" / "optimizer").mkdir(parents=True)
    (tmp_path / "own" / "optimizer" / "mine.yaml").write_text("_target_: torch.optim.Adagrad\nlr: 0.01\n")
    files = ConfigFiles("train", str(tmp_path / "own"))
    for path, text in experiment(trial, "tune", overrides, files, "val/acc").items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(text)

    def decisive(files: ConfigFiles, *given: str) -> dict[str, Any]:
        values = flatten(checked_values("train", files.compose(given)))
        return {key: value for key, value in values.items() if not is_under(key, NOT_SHOWN)}

    had = decisive(files, *overrides, *(f"{key}={value}" for key, value in params.items()))
    assert decisive(ConfigFiles("train", str(tmp_path)), "experiment=best") == had


DISTRIBUTION = optuna.distributions.FloatDistribution(0, 1000) if optuna else None


def test_ranges_of_integers_and_of_floats() -> None:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    space = {
        "data": {"batch_size": {"low": 100, "high": 900}},
        "optimizer": {"weight_decay": {"low": 0.0, "high": 0.1}},
    }
    drawn = suggest(study.ask(), distributions(space, train_config()))
    assert type(drawn["data.batch_size"]) is int and 0 < drawn["optimizer.weight_decay"] < 0.1


def test_the_same_sampler_seed_does_not_draw_the_same_trials_again(tmp_path: Path) -> None:
    def draws(trials: int) -> list[float]:
        study = optuna.create_study(sampler=make_sampler("random", 0, trials))
        return [study.ask().suggest_float("x", 0, 1) for _ in range(3)]

    assert draws(0) == draws(0) != draws(3)


def test_25_a_trial_whose_process_was_killed_before_it_began_does_not_stay_running(tmp_path: Path, monkeypatch) -> None:
    from mnist_lit.sweeps import search

    study = opened(sqlite(tmp_path))
    never_begun, begun = study.ask(), study.ask()
    begun.set_user_attr("started", begun.number)
    monkeypatch.setattr(search, "GRACE_PERIOD", 0.2)
    workers = search_in(tmp_path)
    workers._fail_stale_trials()
    assert states(study) == ["RUNNING", "RUNNING"]
    time.sleep(0.3)
    workers._fail_stale_trials()
    assert states(study) == ["FAIL", "RUNNING"]
    assert not counts(study.get_trials()[never_begun.number])


def test_what_a_search_changes_for_its_trials(tmp_path: Path) -> None:
    """Groups and keys of a file of one's own in place of tune.yaml, and not what an experiment has otherwise."""
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "held.yaml").write_text("# @package _global_\ndata: {val_size: 700}\n")
    own = [
        "tune",
        {"override optimizer": "adam"},
        {"override scheduler": "step"},
        {"override augment": "shift"},
        "_self_",
    ]
    (tmp_path / "mine.yaml").write_text(json.dumps({"defaults": own, "optimizer": {"lr": 0.002}, "my": {"alpha": 1}}))

    def of_trials(name: str, *typed: str) -> dict[str, Any]:
        place, other = (CONF, tmp_path) if name == "tune" else (tmp_path, CONF)
        with hydra.initialize_config_dir(str(place), version_base="1.3", job_name="test"):
            config = hydra.compose(name, [*typed, f"hydra.searchpath=[file://{other}]"], return_hydra_config=True)
        values = {key: value for key, value in plain_values(config).items() if key not in TUNE_KEYS}
        files = ConfigFiles("train", str(tmp_path))
        given = overrides_of_train([*typed], values, config.hydra.runtime.choices, files)
        return flatten(plain_values(files.compose(given)))

    usual = of_trials("tune")
    assert usual["data.val_size"] == 5000 and usual["trainer.enable_checkpointing"] is False
    assert of_trials("tune", "experiment=held")["data.val_size"] == 700
    assert of_trials("tune", "data.val_size=600")["data.val_size"] == 600
    mine = of_trials("mine", "scheduler.step_size=3")
    assert (mine["optimizer._target_"], mine["optimizer.lr"]) == ("torch.optim.Adam", 0.002)
    assert mine["augment._target_"] and (mine["scheduler.step_size"], mine["my.alpha"]) == (3, 1)
