"""Collect a model's predictions for the test images and compute scores from them."""

from typing import Any

import lightning as L
import torch
from torch import Tensor
from torchmetrics.functional import classification as metrics


class PredictionCollector(L.Callback):
    """Collects the predictions of a test from all processes.

    Attributes:
        images: uint8 [N, 28, 28], the tested images.
        labels: int64 [N], their digits.
        probabilities: float32 [N, 10], predicted by the model.
    """

    images: Tensor
    labels: Tensor
    probabilities: Tensor

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._data: Any = trainer.datamodule  # type: ignore[attr-defined]
        # The last column marks the rows with a prediction, since a test may be limited to some batches.
        self._rows = torch.zeros(len(self._data.test_labels), 11, device=pl_module.device)

    def on_test_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        size = self._data.batch_size
        rows = self._rows[batch_idx * size : (batch_idx + 1) * size][trainer.global_rank :: trainer.world_size]
        rows[:, :10] = outputs
        rows[:, 10] = 1

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        rows: Any = trainer.strategy.reduce(self._rows, reduce_op="sum")
        tested = rows[:, 10].cpu() > 0
        self.probabilities = rows[:, :10].cpu()[tested]
        self.images, self.labels = self._data.test_images[tested], self._data.test_labels[tested]


def scores(probabilities: Tensor, labels: Tensor) -> dict[str, Any]:
    """Scores of the predicted probabilities [N, 10] for the true digits ``labels`` [N], besides loss and accuracy.

    Returns:
        The entries of ``metrics.json``: ``test/images``, the number of images; ``test/calibration_error``, the expected
        calibration error with 15 equal bins; ``test/digits``, the number of images, precision, recall and F1 of each
        digit; and ``test/confusion_matrix``, with true digits as rows and predicted digits as columns.
    """
    precision, recall, f1 = (
        metric(probabilities, labels, num_classes=10, average="none").tolist()
        for metric in (metrics.multiclass_precision, metrics.multiclass_recall, metrics.multiclass_f1_score)
    )
    counts = labels.bincount(minlength=10).tolist()
    return {
        "test/images": len(labels),
        "test/calibration_error": float(metrics.multiclass_calibration_error(probabilities, labels, num_classes=10)),
        "test/digits": [
            {"digit": n, "images": counts[n], "precision": precision[n], "recall": recall[n], "f1": f1[n]}
            for n in range(10)
        ],
        "test/confusion_matrix": metrics.multiclass_confusion_matrix(probabilities, labels, num_classes=10).tolist(),
    }
