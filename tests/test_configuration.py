"""What is refused, with which sentence, and that paths of any name come through."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT

from mnist_lit import UserError
from mnist_lit.cli.configuration import quoted, settings
from mnist_lit.cli.ranges import RANGES

REFUSALS = [
    ("optimizer.lrr=1", "unknown key optimizer.lrr; did you mean optimizer.lr?"),
    ("lr=1", "unknown key lr; did you mean optimizer.lr?"),
    ("data.batchsize=1", "unknown key data.batchsize; did you mean data.batch_size?"),
    ("optimiser=sgd", "unknown key optimiser; did you mean optimizer?"),
    ("+data.dri=x", "unknown key data.dri; did you mean data.dir?"),
    ("+qqq=1", "unknown key qqq (--help shows them all)"),
    ("optimizer=sgdd", "optimizer=sgdd: there is no such choice; there are adadelta, adam, adamw"),
    ("experiment=none", "experiment=none: there is no such choice; there are adam, validated"),
    ("optimizer=sgd optimizer.rho=0.9", "unknown key optimizer.rho (--help shows them all)"),
    ("epochs=3", "unknown key epochs; did you mean trainer.max_epochs?"),
    ("seed=0,1", "seed=0,1: several values are a sweep, which needs -m"),
    ("data.dir=", "data.dir=: must be the name of a folder"),
    ("seed=-1", "seed=-1: must be a whole number from 0 to 4294967295"),
    ("seed=one", "seed=one: must be a whole number"),
    ("seed=null", "seed=None: must be a whole number"),
    ("data.source=web", "data.source=web: must be one of auto, mnist, sample"),
    ("data.batch_size=0", "data.batch_size=0: must be a whole number of at least 1"),
    ("data.batch_size=true", "data.batch_size=True: must be a whole number"),
    ("data.val_size=60000", "data.val_size=60000: must be a whole number from 0 to 59999"),
    ("model.dropout=1", "model.dropout=1: must be a number from 0 to below 1"),
    ("optimizer.lr=fast", "optimizer.lr=fast: must be a number from 0"),
    ("optimizer.lr=nan", "optimizer.lr=nan: must be a number from 0"),
    ("optimizer=adam optimizer.betas=[0.9,1.0]", "optimizer.betas=[0.9, 1.0]: must be two numbers from 0 to below 1"),
    ("optimizer=sgd optimizer.nesterov=1", "optimizer.nesterov=1: must be true or false"),
    ("trainer.max_epochs=0", "trainer.max_epochs=0: must be a whole number of at least 1, or -1 for no limit"),
    ("trainer.max_epochs=1.5", "trainer.max_epochs=1.5: must be a whole number"),
    ("trainer.accelerator=cuad", "trainer.accelerator=cuad: must be one of auto, cpu, gpu"),
    ("trainer.devices=0", "trainer.devices=0: must be a whole number of at least 1"),
    ("trainer.precision=31", "trainer.precision=31: must be one of 32-true"),
    ("trainer.limit_train_batches=1.5", "trainer.limit_train_batches=1.5: must be a whole number"),
    ("trainer.fast_dev_run=maybe", "trainer.fast_dev_run=maybe: must be true or false, or a whole number"),
    ("trainer.enable_checkpointing=3", "trainer.enable_checkpointing=3: must be true or false"),
    ("logger=null", "a group takes the name of one of its files; for none, leave it out"),
    ("optimizer=null", "a group takes the name of one of its files; for none, leave it out"),
    ("+seed=1", "seed exists: leave out the + before it"),
    ("+trainer.fast_dev_run=true", "trainer.fast_dev_run exists: leave out the + before it"),
    ("~seed", "seed is needed: it can be changed, but not taken away"),
    ("~sed", "unknown key sed; did you mean seed?"),
    ("trainer=5", "trainer.accelerator is needed"),
    ("trainer.max_time=60", "trainer.max_time=60: must be DD:HH:MM:SS, such as 00:01:30:00"),
    ("optimizer=sgd,adam optimizer.lrr=1", "optimizer=sgd,adam: several values are a sweep, which needs -m"),
    ("data.dir", "cannot read data.dir: arguments are KEY=VALUE (--help shows the keys)"),
    ("seed=1=2", "cannot read seed=1=2"),
]


@pytest.mark.parametrize(("overrides", "sentence"), REFUSALS)
def test_28_mistakes_are_refused_in_one_sentence(overrides: str, sentence: str) -> None:
    with pytest.raises(UserError) as refusal:
        settings("train", *overrides.split())
    assert str(refusal.value).startswith(sentence)
    assert "\n" not in str(refusal.value)


def test_values_that_people_use_are_accepted() -> None:
    for override in (
        "trainer.accelerator=gpu",
        "trainer.devices=2",
        "trainer.devices=auto",
        "trainer.devices=[0,1]",
        "trainer.devices=-1",
        "trainer.precision=bf16-mixed",
        "trainer.precision=16",
        "trainer.fast_dev_run=3",
        "trainer.limit_train_batches=0.1",
        "trainer.limit_train_batches=10",
        "trainer.max_epochs=-1",
        "trainer.max_time='00:00:01:00'",
        "trainer.gradient_clip_val=0.5",
        "trainer.strategy=ddp",
        "trainer.profiler=simple",
        "trainer.deterministic=true",
        "optimizer.lr=1",
        "optimizer=sgd",
        "logger=tensorboard",
        "logger=[csv,tensorboard]",
        "+trainer.plugins=null",
        "+optimizer.foreach=true",
    ):
        settings("train", override)


def test_every_range_is_of_a_key_that_exists() -> None:
    from mnist_lit.cli.configuration import CONF, flatten

    keys: set[str] = set()
    for optimizer in (path.stem for path in (CONF / "optimizer").glob("*.yaml")):
        keys |= flatten(settings("train", f"optimizer={optimizer}")).keys()
    for verb, *required in (
        ("convert", "source=a", "target=b"),
        ("evaluate",),
        ("tune",),
        ("serve",),
        ("predict", "images=a"),
        ("export", "output=a"),
    ):
        keys |= flatten(settings(verb, *required)).keys()
    assert RANGES.keys() <= keys


@pytest.mark.parametrize(
    "name", ["a b", "a=b", "a,b", "Grüße", "it's", '"', "a'b\\", "\\", "(1)[2]{3}", "#x", "a&b", "1e3", "null", "x~"]
)
def test_paths_of_any_name_come_through(name: str) -> None:
    assert settings("train", f"data.dir={name}")["data"]["dir"] == name


def test_tilde_is_the_home_folder_and_quotes_of_the_users_stay() -> None:
    assert settings("train", "data.dir=~/x")["data"]["dir"] == str(Path.home() / "x")
    assert settings("train", "data.dir='a b'")["data"]["dir"] == "a b"
    assert quoted("seed=~/x") == "seed=~/x"


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


def test_help_shows_every_key_with_its_comment() -> None:
    from mnist_lit.cli.launch import help_text

    text = help_text("train", ["optimizer=sgd"])
    for line in (ROOT / "conf" / "train.yaml").read_text().splitlines():
        assert line in text
    assert "momentum: 0.9" in text and "rho" not in text.replace("through", "")
    assert "dropout: 0.5  # share of the pooled values" in text


@pytest.mark.parametrize("path", sorted((ROOT / "conf").rglob("*.yaml")), ids=lambda path: path.stem)
def test_every_key_has_a_comment(path: Path) -> None:
    if {"hydra", "experiment"} & {*path.relative_to(ROOT).parts}:
        return  # logging formats, and deltas that say at their head why
    for line in path.read_text().splitlines():
        if re.match(r" *\w+: *[^ |]", line) and "hydra" not in line:
            assert "#" in line, line
