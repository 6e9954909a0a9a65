"""A device that is not the CPU: every PyTorch has one, "lazy", which records operations and runs them later."""

import math
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import lightning as L
import pytest
import torch
from helpers import assert_same, final, results, small
from lightning.pytorch.accelerators import Accelerator, AcceleratorRegistry
from lightning.pytorch.strategies import SingleDeviceStrategy, StrategyRegistry
from torchvision.transforms import ToTensor

from mnist_lit import Interrupted, UserError
from mnist_lit.cli.config import settings
from mnist_lit.data import scale
from mnist_lit.evaluate import evaluate
from mnist_lit.model import MNISTClassifier
from mnist_lit.storage import runs
from mnist_lit.train import train


class LazyAccelerator(Accelerator):
    """``torch.device("lazy")`` for Lightning."""

    def setup_device(self, device: torch.device) -> None:
        pass

    def teardown(self) -> None:
        pass

    @staticmethod
    def parse_devices(devices: Any) -> Any:
        return devices

    @staticmethod
    def get_parallel_devices(devices: Any) -> list[torch.device]:
        return [torch.device("lazy", 0)]

    @staticmethod
    def auto_device_count() -> int:
        return 1

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def name() -> str:
        return "lazy"


class LazyStrategy(SingleDeviceStrategy):
    def __init__(self, **options: Any) -> None:
        super().__init__(torch.device("lazy", 0), **options)

    def optimizer_step(self, *arguments: Any, **options: Any) -> Any:
        return _computed(super().optimizer_step(*arguments, **options))

    def validation_step(self, *arguments: Any) -> Any:
        return _computed(super().validation_step(*arguments))

    def test_step(self, *arguments: Any) -> Any:
        return _computed(super().test_step(*arguments))


def _computed(result: Any) -> Any:
    torch._lazy.mark_step()  # else the recorded operations would grow into one program
    return result


DEVICES = [
    "lazy",
    pytest.param(
        "gpu", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.accelerator.is_available(), reason="no GPU")]
    ),
]


@cache
def _begin() -> None:
    """To be called once in a process, and the fixture may be set up several times."""
    import torch._lazy.ts_backend

    torch._lazy.ts_backend.init()


@pytest.fixture(scope="module", params=DEVICES)
def device(request: pytest.FixtureRequest) -> Iterator[dict[str, Any]]:
    """What of ``trainer`` is to be otherwise."""
    if request.param == "gpu":
        # Without the last, two runs on a GPU differ in their last bits.
        yield {"accelerator": "gpu", "strategy": "auto", "deterministic": True}
        return
    _begin()
    AcceleratorRegistry.register("lazy", LazyAccelerator)
    StrategyRegistry.register("lazy", LazyStrategy)
    # It lacks a view that inference mode wants of linear layers.
    yield {"accelerator": "lazy", "strategy": "lazy", "inference_mode": False}
    AcceleratorRegistry.remove("lazy")
    StrategyRegistry.remove("lazy")


def on(device: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    return {**values, "trainer": {**values["trainer"], **device}}


@pytest.fixture(scope="module")
def trained(device: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("device") / "run"
    train(folder, **on(device, small("data.val_size=200")))
    return folder


def weights_of(folder: Path) -> torch.Tensor:
    """Of the first convolution, whose order in memory the others follow; channels-last only where that is good."""
    return torch.load(folder / runs.LAST, weights_only=True)["state_dict"]["network.conv1.weight"]


def test_a_run_ends_as_on_the_cpu(trained: Path, device: dict[str, Any], tmp_path: Path) -> None:
    """Without dropout, whose draws are the device's own."""
    one, other = (
        train(tmp_path / name, **values)
        for name, values in (
            ("device", on(device, small("model.dropout=0", "data.val_size=200"))),
            ("cpu", small("model.dropout=0", "data.val_size=200", "model.cpu_kernel=false")),
        )
    )
    assert one["device"] != other["device"] == results(tmp_path / "cpu")["device"]
    for key in ("train/loss", "val/loss", "test/loss"):
        assert one[key] == pytest.approx(other[key], rel=1e-3), key
    contiguous = {name: weights_of(tmp_path / name).stride() == (9, 9, 3, 1) for name in ("device", "cpu")}
    assert contiguous == {"device": device["accelerator"] == "lazy" or not torch.cuda.is_available(), "cpu": False}
    assert {path.name for path in trained.iterdir()} >= {"metrics.csv", "report.html", "metrics.json", "checkpoints"}


def test_dropout_drops_as_many_and_the_same_ones_again(device: dict[str, Any]) -> None:
    where = torch.device("lazy", 0) if device["accelerator"] == "lazy" else torch.accelerator.current_accelerator()
    network: Any = MNISTClassifier().network.to(where)
    network.to(memory_format=torch.contiguous_format)
    seen = []
    network.dense1.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach().cpu()))
    with torch.no_grad():
        for _ in range(2):
            torch.manual_seed(1)
            network.train()(torch.rand(50, 1, 28, 28).to(where))
        network.eval()(torch.rand(50, 1, 28, 28).to(where))
    assert_same(seen[0], seen[1])
    positive = (seen[2] > 0).float().mean()
    assert (seen[0] > 0).float().mean() == pytest.approx(float(positive) / 2, rel=0.05)


def test_a_run_that_is_stopped_goes_on_with_the_same_bits(
    trained: Path, device: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os
    import signal

    step, count = MNISTClassifier.training_step, 0

    def training_step(model: Any, batch: Any, batch_idx: int) -> Any:
        nonlocal count
        count += 1
        if count == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(model, batch, batch_idx)

    monkeypatch.setattr(MNISTClassifier, "training_step", training_step)
    asked = on(device, small("data.val_size=200"))
    with pytest.raises(Interrupted):
        train(tmp_path / "run", **asked)
    train(tmp_path / "run", **{**asked, "resume": str(tmp_path / "run" / runs.LAST)})
    assert_same(final(tmp_path / "run"), final(trained))


def test_what_was_trained_there_is_evaluated_there_and_on_the_cpu(
    trained: Path, device: dict[str, Any], tmp_path: Path
) -> None:
    asked = settings("evaluate", f"ckpt={trained}", "data.source=sample", "trainer.accelerator=cpu")
    here, there = evaluate(tmp_path / "cpu", **asked), evaluate(tmp_path / "device", **on(device, asked))
    assert there["test/loss"] == pytest.approx(here["test/loss"], rel=1e-3)
    assert there["test/images"] == here["test/images"] == 1000


def test_its_checkpoint_goes_on_on_the_cpu(trained: Path, device: dict[str, Any], tmp_path: Path) -> None:
    import shutil

    folder = shutil.copytree(trained, tmp_path / "run")
    (folder / "metrics.json").unlink()
    asked = small("data.val_size=200", "trainer.max_epochs=3")
    more = train(folder, **{**asked, "resume": str(folder / runs.LAST)})
    assert more["epochs"] == 3 and more["device"].startswith("cpu")


def test_a_classifier_predicts_there(trained: Path, device: dict[str, Any], sample: Any) -> None:
    classifier = MNISTClassifier.load_from_checkpoint(trained / runs.LAST)
    trainer = L.Trainer(**device, logger=False, enable_checkpointing=False, limit_predict_batches=1)
    found: Any = trainer.predict(classifier, sample)
    expected = classifier.cpu().eval()(next(iter(sample.predict_dataloader()))[0])
    torch.testing.assert_close(found[0].cpu(), expected, rtol=1e-3, atol=1e-5)


def test_a_tensor_that_is_left_on_the_cpu_is_noticed(
    device: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control: what a mistake of this kind in the package would do to the tests above."""
    step = MNISTClassifier._step

    def forgetful(self: Any, stage: str, batch: Any) -> Any:
        return step(self, stage, (batch[0].cpu(), batch[1]))

    monkeypatch.setattr(MNISTClassifier, "_step", forgetful)
    with pytest.raises(RuntimeError):
        train(tmp_path, **on(device, small()))


on_cuda = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=on_cuda), "cpu"])
def test_pixels_are_scaled_to_the_same_bits(device: str) -> None:
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 16, 16)
    assert_same(scale(pixels.to(device)).cpu(), ToTensor()(pixels[0].numpy()).unsqueeze(0))


def test_the_images_are_where_the_trainer_is_while_it_runs(device: dict[str, Any], tmp_path: Path) -> None:
    values = on(device, small())
    values["trainer"]["callbacks"] = [{"_target_": f"{__name__}.WhereTheImagesAre"}]
    train(tmp_path, **values)
    expected = (
        "lazy" if device["accelerator"] == "lazy" else str(torch.accelerator.current_accelerator()).partition(":")[0]
    )
    assert WhereTheImagesAre.found == [expected, expected]


class WhereTheImagesAre(L.Callback):
    """Where the images are, and the indices that select a batch of them."""

    found: ClassVar[list[str]] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        loader = trainer.train_dataloader
        self.found[:] = [loader.dataset.images.device.type, next(iter(loader.sampler)).device.type]


def change_the_fifth_loss(monkeypatch: pytest.MonkeyPatch, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    step = MNISTClassifier.training_step

    def training_step(model: Any, batch: Any, batch_idx: int) -> Any:
        loss = step(model, batch, batch_idx)
        return change(loss) if model.global_step == 4 else loss

    monkeypatch.setattr(MNISTClassifier, "training_step", training_step)


def test_the_first_loss_that_is_not_finite_is_named_though_they_are_looked_at_later(
    device: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change_the_fifth_loss(monkeypatch, lambda loss: loss / torch.zeros_like(loss))
    halved = ["optimizer=sgd", "optimizer.lr=0.8", "scheduler=step", "scheduler.step_size=1", "scheduler.gamma=0.5"]
    asked = [*halved, "scheduler.interval=step", "data.batch_size=100", "trainer.limit_train_batches=8"]
    with pytest.raises(UserError, match=r"the loss is not finite at step 5 .*, at a learning rate of 0\.05:"):
        train(tmp_path / "run", **on(device, small(*asked)))
    assert not (tmp_path / "run" / runs.LAST).exists()


def test_no_checkpoint_is_written_after_a_loss_that_is_not_finite_though_the_weights_are(
    device: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In 16-mixed, such a step is left out."""
    change_the_fifth_loss(monkeypatch, lambda loss: loss + torch.full_like(loss, math.inf))
    asked = ["data.batch_size=100", "trainer.limit_train_batches=8", "checkpoint.every_n_steps=3"]
    with pytest.raises(UserError, match="the loss is not finite at step 5 "):
        train(tmp_path / "run", **on(device, small(*asked)))
    assert torch.load(tmp_path / "run" / runs.LAST, weights_only=True)["global_step"] == 3
