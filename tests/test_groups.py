"""Every option of the groups ``scheduler``, ``callbacks`` and ``logger`` trains, and goes on exactly where it stopped."""

import csv
import itertools
import math
import os
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from helpers import ROOT, assert_same, final, small
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy
from torchmetrics.functional import classification as functional

from mnist_lit import UserError
from mnist_lit.cli.config import settings
from mnist_lit.cli.keys import RUN_LENGTH_KEYS
from mnist_lit.cli.resume import Run, continued, find
from mnist_lit.data import MNISTDataModule
from mnist_lit.evaluate import evaluate
from mnist_lit.inference.trained import load, load_for_pictures
from mnist_lit.metrics import StageMetrics
from mnist_lit.model import MNISTClassifier
from mnist_lit.schedulers import LENGTHS
from mnist_lit.storage import runs
from mnist_lit.train import train
from mnist_lit.training.harness import build_module, build_trainer


def options(group: str) -> list[str]:
    """The files of a group but ``none``."""
    return sorted({path.stem for path in (ROOT / "conf" / group).glob("*.yaml")} - {"none"})


CALLBACKS = options("callbacks")


class Killed(BaseException):
    pass


class KillAt(L.Callback):
    """Ends a run after a number of steps, before there is a checkpoint of the last one."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            raise Killed


def killed_and_resumed(folder: Path, step: int, *overrides: str) -> Any:
    """What a run ends with that was killed after ``step`` steps and resumed from its last checkpoint."""
    values = small(*overrides)
    killer = {"_target_": f"{__name__}.KillAt", "step": step}
    with pytest.raises(Killed):
        train(folder, **{**values, "trainer": {**values["trainer"], "callbacks": [killer]}})
    train(folder, **{**values, "resume": str(find(str(folder)).start)})
    return final(folder)


@pytest.mark.parametrize(
    ("name", "overrides", "rate"),
    [
        ("cosine", [], 0.0),
        ("onecycle", [], 0.0608929698),
        ("warmup_cosine", [], 0.0),
        ("warmup_cosine", ["scheduler.interval=epoch", "scheduler.warmup=0"], 0.0),
        ("step", ["scheduler.step_size=1"], 0.125),
        ("plateau", ["scheduler.patience=0", "+scheduler.threshold=0.9"], 0.25),  # nothing is an improvement
    ],
)
def test_a_scheduler_ends_with_its_rate_and_resumes_exactly(
    name: str, overrides: list[str], rate: float, tmp_path: Path
) -> None:
    overrides = [f"scheduler={name}", *overrides, "data.val_size=100", "trainer.max_epochs=3"]
    train(tmp_path / "whole", **small(*overrides))
    content = torch.load(tmp_path / "whole" / runs.LAST, weights_only=True)
    (found,) = {group["lr"] for group in content["optimizer_states"][0]["param_groups"]}
    assert found == pytest.approx(rate, abs=1e-9)
    # From the end of the first epoch, and of the second; from within the second, and the third.
    for step, every in ((4, 1000), (8, 1000), (5, 4), (8, 7)):
        resumed = killed_and_resumed(
            tmp_path / f"{step} {every}", step, *overrides, f"checkpoint.every_n_steps={every}"
        )
        assert_same(resumed, final(tmp_path / "whole"))


def test_the_command_line_knows_which_schedules_are_as_long_as_the_run() -> None:
    assert {f"scheduler.{key}" for key in LENGTHS} == set(RUN_LENGTH_KEYS)


def test_every_scheduler_has_been_tried() -> None:
    assert options("scheduler") == ["cosine", "onecycle", "plateau", "step", "warmup_cosine"]


def test_the_rate_of_every_step(tmp_path: Path) -> None:
    overrides = ["scheduler=warmup_cosine", "scheduler.warmup=0.5", "callbacks=lr_monitor", "logger=csv"]
    train(tmp_path, **small(*overrides, "trainer.log_every_n_steps=1", "trainer.max_epochs=2"))
    with (tmp_path / "csv" / "metrics.csv").open() as file:
        rates = [float(row["lr-Adadelta"]) for row in csv.DictReader(file) if row["lr-Adadelta"]]
    assert rates == pytest.approx(
        [1 / 3, 2 / 3, 1.0, *((1 + math.cos(math.pi * k / 4)) / 2 for k in (1, 2, 3))], abs=1e-6
    )


@pytest.mark.parametrize("name", [name for name in CALLBACKS if name != "cuda_graphs"])  # test_cuda_graphs.py has it
def test_a_callback_of_the_group_trains(name: str, tmp_path: Path) -> None:
    overrides = [f"callbacks={name}", "data.val_size=100", "logger=csv", "trainer.log_every_n_steps=1"]
    overrides += ["callbacks.throughput.window_size=2"] if name == "throughput" else []
    train(tmp_path / "whole", **small(*overrides))
    with (tmp_path / "whole" / "csv" / "metrics.csv").open() as file:
        logged = set(csv.DictReader(file).fieldnames or ())
    of_callbacks = {
        "lr_monitor": "lr-Adadelta",
        "throughput": "train/device/samples_per_sec",
        "device_stats": "DeviceStatsMonitor.on_train_batch_start/cpu_percent",
    }
    assert of_callbacks.get(name, "val/acc") in logged
    if name in ("early_stopping", "ema", "swa"):  # those that have a state
        assert_same(killed_and_resumed(tmp_path / "killed", 5, *overrides), final(tmp_path / "whole"))
        overrides += ["trainer.max_epochs=4", "checkpoint.every_n_steps=1"]
        train(tmp_path / "longer", **small(*overrides))
        for step in (10, 11):  # within the fourth epoch, in which SWA averages
            assert_same(killed_and_resumed(tmp_path / str(step), step, *overrides), final(tmp_path / "longer"))


@pytest.mark.parametrize(
    ("name", "parameters"), [("mlp", 203_530), pytest.param("resnet18", 11_172_810, marks=pytest.mark.slow)]
)
def test_a_model_of_the_group_trains_resumes_and_is_loaded(name: str, parameters: int, tmp_path: Path) -> None:
    overrides = [f"model={name}", "optimizer=sgd", "data.batch_size=10"]
    train(tmp_path / "whole", **small(*overrides))
    model = load(tmp_path / "whole")
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    torch.testing.assert_close(model(torch.rand(2, 1, 28, 28)).sum(1), torch.ones(2))
    assert_same(killed_and_resumed(tmp_path / "killed", 4, *overrides), final(tmp_path / "whole"))


@pytest.mark.slow
def test_a_compiled_network_trains_resumes_and_is_loaded(tmp_path: Path) -> None:
    torch._dynamo.utils.counters.clear()
    train(tmp_path / "whole", **small("model=mlp", "model.compile=true"))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert_same(
        killed_and_resumed(tmp_path / "killed", 4, "model=mlp", "model.compile=true"), final(tmp_path / "whole")
    )
    content = torch.load(tmp_path / "whole" / runs.LAST, weights_only=True)
    assert "compile" not in content["hyper_parameters"]["model"]
    images = torch.rand(2, 1, 28, 28)
    network = load(tmp_path / "whole").network
    model = small("model=mlp", "model.compile=true")["model"]
    again = MNISTClassifier.load_from_checkpoint(tmp_path / "whole" / runs.LAST, model=model).eval()
    torch.testing.assert_close(again(images), network(images).softmax(1))


AUGMENTATIONS = options("augment")


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_an_augmentation_of_the_group_trains_and_resumes_exactly(name: str, tmp_path: Path) -> None:
    overrides = [f"augment={name}", "model=mlp", "checkpoint.every_n_steps=1"]
    train(tmp_path / "whole", **small(*overrides))
    plain = train(tmp_path / "plain", **small("model=mlp"))
    assert final(tmp_path / "whole")[-1]["train/loss"] != plain["train/loss"]
    assert_same(killed_and_resumed(tmp_path / "killed", 5, *overrides), final(tmp_path / "whole"))
    assert load(tmp_path / "whole").network  # by a checkpoint that says nothing of it
    content = torch.load(tmp_path / "whole" / runs.LAST, weights_only=True)
    assert "augment" not in str(content["hyper_parameters"]) + str(content["state_dict"].keys())


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_an_augmentation_changes_each_image_by_itself_and_keeps_what_it_shows(
    name: str, sample: MNISTDataModule
) -> None:
    augment = build_module("augment", settings("train", f"augment={name}")["augment"])
    assert augment
    images = sample.test_images[:1].float().reshape(1, 1, 28, 28).expand(50, -1, -1, -1) / 255
    torch.manual_seed(0)
    first, second = augment(images), augment(images)
    torch.manual_seed(0)
    assert torch.equal(augment(images), first) and not torch.equal(first, second)
    assert len(first.flatten(1).unique(dim=0)) == 50 and first.min() >= 0 and first.max() <= 1
    ink = first.sum((1, 2, 3)) / images.sum((1, 2, 3))
    few, much = ink.quantile(torch.tensor([0.1, 0.9]))
    assert few > 0.7 and much < 1.4 and abs(ink.mean() - 1) < 0.1
    x = torch.arange(28.0)
    places = (first * x).sum((1, 2, 3)) / first.sum((1, 2, 3)) - (images * x).sum((1, 2, 3)) / images.sum((1, 2, 3))
    assert 0.5 < places.abs().max() < 6  # moved, and not out of sight


@pytest.mark.parametrize("name", options("loss"))
def test_a_loss_of_the_group_is_what_training_minimizes_and_resumes_exactly(name: str, tmp_path: Path) -> None:
    overrides = [f"loss={name}", "model=mlp", "data.val_size=100"]
    found = train(tmp_path / "whole", **small(*overrides))
    assert_same(killed_and_resumed(tmp_path / "killed", 5, *overrides), final(tmp_path / "whole"))
    content = torch.load(tmp_path / "whole" / runs.LAST, weights_only=True)
    assert "loss" not in str(content["hyper_parameters"]) + str(content["state_dict"].keys())

    images, labels = torch.rand(5, 1, 28, 28), torch.arange(5)
    of_config = build_module("loss", settings("train", f"loss={name}")["loss"])
    assert of_config
    classifier = MNISTClassifier(loss=of_config).eval()
    logits = classifier.network(images)
    plain = torch.nn.functional.cross_entropy(logits, labels)
    smoothed = 0.9 * plain - 0.1 * logits.log_softmax(1).mean()
    assert classifier.training_step((images, labels), 0).item() == pytest.approx(smoothed.item(), rel=1e-5)
    classifier.validation_step((images, labels), 0)
    assert classifier.stage_metrics("val").compute()["loss"] == pytest.approx(plain.item(), rel=1e-5)
    assert found["train/loss"] != train(tmp_path / "plain", **small("model=mlp", "data.val_size=100"))["train/loss"]


class WeightedLoss(torch.nn.CrossEntropyLoss):
    """With a buffer, which checkpoints have."""

    def __init__(self, weights: list[float]) -> None:
        super().__init__(torch.tensor(weights))


def test_a_network_trained_with_a_loss_that_has_buffers_resumes_and_is_loaded(tmp_path: Path) -> None:
    loss = {"_target_": f"{__name__}.WeightedLoss", "weights": [1.0] * 5 + [2.0] * 5}
    train(tmp_path, **{**small("model=mlp"), "loss": loss})
    assert "loss.weight" in torch.load(tmp_path / runs.LAST, weights_only=True)["state_dict"]
    weights = MNISTClassifier.load_from_checkpoint(tmp_path / runs.LAST).network.state_dict()
    assert_same(weights, load(tmp_path).network.state_dict())
    assert evaluate(tmp_path / "tested", **settings("evaluate", f"ckpt={tmp_path}", "trainer.accelerator=cpu"))


def test_only_training_images_are_augmented(tmp_path: Path) -> None:
    values = small("model=mlp", "augment=shift", "augment.translate=[1.0,1.0]", "trainer.max_epochs=1")
    shifted = train(tmp_path / "shifted", **values)
    model = load(tmp_path / "shifted")
    data = MNISTDataModule(source="sample", batch_size=100)
    data.prepare_data()
    data.setup()
    correct = [
        (model(images).argmax(1) == labels).float().mean().item()
        for images, labels in itertools.islice(data.test_dataloader(), 2)
    ]
    assert shifted["test/acc"] == pytest.approx(sum(correct) / 2)


METRICS: dict[str, Any] = {
    "f1": functional.multiclass_f1_score,
    "top2": partial(functional.multiclass_accuracy, top_k=2, average="micro"),
    "auroc": partial(functional.multiclass_auroc, thresholds=200),
}


def test_metrics_of_the_group_are_torchmetrics_and_are_everywhere(tmp_path: Path) -> None:
    assert options("metrics") == sorted(METRICS)
    chosen = [f"metrics=[{','.join(METRICS)}]", "checkpoint.monitor=val/f1", "logger=csv"]
    stops = ["callbacks=early_stopping", "callbacks.early_stopping.monitor=val/top2"]
    overrides = ["model=mlp", "optimizer=adam", "data.val_size=500", "checkpoint.every_n_steps=1", *chosen]
    values = small(*overrides, *stops, "trainer.limit_test_batches=1.0")
    found = train(tmp_path / "run", **values)
    data = MNISTDataModule(source="sample", batch_size=1000)
    data.setup()
    images, labels = next(iter(data.test_dataloader()))
    probabilities = load(tmp_path / "run").network(images).softmax(1)  # not scaled, as in any test
    for name, function in METRICS.items():
        assert found[f"test/{name}"] == pytest.approx(float(function(probabilities, labels, num_classes=10)), abs=1e-6)
    for file in ("metrics.csv", "csv/metrics.csv"):
        with (tmp_path / "run" / file).open() as lines:
            columns = csv.DictReader(lines).fieldnames or ()
        assert {f"{stage}/{name}" for stage in ("train", "val") for name in METRICS} <= {*columns}
    page = (tmp_path / "run" / "report.html").read_text()
    assert f"<dt>test auroc</dt><dd>{found['test/auroc']:.4f}</dd>" in page
    best = torch.load(tmp_path / "run" / runs.BEST, weights_only=True)["recorded"]["validations"][-1]
    assert best["val/f1"] == found["val/f1"] == max(row["val/f1"] for row in validations(tmp_path / "run"))
    again = evaluate(
        tmp_path / "again",
        ckpt=tmp_path / "run",
        **{key: values[key] for key in ("data", "metrics")},
        trainer={"_target_": "lightning.Trainer", "accelerator": "cpu"},
    )
    assert again["test/f1"] == found["test/f1"]


def test_metrics_are_resumed_exactly_within_an_epoch(tmp_path: Path) -> None:
    overrides = ["model=mlp", "metrics=[f1,auroc]", "checkpoint.every_n_steps=1", "data.val_size=100"]
    train(tmp_path / "whole", **small(*overrides))
    assert_same(killed_and_resumed(tmp_path / "killed", 5, *overrides), final(tmp_path / "whole"))


def validations(folder: Path) -> list[dict[str, float]]:
    found: list[dict[str, float]] = torch.load(folder / runs.LAST, weights_only=True)["recorded"]["validations"]
    return found


class LogsAnother(L.Callback):
    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        pl_module.log("val/place", float(trainer.current_epoch == 0))


def test_the_best_epoch_by_what_a_callback_logs(tmp_path: Path) -> None:
    values = small("model=mlp", "data.val_size=100", "checkpoint.monitor=val/place")
    values["callbacks"] = {"mine": {"_target_": f"{__name__}.LogsAnother"}}
    found = train(tmp_path, **values)
    assert found["tested_weights"] == "best (epoch 1)" and found["val/place"] == 1.0
    assert ",val/place," in (tmp_path / "metrics.csv").read_text()  # where a search looks for it


@pytest.mark.parametrize("mode", ["max", "min"])
def test_the_best_epoch_is_that_of_the_metric_that_is_monitored(mode: str, tmp_path: Path) -> None:
    wild = ["model=mlp", "optimizer=sgd", "optimizer.lr=20", "data.val_size=100", "trainer.max_epochs=4", "metrics=f1"]
    found = train(tmp_path, **small(*wild, "checkpoint.monitor=val/f1", f"checkpoint.mode={mode}"))
    scores = [row["val/f1"] for row in validations(tmp_path)]
    assert found["val/f1"] == {"max": max, "min": min}[mode](scores)
    assert found["tested_weights"] == f"best (epoch {scores.index(found['val/f1']) + 1})"
    assert scores.index(min(scores)) != scores.index(max(scores))


def test_more_processes_than_cores_are_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cores = os.cpu_count() or 1
    arguments = {**settings("train")["trainer"], "accelerator": "cpu", "devices": cores + 1, "strategy": "ddp"}
    trainer = build_trainer(tmp_path, arguments, None, [], MNISTDataModule(source="sample"))
    assert trainer.world_size == cores + 1
    assert f"{cores + 1} processes share {cores} CPU cores" in caplog.text


def test_a_network_for_five_classes_reads_no_digits(tmp_path: Path) -> None:
    values = small("model=mlp", "trainer.max_epochs=1", "trainer.limit_test_batches=1")
    classifier = MNISTClassifier({**values["model"], "classes": 5})
    trainer = L.Trainer(max_steps=0, logger=False, enable_checkpointing=False, default_root_dir=tmp_path)
    trainer.strategy.connect(classifier)
    trainer.save_checkpoint(tmp_path / "five.ckpt", weights_only=True)
    with pytest.raises(UserError, match=r"model for data of another kind \(.*5 classes instead of ten"):
        load_for_pictures(tmp_path / "five.ckpt")


def test_a_schedule_over_the_whole_run_does_not_get_longer() -> None:
    values = settings("train", "scheduler=cosine")
    longer = {**values, "trainer": {**values["trainer"], "max_epochs": 20}}
    run = Run(Path("run"), Path("run"), values)
    with pytest.raises(UserError, match=r"scheduler\.T_max=null: its schedule spans the whole run"):
        continued(run, longer, {"trainer.max_epochs"})
    averaging = settings("train", "callbacks=swa")
    longer = {**averaging, "trainer": {**averaging["trainer"], "max_epochs": 20}}
    with pytest.raises(UserError, match=r"callbacks\.swa\.swa_epoch_start=0\.75: averaging begins at this fraction"):
        continued(Run(Path("run"), Path("run"), averaging), longer, {"trainer.max_epochs"})
    with_time = {**values, "trainer": {**values["trainer"], "max_time": "00:01:00:00"}}
    assert (
        continued(Run(Path("run"), Path("run"), with_time), values, {"trainer.max_time"})["trainer"]["max_time"] is None
    )
    values["scheduler"]["T_max"] = 100
    assert continued(run, longer, {"trainer.max_epochs"})["trainer"]["max_epochs"] == 20


def test_several_callbacks_one_of_them_switched_off(tmp_path: Path) -> None:
    chosen = settings("train", "callbacks=[early_stopping,ema]", "callbacks.early_stopping=null")["callbacks"]
    assert chosen.keys() == {"early_stopping", "ema"} and chosen["early_stopping"] is None
    train(tmp_path, **{**small("data.val_size=100"), "callbacks": chosen})
    names = torch.load(tmp_path / runs.LAST, weights_only=True)["callbacks"]
    assert [name for name in names if "EMA" in name] and not [name for name in names if "EarlyStopping" in name]


def test_averaged_weights_are_validated_saved_and_tested(tmp_path: Path) -> None:
    overrides = [
        "callbacks=ema",
        "callbacks.ema.decay=0.9",
        "data.val_size=100",
        "trainer.max_epochs=2",
        "optimizer=adam",
    ]
    tested = train(tmp_path / "run", **small(*overrides))
    asked = settings("evaluate", f"ckpt={tmp_path / 'run'}", "data.source=sample", "trainer.accelerator=cpu")
    asked["trainer"]["limit_test_batches"] = small()["trainer"]["limit_test_batches"]
    asked["data"]["batch_size"] = small()["data"]["batch_size"]
    again = evaluate(tmp_path / "again", **asked)
    assert again["test/loss"] == pytest.approx(tested["test/loss"], rel=1e-6)


def test_of_two_callbacks_of_a_class_each_needs_what_it_monitors(tmp_path: Path) -> None:
    other = "{_target_: lightning.pytorch.callbacks.EarlyStopping, monitor: train/loss}"
    with pytest.raises(UserError, match="EarlyStopping monitors val/acc, and there is no validation split"):
        train(tmp_path, **small("callbacks=early_stopping", f"+callbacks.other={other}"))


@pytest.mark.parametrize("override", ["scheduler.frequency=0", "scheduler.frequency=1.5", "scheduler.interval=batch"])
def test_how_often_a_schedule_is_stepped_is_checked(override: str) -> None:
    with pytest.raises(UserError, match=rf"^{override}: must be"):
        settings("train", "scheduler=cosine", override)


def test_early_stopping_says_why(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    overrides = ["callbacks=early_stopping", "+callbacks.early_stopping.stopping_threshold=0.0", "data.val_size=100"]
    with caplog.at_level("INFO"):
        assert train(tmp_path, **small(*overrides))["epochs"] == 1
    assert [record for record in caplog.messages if record.startswith("stopped early: ")]


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["callbacks=early_stopping"], "callbacks: EarlyStopping monitors val/acc, and there is no validation split"),
        (
            ["callbacks=early_stopping", "callbacks.early_stopping.monitor=val/accc", "data.val_size=100"],
            "Early stopping conditioned on metric `val/accc` which is not available",
        ),
        (["scheduler=plateau"], "scheduler monitors val/loss, and there is no validation split: set data.val_size"),
        (["callbacks=lr_monitor"], "no logger"),
        (["scheduler=step", "scheduler.gamma=high"], r"scheduler\.gamma=high: must be a valid number"),
        (["scheduler=step", "+scheduler.speed=1"], "scheduler: .*speed"),
        (
            ["scheduler=cosine", "trainer.max_epochs=-1", "trainer.max_time=00:00:00:01"],
            r"scheduler\.T_max=null: the schedule has no end to reach",
        ),
        (
            ["scheduler=cosine", "scheduler.frequency=2"],
            r"scheduler\.T_max=null: the schedule is not stepped at every step",
        ),
        (["scheduler=onecycle", "optimizer._target_=torch.optim.Adam"], "optimizer.lr"),
        (["scheduler._target_=torch.optim.SGD", "scheduler=step"], "not a subclass of torch.optim.lr_scheduler"),
        (["callbacks=ema", "callbacks.ema.decay=much"], r"callbacks\.ema\.decay=much"),
        (["+callbacks._target_=my.Callback"], r"callbacks: an entry has a name, .*mine: \{_target_: my.Callback"),
        (["+logger._target_=my.Logger"], r"logger: an entry has a name, .*mine: \{_target_: my.Logger"),
        (["metrics=f1", "metrics.f1.average=most"], r"metrics\.f1.*average"),
        (["metrics=auroc", "metrics.auroc.thresholds=null"], r"metrics\.auroc: it would keep every prediction"),
        (["+metrics.acc={_target_: torchmetrics.MeanMetric}"], r"metrics\.acc: acc is a reserved name"),
        (
            ["data.val_size=100", "checkpoint.monitor=val/f1"],
            r"monitor=val/f1: there is no such metric; there are val/acc, val/loss",
        ),
        (["augment=affine", "+augment.angle=3"], "augment: .*angle"),
        (["callbacks=throughput"], "Throughput only writes to loggers"),
        (
            ["experiment=speedrun", "trainer.precision=bf16-mixed", "trainer.gradient_clip_val=1"],
            "Adam, does not allow for gradient clipping",
        ),
        (["augment=affine", "augment._target_=torch.optim.SGD"], "not a subclass of torch.nn"),
    ],
)
def test_what_does_not_fit_is_one_sentence(overrides: list[str], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=sentence):
        train(tmp_path, **small(*overrides))


@pytest.mark.parametrize(
    ("name", "shorter", "epochs", "steps"),
    [
        ("one_batch", [], 1, None),
        ("overfit", ["trainer.max_epochs=2"], 2, 6),
        ("limit", [], 2, 6),
        ("profiler", [], 1, 8),
        ("anomaly", ["trainer.max_epochs=1"], 1, 8),
    ],
)
def test_a_way_to_find_mistakes_trains(
    name: str, shorter: list[str], epochs: int, steps: int | None, tmp_path: Path
) -> None:
    quick = ["data.source=sample", "trainer.accelerator=cpu", "model=mlp", f"debug={name}", *shorter]
    assert train(tmp_path, **settings("train", *quick))["epochs"] == epochs
    checkpoint = tmp_path / runs.LAST
    assert checkpoint.exists() == (steps is not None)
    assert steps is None or torch.load(checkpoint, weights_only=True)["global_step"] == steps


class Both(Metric):
    """Wraps another metric, and has a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = MulticlassAccuracy(10, average="micro")
        self.register_buffer("weight", torch.ones(()))

    def update(self, logits: torch.Tensor, labels: torch.Tensor) -> None:
        self.inner.update(logits, labels)

    def compute(self) -> torch.Tensor:
        return self.inner.compute() * self.get_buffer("weight")

    def reset(self) -> None:
        super().reset()
        self.inner.reset()


def test_a_metric_made_of_others_is_resumed_exactly_within_an_epoch(tmp_path: Path) -> None:
    values = small("model=mlp", "optimizer=adam", "checkpoint.every_n_steps=1", "data.val_size=100")
    values["metrics"] = {"both": {"_target_": f"{__name__}.Both"}}
    found = train(tmp_path / "whole", **values)
    assert found["train/both"] == pytest.approx(found["train/acc"])
    killer = {"_target_": f"{__name__}.KillAt", "step": 5}
    with pytest.raises(Killed):
        train(tmp_path / "killed", **{**values, "trainer": {**values["trainer"], "callbacks": [killer]}})
    resumed = train(tmp_path / "killed", **{**values, "resume": str(find(str(tmp_path / "killed")).start)})
    assert resumed["train/both"] == found["train/both"]


def test_a_metric_of_several_values_is_refused_by_its_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"metrics\.f1: gives no single number"):
        train(tmp_path / "f1", **small("model=mlp", "metrics=f1", "metrics.f1.average=none"))
    roc = {"_target_": "torchmetrics.classification.MulticlassROC", "num_classes": 10, "thresholds": 5}
    with pytest.raises(UserError, match=r"metrics\.roc: gives no single number"):
        train(tmp_path / "roc", **{**small("model=mlp"), "metrics": {"roc": roc}})


def test_accumulation_that_changes_by_epoch_is_resumed_within_one(tmp_path: Path) -> None:
    values = small("model=mlp", "optimizer=adam", "checkpoint.every_n_steps=1")
    target = "lightning.pytorch.callbacks.GradientAccumulationScheduler"
    values["callbacks"] = {"accumulation": {"_target_": target, "scheduling": {0: 1, 1: 2}}}
    train(tmp_path / "whole", **values)
    killer = {"_target_": f"{__name__}.KillAt", "step": 4}  # within the second epoch
    with pytest.raises(Killed):
        train(tmp_path / "killed", **{**values, "trainer": {**values["trainer"], "callbacks": [killer]}})
    train(tmp_path / "killed", **{**values, "resume": str(find(str(tmp_path / "killed")).start)})
    assert_same(final(tmp_path / "killed"), final(tmp_path / "whole"))


def test_in_half_precision_the_sums_of_an_epoch_stay_as_they_are() -> None:
    metrics = StageMetrics()
    metrics.to(torch.bfloat16)
    for _ in range(400):
        metrics.add(torch.tensor(0.04, dtype=torch.bfloat16), torch.zeros(160, 10), torch.zeros(160, dtype=torch.long))
    assert metrics.compute()["loss"] == pytest.approx(0.04, rel=0.01)
    metrics.to(torch.float64)
    assert metrics["loss"].mean_value.dtype == torch.float64


def test_a_schedule_that_is_stepped_seldom_ends_with_the_run(tmp_path: Path) -> None:
    train(
        tmp_path,
        **small(
            "model=mlp", "scheduler=cosine", "scheduler.interval=epoch", "scheduler.frequency=2", "trainer.max_epochs=4"
        ),
    )
    state = torch.load(tmp_path / runs.LAST, weights_only=True)
    assert state["optimizer_states"][0]["param_groups"][0]["lr"] == pytest.approx(0)
