"""The progress bar: where a resumed run stands, and that validation does not count as training."""

import csv
import sys
import time
from pathlib import Path
from typing import Any, ClassVar

import lightning as L
import pytest
from helpers import small
from test_groups import killed_and_resumed

from mnist_lit.train import train


@pytest.fixture(autouse=True)
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setattr(Watch, "seen", [])
    monkeypatch.setattr(Seconds, "elapsed", 0.0)


class Watch(L.Callback):
    """Notes the bar at each step."""

    seen: ClassVar[list[Any]] = []

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        bar = trainer.progress_bar_callback.train_progress_bar
        self.seen.append((bar.desc, bar.initial, bar.total))


class SlowValidation(L.Callback):
    def on_validation_batch_end(self, *_: Any) -> None:
        time.sleep(2.0)


def test_a_run_that_is_resumed_within_an_epoch_counts_from_there(tmp_path: Path) -> None:
    asked = ["+callbacks.watch._target_=test_progress.Watch", "checkpoint.every_n_steps=1"]
    killed_and_resumed(tmp_path, 5, *asked)  # of six; the second epoch has the steps 4 to 6
    assert Watch.seen == [
        *[("epoch 1/2: ", 0, 3)] * 3,
        *[("epoch 2/2: ", 0, 3)] * 2,
        *[("epoch 2/2: ", 1, 3)] * 2,  # the step in which it was killed, again, and the last one
    ]
    with (tmp_path / "metrics.csv").open() as file:
        for row in csv.DictReader(file):
            assert float(row["images_per_second"]) * float(row["epoch_seconds"]) == pytest.approx(300)


def test_images_per_second_are_those_of_training(tmp_path: Path) -> None:
    asked = [f"+callbacks.{name.lower()}._target_=test_progress.{name}" for name in ("SlowValidation", "Seconds")]
    train(tmp_path, **small(*asked, "data.val_size=100", "trainer.val_check_interval=2", "trainer.max_epochs=1"))
    assert 0 < Seconds.elapsed < 2.0


class Seconds(L.Callback):
    """What the bar shows as the time of the epoch."""

    elapsed = 0.0

    def on_train_epoch_end(self, trainer: Any, *_: Any) -> None:
        Seconds.elapsed = trainer.progress_bar_callback.train_progress_bar.format_dict["elapsed"]
