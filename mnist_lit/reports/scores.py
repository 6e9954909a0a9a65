"""What the network answered to each test image, and the figures that say how good the answers are."""

from typing import Any

import lightning as L
import torch
from torch import Tensor
from torchmetrics.functional.classification import (
    multiclass_calibration_error,
    multiclass_confusion_matrix,
    multiclass_f1_score,
    multiclass_precision,
    multiclass_recall,
)


class PredictionCollector(L.Callback):
    """Keeps the answers of a test, whichever process gave them.

    Attributes:
        images: uint8 [N, 28, 28], the images that were tested.
        labels: int64 [N], what they are.
        probabilities: float32 [N, 10], what the network says that they are.
    """

    images: Tensor
    labels: Tensor
    probabilities: Tensor

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        self._data = data
        # The last column says which rows have an answer: a test may be limited to some batches.
        self._rows = torch.zeros(len(data.test_labels), 11, device=pl_module.device)

    def on_test_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        size, order = self._data.batch_size, torch.arange(len(self._rows), device=self._rows.device)
        places = order[batch_idx * size : (batch_idx + 1) * size][trainer.global_rank :: trainer.world_size]
        self._rows[places, :10] = outputs.to(self._rows.dtype)
        self._rows[places, 10] = 1

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        rows: Any = trainer.strategy.reduce(self._rows, reduce_op="sum")
        answered = rows[:, 10].cpu() > 0
        self.probabilities = rows[:, :10].cpu()[answered]
        self.images, self.labels = self._data.test_images[answered], self._data.test_labels[answered]


def scores(probabilities: Tensor, labels: Tensor) -> dict[str, Any]:
    """How good the answers [N, 10] to images of the digits ``labels`` [N] are, besides loss and accuracy.

    Returns:
        What ``metrics.json`` says of a test: ``test/images``, how many; ``test/calibration_error``, by how much the
        probability of the answers differs from the share that is right, on average over 15 equal ranges of it;
        ``test/digits``, each digit's number of images, precision, recall and F1; and ``test/confusion_matrix``, whose
        row is the digit that an image shows and whose column the answer.
    """
    precision, recall, f1 = (
        metric(probabilities, labels, num_classes=10, average="none").tolist()
        for metric in (multiclass_precision, multiclass_recall, multiclass_f1_score)
    )
    counts = labels.bincount(minlength=10).tolist()
    return {
        "test/images": len(labels),
        "test/calibration_error": float(multiclass_calibration_error(probabilities, labels, num_classes=10)),
        "test/digits": [
            {"digit": n, "images": counts[n], "precision": precision[n], "recall": recall[n], "f1": f1[n]}
            for n in range(10)
        ],
        "test/confusion_matrix": multiclass_confusion_matrix(probabilities, labels, num_classes=10).tolist(),
    }
