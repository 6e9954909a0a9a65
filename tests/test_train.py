"""The verb as a function: what a run leaves behind, and that the same seed gives the same bits."""

import csv
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import lightning as L
import pytest
import torch
import yaml
from helpers import OFF, ROOT, assert_same, differences, small

from mnist_lit import UserError
from mnist_lit.reports.results import training_results
from mnist_lit.train import train
from mnist_lit.training import harness

CHECKPOINTS = ("checkpoints/last.ckpt", "checkpoints/previous.ckpt")


def weights(folder: Path, name: str = "last") -> dict[str, torch.Tensor]:
    return torch.load(folder / "checkpoints" / f"{name}.ckpt", weights_only=True)["state_dict"]


def test_a_run_leaves_everything_in_one_folder(finished_run: Path) -> None:
    found = {str(path.relative_to(finished_run)) for path in finished_run.rglob("*") if path.is_file()}
    assert found == {"config.yaml", "metrics.csv", "metrics.json", "learning_curve.png", "report.html", *CHECKPOINTS}
    assert (finished_run / "learning_curve.png").read_bytes().startswith(b"\x89PNG")


def test_metrics_json_has_the_results_and_where_they_come_from(finished_run: Path) -> None:
    results = json.loads((finished_run / "metrics.json").read_text())
    for key in ("test/loss", "test/acc", "train/loss", "train/acc", "fit_seconds"):
        assert isinstance(results[key], float)
    assert len(results["epoch_seconds"]) == 2 and sum(results["epoch_seconds"]) < results["fit_seconds"]
    assert results["test_seconds"] > 0
    assert results["data"]["name"] == "mnist-sample" and len(results["data"]["sha256"]) == 64
    assert results["seed"] == 0 and results["versions"]["torch"] == torch.__version__.split("+")[0]
    assert 2e8 < results["peak_memory_bytes"] < 2e9


def test_metrics_csv_has_a_row_an_epoch_that_agrees_with_the_results(finished_run: Path) -> None:
    rows = list(csv.DictReader((finished_run / "metrics.csv").open()))
    results = json.loads((finished_run / "metrics.json").read_text())
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert float(rows[-1]["train/loss"]) == results["train/loss"]
    assert [float(row["epoch_seconds"]) for row in rows] == results["epoch_seconds"]
    images = 3 * small()["data"]["batch_size"]
    for row in rows:
        assert float(row["images_per_second"]) == pytest.approx(images / float(row["epoch_seconds"]))
    assert {(row["data"], row["data_sha256"]) for row in rows} == {("mnist-sample", results["data"]["sha256"])}


def test_config_yaml_has_every_value_and_the_data(finished_run: Path) -> None:
    text = (finished_run / "config.yaml").read_text()
    assert yaml.safe_load(text) | {"resume": None} == {
        **small(),
        **dict.fromkeys(OFF),
    }
    assert text.startswith("# data: mnist-sample, sha256 ")


def test_same_seed_same_bits_another_seed_others(finished_run: Path, tmp_path: Path) -> None:
    train(tmp_path / "again", **small())
    train(tmp_path / "other", **small("seed=1"))
    assert_same(weights(finished_run), weights(tmp_path / "again"))
    assert [*differences(weights(finished_run), weights(tmp_path / "other"))]


def test_with_a_validation_split_the_best_weights_are_tested(validated_run: Path) -> None:
    from mnist_lit.data import MNISTDataModule
    from mnist_lit.model import MNISTClassifier

    rows = list(csv.DictReader((validated_run / "metrics.csv").open()))
    results = json.loads((validated_run / "metrics.json").read_text())
    accuracies = [float(row["val/acc"]) for row in rows]
    best = accuracies.index(max(accuracies)) + 1
    assert results["tested_weights"] == f"best (epoch {best})"
    assert results["val/acc"] == max(accuracies)
    assert [*differences(weights(validated_run, "best"), weights(validated_run, "last"))]

    data = MNISTDataModule(source="sample", batch_size=100)
    data.setup()
    scores = {}
    for name in ("best", "last"):
        path = validated_run / "checkpoints" / f"{name}.ckpt"
        classifier = MNISTClassifier.load_from_checkpoint(path, map_location="cpu").eval()
        losses = []
        with torch.no_grad():
            for (images, labels), _ in zip(data.test_dataloader(), range(2), strict=False):
                losses.append(torch.nn.functional.cross_entropy(classifier.network(images), labels).item())
        scores[name] = sum(losses) / 2
    assert results["test/loss"] == pytest.approx(scores["best"], rel=1e-5)
    assert results["test/loss"] != pytest.approx(scores["last"], rel=1e-5)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["trainer.limit_test_batches=0.01"], r"selects no batch \(there are 10\)"),
        (["trainer.limit_train_batches=0.001"], r"selects no batch \(there are 40\)"),
        (["data.val_size=300", "trainer.limit_val_batches=0.1"], r"selects no batch \(there are 3\)"),
        (["data.val_size=300", "trainer.val_check_interval=500"], "an epoch has only 3 batches"),
        (["trainer.devices=64"], "must divide equally among the 64 processes"),
        (["trainer.accelerator=mps"], "trainer.accelerator=mps"),
        (["trainer.accelerator=tpu"], "trainer.accelerator=tpu"),
        (["trainer.devices=2", "data.batch_size=99"], "must divide equally among the 2 processes"),
        (["trainer.devices=2", "data.val_size=199"], "must divide equally among the 2 processes"),
        (["trainer.strategy=ddpp"], "trainer: .*ddpp"),
        (["+trainer.foo=1"], "trainer: .*foo"),
    ],
)
def test_28_29_what_machine_and_data_do_not_allow_is_refused_before_any_work(
    overrides: list[str], sentence: str, tmp_path: Path
) -> None:
    if "mps" in overrides[0] and torch.backends.mps.is_available():
        pytest.skip("there is such a device here")
    with pytest.raises(UserError, match=sentence):
        train(tmp_path / "run", **small(*overrides))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "override",
    [
        "trainer.overfit_batches=2",
        "trainer.max_steps=4",
        "trainer.max_time='00:00:00:01'",
        "trainer.accumulate_grad_batches=2",
        "trainer.gradient_clip_val=0.5",
        "trainer.deterministic=true",
        "trainer.precision=bf16-mixed",
        "trainer.precision=64-true",
        "trainer.profiler=simple",
        "trainer.detect_anomaly=true",
        "trainer.val_check_interval=2",
        "trainer.check_val_every_n_epoch=2",
        "trainer.num_sanity_val_steps=1",
        "trainer.limit_val_batches=0",
    ],
)
def test_flags_that_people_use_work(override: str, tmp_path: Path) -> None:
    results = train(tmp_path / "run", **small("data.val_size=40", "data.batch_size=20", override))
    rows = list(csv.DictReader((tmp_path / "run" / "metrics.csv").open()))
    assert len(rows) == results["epochs"] == len(results["epoch_seconds"]) > 0
    assert 0 < results["test/loss"] < 10


def test_the_validation_in_the_results_is_that_of_the_tested_weights(tmp_path: Path) -> None:
    steps = ["trainer.limit_train_batches=20", "trainer.val_check_interval=5", "trainer.max_epochs=3"]
    results = train(tmp_path / "run", **small("data.val_size=200", *steps))
    best = torch.load(tmp_path / "run" / "checkpoints" / "best.ckpt", weights_only=True)
    assert results["val/acc"] == best["callbacks"]["Checkpoints"]["best"]["val/acc"]


def test_27_a_folder_that_holds_a_run_is_refused_and_kept(finished_run: Path) -> None:
    before = {path: path.read_bytes() for path in finished_run.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="holds a run already"):
        train(finished_run, **small("seed=5"))
    assert before == {path: path.read_bytes() for path in finished_run.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "conf" / "optimizer").glob("*.yaml")))
def test_every_optimizer_file_trains(name: str, tmp_path: Path) -> None:
    results = train(tmp_path / "run", **small(f"optimizer={name}", "trainer.fast_dev_run=true"))
    assert results["test/loss"] < 5


def test_null_is_lightnings_default_and_writes_checkpoints(tmp_path: Path) -> None:
    train(tmp_path / "run", **small("trainer.enable_checkpointing=null"))
    assert (tmp_path / "run" / CHECKPOINTS[0]).exists()


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "conf" / "experiment").glob("*.yaml")))
def test_every_experiment_file_trains(name: str, tmp_path: Path) -> None:
    assert small(f"experiment={name}") != small()
    asked = [f"experiment={name}", "data.val_size=100", "trainer.fast_dev_run=true"]
    if name == "speedrun_gpu":
        with pytest.raises(UserError, match=r"needs trainer\.accelerator=gpu"):
            train(tmp_path / "cpu", **small(*asked))
        asked += ["trainer.accelerator=gpu"] if torch.cuda.is_available() else ["callbacks=none"]
    assert train(tmp_path / "run", **small(*asked))["test/loss"] < 5


def test_csv_and_tensorboard_loggers_write_offline(tmp_path: Path) -> None:
    train(tmp_path / "run", **small("logger=[csv,tensorboard]", "trainer.log_every_n_steps=1"))
    rows = list(csv.DictReader((tmp_path / "run" / "csv" / "metrics.csv").open()))
    assert any(row["train/loss"] for row in rows) and any(row["test/acc"] for row in rows)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert {"train/loss", "train/acc", "test/loss", "test/acc"} <= set(events.Tags()["scalars"])
    assert "data_sha256: 3efc61a6" in (tmp_path / "run" / "csv" / "hparams.yaml").read_text()
    assert "data_sha256: 3efc61a6" in (tmp_path / "run" / "tensorboard" / "hparams.yaml").read_text()


def test_a_logger_that_is_not_installed_says_what_to_install(tmp_path: Path, monkeypatch) -> None:
    import lightning.pytorch.loggers.wandb as module

    monkeypatch.setattr(module, "_WANDB_AVAILABLE", False)
    with pytest.raises(UserError, match="pip install wandb"):
        train(tmp_path / "run", **small("logger=wandb"))
    assert not (tmp_path / "run").exists()


def test_a_missing_package_is_not_blamed_on_the_accelerator(tmp_path: Path, monkeypatch) -> None:
    import lightning.pytorch.loggers.wandb as module

    monkeypatch.setattr(module, "_WANDB_AVAILABLE", False)
    config = small("logger=wandb")
    with pytest.raises(UserError, match=r"^logger=wandb needs a package that is not installed: pip install wandb$"):
        harness.build_trainer(tmp_path, {**config["trainer"], "accelerator": "gpu"}, config["logger"], [], None)


def test_a_class_that_there_is_not_is_no_missing_package(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no_such_module") as refused:
        train(tmp_path / "run", **small("+callbacks.mine._target_=no_such_module.Callback"))
    assert "pip install" not in str(refused.value)


def test_what_a_callback_needs_is_named_and_the_folder_stays_free(tmp_path: Path, monkeypatch) -> None:
    import lightning.pytorch.callbacks.device_stats_monitor as module
    from lightning.pytorch.accelerators import cpu

    for each in (cpu, module):
        monkeypatch.setattr(each, "_PSUTIL_AVAILABLE", False)
    with pytest.raises(UserError, match="psutil"):
        train(tmp_path / "run", **small("callbacks=device_stats", "logger=csv"))
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_without_checkpoints_the_final_weights_are_tested(tmp_path: Path) -> None:
    results = train(tmp_path / "run", **small("data.val_size=200", "trainer.enable_checkpointing=false"))
    assert results["tested_weights"] == "final" and not (tmp_path / "run" / "checkpoints").exists()


def test_epoch_seconds_leave_out_validation(tmp_path: Path, monkeypatch) -> None:
    import time

    from mnist_lit.model import MNISTClassifier

    monkeypatch.setattr(MNISTClassifier, "on_validation_epoch_start", lambda self: time.sleep(0.4))
    results = train(tmp_path / "run", **small("data.val_size=200", "trainer.val_check_interval=1"))
    assert results["fit_seconds"] > 6 * 0.4  # three validations in each of two epochs
    assert sum(results["epoch_seconds"]) <= results["fit_seconds"] - 6 * 0.4


def test_callbacks_of_the_users_own_come_beside_those_of_the_run(tmp_path: Path) -> None:
    stopper = (
        "{_target_: lightning.pytorch.callbacks.EarlyStopping, monitor: val/acc, mode: max, stopping_threshold: 0.0}"
    )
    results = train(tmp_path / "run", **small("data.val_size=100", f"+trainer.callbacks=[{stopper}]"))
    assert results["epochs"] == 1 and results["test/images"] == 200
    assert (tmp_path / "run" / CHECKPOINTS[0]).exists()


class Precision(L.Callback):
    """What torch's precision of matrix products was while the run trained and tested."""

    found: ClassVar[list[str]] = []

    def on_train_start(self, *_: Any) -> None:
        self.found.append(torch.get_float32_matmul_precision())

    def on_test_start(self, *_: Any) -> None:
        self.found.append(torch.get_float32_matmul_precision())


def test_the_precision_of_matrix_products_is_torchs_and_only_that_runs(tmp_path: Path) -> None:
    values = small("float32_matmul_precision=medium")
    values["trainer"]["callbacks"] = [{"_target_": f"{__name__}.Precision"}]
    train(tmp_path, **values)
    assert Precision.found == ["medium", "medium"] and torch.get_float32_matmul_precision() == "highest"
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["float32_matmul_precision"] == "medium"


def test_a_metric_that_is_nan_does_not_cost_the_results() -> None:
    nans = [{"epoch": epoch, "val/acc": float("nan"), "val/loss": float(epoch)} for epoch in (1, 2)]
    recorder = SimpleNamespace(
        history=[{"epoch": 2, "epoch_seconds": 1.0}], validations=nans, fit_seconds=1, test_seconds=1
    )
    checkpoints = SimpleNamespace(best={"epoch": 2, "val/acc": float("nan")}, best_path=Path("best.ckpt"))
    found = training_results(recorder, checkpoints)
    assert found["tested_weights"] == "best (epoch 2)" and found["val/loss"] == 2.0


def test_several_processes_do_not_validate_by_their_own_clocks(sample: Any) -> None:
    trainer: Any = SimpleNamespace(world_size=2, callbacks=[])
    with pytest.raises(UserError, match="the clocks of several processes differ"):
        harness.prepare_data(trainer, sample, {"val_check_interval": "00:00:00:30"})
