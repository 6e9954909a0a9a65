"""MNISTClassifier: probabilities outside, honest metrics, checkpoints that load anywhere."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from helpers import assert_same
from torch import nn
from torchmetrics import MeanMetric

from mnist_lit import UserError
from mnist_lit.cli.config import settings
from mnist_lit.data import MNISTDataModule
from mnist_lit.model import TUTORIAL_MODEL, TUTORIAL_OPTIMIZER, MNISTClassifier


def quiet_trainer(**arguments) -> L.Trainer:
    return L.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **arguments,
    )


def test_it_gives_probabilities(sample) -> None:
    images, _ = next(iter(sample.test_dataloader()))
    classifier = MNISTClassifier().eval()
    probabilities = classifier(images)
    torch.testing.assert_close(probabilities, torch.softmax(classifier.network(images), dim=1))
    torch.testing.assert_close(probabilities.sum(dim=1), torch.ones(500))
    predicted = quiet_trainer().predict(classifier, sample)
    assert predicted is not None
    torch.testing.assert_close(predicted[0], probabilities)


def test_defaults_are_those_of_the_yaml() -> None:
    tutorial = settings("train")
    assert tutorial["model"] == {**TUTORIAL_MODEL, "compile": False}
    assert tutorial["optimizer"] == TUTORIAL_OPTIMIZER
    optimizer = MNISTClassifier().configure_optimizers()
    assert type(optimizer) is torch.optim.Adadelta
    assert [optimizer.defaults[key] for key in ("lr", "rho", "eps")] == [1.0, 0.95, 1e-7]


class Mine(MNISTClassifier):
    """A subclass with arguments of the same names, as LightningCLI makes them, and one of its own."""

    def __init__(self, model: Any = None, optimizer: Any = None, twice: bool = False) -> None:
        super().__init__({**TUTORIAL_MODEL, "compile": True} if twice else model, optimizer)


@pytest.mark.parametrize("twice", [False, True])
def test_a_subclass_keeps_the_defaults(twice: bool) -> None:
    assert dict(Mine(twice=twice).hparams) == dict(MNISTClassifier().hparams)


def test_test_metrics_are_means_over_all_test_images(sample) -> None:
    torch.manual_seed(0)
    classifier = MNISTClassifier()
    data = MNISTDataModule(source="sample", batch_size=300)  # 300, 300, 300, 100
    (measured,) = quiet_trainer().test(classifier, data, verbose=False)
    images, labels = (torch.cat(parts) for parts in zip(*sample.test_dataloader(), strict=True))
    with torch.no_grad():
        logits = classifier.eval().network(images)
    assert measured["test/loss"] == pytest.approx(nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)
    assert measured["test/acc"] == pytest.approx((logits.argmax(1) == labels).float().mean().item(), abs=1e-7)


def test_running_metrics_are_those_that_the_epoch_will_end_with(sample) -> None:
    classifier = MNISTClassifier()
    seen = {}

    class Look(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
            seen.update(pl_module.stage_metrics("train").compute_locally())
            if batch_idx == 0:  # in the second epoch, too: the first one's values are gone
                assert seen["loss"] == pytest.approx(outputs["loss"].item(), rel=1e-6)

    trainer = quiet_trainer(max_epochs=2, limit_train_batches=3, limit_val_batches=0, callbacks=[Look()])
    trainer.fit(classifier, datamodule=MNISTDataModule(source="sample"))
    assert len(seen) == 2
    for name, value in seen.items():
        assert trainer.callback_metrics[f"train/{name}"].item() == pytest.approx(value, rel=1e-6)


def test_training_sees_every_image_once_an_epoch_and_in_another_order_in_the_next() -> None:
    seen: list[list[bytes]] = [[], []]

    class Look(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
            seen[trainer.current_epoch] += [bytes(image.numpy()) for image in batch[0]]

    data = MNISTDataModule(source="sample")
    trainer = quiet_trainer(max_epochs=2, limit_val_batches=0, callbacks=[Look()])
    trainer.fit(MNISTClassifier(), datamodule=data)
    everything = sorted(bytes(image.numpy()) for images, _ in data.train_dataloader() for image in images)
    assert sorted(seen[0]) == sorted(seen[1]) == everything
    assert seen[0] != seen[1]


def test_a_nan_loss_shows_in_the_epochs_mean() -> None:
    classifier = MNISTClassifier()
    loss = classifier.metrics.get_submodule("train_metrics.loss")
    assert isinstance(loss, MeanMetric)
    loss.update(torch.tensor(1.0).expand(2))
    loss.update(torch.tensor(float("nan")).expand(2))
    assert loss.compute().isnan()


def test_checkpoint_loads_with_weights_only_and_says_what_it_was_trained_on(finished_run: Path) -> None:
    path = finished_run / "checkpoints" / "last.ckpt"
    content = torch.load(path, weights_only=True)
    (facts,) = content["data"]
    assert facts["name"] == "mnist-sample" and len(facts["sha256"]) == 64
    assert content["hyper_parameters"] == {
        "model": TUTORIAL_MODEL,
        "optimizer": TUTORIAL_OPTIMIZER,
        "scheduler": None,
    }
    classifier = MNISTClassifier.load_from_checkpoint(path)
    assert classifier.trained_on == content["data"]
    for name, value in classifier.state_dict().items():
        assert_same(value, content["state_dict"][name])


@pytest.fixture
def claims_full_data(finished_run: Path, tmp_path: Path) -> Path:
    """A checkpoint that says that its weights were trained on the full MNIST."""
    content = torch.load(finished_run / "checkpoints" / "last.ckpt", weights_only=True)
    content["data"] = [{**content["data"][0], "name": "mnist"}]
    torch.save(content, tmp_path / "full.ckpt")
    return tmp_path / "full.ckpt"


def test_a_model_of_the_sample_is_scored_on_the_sample(finished_run: Path) -> None:
    classifier = MNISTClassifier.load_from_checkpoint(finished_run / "checkpoints" / "last.ckpt")
    quiet_trainer(limit_test_batches=1).test(classifier, MNISTDataModule(source="sample"), verbose=False)


def test_a_model_of_the_full_data_is_never_scored_on_the_samples_test_digits(claims_full_data: Path, sample) -> None:
    classifier = MNISTClassifier.load_from_checkpoint(claims_full_data)
    for data in (MNISTDataModule(source="sample"), sample.test_dataloader(), [sample.test_dataloader()]):
        with pytest.raises(UserError, match=r"other data than the sample \(mnist\)"):
            quiet_trainer(limit_test_batches=1).test(classifier, data, verbose=False)


def test_training_on_the_sample_does_not_wash_the_full_data_off(claims_full_data: Path) -> None:
    classifier = MNISTClassifier.load_from_checkpoint(claims_full_data)
    data, trainer = MNISTDataModule(source="sample"), quiet_trainer(max_steps=1, limit_val_batches=0)
    trainer.fit(classifier, data)
    assert [facts["name"] for facts in classifier.trained_on] == ["mnist", "mnist-sample"]
    with pytest.raises(UserError, match="other data than the sample"):
        trainer.test(classifier, data)


def test_weights_of_unknown_origin_are_not_scored_on_the_sample(claims_full_data: Path) -> None:
    content = torch.load(claims_full_data, weights_only=True)
    del content["data"]
    torch.save(content, claims_full_data)
    classifier = MNISTClassifier.load_from_checkpoint(claims_full_data)
    with pytest.raises(UserError, match=r"other data than the sample \(unknown\)"):
        quiet_trainer().test(classifier, MNISTDataModule(source="sample"))


class Outer:
    class Net(nn.Linear):
        def __init__(self) -> None:
            super().__init__(784, 10)


def test_a_class_can_be_inside_another_class() -> None:
    assert type(MNISTClassifier({"_target_": f"{__name__}.Outer.Net"}).network) is Outer.Net


@pytest.mark.parametrize(
    ("model", "optimizer", "sentence"),
    [
        ({"_target_": "mnist_lit.network.Nothing"}, None, "no such class"),
        ({"_target_": "no_such_module.Net"}, None, "no such class"),
        ({"_target_": "Net"}, None, "no such class"),
        ({"_target_": "..Net"}, None, "no such class"),
        ({"_target_": "mnist_lit.network.TutorialCNN.Inner"}, None, "no such class"),
        ({"dropout": 0.5}, None, "model has no _target_, so no class"),
        ({"_target_": "pathlib.Path"}, None, "not a subclass of torch.nn.modules.module.Module"),
        ({**TUTORIAL_MODEL, "droput": 0.1}, None, "model: .*droput"),
        (None, {"_target_": "torch.optim.Adamm", "lr": 1.0}, "no such class"),
        (None, {"_target_": "torch.optim.lr_scheduler", "lr": 1.0}, "not a subclass of torch.optim"),
        (None, {"_target_": "torch.optim.SGD", "rho": 1.0}, "optimizer: .*rho"),
        (None, {"_target_": "torch.optim.Adadelta", "lr": -1.0}, "optimizer: Invalid learning rate"),
    ],
)
def test_classes_and_arguments_that_do_not_exist_are_refused(model, optimizer, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        MNISTClassifier(model, optimizer)
