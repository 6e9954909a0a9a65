"""The loggers whose packages are not among this project's: each keeps a run here, without its service."""

import importlib.util
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import ROOT, small

import mnist_lit
from mnist_lit import UserError
from mnist_lit.train import train

KEPT = ("optimizer", "max_epochs", "batch_size", "versions", mnist_lit.__version__, "train/acc")


def of_aim(folder: Path) -> str:
    import aim

    index = [str(Path(sys.executable).with_name("aim")), "storage", "--repo", str(folder), "reindex"]
    subprocess.run(index, input="y\n", text=True, check=True)  # as aim up does
    (run,) = aim.Repo(str(folder)).iter_runs()
    return f"{run['hparams']} {[metric.name for metric in run.metrics()]}"


def of_comet(folder: Path) -> str:
    (kept,) = (folder / ".cometml-runs").glob("*.zip")
    return zipfile.ZipFile(kept).read("messages.json").decode()


def of_mlflow(folder: Path) -> str:
    import mlflow

    mlflow.set_tracking_uri(f"sqlite:///{folder}/mlflow.db")
    (run,) = mlflow.search_runs(experiment_names=["mnist_lit"], output_format="list")
    return f"{run.data.params} {run.data.metrics}"


def of_wandb(folder: Path) -> str:
    (kept,) = folder.glob("run/wandb/offline-run-*/run-*.wandb")
    return kept.read_bytes().decode(errors="ignore")


LOGGERS: dict[str, tuple[list[str], Callable[[Path], str]]] = {
    "aim": ([], of_aim),
    "comet": ([], of_comet),
    "mlflow": ([], of_mlflow),
    "wandb": (["logger.wandb.offline=true"], of_wandb),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LOGGERS)
def test_a_logger_keeps_the_whole_configuration_and_the_metrics(name: str, tmp_path: Path) -> None:
    overrides, kept = LOGGERS[name]
    pytest.importorskip({"comet": "comet_ml"}.get(name, name))
    asked = [
        "data.source=sample",
        "trainer.accelerator=cpu",
        "debug=limit",
        "model=mlp",
        f"logger={name}",
        *overrides,
        "hydra.run.dir=run",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "mnist_lit.train", *asked],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "COMET_START_ONLINE": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = kept(tmp_path)
    assert not [each for each in KEPT if each not in found]


@pytest.mark.parametrize(("name", "package"), [("aim", "aim"), ("comet", "comet_ml")])
def test_a_package_that_is_missing_is_named(name: str, package: str, tmp_path: Path) -> None:
    if importlib.util.find_spec(package):
        pytest.skip(f"{package} is installed")
    with pytest.raises(
        UserError, match=rf"logger={name} needs a package that is not installed: pip install {package}$"
    ):
        train(tmp_path, **small(f"logger={name}"))


def test_every_logger_has_been_tried() -> None:
    names = {path.stem for path in (ROOT / "conf" / "logger").glob("*.yaml")}
    assert names == {*LOGGERS, "none", "csv", "tensorboard"}  # test_train.py has these
