"""Graphs of the network's passes: on a GPU against the network itself; elsewhere what is decided around the capture."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from helpers import assert_same, final, small
from test_devices import on_cuda
from test_groups import KillAt, Killed, killed_and_resumed
from torch import Tensor, nn

from mnist_lit import UserError
from mnist_lit.cli.resume import find
from mnist_lit.data import MNISTDataModule
from mnist_lit.model import MNISTClassifier
from mnist_lit.train import train
from mnist_lit.training import callbacks
from mnist_lit.training.callbacks import CUDAGraphs

either_precision = pytest.mark.parametrize(
    "precision", [pytest.param(each, marks=on_cuda) for each in ("32-true", "bf16-mixed")]
)


@either_precision
def test_graphs_train_as_the_network_itself_and_resume_exactly(precision: str, tmp_path: Path) -> None:
    """Batches of 300 of 3,800 images: the last one has 200, and is not captured."""
    asked = ["trainer.accelerator=gpu", f"trainer.precision={precision}", "trainer.limit_train_batches=null"]
    asked += ["data.batch_size=300", "data.val_size=200", "trainer.deterministic=true"]
    eager = train(tmp_path / "eager", **small(*asked))
    whole = train(tmp_path / "whole", **small(*asked, "callbacks=cuda_graphs"))
    for key in ("train/loss", "val/loss", "test/loss"):
        assert whole[key] == pytest.approx(eager[key], rel=1e-3), key
    resumed = killed_and_resumed(tmp_path / "run", 18, *asked, "callbacks=cuda_graphs", "checkpoint.every_n_steps=5")
    assert_same(resumed, final(tmp_path / "whole"))


@either_precision
@pytest.mark.parametrize("overrides", [["trainer.gradient_clip_val=0.1"], ["scheduler=cosine", "optimizer=adam"]])
def test_graphs_and_what_reads_gradients(precision: str, overrides: list[str], tmp_path: Path) -> None:
    asked = ["trainer.accelerator=gpu", f"trainer.precision={precision}", *overrides]
    eager, graphs = (
        train(tmp_path / name, **small(*asked, *more)) for name, more in (("a", []), ("b", ["callbacks=cuda_graphs"]))
    )
    assert graphs["train/loss"] == pytest.approx(eager["train/loss"], rel=1e-2)


class Normalized(nn.Sequential):
    """A network with buffers."""

    def __init__(self) -> None:
        super().__init__(nn.Flatten(), nn.BatchNorm1d(784), nn.Dropout(0.5), nn.Linear(784, 10))


class Recorded:
    """Stands in for the capture on a device that has none: its passes and its new ``forward``, which notes the batches."""

    def __init__(self) -> None:
        self.captured: list[int] = []
        self.replayed: list[int] = []

    def __call__(self, network: nn.Module, images: Tensor) -> None:
        eager, size = network.forward, len(images)
        with torch.random.fork_rng([]):
            for _ in range(3):
                eager(images)

        def replay(x: Tensor) -> Any:
            assert len(x) == size, "a graph has one size"
            self.replayed.append(size)
            return eager(x)

        self.captured.append(size)
        network.forward = replay


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Recorded:
    recorded = Recorded()
    monkeypatch.setattr(callbacks, "capture", recorded)
    monkeypatch.setattr(callbacks, "_what_graphs_lack", lambda *_: None)
    return recorded


NETWORK = [f"model._target_={__name__}.Normalized", "~model.dropout", "~model.cpu_kernel"]
NORMALIZED = [*NETWORK, "data.val_size=200", "data.batch_size=300"]
NORMALIZED += ["trainer.limit_train_batches=null"]  # 3,800 images: twelve batches and one of 200


def test_batches_of_the_first_ones_size_are_replayed_and_buffers_keep_their_values(
    graphs: Recorded, tmp_path: Path
) -> None:
    train(tmp_path / "eager", **small(*NORMALIZED))
    train(tmp_path / "graphs", **small(*NORMALIZED, "callbacks=cuda_graphs"))
    assert graphs.captured == [300] and graphs.replayed == [300] * 24
    eager, replayed = (final(tmp_path / name) for name in ("eager", "graphs"))
    assert_same(replayed, eager)


def test_a_process_that_begins_with_the_smaller_last_batch_captures_again(graphs: Recorded, tmp_path: Path) -> None:
    killed_and_resumed(tmp_path, 13, *NORMALIZED, "callbacks=cuda_graphs", "checkpoint.every_n_steps=4")
    assert graphs.captured == [300, 200, 300]


def test_a_fit_that_fails_leaves_the_network_as_it_was(graphs: Recorded, tmp_path: Path) -> None:
    classifier, data = MNISTClassifier(), MNISTDataModule(source="sample", batch_size=100)
    trainer = L.Trainer(default_root_dir=tmp_path, accelerator="cpu", logger=False, callbacks=[CUDAGraphs(), KillAt(2)])
    with pytest.raises(Killed):
        trainer.fit(classifier, data)
    assert graphs.replayed == [100, 100] and "forward" not in vars(classifier.network)


LACKS = [
    ([], r"needs trainer\.accelerator=gpu and a CUDA device, not cpu"),
    (["trainer.accumulate_grad_batches=2"], r"needs trainer\.accumulate_grad_batches=1, not 2"),
    (["trainer.detect_anomaly=true"], r"needs trainer\.detect_anomaly=false"),
    (["callbacks=[cuda_graphs,swa]", *NETWORK], "needs a network without BatchNorm"),
]


@pytest.mark.parametrize(("overrides", "message"), LACKS)
def test_where_graphs_cannot_be_used_it_says_so(overrides: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        train(tmp_path, **small("callbacks=cuda_graphs", *overrides))


def test_accumulation_that_begins_later_is_noticed(graphs: Recorded, tmp_path: Path) -> None:
    later = "{_target_: lightning.pytorch.callbacks.GradientAccumulationScheduler, scheduling: {1: 2}}"
    with pytest.raises(UserError, match=r"needs trainer\.accumulate_grad_batches=1, not 2"):
        train(tmp_path, **small("callbacks=cuda_graphs", f"+trainer.callbacks=[{later}]"))
    assert graphs.replayed


def test_a_run_with_graphs_goes_on_without_them_on_a_cpu(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train(tmp_path / "eager", **small())
    killer = {"_target_": "test_groups.KillAt", "step": 4}
    values = small("callbacks=cuda_graphs", "checkpoint.every_n_steps=1")
    with pytest.MonkeyPatch.context() as patched, pytest.raises(Killed):
        patched.setattr(callbacks, "capture", Recorded())
        patched.setattr(callbacks, "_what_graphs_lack", lambda *_: None)
        train(tmp_path / "run", **{**values, "trainer": {**values["trainer"], "callbacks": [killer]}})
    train(tmp_path / "run", **{**values, "resume": str(find(str(tmp_path / "run")).start)})
    assert "resumed without CUDA graphs, which need trainer.accelerator=gpu and a CUDA device, not cpu" in caplog.text
    assert_same(final(tmp_path / "run"), final(tmp_path / "eager"))
