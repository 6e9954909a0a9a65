"""What is refused, with which sentence, and that paths of any name come through."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import Command
from helpers import OFF, ROOT, small

from mnist_lit import UserError
from mnist_lit.cli import schema
from mnist_lit.cli.config import ConfigFiles, absolute_paths, quoted, settings
from mnist_lit.cli.help import help_text
from mnist_lit.cli.keys import TUNE_KEYS
from mnist_lit.train import train

REFUSALS = [
    ("optimizer.lrr=1", "unknown key optimizer.lrr; did you mean optimizer.lr?"),
    ("lr=1", "unknown key lr; did you mean optimizer.lr?"),
    ("data.batchsize=1", "unknown key data.batchsize; did you mean data.batch_size?"),
    ("optimiser=sgd", "unknown key optimiser; did you mean optimizer?"),
    ("qqq=1", "unknown key qqq (--help shows them all; + adds a new one)"),
    ("optimizer=sgdd", "optimizer=sgdd: there is no such choice; there are adadelta, adam, adamw"),
    (
        "experiment=none",
        "experiment=none: there is no such choice; there are accurate, adam, speedrun, speedrun_gpu, validated",
    ),
    ("optimizer=sgd optimizer.rho=0.9", "unknown key optimizer.rho (--help shows them all"),
    ("optimizer=sgd optimizer.momentm=0.9", "unknown key optimizer.momentm; did you mean optimizer.momentum?"),
    ("epochs=3", "unknown key epochs; did you mean trainer.max_epochs?"),
    ("seed=0,1", "seed=0,1: several values are a sweep, which needs -m"),
    ("data.dir=", "data.dir=: must have at least 1 character"),
    ("seed=-1", "seed=-1: must be greater than or equal to 0"),
    ("seed=one", "seed=one: must be a valid integer"),
    ("seed=null", "seed=None: must be a valid integer"),
    ("data.source=web", "data.source=web: must be 'auto', 'mnist' or 'sample'"),
    ("data.batch_size=0", "data.batch_size=0: must be greater than or equal to 1"),
    ("data.batch_size=true", "data.batch_size=True: must be a valid integer"),
    ("data.val_size=60000", "data.val_size=60000: must be less than 60000"),
    ("checkpoint.every_n_steps=0", "checkpoint.every_n_steps=0: must be greater than or equal to 1"),
    ("float32_matmul_precision=low", "float32_matmul_precision=low: must be 'highest', 'high' or 'medium'"),
    ("debug=all", "debug=all: there is no such choice; there are anomaly, limit, one_batch, overfit, profiler"),
    (
        "debug=true",
        "a group takes the name of one of its files (--help shows them); none switches off those that have it",
    ),
    ("trainer=5", "trainer=5: must be a valid dictionary"),
    (
        "logger=null",
        "a group takes the name of one of its files (--help shows them); none switches off those that have it",
    ),
    (
        "optimizer=null",
        "a group takes the name of one of its files (--help shows them); none switches off those that have it",
    ),
    ("+seed=1", "seed exists already: leave out the +"),
    ("+trainer.fast_dev_run=true", "trainer.fast_dev_run exists already: leave out the +"),
    ("~trainer.profiler", "trainer.profiler is null: there is nothing to delete"),
    ("~sed", "unknown key sed; did you mean seed?"),
    ("optimizer=sgd,adam optimizer.lrr=1", "optimizer=sgd,adam: several values are a sweep, which needs -m"),
    ("scheduler.max_lr=1", "unknown key scheduler.max_lr: scheduler is null; choose one first, scheduler=NAME"),
    ("callbacks.ema.decay=1", "unknown key callbacks.ema.decay: callbacks is null; choose one first, callbacks=NAME"),
    (
        "checkpoint.monitor=val/loss",
        "checkpoint.mode=max: with checkpoint.monitor=val/loss the worst epoch would count",
    ),
    (
        "callbacks=early_stopping callbacks.early_stopping.monitor=val/loss",
        "callbacks.early_stopping.mode=max: with callbacks.early_stopping.monitor=val/loss the worst epoch would count",
    ),
    ("scheduler=plateau scheduler.monitor=val/acc", "scheduler.mode=min: with scheduler.monitor=val/acc the worst"),
    ("resume.x=1", "unknown key resume.x (--help shows them all"),
    ("trainer.accumulate_grad_batches=0", "trainer.accumulate_grad_batches=0: must be greater than or equal to 1"),
    ("trainer.check_val_every_n_epoch=0", "trainer.check_val_every_n_epoch=0: must be greater than or equal to 1"),
    ("trainer.val_check_interval=0", "trainer.val_check_interval=0: must be greater than 0"),
    ("trainer.gradient_clip_val=-1", "trainer.gradient_clip_val=-1: must be greater than or equal to 0"),
    ("data.dir", "cannot read data.dir: arguments are KEY=VALUE (--help shows the keys)"),
    ("seed=1=2", "cannot read seed=1=2"),
]


def test_help_shows_what_an_experiment_chooses() -> None:
    text = help_text("train", ["experiment=adam"])
    assert "# ---- optimizer: adam " in text and "amsgrad" in text
    assert "# ---- optimizer: sgd " in help_text("train", ["experiment=adam", "optimizer=sgd"])


def test_help_shows_what_an_experiment_chooses_that_begins_with_another(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    mine = "# @package _global_\ndefaults: [speedrun, override /loss: none]\n"
    (tmp_path / "experiment" / "mine.yaml").write_text(mine)
    text = help_text("train", ["experiment=mine"], str(tmp_path))
    assert "# ---- scheduler: onecycle " in text and "# ---- loss: none " in text
    composed = ConfigFiles("train", str(tmp_path)).compose(["experiment=mine"])
    assert (
        composed.hydra.runtime.choices["scheduler"] == "onecycle" and composed.hydra.runtime.choices["loss"] == "none"
    )


@pytest.mark.parametrize(("overrides", "sentence"), REFUSALS)
def test_28_mistakes_are_refused_in_one_sentence(overrides: str, sentence: str) -> None:
    with pytest.raises(UserError) as error:
        settings("train", *overrides.split())
    assert str(error.value).startswith(sentence)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("verb", "overrides", "sentence"),
    [
        ("predict", "images=[]", "images=[]: must be"),
        ("predict", "images=a preprocess=x", "preprocess=x: must be 'mnist' or 'none'"),
        ("predict", "images=a +overwrit=true", "unknown key overwrit; did you mean overwrite?"),
        ("serve", "port=70000", "port=70000: must be less than 65536"),
        ("tune", "study=a/b", "study=a/b: must match pattern"),
        ("tune", "sampler=grid", "sampler=grid: must be 'tpe' or 'random'"),
        ("convert", "source=a target=b data_format=x", "data_format=x: must be 'channels_last'"),
        ("evaluate", "data.batch_size=0", "data.batch_size=0: must be greater"),
        ("export", "output=a overwrite=1", "overwrite=1: must be a valid boolean"),
    ],
)
def test_28_mistakes_of_other_verbs_are_refused_in_one_sentence(verb: str, overrides: str, sentence: str) -> None:
    with pytest.raises(UserError) as error:
        settings(verb, *overrides.split())
    assert str(error.value).startswith(sentence)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ("trainer.accelerator=cuad", "trainer: You selected an invalid accelerator name: `accelerator='cuad'`"),
        ("trainer.max_epochs=abc", "trainer.max_epochs=abc: "),
        ("trainer.max_epochs=-2", "trainer: `max_epochs` must be a non-negative integer or -1"),
        ("trainer.devices=0", "trainer: "),
        ("trainer.precision=31", "trainer.precision=31: Precision 31 is invalid. Allowed precision values"),
        ("trainer.limit_train_batches=1.5", "trainer: You have passed invalid value 1.5 for limit_train_batches"),
        ("trainer.fast_dev_run=maybe", "trainer.fast_dev_run=maybe: "),
        ("trainer.log_every_n_steps=abc", "trainer.log_every_n_steps=abc: must be a valid integer"),
        ("trainer.gradient_clip_val=x", "trainer.gradient_clip_val=x: "),
        ("+trainer.no_such_argument=1", "trainer: got an unexpected keyword argument 'no_such_argument'"),
        ("model.dropout=1", "model: dropout must be"),
        ("model.dropout=half", "model.dropout=half: must be a valid number"),
        ("+model.no_such_argument=1", "model: got an unexpected keyword argument 'no_such_argument'"),
        ("optimizer.lr=fast", "optimizer.lr=fast: must be a valid number"),
        ("optimizer.lr=-1", "optimizer: Invalid learning rate: -1"),
        ("optimizer=adam optimizer.betas=[0.9,1.0]", "optimizer: Invalid beta parameter at index 1: 1.0"),
        ("+data.dri=x", "data: got an unexpected keyword argument 'dri'"),
        ("+checkpoint.evry=1", "checkpoint: got an unexpected keyword argument 'evry'"),
        ("data._target_=mnist_lit.data.Nothing", "data._target_=mnist_lit.data.Nothing: no such class"),
        ("data._target_=pathlib.Path", "data._target_=pathlib.Path: not a subclass of lightning"),
        ("logger=csv logger.csv.nme=x", "unknown key logger.csv.nme; did you mean logger.csv.name?"),
    ],
)
def test_28_what_a_class_does_not_take_is_refused_in_one_sentence(
    overrides: str, sentence: str, tmp_path: Path
) -> None:
    """By the class itself, before anything is trained."""
    with pytest.raises(UserError) as error:
        train(tmp_path / "run", **small(*overrides.split()))
    assert str(error.value).startswith(sentence), error.value
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "overrides",
    [
        "trainer.precision=bf16",
        "trainer.check_val_every_n_epoch=null data.val_size=100 trainer.val_check_interval=2",
        "trainer.val_check_interval='00:00:10:00' data.val_size=100",
        "trainer.limit_train_batches=0",
        "trainer.num_sanity_val_steps=null data.val_size=100",
        "~trainer.log_every_n_steps",
        "~optimizer.rho",
        "+optimizer.foreach=true",
        "+my.alpha=1",
    ],
)
def test_what_lightning_and_torch_take_is_taken(overrides: str, tmp_path: Path) -> None:
    train(tmp_path / "run", **small("trainer.max_epochs=1", *overrides.split()))
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert ("my" in config) == overrides.startswith("+my")
    assert (tmp_path / "run" / "metrics.json").exists() and (tmp_path / "run" / "report.html").exists()


def test_values_that_people_use_are_accepted() -> None:
    for override in (
        "trainer.accelerator=gpu",
        "trainer.devices=[0,1]",
        "trainer.max_time='00:00:01:00'",
        "optimizer.lr=1",
        "optimizer=sgd",
        "logger=tensorboard",
        "logger=[csv,tensorboard]",
        "+trainer.plugins=null",
        "+my.section={a: 1}",
    ):
        settings("train", override)


def test_every_key_of_the_schema_is_one_of_the_configuration() -> None:
    for verb, *required in (
        ("train",),
        ("convert", "source=a", "target=b"),
        ("evaluate",),
        ("tune",),
        ("serve",),
        ("runs",),
        ("predict", "images=a"),
        ("export", "output=a"),
    ):
        described = schema.VERBS[verb].__annotations__.keys() - {*OFF}
        described -= {"trust"} if verb == "train" else set()  # for the command line
        if verb == "tune":  # the others are train's
            described -= schema.Train.__annotations__.keys()
            assert described == {*TUNE_KEYS}
        assert described <= settings(verb, *required).keys()
    for section, keys in (("data", schema.Data), ("checkpoint", schema.Checkpoint)):
        assert keys.__annotations__.keys() <= settings("train")[section].keys()


@pytest.mark.parametrize(
    "name", ["a b", "a=b", "a,b", "Grüße", "it's", '"', "a'b\\", "\\", "(1)[2]{3}", "#x", "a&b", "1e3", "null", "x~"]
)
def test_paths_of_any_name_come_through(name: str) -> None:
    assert settings("train", f"data.dir={name}")["data"]["dir"] == name


def test_tilde_is_the_home_folder_and_quotes_of_the_users_stay() -> None:
    assert settings("train", "data.dir=~/x")["data"]["dir"] == str(Path.home() / "x")
    assert settings("train", "data.dir='a b'")["data"]["dir"] == "a b"
    assert quoted("seed=~/x") == "seed=~/x"


def test_in_a_multirun_commas_between_paths_separate_jobs() -> None:
    assert quoted("data.dir=~/a,ä b", multirun=True) == f"data.dir='{Path.home()}/a','ä b'"
    for stays in ("data.dir='a,b','c'", "data.dir=choice(a,b)"):
        assert quoted(stays, multirun=True) == stays
    assert quoted("hydra.sweep.dir=a,b", multirun=True) == quoted("hydra.sweep.dir=a,b") == "hydra.sweep.dir='a,b'"


def test_null_is_no_text_where_a_value_may_be_missing() -> None:
    assert settings("train", "resume=null")["resume"] is None
    assert settings("runs", "where=null", "output=null")["where"] is None
    assert settings("train", "data.dir=null")["data"]["dir"] == "null"


def test_help_shows_each_of_several_files() -> None:
    text = help_text("train", ["callbacks=[early_stopping, ema]"])
    assert "callbacks.EarlyStopping" in text and "callbacks.EMAWeightAveraging" in text


@pytest.mark.parametrize(
    ("verb", "arguments", "sentence"),
    [
        ("train", ["-m", "--cfg", "job"], "Only one of --run, --multirun, --cfg"),
        ("train", ["--resolve"], "The --resolve flag can only be used in conjunction with --cfg"),
        ("evaluate", ["~data", "ckpt=nowhere"], "missing a required argument: 'data'"),
        ("tune", ["~data"], "train has no key data.batch_size"),
        ("tune", ["~checkpoint"], "a search needs the section checkpoint"),
        ("tune", ["~workers", "~storage"], "a search needs storage, workers"),
    ],
)
def test_clashing_flags_and_deleted_sections_take_a_sentence(
    verb: str, arguments: list[str], sentence: str, tmp_path: Path, command: Command
) -> None:
    done = command(*arguments, verb=verb, cwd=tmp_path)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert sentence in done.stderr.splitlines()[-1]


def test_missing_values_are_named() -> None:
    with pytest.raises(UserError, match="source=, target= must be given"):
        settings("convert")


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["optimizer.lrr=1"], ["-m", "optimizer.lrr=1,2"], ["-m", "optimizer=sgd,adam", "optimizer.lrr=1"]],
)
def test_help_and_refusals_answer_at_once_and_leave_nothing(arguments: list[str], tmp_path: Path) -> None:
    code = (
        "import sys, mnist_lit.train\n"
        "try: mnist_lit.train.main()\n"
        "finally: print([m for m in ('torch', 'lightning', 'numpy', 'matplotlib') if m in sys.modules], file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "[]" in done.stderr.splitlines()  # it is these imports that take long: docs/speed.md has the times
    assert "Traceback" not in done.stderr
    assert (done.returncode == 0) == (arguments == ["--help"])
    assert list(tmp_path.iterdir()) == []  # and leave nothing behind


def test_a_machine_can_have_paths_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "local").mkdir()
    (tmp_path / "local" / "default.yaml").write_text("# @package _global_\ndata: {dir: /big/disk}\n")
    files = ConfigFiles("train", str(tmp_path))
    assert files.compose([]).data.dir == "/big/disk" and files.compose(["data.dir=here"]).data.dir == "here"
    assert "dir: /big/disk" in help_text("train", [], str(tmp_path))
    assert "/conf/local/" in (ROOT / ".gitignore").read_text().split()


def test_help_shows_every_key_with_its_comment() -> None:
    text = help_text("train", ["optimizer=sgd"])
    for line in (ROOT / "conf" / "train.yaml").read_text().splitlines():
        assert line in text
    assert "momentum: 0.9" in text and "rho" not in text.replace("through", "")
    assert "dropout: 0.5      # fraction of the pooled values" in text


def test_none_switches_a_group_off_whatever_an_experiment_has_chosen() -> None:
    optional = ("augment", "loss", "scheduler", "metrics", "callbacks", "logger")
    off = [f"{group}=none" for group in optional]
    nothing: dict[str, Any] = {group: {} for group in optional}
    assert settings("train", *off) == settings("train") | nothing
    recipe = settings("train", "experiment=speedrun")
    assert settings("train", "experiment=speedrun", *off) == recipe | nothing
    assert recipe["loss"] and recipe["scheduler"]
    own = {"_target_": "my.Own"}
    assert settings("train", "callbacks=none", "+callbacks.mine._target_=my.Own")["callbacks"] == {"mine": own}
    assert "hydra/job_logging" not in settings("train", "hydra/job_logging=none")


@pytest.mark.parametrize("path", sorted((ROOT / "conf").rglob("*.yaml")), ids=lambda path: path.stem)
def test_every_key_has_a_comment(path: Path) -> None:
    if {"hydra", "experiment", "debug"} & {*path.relative_to(ROOT).parts}:
        return  # logging formats, and deltas that say at their head why
    for line in path.read_text().splitlines():
        if re.match(r" *\w+: *[^ |]", line) and "hydra" not in line:
            assert "#" in line, line


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["optimizer.lr=${seed_}"], "train: Interpolation key 'seed_' not found"),
        (
            ["--config-name=mine", "--config-dir=own", "optimizer.lrr=1"],
            "train: unknown key optimizer.lrr; did you mean",
        ),
        (["--config-dir=own", "experiment=many"], "train: hydra.mode=MULTIRUN: a sweep needs -m on the command line"),
        (["data=fashion_mnist", "data.batch_size=0"], "train: data.batch_size=0: must be greater than or equal to 1"),
        (["trainer.num_nodes=two"], "train: trainer.num_nodes=two: "),
    ],
)
def test_28_what_is_refused_leaves_no_folder(
    arguments: list[str], sentence: str, tmp_path: Path, command: Command
) -> None:
    (tmp_path / "own" / "experiment").mkdir(parents=True)
    (tmp_path / "own" / "mine.yaml").write_text("defaults: [train, _self_]\n")
    many = "# @package _global_\nhydra: {mode: MULTIRUN, sweeper: {params: {seed: '0,1'}}}\n"
    (tmp_path / "own" / "experiment" / "many.yaml").write_text(many)
    done = command(*arguments, cwd=tmp_path)
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith(sentence), done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["own"] or not [*tmp_path.glob("outputs/*")]


def test_help_shows_the_file_that_is_taken(tmp_path: Path) -> None:
    (tmp_path / "optimizer").mkdir()
    (tmp_path / "optimizer" / "adam.yaml").write_text("_target_: torch.optim.Adam\nlr: 0.12345\n")
    assert "0.12345" not in help_text("train", ["optimizer=adam"], str(tmp_path))


@pytest.mark.slow
def test_a_run_that_a_callback_refuses_is_no_run(tmp_path: Path, command: Command) -> None:
    small = ["data.source=sample", "trainer.accelerator=cpu", "trainer.limit_train_batches=2", "trainer.max_epochs=1"]
    done = command(*small, "callbacks=lr_monitor", "hydra.run.dir=r", cwd=tmp_path)
    assert done.returncode == 1 and "LearningRateMonitor" in done.stderr and not (tmp_path / "r").exists(), done


@pytest.mark.parametrize(
    ("storage", "absolute"),
    [
        ("sqlite:///outputs/tune.db", "sqlite:////there/outputs/tune.db"),
        ("sqlite:////elsewhere/tune.db", "sqlite:////elsewhere/tune.db"),
        ("postgresql://host/tune", "postgresql://host/tune"),
    ],
)
def test_a_database_stays_where_it_is_when_the_directory_changes(storage: str, absolute: str) -> None:
    assert absolute_paths({"storage": storage}, "/there") == {"storage": absolute}
