"""A user's own ``LightningDataModule``: other sizes, channels and classes, through everything that has a meaning there."""

import csv
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import own_data
import pytest
import torch
from helpers import ROOT, assert_same, final, results
from PIL import Image
from test_groups import Killed

from mnist_lit import UserError
from mnist_lit.build import instantiate
from mnist_lit.cli.config import settings
from mnist_lit.data import MNISTDataModule
from mnist_lit.evaluate import evaluate
from mnist_lit.export import export
from mnist_lit.predict import predict
from mnist_lit.serve import serve
from mnist_lit.storage import runs
from mnist_lit.train import train


def asked(*overrides: str, verb: str = "train") -> dict[str, Any]:
    return settings(verb, *own_data.ASKED[:: 2 if verb == "evaluate" else 1], *overrides)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("own") / "run"
    train(folder, **asked("trainer.max_epochs=3", "optimizer.lr=0.1"))
    return folder


def test_it_trains_validates_tests_and_has_a_report(trained: Path) -> None:
    found = results(trained)
    assert found["data"] == {"name": "own_data.Patches"} and found["test/images"] == 200
    assert len(found["test/digits"]) == len(found["test/confusion_matrix"]) == 5
    assert found["test/acc"] > 0.3 and found["tested_weights"].startswith("best")
    with (trained / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 and {row["data"] for row in rows} == {"own_data.Patches"} and rows[0]["val/acc"]
    page = (trained / "report.html").read_text()
    assert "own_data.Patches" in page and 'alt="test image' in page
    assert torch.load(trained / runs.LAST, weights_only=True)["data"] == [{"name": "own_data.Patches"}]


def test_its_keys_are_those_of_the_class_and_what_is_typed() -> None:
    assert asked("+data.size=100")["data"] == {"_target_": "own_data.Patches", "size": 100}
    assert asked()["model"] == {"_target_": "own_data.Net"}
    assert asked("optimizer._target_=torch.optim.SGD", "optimizer.lr=0.1")["optimizer"] == {
        "_target_": "torch.optim.SGD",
        "lr": 0.1,
    }


def test_a_schedule_does_not_refer_to_a_class_that_is_replaced() -> None:
    with pytest.raises(UserError, match=r"optimizer\.lr"):
        asked("optimizer._target_=torch.optim.Adam", "scheduler=onecycle")
    values = asked("optimizer._target_=torch.optim.Adam", "optimizer.lr=0.002", "scheduler=onecycle")
    assert values["scheduler"]["max_lr"] == 0.002


def test_it_resumes_for_more_epochs(trained: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(trained, tmp_path / "run")
    values = asked("trainer.max_epochs=4", "optimizer.lr=0.1")
    assert train(folder, **{**values, "resume": str(folder / runs.LAST)})["epochs"] == 4


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_that_was_killed_goes_on_exactly_from_the_end_of_an_epoch(workers: int, tmp_path: Path) -> None:
    """The order of the images is the sampler's, which draws from PyTorch's global generator."""
    values = asked("trainer.max_epochs=3", "optimizer.lr=0.1", f"+data.workers={workers}")
    trained, tmp_path = tmp_path / "whole", tmp_path / "killed"
    train(trained, **values)
    killer = {"_target_": "test_groups.KillAt", "step": 10}  # in the third epoch of four steps
    with pytest.raises(Killed):
        train(tmp_path, **{**values, "trainer": {**values["trainer"], "callbacks": [killer]}})
    train(tmp_path, **{**values, "resume": str(tmp_path / runs.LAST)})
    assert_same(final(tmp_path), final(trained))


def test_it_is_evaluated(trained: Path, tmp_path: Path) -> None:
    evaluate(tmp_path, **asked(f"ckpt={trained}", "trust=[own_data]", verb="evaluate"))
    assert results(tmp_path)["test/acc"] == results(trained)["test/acc"]
    assert json.loads((tmp_path / "metrics.json").read_text())["trained_on"] == [{"name": "own_data.Patches"}]


@pytest.mark.parametrize("suffix", ["onnx", "pt2", "safetensors"])
def test_it_is_exported_and_verified_on_its_own_test_images(suffix: str, trained: Path, tmp_path: Path) -> None:
    path = tmp_path / f"model.{suffix}"
    facts = export(path, trained, {"_target_": "own_data.Patches"}, trust=["own_data"])
    assert facts["tested_on"] == "own_data.Patches"
    assert float(facts["test_accuracy"]) == pytest.approx(results(trained)["test/acc"], abs=1e-4)
    if suffix == "onnx":
        onnxruntime = pytest.importorskip("onnxruntime")
        session = onnxruntime.InferenceSession(path.read_bytes())
        assert session.get_inputs()[0].shape == ["N", 3, 32, 32]
    with pytest.raises(
        UserError, match=r"is a model for other data: its network takes no images \[N, 1, 28, 28\] of mnist-s"
    ):
        export(tmp_path / f"other.{suffix}", trained, {"source": "sample"}, trust=["own_data"])
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("verb", ["predict", "serve"])
def test_what_has_no_meaning_for_other_images_says_so(verb: str, trained: Path, tmp_path: Path) -> None:
    Image.new("L", (28, 28)).save(tmp_path / "picture.png")
    calls: dict[str, Callable[..., object]] = {
        "predict": partial(predict, str(tmp_path / "picture.png"), output=tmp_path / "p.csv"),
        "serve": partial(serve, port=0),
    }
    with pytest.raises(
        UserError, match=r"is a model for data of another kind \(its network takes no images \[N, 1, 28"
    ):
        calls[verb](ckpt=trained, trust=["own_data"])
    assert [path.name for path in tmp_path.iterdir()] == ["picture.png"]


@pytest.mark.slow
def test_two_processes_find_what_one_finds(trained: Path, tmp_path: Path) -> None:
    """Lightning's sampler deals out the images of an own module; the report has them in their order."""
    (tmp_path / "run.py").write_text(f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
from mnist_lit.cli.config import settings
from mnist_lit.evaluate import evaluate
import own_data
asked = ["ckpt={trained}", "trust=[own_data]", *own_data.ASKED[::2], "trainer.devices=2", "trainer.strategy=ddp"]
evaluate({str(tmp_path / "two")!r}, **settings("evaluate", *asked))
""")
    subprocess.run([sys.executable, "-W", "ignore", str(tmp_path / "run.py")], cwd=tmp_path, check=True, timeout=300)
    two, one = results(tmp_path / "two"), results(trained)
    assert {key: two[key] for key in one if key.startswith("test/") and key != "test/loss"} == {
        key: one[key] for key in one if key.startswith("test/") and key != "test/loss"
    }


class Untested(own_data.Patches):
    test_dataloader = L.LightningDataModule.test_dataloader


class TestedTwice(own_data.Patches):
    def test_dataloader(self) -> Any:
        return [self._loader(), self._loader()]


class Passing(MNISTDataModule):
    def __init__(self, more: int = 0, **options: Any) -> None:
        super().__init__(**options)


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        (f"data._target_={__name__}.Untested", "data: Untested has no test_dataloader, and every run ends with a test"),
        ("trainer.limit_test_batches=0", "trainer.limit_test_batches=0: every run ends with a test"),
        (
            f"data._target_={__name__}.TestedTwice",
            "data: several loaders for test; only one loader for each part is supported",
        ),
    ],
)
def test_without_a_test_there_is_a_sentence(override: str, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=sentence):
        train(tmp_path, **asked("trainer.max_epochs=1", override))


def test_a_class_that_passes_its_arguments_on_gets_the_seed() -> None:
    section = {"_target_": f"{__name__}.Passing", "source": "sample"}
    assert instantiate("data", section, MNISTDataModule, seed=7).seed == 7
    assert "seed" not in vars(instantiate("data", {"_target_": "own_data.Patches"}, L.LightningDataModule, seed=7))
