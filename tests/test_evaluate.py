"""Testing a trained model again, as a function and as a command."""

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import Command
from helpers import ROOT, results
from PIL import Image
from torchvision.datasets import MNIST

from mnist_lit import UserError
from mnist_lit.cli.config import settings
from mnist_lit.cli.data_of_run import with_data_of_run
from mnist_lit.cli.keys import DATA_DIR
from mnist_lit.evaluate import evaluate
from mnist_lit.export import export
from mnist_lit.inference.trained import load
from mnist_lit.reports.scores import scores
from mnist_lit.storage import mnist_files, runs
from mnist_lit.train import train

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


@pytest.fixture
def tiny_mnist(sample: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder with four small files in MNIST's place, which count as MNIST; there is no mirror."""
    folder, known = tmp_path / "project" / "elsewhere", {}
    folder.mkdir(parents=True)
    parts = {"train": (sample.train_images[::20], sample.train_labels[::20])}
    parts["t10k"] = (sample.test_images[::20], sample.test_labels[::20])
    for prefix, (images, labels) in parts.items():
        contents = {
            f"{prefix}-images-idx3-ubyte": struct.pack(">4i", 2051, len(images), 28, 28) + bytes(images.numpy()),
            f"{prefix}-labels-idx1-ubyte": struct.pack(">2i", 2049, len(labels)) + bytes(labels.byte().numpy()),
        }
        for name, content in contents.items():
            (folder / name).write_bytes(content)
            known[name] = len(content), mnist_files.sha256(content)
    monkeypatch.setattr(mnist_files, "RAW_FILES", known)
    monkeypatch.setattr(MNIST, "mirrors", [])
    return folder


QUICKLY = ("data.batch_size=100", "trainer.max_epochs=1", "trainer.accelerator=cpu")


def test_the_runs_own_data_folder_is_tested_on_from_wherever(
    tiny_mnist: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its path in the run is relative to the working directory that the run was started in."""
    monkeypatch.chdir(tiny_mnist.parent)
    train("outputs/run", **settings("train", "data.dir=elsewhere", *QUICKLY))
    there = tmp_path / "project" / "outputs" / "run"
    asked = ["trainer.accelerator=cpu", f"ckpt={there}"]
    for cwd in (tiny_mnist.parent, tmp_path):
        monkeypatch.chdir(cwd)
        found = evaluate(tmp_path / f"in_{cwd.name}", **settings("evaluate", *asked))
        assert found["data"] == results(there)["data"] and found["data"]["name"] == "mnist"
        assert not (cwd / "data").exists()
    of_export = {**settings("export", f"ckpt={there}", "output=x"), "output": tmp_path / "model.safetensors"}
    facts = export(**of_export)
    assert (facts["tested_on"], facts["test_accuracy"]) == ("mnist", f"{results(there)['test/acc']:.4f}")

    assert "not there now" not in caplog.text
    shutil.rmtree(tiny_mnist)
    export(**{**of_export, "output": tmp_path / "2.safetensors"})
    gone = f"{there} had its data in {tiny_mnist}, which is not there now: data.dir= says where they are"
    assert gone in caplog.text and "NOT THE FULL MNIST" in caplog.text  # what was done before, but for this line


def test_a_data_folder_that_is_given_or_of_another_class_is_not_the_runs(tmp_path: Path, monkeypatch) -> None:
    run, own = tmp_path / "run", "mnist_lit.data.MNISTDataModule"
    (run / "checkpoints").mkdir(parents=True)
    (tmp_path / "there").mkdir()
    sections = {"model": {}, "optimizer": {}, "trainer": {}, "data": {"_target_": own, "dir": "there"}}
    monkeypatch.chdir(tmp_path)
    runs.create(run, sections, {"name": "mnist"})
    for folder in (tmp_path, run):
        monkeypatch.chdir(folder)
        for data in ({}, {"_target_": own}):
            assert Path(with_data_of_run(data, run / runs.LAST)["dir"]).absolute() == tmp_path / "there"
    for data in (
        {"_target_": own, "dir": "data"},
        {"_target_": "mnist_lit.mnist_like.MNISTLikeDataModule"},
        {"_target_": "my.Data"},
    ):
        assert with_data_of_run(data, run / runs.LAST) == data
    assert with_data_of_run({}, tmp_path / "elsewhere" / "checkpoints" / "last.ckpt") == {"_target_": own}

    config = run / "config.yaml"
    head, _, rest = config.read_text().split("\n", 2)
    config.write_text(f"{head}\n{rest}")  # of a run before the line was written
    monkeypatch.chdir(tmp_path)
    assert with_data_of_run({}, run / runs.LAST) == {"_target_": own, "dir": "there"}
    for strange in ("# working directory: [1]", "# working directory: {", "[" * 10**4, "x" * 2**20):
        config.write_text(f"{head}\n{strange}\n{rest}")
        assert with_data_of_run({}, run / runs.LAST) in ({"_target_": own, "dir": "there"}, {"_target_": own})
    config.write_text("nothing")
    assert with_data_of_run({}, run / runs.LAST) == {"_target_": own}


def test_without_a_choice_the_runs_own_data_and_metrics_are_taken(tmp_path: Path) -> None:
    """Of other classes than those of conf/evaluate.yaml; a class of somebody else only if it is trusted."""
    folder = tmp_path / "pictures"
    for number in range(20):
        for label in ("a", "b"):
            (folder / label).mkdir(parents=True, exist_ok=True)
            drawing = Image.new("L", (28, 28))
            drawing.paste(255, (4, 4, 8 + number % 9, 24) if label == "a" else (4, 4, 24, 8 + number % 9))
            drawing.save(folder / label / f"{number}.png")
    of_run = ["data=image_folder", f"data.dir={folder}", "metrics=top2", "data.batch_size=10"]
    train(tmp_path / "run", **settings("train", *of_run, "trainer.max_epochs=1", "trainer.accelerator=cpu"))
    names = ["a", "b", *(f"class {n}" for n in range(2, 10))]  # the tutorial's network has ten outputs
    assert [row["name"] for row in results(tmp_path / "run")["test/digits"]] == load(tmp_path / "run").names == names
    here = [f"ckpt={tmp_path / 'run'}", "trainer.accelerator=cpu"]
    found, trained = evaluate(tmp_path / "tested", **settings("evaluate", *here)), results(tmp_path / "run")
    compared = ("data", "test/loss", "test/acc", "test/top2")
    assert {key: found[key] for key in compared} == {key: trained[key] for key in compared}
    assert evaluate(tmp_path / "in_3", **settings("evaluate", *here, "data.batch_size=3"))["data"] == found["data"]
    assert "test/top2" not in evaluate(tmp_path / "bare", **settings("evaluate", *here, "metrics=none"))

    config = tmp_path / "run" / "config.yaml"
    config.write_text(config.read_text().replace("mnist_lit.image_folder.", "antigravity."))
    with pytest.raises(UserError, match=r"names antigravity.ImageFolderDataModule.* add trust=\[antigravity\]"):
        evaluate(tmp_path / "refused", **settings("evaluate", *here))


@pytest.mark.parametrize("verb", ["evaluate", "export"])
def test_only_the_usual_folder_gives_way_to_the_runs(verb: str) -> None:
    required = ["output=x"] * (verb == "export")
    for group in ("mnist", "fashion_mnist"):
        assert "dir" not in settings(verb, f"data={group}", *required)["data"]
        for given in ("data", "elsewhere"):
            assert settings(verb, f"data={group}", f"data.dir={given}", *required)["data"]["dir"] == given
    assert settings("train")["data"]["dir"] == "data"
    for path in (ROOT / "conf" / "data").glob("*.yaml"):
        assert yaml.safe_load(path.read_text())["dir"] == DATA_DIR


def test_a_resumed_run_has_its_data_where_it_was_resumed(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "line\nbreak").mkdir()
    monkeypatch.chdir(tmp_path / "one")
    runs.create(tmp_path, {"seed": 0}, {"name": "mnist"})
    assert runs.working_directory(tmp_path) == tmp_path / "one"
    monkeypatch.chdir(tmp_path / "line\nbreak")
    runs.reopen(tmp_path, {"seed": 0}, {"name": "mnist"})
    assert runs.working_directory(tmp_path) == tmp_path / "line\nbreak"


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


def test_a_link_to_a_checkpoint_has_the_data_of_its_run(finished_run: Path, tmp_path: Path) -> None:
    (tmp_path / "linked.ckpt").symlink_to((finished_run / "checkpoints" / "last.ckpt").absolute())
    through_link, itself = (
        with_data_of_run({}, path) for path in (tmp_path / "linked.ckpt", finished_run / "checkpoints" / "last.ckpt")
    )
    assert through_link == itself != with_data_of_run({}, tmp_path / "none.ckpt")
