"""Resolving ``ckpt=`` and loading a trained network without Lightning."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import ROOT, assert_same

from mnist_lit import UserError
from mnist_lit.cli.latest import resolve
from mnist_lit.cli.resume import find as find_run
from mnist_lit.inference.trained import TrainedModel, find, load
from mnist_lit.model import MNISTClassifier
from mnist_lit.network import TutorialCNN
from mnist_lit.storage import runs
from mnist_lit.storage.provenance import why_not_to_test


def test_a_folder_means_its_best_checkpoint_or_else_its_last(finished_run: Path, validated_run: Path) -> None:
    assert find(finished_run) == finished_run / runs.LAST
    assert find(validated_run) == validated_run / runs.BEST
    assert find(validated_run / runs.LAST) == validated_run / runs.LAST


def test_latest_is_the_newest_run_with_a_checkpoint_jobs_of_sweeps_too(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="there is no trained model in outputs"):
        find(resolve("latest"))
    for age, name in enumerate(("without", "sweep/0", "old")):
        folder = shutil.copytree(finished_run, Path("outputs") / name)
        os.utime(folder / "config.yaml", times=(2e9 - age, 2e9 - age))
    for name in (runs.LAST, runs.PREVIOUS):
        (Path("outputs/without") / name).unlink()
    hydra = Path("outputs/newest_evaluate/.hydra")  # made by Hydra, not a run
    hydra.mkdir(parents=True)
    (hydra / "config.yaml").touch()
    assert find(resolve("latest")) == Path("outputs/sweep/0") / runs.LAST
    # All of these used a few batches only; a run that used all images is preferred.
    assert find_run("latest", Path("outputs")).folder == Path("outputs/without")
    config = Path("outputs/old/config.yaml")
    config.write_text(re.sub("(limit_(train|test)_batches): .*", r"\1: null", config.read_text()))
    os.utime(config, times=(1e9, 1e9))
    assert find(resolve("latest")) == Path("outputs/old") / runs.LAST
    assert find_run("latest", Path("outputs")).folder == Path("outputs/old")
    Path("latest").mkdir()  # a folder of that name takes precedence
    with pytest.raises(UserError, match="ckpt=latest: there is no checkpoint in this folder"):
        find(resolve("latest"))


def test_07_a_damaged_checkpoint_is_refused_and_the_newest_whole_one_named(finished_run: Path, tmp_path: Path) -> None:
    run = shutil.copytree(finished_run, tmp_path / "run")
    content = (run / runs.LAST).read_bytes()
    (run / runs.LAST).write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="damaged") as refused:
        find(run)
    assert str(refused.value).endswith(f"the newest intact one: ckpt={run / runs.PREVIOUS}")
    with pytest.raises(UserError, match="there is no such checkpoint or run"):
        find(tmp_path / "nowhere")


def test_the_network_alone_predicts_as_the_classifier_does(finished_run: Path, sample) -> None:
    images, _ = next(iter(sample.test_dataloader()))
    model = load(finished_run)
    with torch.no_grad():
        expected = MNISTClassifier.load_from_checkpoint(finished_run / runs.LAST).eval()(images)
        assert_same(model(images), expected)
    assert model.trained_on[0]["name"] == "mnist-sample"
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_10_weights_of_another_architecture_are_refused_here_too(finished_run: Path, tmp_path: Path) -> None:
    content = torch.load(finished_run / runs.LAST, weights_only=True)
    content["state_dict"]["network.dense2.weight"] = torch.zeros(10, 128)
    torch.save(content, tmp_path / "other.ckpt")
    with pytest.raises(UserError, match=r"network.dense2.weight \(10, 128\) instead of \(10, 250\)"):
        load(tmp_path / "other.ckpt")


def test_loading_needs_neither_lightning_nor_torchvision(finished_run: Path) -> None:
    code = (
        "import sys; from mnist_lit.inference.trained import load; load(sys.argv[1]); "
        "print([name for name in ('lightning', 'torchvision', 'torchmetrics', 'hydra') if name in sys.modules])"
    )
    found = subprocess.check_output([sys.executable, "-c", code, finished_run], cwd=ROOT, text=True)
    assert found == "[]\n"


def test_names_of_classes_are_nothing_that_a_terminal_would_obey() -> None:
    model = TrainedModel(torch.nn.Identity(), Path("x"), {}, [{"name": "x", "classes": ["\x1b]0;owned\x07", "b"]}])
    assert model.names and model.names[:3] == ["?]0;owned?", "b", "class 2"]


def test_a_model_of_the_full_set_is_not_tested_on_the_sample() -> None:
    full, sample = {"name": "mnist"}, {"name": "mnist-sample"}
    assert "data.source=mnist" in why_not_to_test([sample, full], sample)
    assert not why_not_to_test([sample], sample)
    assert not why_not_to_test([sample, full], full)


def test_a_model_is_not_tested_on_other_classes_of_the_same_kind_of_data() -> None:
    all_ten, two = ({"name": "image_folder", "classes": [*each]} for each in ("0123456789", "37"))
    reason = why_not_to_test([two, all_ten], two)
    assert reason.endswith("those that the model was trained on: 3, 7 instead of 0, 1, 2, 3, 4, 5, 6, 7, 8, 9")
    assert not why_not_to_test([two, all_ten], all_ten)
    # Those of other data are named otherwise: "0 - zero" in QMNIST.
    assert not why_not_to_test([all_ten], {"name": "QMNIST", "classes": ["0 - zero"]})
    assert not why_not_to_test([{"name": "mnist"}], all_ten)


@pytest.mark.parametrize(
    ("classes", "expected"),
    [
        ([str(n) for n in range(10)], True),
        (["0 - zero", "1 - one", *map(str, range(2, 10))], True),
        ([f"{n}_cat" for n in range(10)], False),
        (["cat", *map(str, range(1, 10))], False),
    ],
)
def test_classes_are_digits_only_if_that_is_what_they_are_called(classes: list[str], expected: bool) -> None:
    assert TrainedModel(TutorialCNN(), Path(), {}, [{"name": "own", "classes": classes}]).reads_digits is expected


@pytest.mark.parametrize("ckpt", ["x" * 300, "~nosuchuser/x"])
def test_a_path_that_cannot_be_is_said_in_a_sentence(ckpt: str) -> None:
    with pytest.raises(UserError, match="there is no such checkpoint or run"):
        load(ckpt)
