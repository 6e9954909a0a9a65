"""Whole commands, as a user types them."""

import json
import os
import pty
import re
import subprocess
import sys
import termios
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import Command
from helpers import QUICK, ROOT
from PIL import Image


def test_fast_dev_run_ends_with_the_tutorials_two_lines_in_a_folder_of_any_name(
    tmp_path: Path, command: Command
) -> None:
    done = command(*QUICK, "hydra.run.dir=Läufe, seed=1 (neu)/a", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"loss= \d+\.\d+\naccuracy= [01]\.\d+", "\n".join(done.stdout.splitlines()[-2:]))
    assert "\r" not in done.stdout + done.stderr  # a pipe gets lines, no bar
    folder = tmp_path / "Läufe, seed=1 (neu)" / "a"
    assert json.loads((folder / "metrics.json").read_text())["data"]["name"] == "mnist-sample"
    log = (folder / "train.log").read_text()
    assert log.count("lightning.pytorch") >= 1 and "1,045,576 parameters" in log
    for message in (
        "epoch 1/1",
        "`Trainer.fit` stopped",
    ):  # ours and Lightning's: once on the terminal, once in the log
        assert (done.stdout + done.stderr).count(message) == 1 and log.count(message) == 1

    again = command(*QUICK, "hydra.run.dir=Läufe, seed=1 (neu)/a", cwd=tmp_path)
    assert again.returncode == 1
    assert again.stderr == (
        "train: Läufe, seed=1 (neu)/a already contains a run: choose another hydra.run.dir, or resume it: "
        "resume=Läufe, seed=1 (neu)/a\n"
    )


def test_full_data_from_the_command_line(full_data_dir: str, tmp_path: Path, command: Command) -> None:
    done = command(f"data.dir={full_data_dir}", "trainer.fast_dev_run=true", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "outputs").iterdir()
    assert json.loads((folder / "metrics.json").read_text())["data"]["name"] == "mnist"


def test_a_run_that_is_refused_late_leaves_no_folder(tmp_path: Path, command: Command) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    for arguments, sentence in (
        (["trainer.accelerator=gpu"], "train: trainer.accelerator=gpu"),
        (["data.val_size=4000"], "train: data.val_size=4000: must be from 0 to 3999"),
    ):
        done = command("data.source=sample", *arguments, cwd=tmp_path)
        assert done.returncode == 1 and "Traceback" not in done.stderr
        (line,) = done.stderr.splitlines()
        assert line.startswith(sentence)
        assert not (tmp_path / "outputs").exists() or list((tmp_path / "outputs").iterdir()) == []


def test_27_two_runs_of_the_same_second_get_two_folders(tmp_path: Path) -> None:
    from mnist_lit.storage.runs import claim

    folders = [claim(tmp_path / "outputs" / "2026-01-01_00-00-00") for _ in range(3)]
    assert len(set(folders)) == 3 and all(folder.is_dir() for folder in folders)


@pytest.mark.slow
def test_a_terminal_gets_a_bar_with_loss_accuracy_and_images_per_second(tmp_path: Path) -> None:
    master, slave = pty.openpty()
    termios.tcsetwinsize(slave, (24, 100))
    process = subprocess.Popen(
        [sys.executable, "-m", "mnist_lit.train", *QUICK[:2], "data.batch_size=100", "trainer.max_epochs=1"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=slave,
        stderr=slave,
    )
    os.close(slave)
    shown = b""
    while True:
        try:
            if not (part := os.read(master, 4096)):
                break
        except OSError:  # how Linux says that the other end is closed
            break
        shown += part
    os.close(master)
    text = shown.decode()
    assert process.wait() == 0, text
    assert re.search(r"\repoch 1/1: .*\d+/40 .*loss=\d\.\d{4}, acc=\d\.\d{4}, images/s=\d[\d,]*\]", text), text
    assert len(re.findall(r"^epoch 1/1  train/loss", text.replace("\r", "\n"), re.MULTILINE)) == 1


def test_06_folders_that_cannot_be_made_are_refused(tmp_path: Path, command: Command) -> None:
    (tmp_path / "file").write_text("in the way")
    for arguments in (["hydra.run.dir=file"], ["hydra.run.dir=file/run"], ["-m", "seed=0,1", "hydra.sweep.dir=file"]):
        done = command("data.source=sample", *arguments, cwd=tmp_path)
        assert done.returncode == 1
        assert re.fullmatch(r"train: cannot make the folder file.*: .*\n", done.stderr), done.stderr
    assert command("hydra.run.dir=", cwd=tmp_path).stderr.startswith("train: hydra.run.dir= is empty")


def test_convert_as_a_command(finished_run: Path, tmp_path: Path, command: Command) -> None:
    source = finished_run / "checkpoints" / "last.ckpt"
    done = command(f"source={source}", "target=a model, 1.keras", cwd=tmp_path, verb="convert")
    assert done.returncode == 0, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["a model, 1.keras"]
    refused = command("source=no.keras", "target=model.ckpt", cwd=tmp_path, verb="convert")
    assert (refused.returncode, refused.stderr) == (1, "convert: source=no.keras: no such file\n")


@pytest.mark.slow
def test_the_wheel_carries_conf_and_its_command_runs_from_any_folder(tmp_path: Path) -> None:
    """Built and installed without the network, into an environment that sees the packages of this one."""
    source = _clean_copy(tmp_path)
    (source / "conf" / "local").mkdir()
    (source / "conf" / "local" / "default.yaml").write_text("# @package _global_\ndata: {dir: /of/this/machine}\n")
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "-q",
            "--no-build-isolation",
            "--no-deps",
            "-w",
            tmp_path,
            source,
        ],
        check=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    assert not [name for name in zipfile.ZipFile(wheel).namelist() if "local" in name]
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run(
        [sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-index", wheel], check=True
    )
    (site,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    packages = {str(Path(module.__file__).parents[1]) for module in (torch, pytest) if module.__file__}
    (site / "packages_of_the_test.pth").write_text("\n".join(packages))

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [tmp_path / "venv" / "bin" / "mnist-lit-train", *QUICK],
        cwd=elsewhere,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert [path.name for path in elsewhere.iterdir()] == ["outputs"]
    for verb in ("train", "evaluate", "predict", "export", "convert", "serve"):
        shown = subprocess.check_output(
            [tmp_path / "venv" / "bin" / f"mnist-lit-{verb}", "--help"], cwd=elsewhere, env=environment
        )
        assert b"#" in shown


def _clean_copy(folder: Path) -> Path:
    """The project's sources without what a build would leave in the checkout."""
    import shutil

    copy = folder / "sources"
    copy.mkdir()
    for name in ("mnist_lit", "conf"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    return copy


@pytest.mark.slow
def test_every_verb_as_a_user_types_it(finished_run: Path, digits: tuple[Any, Any], tmp_path: Path) -> None:
    """Started from nothing; serve is so in test_serve.py."""
    Image.fromarray(digits[0][0]).save(tmp_path / "digit.png")
    sample, ckpt = ["data.source=sample", "trainer.accelerator=cpu"], f"ckpt={finished_run}"
    few = ["trainer.max_epochs=1", "trainer.limit_train_batches=1", "~space.data"]
    for verb, arguments, result in (
        ("train", [*QUICK, "hydra.run.dir=run"], "run/metrics.json"),
        ("evaluate", [*sample, ckpt, "hydra.run.dir=test"], "test/report.html"),
        ("predict", ["images=digit.png", ckpt, "output=rows.csv"], "rows.csv"),
        ("export", ["output=model.safetensors", ckpt, "data.source=sample"], "model.safetensors"),
        ("convert", [f"source={finished_run}/checkpoints/last.ckpt", "target=model.keras"], "model.keras"),
        ("tune", [*sample, *few, "n_trials=1", "data.val_size=100"], "outputs/tune/best.yaml"),
    ):
        done = subprocess.run(
            [sys.executable, "-m", f"mnist_lit.{verb}", *arguments],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert list(tmp_path.glob(f"**/{Path(result).name}")), (verb, done.stdout)
        if verb == "train":  # the others may be faster than the second after which it is said
            assert done.stderr.startswith("loading PyTorch and Lightning ...\n"), done.stderr


def test_hydras_own_ways_work(tmp_path: Path, command: Command) -> None:
    shown = command("--cfg", "job", "--package", "optimizer", "optimizer=sgd", cwd=tmp_path)
    assert shown.returncode == 0 and "_target_: torch.optim.SGD" in shown.stdout and "max_epochs" not in shown.stdout
    assert "Config search path" in command("--info", "searchpath", cwd=tmp_path).stdout
    own = tmp_path / "own"
    (own / "experiment").mkdir(parents=True)
    (own / "experiment" / "mine.yaml").write_text("# @package _global_\ntrainer: {max_epochs: 3}\nmy: {alpha: 1}\n")
    (own / "mine.yaml").write_text("defaults: [train, _self_]\nseed: 7\n")
    for arguments in (["--help"], ["--cfg", "job"]):
        shown = command("--config-dir=own", "--config-name=mine", "experiment=mine", *arguments, cwd=tmp_path)
        assert shown.returncode == 0 and "seed: 7" in shown.stdout and "alpha: 1" in shown.stdout, shown.stderr
    assert (
        "accurate, adam, mine, speedrun, speedrun_gpu, validated"
        in command("--config-dir=own", "--help", cwd=tmp_path).stdout
    )
    assert {path.name for path in tmp_path.iterdir()} == {"own"}

    done = command(
        *(*QUICK, "--config-dir=own", "--config-name=mine", "hydra.job.chdir=true", "hydra.verbose=true"),
        *("data.dir=files", "+my.beta=2", "~trainer.detect_anomaly", "hydra.run.dir=run"),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert config["seed"] == 7 and config["my"] == {"beta": 2} and "detect_anomaly" not in config["trainer"]
    assert config["data"]["dir"] == str(tmp_path / "files")  # and not in the run's folder
    assert " DEBUG " in (tmp_path / "run" / "train.log").read_text()


@pytest.mark.parametrize("where", ["import", "missing", "__init__", "forward"])
def test_an_error_in_ones_own_network_shows_where_it_was_raised(where: str, tmp_path: Path, command: Command) -> None:
    (tmp_path / "my_networks.py").write_text(
        {"import": "from torch import no_such_name\n", "missing": "import no_such_package\n"}.get(where, "")
        + "from torch import nn\n\nclass Net(nn.Module):\n"
        "    def __init__(self):\n        super().__init__()\n        self.layer = nn.Linear(784, 10)\n"
        f"        if '{where}' == '__init__': nn.Linear(784, 'ten')\n\n"
        "    def forward(self, images):\n        return self.layer(images.flatten(1)).reshape(3, 3, 3)\n"
    )
    asked = ["model._target_=my_networks.Net", "~model.dropout", "~model.cpu_kernel", "hydra.run.dir=run"]
    done = command(*QUICK, *asked, cwd=tmp_path)
    assert done.returncode == 1
    log = (tmp_path / "run" / "train.log").read_text()
    for text in (done.stderr, log):
        assert "Traceback" in text and 'my_networks.py", line ' in text, text
    assert "Traceback" not in done.stdout


def test_tracebacks_where_they_are_asked_for(tmp_path: Path, command: Command) -> None:
    for arguments, environment in ((["debug=anomaly"], {}), ([], {"HYDRA_FULL_ERROR": "1"})):
        for mistake in ("seed=-1", "optimizer.lr=-1"):
            done = command(*QUICK, mistake, *arguments, cwd=tmp_path, environment=environment)
            assert done.returncode == 1 and "Traceback" in done.stderr and "UserError" in done.stderr, done.stderr
    assert not (tmp_path / "outputs").exists() or list((tmp_path / "outputs").iterdir()) == []
