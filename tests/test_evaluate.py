"""Testing a trained model again, as a function and as a command."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Command
from helpers import results

from mnist_lit import UserError
from mnist_lit.cli.config import settings
from mnist_lit.evaluate import evaluate
from mnist_lit.inference.trained import load
from mnist_lit.reports.scores import scores
from mnist_lit.storage import runs

ALIKE = ("test/loss", "test/acc", "test/images", "test/calibration_error", "test/digits", "test/confusion_matrix")


def asked(ckpt: Path, *overrides: str) -> dict[str, Any]:
    return settings("evaluate", f"ckpt={ckpt}", "data.source=sample", "trainer.accelerator=cpu", *overrides)


def test_it_finds_what_the_runs_own_test_found(validated_run: Path, tmp_path: Path) -> None:
    found = evaluate(tmp_path, **asked(validated_run, "data.batch_size=100", "trainer.limit_test_batches=2"))
    trained = json.loads((validated_run / "metrics.json").read_text())
    assert {key: found[key] for key in ALIKE} == {key: trained[key] for key in ALIKE}
    assert found["test/images"] == 200
    assert json.loads((tmp_path / "metrics.json").read_text()) == found
    # No config.yaml: this is no run to go on with, and no trained model.
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.json", "report.html"}


def test_every_figure_follows_from_the_networks_answers(finished_run: Path, sample, tmp_path: Path) -> None:
    """Worked out here in another way, over the whole test set in batches that do not divide it."""
    found = evaluate(tmp_path, **asked(finished_run, "data.batch_size=300"))
    with torch.no_grad():
        probabilities = load(finished_run)(sample.test_images.unsqueeze(1) / 255)
    confidence, guess = probabilities.max(1)
    truth = sample.test_labels
    confusion = [[int(((truth == i) & (guess == j)).sum()) for j in range(10)] for i in range(10)]
    assert found["test/confusion_matrix"] == confusion
    assert found["test/acc"] == pytest.approx(sum(confusion[n][n] for n in range(10)) / 1000, abs=1e-7)
    assert found["test/loss"] == pytest.approx(float(-probabilities[range(1000), truth].log().mean()), rel=1e-5)
    for n, row in enumerate(found["test/digits"]):
        right, answered = confusion[n][n], sum(line[n] for line in confusion)
        precision, recall = right / answered if answered else 0.0, right / 100
        assert (row["digit"], row["images"]) == (n, 100)
        assert row["precision"] == pytest.approx(precision, abs=1e-6)
        assert row["recall"] == pytest.approx(recall, abs=1e-6)
        assert row["f1"] == pytest.approx(2 * right / (answered + 100), abs=1e-6)
    ranges, error = (confidence * 15).long(), 0.0
    for n in ranges.unique():
        there = ranges == n
        error += float(abs(confidence[there].mean() - (guess == truth)[there].float().mean()) * there.sum() / 1000)
    assert found["test/calibration_error"] == pytest.approx(error, abs=1e-6)


def test_answers_that_are_no_numbers_do_not_stop_it() -> None:
    assert scores(torch.full((3, 10), float("nan")), torch.tensor([1, 2, 3]))["test/images"] == 3


def test_a_test_that_would_mean_nothing_is_refused(finished_run: Path, tmp_path: Path) -> None:
    content = torch.load(finished_run / runs.LAST, weights_only=True)
    torch.save({**content, "data": [{"name": "mnist"}]}, tmp_path / "full.ckpt")
    with pytest.raises(UserError, match="the sample's test images are training images"):
        evaluate(tmp_path / "results", **asked(tmp_path / "full.ckpt"))


def asked_as_a_command(ckpt: Path) -> list[str]:
    return [f"ckpt={ckpt}", "data.source=sample", "trainer.accelerator=cpu", "data.batch_size=333"]


def test_evaluate_as_a_command(finished_run: Path, tmp_path: Path, command: Command) -> None:
    done = command(*asked_as_a_command(finished_run), cwd=tmp_path, verb="evaluate")
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "outputs").iterdir()
    assert folder.name.endswith("_evaluate")
    names = {path.name for path in folder.iterdir()}
    assert names == {".hydra", "evaluate.log", "metrics.json", "report.html"}
    assert "1,000 images of mnist-sample, NOT THE FULL MNIST" in done.stdout

    refused = command("ckpt=nowhere", cwd=tmp_path, verb="evaluate")
    assert (refused.returncode, refused.stderr) == (1, "evaluate: ckpt=nowhere: there is no such checkpoint or run\n")
    assert len(list((tmp_path / "outputs").iterdir())) == 1


@pytest.mark.slow
def test_evaluate_with_two_processes(finished_run: Path, tmp_path: Path, command: Command) -> None:
    for name, devices in (("one", 1), ("two", 2)):
        arguments = [*asked_as_a_command(finished_run), f"trainer.devices={devices}", f"hydra.run.dir={name}"]
        done = command(*arguments, cwd=tmp_path, verb="evaluate")
        assert done.returncode == 0, done.stderr
    one, two = results(tmp_path / "one"), results(tmp_path / "two")
    assert two["test/loss"] == pytest.approx(one["test/loss"], rel=1e-6)
    for key in ("test/acc", "test/images", "test/digits", "test/confusion_matrix"):
        assert two[key] == one[key]
