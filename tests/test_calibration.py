"""Temperature scaling: measured on the validation images, stored with the model, used when it predicts."""

import json
from pathlib import Path

import pytest
import torch
from helpers import results, small

from mnist_lit import UserError, load
from mnist_lit.cli.config import settings
from mnist_lit.evaluate import evaluate
from mnist_lit.model import MNISTClassifier
from mnist_lit.storage import runs
from mnist_lit.train import train
from mnist_lit.training.calibration import BestTemperature


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_the_temperature_of_logits_is_found(temperature: float) -> None:
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(20_000, 10, generator=draw) * 2
    labels = torch.multinomial(logits.softmax(1), 1, generator=draw)[:, 0]
    metric = BestTemperature()
    for batch in torch.arange(len(labels)).split(3000):
        metric.update(logits[batch] * temperature, labels[batch])
    assert float(metric.compute()) == pytest.approx(temperature, rel=0.03)


def test_a_validated_run_predicts_at_the_temperature_of_its_validation(validated_run: Path) -> None:
    found = results(validated_run)
    model, classifier = (
        load(validated_run),
        MNISTClassifier.load_from_checkpoint(validated_run / "checkpoints/best.ckpt").eval(),
    )
    assert model.temperature == pytest.approx(found["val/temperature"]) != 1
    images = torch.rand(20, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = (classifier.network(images) / model.temperature).softmax(1)
        torch.testing.assert_close(model(images), expected)
        torch.testing.assert_close(classifier(images), classifier.network(images).softmax(1))
    assert "as predict gives it" in (validated_run / "report.html").read_text()


def test_the_probabilities_of_a_run_are_better_scaled(tmp_path: Path) -> None:
    """Dropout leaves it too unsure of itself at first."""
    values = settings("train", "data.source=sample", "data.val_size=500", "optimizer=adam", "trainer.max_epochs=1")
    found = train(tmp_path / "run", **values)
    assert found["test/calibration_error_scaled"] < found["test/calibration_error"]
    assert found["val/temperature"] < 1
    again = evaluate(tmp_path / "again", **settings("evaluate", f"ckpt={tmp_path / 'run'}", "data.source=sample"))
    for key in ("test/calibration_error", "test/calibration_error_scaled"):
        assert again[key] == pytest.approx(found[key], abs=1e-6)


def test_without_validation_nothing_is_scaled(good_run: Path) -> None:
    assert load(good_run).temperature == 1
    assert "test/calibration_error_scaled" not in json.loads((good_run / "metrics.json").read_text())


def test_an_impossible_temperature_is_refused(validated_run: Path, tmp_path: Path) -> None:
    checkpoint = torch.load(validated_run / "checkpoints/best.ckpt", weights_only=True)
    for value in (0.0, -1.0, float("nan"), float("inf"), "1"):
        torch.save({**checkpoint, "temperature": value}, tmp_path / "odd.ckpt")
        with pytest.raises(UserError, match="temperature"):
            load(tmp_path / "odd.ckpt")


def test_the_check_before_the_first_epoch_measures_nothing(tmp_path: Path) -> None:
    limits = ["trainer.max_epochs=-1", "trainer.max_steps=2"]  # less than an epoch, so that nothing is validated
    train(tmp_path, **small("data.val_size=200", "trainer.num_sanity_val_steps=1", *limits))
    assert "temperature" not in torch.load(tmp_path / runs.LAST, weights_only=True)
