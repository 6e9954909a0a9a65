"""Exported models in the runtimes they are meant for; the numbers are the rows of docs/faults.md."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import Command
from helpers import assert_same
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from mnist_lit import UserError, __version__
from mnist_lit.export import export
from mnist_lit.inference.trained import load
from mnist_lit.network import TutorialCNN
from mnist_lit.storage import runs

SAMPLE = {"source": "sample"}


@pytest.fixture(scope="module")
def exported(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the model in all three formats."""
    folder = tmp_path_factory.mktemp("exported")
    for ending in ("onnx", "pt2", "safetensors"):
        facts = export(folder / f"model.{ending}", finished_run, SAMPLE)
    (folder / "facts.json").write_text(json.dumps(facts))
    return folder


@pytest.fixture(scope="module")
def expected(finished_run: Path, sample: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Images and the original model's probabilities for them."""
    images = sample.test_images.unsqueeze(1) / 255
    with torch.inference_mode():
        return images, load(finished_run)(images)


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_onnx_gives_the_same_predictions_for_any_batch_size(exported: Path, expected, size: int) -> None:
    session = onnxruntime.InferenceSession(exported / "model.onnx")
    (image,), (probabilities,) = session.get_inputs(), session.get_outputs()
    assert (image.name, image.type, image.shape[1:]) == ("image", "tensor(float)", [1, 28, 28])
    assert (probabilities.name, probabilities.shape[1:]) == ("probabilities", [10])
    assert image.shape[0] == probabilities.shape[0] == "N"
    (found,) = session.run(None, {"image": expected[0][:size].numpy()})
    np.testing.assert_allclose(found, expected[1][:size], atol=1e-5, rtol=0)
    assert (found.argmax(1) == expected[1][:size].argmax(1).numpy()).all()


def test_onnx_has_only_standard_operators_and_has_metadata(exported: Path, finished_run: Path) -> None:
    model = onnx.load(exported / "model.onnx")
    onnx.checker.check_model(model, full_check=True)
    assert [each.domain for each in model.opset_import] == [""]
    assert {node.domain for node in model.graph.node} == {""} and not model.functions
    facts = {each.key: each.value for each in model.metadata_props}
    assert facts == json.loads((exported / "facts.json").read_text())
    assert facts["version"] == f"mnist_lit {__version__}" and facts["tested_on"] == "mnist-sample"
    assert json.loads(facts["trained_on"])[0]["name"] == "mnist-sample"
    content = (exported / "model.onnx").read_bytes()
    assert str(Path(__file__).parents[1]).encode() not in content  # no local path
    with torch.inference_mode():
        assert float(facts["test_accuracy"]) == pytest.approx(accuracy(load(finished_run)), abs=5e-5)


def accuracy(model: nn.Module) -> float:
    from mnist_lit.data import MNISTDataModule

    data = MNISTDataModule(source="sample")
    data.setup()
    return float((model(data.test_images.unsqueeze(1) / 255).argmax(1) == data.test_labels).float().mean())


def test_pt2_runs_without_this_package(exported: Path, expected, tmp_path: Path) -> None:
    np.save(tmp_path / "images.npy", expected[0][:5].numpy())
    code = """
import sys, json, numpy, torch
facts = {"mnist_lit.json": ""}
model = torch.export.load("%s", extra_files=facts).module()
numpy.save("found.npy", model(torch.from_numpy(numpy.load("images.npy"))).detach().numpy())
print(json.loads(facts["mnist_lit.json"])["tested_on"], "mnist_lit" in sys.modules)
"""
    found = subprocess.check_output(
        [sys.executable, "-P", "-c", code % (exported / "model.pt2")], cwd=tmp_path, text=True, env={}
    )
    assert found == "mnist-sample False\n"
    np.testing.assert_allclose(np.load(tmp_path / "found.npy"), expected[1][:5], atol=1e-5, rtol=0)
    assert str(Path(__file__).parents[1]).encode() not in (exported / "model.pt2").read_bytes()


def test_safetensors_has_the_networks_weights(exported: Path, expected) -> None:
    with safe_open(exported / "model.safetensors", "pt") as file:
        assert file.metadata() == json.loads((exported / "facts.json").read_text())
    network = TutorialCNN().eval()
    network.load_state_dict(load_file(exported / "model.safetensors"))
    with torch.inference_mode():
        assert_same(network(expected[0]).softmax(1), expected[1])


class TwoFaced(nn.Module):
    """Predicts something else once it is exported."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(784, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits = self.linear(images.flatten(1))
        return logits + 0.01 * logits[:, :1].abs() * torch.arange(10) if torch.compiler.is_exporting() else logits


class Unexportable(TwoFaced):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.linear(images.flatten(1)) * (1 if images.sum().item() > 5 else 2)


class Tied(nn.Module):
    """Two layers share their weights."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(784, 784), nn.Linear(784, 784), nn.Linear(784, 10)
        self.second.weight = self.first.weight

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.last(self.second(self.first(images.flatten(1)).relu()).relu())


def checkpoint_of(network: type[nn.Module], path: Path, data: str = "mnist-sample") -> Path:
    weights = {f"network.{key}": value for key, value in network().state_dict().items()}
    parameters = {"model": {"_target_": f"{network.__module__}.{network.__name__}"}, "optimizer": {}}
    torch.save({"state_dict": weights, "hyper_parameters": parameters, "data": [{"name": data}]}, path)
    return path


def test_weights_that_layers_share_are_written_once(tmp_path: Path) -> None:
    export(str(tmp_path / "tied.safetensors"), checkpoint_of(Tied, tmp_path / "tied.ckpt"), trust=["test_export"])
    with safe_open(tmp_path / "tied.safetensors", "pt") as file:
        assert len(file.keys()) == 5


@pytest.mark.parametrize(
    ("network", "sentence"),
    [(TwoFaced, "the exported model differs from the original"), (Unexportable, "the network cannot be exported")],
)
@pytest.mark.parametrize("ending", ["onnx", "pt2"])
def test_30_a_model_that_differs_from_the_original_leaves_no_file(
    network: type[nn.Module], sentence: str, ending: str, tmp_path: Path
) -> None:
    ckpt = checkpoint_of(network, tmp_path / "model.ckpt")
    with pytest.raises(UserError, match=sentence):
        export(tmp_path / f"model.{ending}", ckpt, SAMPLE, trust=[__name__])
    assert [path.name for path in tmp_path.iterdir()] == ["model.ckpt"]


def test_the_accuracy_of_a_model_of_other_data_is_not_measured_on_the_sample(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = torch.load(finished_run / runs.LAST, weights_only=True)
    torch.save({**content, "data": [{"name": "mnist"}]}, tmp_path / "full.ckpt")
    facts = export(tmp_path / "model.safetensors", tmp_path / "full.ckpt", SAMPLE)
    assert facts["test_accuracy"] == facts["tested_on"] == ""
    assert "test accuracy not measured: this model was" in capsys.readouterr().err


def test_27_export_as_a_command_and_what_it_refuses(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Command
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = [f"ckpt={finished_run}", "data.source=sample"]
    done = command(*arguments, "output=my model.onnx", cwd=tmp_path, verb="export")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("my model.onnx: written; its predictions for 1,000 test images match those of ")
    assert done.stderr == ""
    assert [path.name for path in tmp_path.iterdir()] == ["my model.onnx"]
    for output, sentence in (
        ("my model.onnx", "exists already (overwrite=true replaces it)"),
        ("model.keras", "must end in .onnx, .pt2, .safetensors"),
        ("nowhere/model.onnx", "there is no folder nowhere"),
    ):
        with pytest.raises(UserError) as refused:
            export(output, finished_run, SAMPLE)
        assert sentence in str(refused.value)
