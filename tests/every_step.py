"""In each of two processes: a run that nothing stops, and one stopped at each step that goes on; the same bits?

A signal to the second process alone stops both.
"""

import os
import signal
from pathlib import Path
from typing import Any

import torch
from helpers import assert_same, final, small

from mnist_lit import Interrupted
from mnist_lit.model import MNISTClassifier
from mnist_lit.storage import runs
from mnist_lit.train import train

STEPS_OF_AN_EPOCH = 8
SETTINGS = small(
    "data.batch_size=60",
    f"trainer.limit_train_batches={STEPS_OF_AN_EPOCH}",
    "trainer.devices=2",
    "trainer.max_epochs=1",
)


def main() -> None:
    first = os.environ["RANK"] == "0"
    step, stop_at, taken = MNISTClassifier.training_step, 0, 0

    def training_step(model: Any, batch: Any, batch_idx: int) -> Any:
        nonlocal taken
        taken += 1
        if taken == stop_at and not first:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(model, batch, batch_idx)

    MNISTClassifier.training_step = training_step  # type: ignore[method-assign, assignment]
    train("whole", **SETTINGS)
    for stop_at in range(1, STEPS_OF_AN_EPOCH + 1):
        folder, taken = Path(f"stopped at {stop_at}"), 0
        try:
            train(folder, **SETTINGS)
        except Interrupted:
            assert taken == stop_at
        else:
            raise AssertionError(f"it was not stopped at step {stop_at}")
        torch.distributed.barrier()  # until the first process has renamed the checkpoint
        train(folder, **{**SETTINGS, "resume": str(folder / runs.LAST)})
        if first:
            assert_same(final(folder), final(Path("whole")))
            print(f"stopped at step {stop_at}: the same bits", flush=True)


if __name__ == "__main__":
    main()
